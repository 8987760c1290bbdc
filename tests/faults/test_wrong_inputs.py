"""Wrong inputs, classes that no worker could find, values that are too large: told here, before anything is sent."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from prunus import Process, ProcessSpec
from prunus.errors import (
    InvalidInputError,
    MessageTooLargeError,
    ProcessClassNotFoundError,
    ProfileError,
    UnsavableValueError,
)
from prunus.messaging.communicator import MAX_BODY_BYTES
from prunus.messaging.connecting import connect_to
from prunus.runtime.inputs import MAX_FILE_BYTES
from prunus.runtime.profile import Config, Profile
from prunus.testing.local_daemon import LocalDaemon
from tests.faults.parts import PROJECT, Services, command_line, complaint, run


class Crystal(Process):
    """Ports of several kinds."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("element", valid_type=str)
        spec.input("cell.a", valid_type=float)
        spec.input("cell.angle", valid_type=float, default=90.0, validator=_is_angle)
        spec.input("extra", required=False)

    async def run(self) -> None:
        pass


def _is_angle(value: float) -> str | None:
    return None if 0 < value < 180 else "expected an angle between 0 and 180"


WRONG = {"element": 29, "cell": {"angle": 200.0, "b": 1.0}, "colour": "red"}
NAMED = ("inputs.element", "inputs.cell.a", "inputs.cell.angle", "inputs.cell.b", "inputs.colour")


async def nothing_is_sent(doing: Callable[[LocalDaemon], Awaitable[object]]) -> None:
    """The broker is asked nothing, and there is no process."""
    async with LocalDaemon(workers=0) as daemon:
        before = daemon.broker.exchange.statistics().calls
        await doing(daemon)
        assert daemon.broker.exchange.statistics().calls == before
        assert not await daemon.controller.find()


async def test_every_wrong_port_is_named_with_what_was_expected() -> None:
    """All of them at once, by their dotted names: of a wrong type, missing, refused by a validator, unknown."""

    async def launch(daemon: LocalDaemon) -> None:
        with pytest.raises(InvalidInputError) as caught:
            await daemon.controller.launch(Crystal, WRONG)
        problems = caught.value.problems
        assert sorted(problems) == sorted(NAMED)
        assert "expected str" in problems["inputs.element"]
        assert "nothing was given" in problems["inputs.cell.a"]
        assert "expected an angle" in problems["inputs.cell.angle"]

    await nothing_is_sent(launch)


async def test_the_command_line_names_them_too(tmp_path: Path) -> None:
    """Without a daemon as well: nobody has to be asked for that."""
    profile = Profile.create(tmp_path / "profile", Config(import_from=[str(PROJECT)]))
    words = ("element=29", "cell.angle=200.0", "cell.b=1.0", "colour=red")
    error = await complaint(profile.path, "launch", "tests.faults.test_wrong_inputs:Crystal", *words)
    for port in NAMED:
        assert f"\n  {port}: " in error
    assert "broker" not in error


async def test_a_value_without_a_form_is_named() -> None:
    """The port and the type; a checkpoint could not hold it."""

    async def launch(daemon: LocalDaemon) -> None:
        with pytest.raises(UnsavableValueError, match=r"inputs\.extra.*object"):
            await daemon.controller.launch(Crystal, {"element": "Cu", "cell": {"a": 3.6}, "extra": object()})

    await nothing_is_sent(launch)


async def test_a_value_that_is_too_large_is_refused() -> None:
    """With its size and the limit, and what to do instead."""

    async def launch(daemon: LocalDaemon) -> None:
        inputs = {"element": "Cu", "cell": {"a": 3.6}, "extra": bytes(MAX_BODY_BYTES)}
        with pytest.raises(MessageTooLargeError, match="keep the data in a file"):
            await daemon.controller.launch(Crystal, inputs)

    await nothing_is_sent(launch)


async def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """By the command line, before it is read."""
    profile = Profile.create(tmp_path / "profile")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    words = ("launch", "tests.faults.test_wrong_inputs:Crystal", f"extra=@{tmp_path / 'large.yaml'}")
    ended = await command_line(profile.path, *words)
    assert ended.code == 2
    assert "larger than" in ended.err
    assert "give its path as the input instead" in ended.err


async def test_a_class_in_a_function_is_refused() -> None:
    """No worker could import it; the error says where to put it."""

    class Inside(Process):
        async def run(self) -> None:
            pass

    async def launch(daemon: LocalDaemon) -> None:
        with pytest.raises(ProcessClassNotFoundError, match="move the class to the top level"):
            await daemon.controller.launch(Inside)

    await nothing_is_sent(launch)


SCRIPT = """
import prunus

class Mine(prunus.Process):
    async def run(self):
        pass

with prunus.connect_sync({profile!r}) as controller:
    try:
        controller.launch(Mine)
    except prunus.errors.ProcessClassNotFoundError as error:
        print(error)
    print(len(controller.find()))
"""


async def test_a_class_in_a_script_is_refused(short_folder: Path) -> None:
    """``__main__`` is another module in every program."""
    async with Services(short_folder, workers=0) as services:
        script = short_folder / "script.py"
        script.write_text(SCRIPT.format(profile=str(services.profile.path)))
        ended = await run([sys.executable, str(script)], short_folder)
        assert ended.out.endswith("put the class into a module\n0\n"), ended
        error = await complaint(services.profile.path, "launch", "__main__:Mine")
        assert "put the class into a module" in error


async def test_names_that_are_no_class_are_refused(tmp_path: Path) -> None:
    """What is missing is said: the colon, the module or the class."""
    profile = Profile.create(tmp_path / "profile", Config(import_from=[str(PROJECT)])).path
    here = "tests.faults.test_wrong_inputs"
    for name, words in {
        "Crystal": "package.module:Class",
        "nowhere.at_all:Crystal": "no module 'nowhere'",
        f"{here}:Glass": "no 'Glass'",
    }.items():
        assert words in await complaint(profile, "launch", name)


async def test_a_socket_path_that_is_too_long_is_refused() -> None:
    """With its length, the limit and what to do."""
    with pytest.raises(ProfileError, match=r"has 209 bytes, 106 are possible; use a profile in a folder with a short"):
        await connect_to(f"ipc:///tmp/{'x' * 203}/s"[: 6 + 209])


@pytest.mark.timeout(60)
async def test_a_profile_with_a_long_path_works_all_the_same(short_folder: Path) -> None:
    """Its socket lies elsewhere; nobody has to know."""
    deep = short_folder / ("x" * 100) / ("y" * 100)
    deep.mkdir(parents=True)
    async with Services(deep, workers=1) as services:
        words = ("launch", "tests.runtime.workflows:Add", "a=1", "--wait")
        ended = await command_line(services.profile.path, *words)
        assert (ended.code, ended.out) == (0, "sum: 2\n"), ended
