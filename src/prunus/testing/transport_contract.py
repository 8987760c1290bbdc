"""What every `Transport` must do, as a test class: inherit from it and give it a `transport`, and its `home`.

::

    class TestMine(TransportContract):
        @pytest.fixture
        async def transport(self):
            transport = await connect_mine()
            yield transport
            await transport.close()

        @pytest.fixture
        def home(self) -> Path:
            ...     # where its relative paths begin, as this machine sees it

The home folder must be empty; the commands run on this machine. Needs pytest and pytest-asyncio
(``asyncio_mode = "auto"``).
"""

# ruff: noqa: ASYNC110, ASYNC240 (it looks at files of this machine, and what another process writes sets no event)

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from prunus.errors import CommandFailedError, TransportError, TransportLostError
from prunus.runtime.remote.transport import MAX_OUTPUT_BYTES, Transport

POLL_S = 0.01


async def there(path: Path) -> str:
    """What a file holds as soon as it has a line."""
    while not (path.exists() and path.read_text().endswith("\n")):
        await asyncio.sleep(POLL_S)
    return path.read_text()


async def gone(pid: int) -> None:
    """Wait until there is no such process, or a zombie of it."""
    while is_alive(pid):
        await asyncio.sleep(POLL_S)


def is_alive(pid: int) -> bool:
    """Whether there is such a process that is more than a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class TransportContract:
    """See the module."""

    # --- commands -----------------------------------------------------------------------------------

    async def test_a_command_says_how_it_ended(self, transport: Transport) -> None:
        """Its output, its errors and its exit status come back."""
        done = await transport.run("echo out; echo err >&2; exit 3")
        assert (done.stdout, done.stderr, done.exit_status) == ("out\n", "err\n", 3)
        with pytest.raises(CommandFailedError, match="exit status 3: err"):
            done.check()

    async def test_a_list_is_no_line_for_a_shell(self, transport: Transport) -> None:
        """Its arguments arrive as they are."""
        awkward = ["a b", "$HOME", "'", '"', "*", "", "é", "a\nb", "!"]
        done = await transport.run(["printf", "<%s>", *awkward])
        assert done.check().stdout == "".join(f"<{each}>" for each in awkward)

    async def test_a_command_has_its_folder_and_its_environment(self, transport: Transport, home: Path) -> None:
        """A folder that is not absolute begins at home; values are not read by a shell."""
        (home / "a b").mkdir()
        done = await transport.run("pwd -P; echo $X", cwd="a b", env={"X": "1 $HOME"})
        assert done.stdout == f"{(home / 'a b').resolve()}\n1 $HOME\n"
        assert (await transport.run("pwd -P")).stdout == f"{home.resolve()}\n"

    async def test_a_folder_that_is_not_there_is_an_exit_status(self, transport: Transport) -> None:
        """The command is not run anywhere else instead."""
        done = await transport.run("echo here", cwd="nowhere")
        assert (done.stdout, done.exit_status) == ("", 1)
        assert "nowhere" in done.stderr

    async def test_a_program_that_is_not_there_is_an_exit_status(self, transport: Transport) -> None:
        """127, as shells say it."""
        assert (await transport.run(["no-such-program"])).exit_status == 127

    async def test_a_command_reads_its_input(self, transport: Transport) -> None:
        """All of it, to its end; without any the input is empty."""
        text = "x" * 300_000
        assert (await transport.run("cat", input=text)).stdout == text
        assert (await transport.run("cat")).stdout == ""

    async def test_a_command_may_leave_its_input_alone(self, transport: Transport) -> None:
        """What it does not read is no error."""
        assert (await transport.run("exit 4", input="x" * 300_000)).exit_status == 4

    async def test_a_signal_is_128_and_its_number(self, transport: Transport) -> None:
        """As shells say it."""
        assert (await transport.run("kill -9 $$")).exit_status == 137

    async def test_many_commands_run_side_by_side(self, transport: Transport, home: Path) -> None:
        """They share the transport; each waits for the last one here."""
        waits = "touch {0}; until [ -e 4 ]; do sleep 0.02; done; echo {0}"
        done = await asyncio.gather(*(transport.run(waits.format(number)) for number in range(5)))
        assert [each.stdout for each in done] == [f"{number}\n" for number in range(5)]

    async def test_a_cancelled_command_is_ended(self, transport: Transport, home: Path) -> None:
        """With what it has started; it may clean up before."""
        line = "sleep 1000 & echo $! > child; trap 'echo cleaned > up; exit' TERM; echo $$ > shell; wait"
        running = asyncio.create_task(transport.run(line))
        pids = [int(await there(home / name)) for name in ("shell", "child")]
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await there(home / "up") == "cleaned\n"
        for pid in pids:
            await gone(pid)
        assert (await transport.run("echo still here")).stdout == "still here\n"

    async def test_a_command_that_takes_too_long_is_ended(self, transport: Transport, home: Path) -> None:
        """`TimeoutError` says which."""
        with pytest.raises(TimeoutError, match="sleep 1000"):
            await transport.run("echo $$ > shell; exec sleep 1000", timeout_s=0.5)
        if (home / "shell").exists():
            await gone(int(await there(home / "shell")))

    async def test_what_is_in_a_session_of_its_own_goes_on(self, transport: Transport, home: Path) -> None:
        """A command may leave something behind on purpose."""
        line = "setsid sh -c 'echo $$ > left; exec sleep 1000' > /dev/null 2>&1 < /dev/null &"
        await transport.run(line)
        pid = int(await there(home / "left"))
        assert is_alive(pid)
        await transport.run(["kill", "-9", str(pid)])
        await gone(pid)

    async def test_an_output_without_end_is_refused(self, transport: Transport) -> None:
        """The command is ended: more than `MAX_OUTPUT_BYTES` are to be written to a file."""
        with pytest.raises(TransportError):
            await transport.run(f"head -c {MAX_OUTPUT_BYTES + 1} /dev/zero; sleep 1000")

    # --- files --------------------------------------------------------------------------------------

    async def test_a_file_goes_there_and_back(self, transport: Transport, home: Path, tmp_path: Path) -> None:
        """With its bytes and its permissions, and in place of what was there."""
        data = bytes(range(256)) * 1000
        script = tmp_path / "script"
        script.write_bytes(data)
        script.chmod(0o750)
        (home / "it").write_text("old")
        await transport.put(script, "it")
        assert (home / "it").read_bytes() == data
        assert (home / "it").stat().st_mode & 0o777 == 0o750
        (tmp_path / "back").write_text("old")
        await transport.get("it", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == data
        assert sorted(path.name for path in home.iterdir()) == ["it"]
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["back", "script"]

    async def test_a_folder_goes_there_and_back(self, transport: Transport, home: Path, tmp_path: Path) -> None:
        """With all that is in it, and in place of the one that was there."""
        (tmp_path / "in" / "deep").mkdir(parents=True)
        (tmp_path / "in" / "deep" / "a").write_text("a")
        (tmp_path / "in" / "b").write_text("b")
        (home / "out").mkdir()
        (home / "out" / "old").write_text("old")
        await transport.put(tmp_path / "in", "out")
        assert sorted(str(path.relative_to(home)) for path in home.rglob("*")) == [
            "out",
            "out/b",
            "out/deep",
            "out/deep/a",
        ]
        for _ in range(2):
            await transport.get("out", tmp_path / "back")
            assert (tmp_path / "back" / "deep" / "a").read_text() == "a"
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("in", "back", "."))) == [
            "back",
            "in",
        ]

    async def test_what_is_not_there_can_not_be_copied(self, transport: Transport, home: Path, tmp_path: Path) -> None:
        """An error of ours that names it, and nothing half done is left."""
        with pytest.raises(TransportError, match="nothing"):
            await transport.put(tmp_path / "nothing", "it")
        with pytest.raises(TransportError):
            await transport.get("nothing", tmp_path / "it")
        assert list(home.iterdir()) == []
        assert not (tmp_path / "it").exists()

    async def test_files_are_read_and_written(self, transport: Transport, home: Path) -> None:
        """Text and bytes; an old file is replaced."""
        await transport.write("it", "grün\n")
        await transport.write("it", "rot\n")
        assert await transport.read("it") == b"rot\n"
        await transport.write("bytes", b"\x00\xff")
        assert (home / "bytes").read_bytes() == b"\x00\xff"
        assert sorted(path.name for path in home.iterdir()) == ["bytes", "it"]
        with pytest.raises(TransportError):
            await transport.read("nothing")

    async def test_a_file_is_replaced_and_not_written_over(
        self, transport: Transport, home: Path, tmp_path: Path
    ) -> None:
        """Who reads the old one meanwhile reads all of it."""
        (tmp_path / "new").write_text("new")
        for replace in (transport.write("it", "new"), transport.put(tmp_path / "new", "it")):
            (home / "it").write_text("old")
            with (home / "it").open() as reader:
                await replace
                assert reader.read() == "old"
            assert (home / "it").read_text() == "new"

    async def test_folders_are_made_listed_and_removed(self, transport: Transport, home: Path) -> None:
        """To make what is there, or to remove what is not, changes nothing."""
        for _ in range(2):
            await transport.mkdir("a/b/c")
        await transport.write("a/file", "")
        (home / "a" / "link").symlink_to(home / "elsewhere")
        assert await transport.list("a") == ["b", "file", "link"]
        assert await transport.exists("a/b")
        assert await transport.exists("a/link")
        for _ in range(2):
            await transport.remove("a")
        assert not await transport.exists("a")
        with pytest.raises(TransportError):
            await transport.list("a")

    async def test_a_link_is_removed_and_not_what_it_leads_to(self, transport: Transport, home: Path) -> None:
        """What is elsewhere stays."""
        (home / "kept").mkdir()
        (home / "link").symlink_to(home / "kept")
        await transport.remove("link")
        assert [path.name for path in home.iterdir()] == ["kept"]

    # --- its end ------------------------------------------------------------------------------------

    async def test_a_closed_transport_does_nothing(self, transport: Transport, tmp_path: Path) -> None:
        """It says so, and to close it again changes nothing."""
        assert not transport.is_closed
        for _ in range(2):
            await transport.close()
        assert transport.is_closed
        with pytest.raises(TransportLostError):
            await transport.run("true")
        with pytest.raises(TransportLostError):
            await transport.exists("it")
