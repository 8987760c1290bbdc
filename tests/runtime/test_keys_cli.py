"""``prunus init --listen``, ``prunus key`` and ``--key``: what they say, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import prunus
from prunus.errors import ConnectionLostError, ProfileError
from prunus.messaging.access import Role
from prunus.messaging.keys import ClientKey
from prunus.runtime.cli import cli, keys
from prunus.runtime.cli.keys import FREE_PORTS, ROLES, places_for_clients, with_port
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Config, Profile
from tests.runtime.shell import Shell, said_by
from tests.runtime.terminal import terminal

PLACE = "tcp://10.0.0.1:5010"
Prunus = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prunus:
    """``prunus WORDS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNUS_PROFILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return lambda *words: CliRunner().invoke(cli, words)


def says(result: Result, words: str) -> bool:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return words in result.output


def test_the_roles_of_the_command_are_those_that_there_are() -> None:
    """The choice of ``--role`` is written out only so that ``--help`` need not import them."""
    assert tuple(Role) == ROLES


def test_init_makes_keys_only_for_a_network(run: Prunus) -> None:
    """Without ``--listen`` there are none."""
    run("init")
    assert not Profile.find().keys.exists
    assert run("init", "--profile", "./other", "--listen", PLACE, "--listen", "tcp://[::1]:5010").exit_code == 0
    other = Profile.find("./other")
    assert other.config.listen == [PLACE, "tcp://[::1]:5010"]
    assert other.keys.server().public_key


def test_init_makes_the_keys_that_are_needed_first(run: Prunus, tmp_path: Path) -> None:
    """One for workers on other hosts and one for whoever controls: closed files, and the commands that use them."""
    before = os.umask(0)
    try:
        made = run("init", "--listen", PLACE)
    finally:
        os.umask(before)
    assert made.exit_code == 0
    known = Profile.find().keys.clients()
    assert {name: key.role for name, key in known.items()} == {"worker": Role.WORKER, "controller": Role.CONTROLLER}
    for name, key in known.items():
        file = tmp_path / f"{name}.key"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        client = ClientKey.read(file)
        assert (client.public_key, client.endpoints) == (key.public_key, [PLACE])
        assert f"scp {name}.key HOST:" in made.output
        assert client.secret_key not in made.output
    assert "There: prunus --key worker.key worker " in made.output
    assert "There: prunus --key controller.key list " in made.output


def test_init_says_of_a_key_what_adding_one_says(run: Prunus) -> None:
    """There is one way to make a key."""
    made = run("init", "--listen", PLACE).output
    run("key", "revoke", "worker")
    Path("worker.key").unlink()
    assert run("key", "add", "worker", "--role", "worker").output in made


def test_a_free_port_is_chosen_once(run: Prunus, tmp_path: Path) -> None:
    """The profile and its keys name it, so that a client finds the broker also when it starts again."""
    assert run("init", "--listen", "tcp://127.0.0.1:*", "--listen", "tcp://*:0").exit_code == 0
    [here, everywhere] = Profile.find().config.listen
    for place, host in ((here, "127.0.0.1"), (everywhere, "*")):
        assert place.rpartition(":")[0] == f"tcp://{host}"
        assert int(place.rpartition(":")[2]) in FREE_PORTS
    assert ClientKey.read(tmp_path / "worker.key").endpoints[0] == here


def test_a_port_that_is_taken_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what can be listened at is; where nothing is left, it is said."""
    with socket.socket() as taken, socket.socket() as other:
        taken.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [taken.getsockname()[1], other.getsockname()[1]]
        monkeypatch.setattr(keys, "FREE_PORTS", ports)
        monkeypatch.setattr(keys, "PORT_TRIES", 2)
        with pytest.raises(ProfileError, match=r"no free port .* for tcp://127.0.0.1:\*; say one"):
            with_port("tcp://127.0.0.1:*")
        other.close()
        assert with_port("tcp://127.0.0.1:*") == f"tcp://127.0.0.1:{ports[1]}"


def test_a_bad_place_makes_no_profile(run: Prunus, tmp_path: Path) -> None:
    """It is looked at first; also one that is not of this host, if a port has to be found there."""
    assert says(run("init", "--listen", "10.0.0.1:5010"), "must be tcp://ADDRESS:PORT")
    assert says(run("init", "--listen", "tcp://192.0.2.1:*"), "no free port can be found for tcp://192.0.2.1:*")
    assert list(tmp_path.iterdir()) == []


def test_init_overwrites_no_key(run: Prunus, tmp_path: Path) -> None:
    """A file in the place of one is said before anything is made."""
    (tmp_path / "controller.key").symlink_to("elsewhere")
    assert says(run("init", "--listen", PLACE), "it has controller.key already")
    assert [file.name for file in tmp_path.iterdir()] == ["controller.key"]
    (tmp_path / "controller.key").unlink()
    assert run("init", "--listen", PLACE).exit_code == 0
    assert says(run("init", "--listen", PLACE), "there is a profile already")


def test_add_list_and_revoke(run: Prunus, tmp_path: Path) -> None:
    """The life of a key."""
    run("init")
    Profile.find().path.joinpath("config.yaml").write_text(f"listen: [{PLACE!r}]")
    assert "No key" in run("key", "list").output
    added = run("key", "add", "laptop", "--role", "controller")
    assert added.exit_code == 0
    assert f"prunus --key laptop.key list   (the broker is looked for at {PLACE})" in added.output
    client = ClientKey.read(tmp_path / "laptop.key")
    assert (client.role, client.endpoints) == (Role.CONTROLLER, [PLACE])
    assert client.secret_key not in added.output
    [listed] = json.loads(run("key", "list", "--json").output)
    assert (listed["name"], listed["role"], listed["public_key"]) == ("laptop", "controller", client.public_key)
    assert run("key", "revoke", "laptop").exit_code == 0
    assert json.loads(run("key", "list", "--json").output) == []


def test_what_is_refused(run: Prunus, tmp_path: Path) -> None:
    """Each error says what to do, and nothing was added."""
    run("init")
    add = ("key", "add", "laptop", "--role", "viewer")
    assert says(run(*add), "listens on no network: set `listen`")
    assert says(run(*add, "--at", "nowhere"), "must be tcp://ADDRESS:PORT")
    assert run("key", "add", "laptop", "--role", "king").exit_code == 2
    assert says(run("key", "revoke", "laptop"), "no key 'laptop'")
    assert run(*add, "--at", PLACE).exit_code == 0
    assert says(run(*add, "--at", PLACE, "--out", "other.key"), "already")
    assert says(run("key", "add", "b", "--role", "viewer", "--at", PLACE, "--out", "laptop.key"), "there is a file")
    assert says(run("--key", "nothing.key", "list"), "there is no key file")
    (tmp_path / "laptop.key").chmod(0o644)
    assert says(run("--key", "laptop.key", "list"), "chmod 600")


def test_where_clients_find_the_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A free port is known when the broker runs; for "everywhere" the name of this host is taken."""
    monkeypatch.setattr("socket.getfqdn", lambda: "host.example.org")
    profile = Profile.create(tmp_path / "p", Config(listen=["tcp://*:5010", "tcp://127.0.0.1:*"]))
    with pytest.raises(ProfileError, match="start the daemon first"):
        places_for_clients(profile)
    profile.note_listening({"tcp://127.0.0.1:*": "tcp://127.0.0.1:40001"})
    assert places_for_clients(profile) == ["tcp://host.example.org:5010", "tcp://127.0.0.1:40001"]
    profile.note_listening({"tcp://*:5010": "tcp://0.0.0.0:5010"})
    with pytest.raises(ProfileError, match="start the daemon first"):
        places_for_clients(profile)


def test_a_broker_without_keys_listens_nowhere(short_folder: Path) -> None:
    """A profile that names a place, but has no keys: the broker does not start, and says how to make some."""
    profile = Profile.create(short_folder / "p", Config(listen=["tcp://127.0.0.1:0"]))
    command = [sys.executable, "-m", "prunus.runtime.broker", "--profile", str(profile.path)]
    environment = {"PYTHONPATH": str(Path(prunus.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "without keys a broker listens on no network" in done.stderr
    assert "prunus key add" in done.stderr
    assert str(profile.path / "config.yaml") in done.stderr
    assert not (profile.run_folder / "broker.sock").exists()


def test_without_keys_nothing_is_started_or_stopped(run: Prunus, short_folder: Path) -> None:
    """Whatever would start a broker says at once what is wrong and what to do; nothing runs, and what runs goes on."""
    profile = Profile.create(short_folder / "p", Config(workers=0, listen=["tcp://127.0.0.1:*"]))
    here = ("--profile", str(profile.path))
    for words in (["daemon", "start"], ["daemon", "run"], ["broker", "run"], ["worker", "--until-idle"]):
        refused = run(*words, *here)
        assert says(
            refused, f"{profile.path / 'config.yaml'} the broker listens at tcp://127.0.0.1:*, but there are no keys"
        )
        assert "prunus key add NAME --role" in refused.output
    assert read_holder(profile.lock("daemon")) is read_holder(profile.lock("broker")) is None
    assert list(profile.log_folder.iterdir()) == []  # it was not even tried
    assert says(run("key", "add", "laptop", "--role", "viewer", *here), "its port is not known: start the daemon first")
    try:
        assert run("daemon", "start", *here).exit_code == 0  # now there are keys
        broker = read_holder(profile.lock("broker"))
        profile.keys.path.rename(short_folder / "keys")
        for words in (["daemon", "restart"], ["daemon", "reload", "--broker"]):
            assert says(run(*words, *here), "but there are no keys")
        assert read_holder(profile.lock("broker")) == broker
    finally:
        run("daemon", "stop", *here)


def test_a_place_that_is_changed_while_the_broker_runs_is_said(run: Prunus, short_folder: Path) -> None:
    """By `daemon status`, by the doctor and by `key add`, until the daemon is restarted; also keys that are gone, or
    that can't be read."""
    profile = Profile.create(short_folder / "p", Config(workers=0))
    here, file = ("--profile", str(profile.path)), profile.path / "config.yaml"

    def complaints() -> tuple[str, str]:
        status = run("daemon", "status", "--json", *here)
        findings = json.loads(run("doctor", "--json", *here).output)
        [said] = [each["text"] for each in findings if each["subject"] == "network" and each["level"] == "problem"] or [
            ""
        ]
        error = json.loads(status.output)["network_error"] or ""
        assert status.exit_code == bool(error)
        return error, said

    try:
        assert run("daemon", "start", *here).exit_code == 0
        assert complaints() == ("", "")
        file.write_text(file.read_text().replace("listen: []", "listen: ['tcp://127.0.0.1:*']"))
        for error in complaints():
            assert "there are no keys" in error
        added = run("key", "add", "laptop", "--role", "viewer", "--at", PLACE, *here)
        assert "does not listen there yet: prunus daemon restart" in added.output
        for error in complaints():
            assert f"`listen` in {file} was changed to tcp://127.0.0.1:* since it was started" in error
            assert "`prunus daemon restart`" in error
        assert run("daemon", "restart", *here).exit_code == 0
        assert complaints() == ("", "")
        assert "restart" not in run("key", "add", "desk", "--role", "viewer", *here).output
        (profile.keys.path / "clients.yaml").write_text("{")
        for error in complaints():
            assert "clients.yaml is damaged in line 1" in error
    finally:
        run("daemon", "stop", *here)


@pytest.mark.parametrize("words", ["--key a.key --profile mine list", "list --profile mine --key a.key", "--key a.key list --profile mine"])  # fmt: skip  # noqa: E501
def test_a_profile_and_a_key_are_one_too_many(run: Prunus, words: str) -> None:
    """Neither wins silently: both are named."""
    refused = run(*words.split())
    assert refused.exit_code == 2
    assert "--profile mine is a profile of this host, and --key a.key is for a broker on a network" in refused.output


async def test_a_profile_and_a_key_are_not_said_together(tmp_path: Path) -> None:
    """It would not be clear which broker is meant."""
    with pytest.raises(TypeError, match="not both"):
        async with prunus.connect(tmp_path, key=tmp_path / "x.key"):
            pass


# --- what goes on until its key is revoked ----------------------------------------------------------


@pytest.fixture
def listening(short_folder: Path) -> Iterator[Shell]:
    """A folder whose broker runs and listens on this host; there is a key in mine.key."""
    shell = Shell(short_folder)
    shell("init", "-w", "0", "--listen", "tcp://127.0.0.1:*")
    with shell.begin("broker", "run") as broker:
        assert broker.stderr is not None
        assert any("serving at" in line for line in broker.stderr)
        shell("key", "add", "mine", "--role", "viewer")
        yield shell
        broker.send_signal(signal.SIGINT)
        _, error = said_by(broker)
        assert broker.returncode == 0, error


REVOKED = (
    r"Error: the broker at tcp://127\.0\.0\.1:\d+ does not know this key, or it was revoked; ask its owner for a key"
)


@pytest.mark.parametrize(("words", "shown"), [("top", "processes"), ("broker status --watch", "round trip")])
def test_a_screen_ends_when_its_key_is_revoked(listening: Shell, words: str, shown: str) -> None:
    """It does not wait for a broker that will never hear it again; the reason is told once."""
    with terminal(listening, "--key", "mine.key", *words.split()) as screen:
        screen.until(shown)
        listening("key", "revoke", "mine")
        text = " ".join(screen.end(1).split())
    assert re.search(REVOKED, text)
    assert text.count("was revoked") == 1


def test_numbers_are_not_served_under_a_revoked_key(listening: Shell) -> None:
    """The command ends, so that somebody notices; the reason is told once."""
    with listening.begin("--key", "mine.key", "broker", "metrics", "--serve", "127.0.0.1:0") as serving:
        assert serving.stderr is not None
        assert "/metrics (Ctrl-C ends it)" in serving.stderr.readline()
        listening("key", "revoke", "mine")
        _, said = said_by(serving)
    assert serving.returncode == 1
    assert re.match(REVOKED, said)
    assert len(said.splitlines()) == 1


def test_a_broker_far_away_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This host's daemon is not what is to be looked at."""

    async def communicator(*_: object, **__: object) -> None:
        raise ConnectionLostError(PLACE)

    shell = Shell(tmp_path)
    shell("init", "--listen", PLACE)
    monkeypatch.setattr("prunus.runtime.connecting.communicator", communicator)
    said = shell.error("--key", "controller.key", "list")
    assert f"no broker answers at {PLACE}; does it run, and does the network let you reach its host?" in said
    assert "daemon" not in said


@pytest.mark.parametrize("columns", [60, 80])
def test_keys_are_shown_in_a_narrow_terminal(short_folder: Path, columns: int) -> None:
    """Whole names, because `prunus key revoke` needs them; and sentences that are broken between words."""
    shell = Shell(short_folder)
    with terminal(shell, "init", "--listen", PLACE, columns=columns) as shown:
        lines = shown.end().splitlines()
    assert max(map(len, lines)) <= columns
    assert "copy it to the computer that launches and controls (scp controller.key HOST:)," in " ".join(lines)
    shell("key", "add", "a-laptop-with-a-name", "--role", "controller")
    with terminal(shell, "key", "list", columns=columns) as shown:
        names = [line.split()[0] for line in shown.end().splitlines()]
    assert names == ["name", "worker", "controller", "a-laptop-with-a-name"]
    piped = shell("key", "list").stdout
    assert all(key.public_key in piped for key in Profile.load(shell.folder / ".prunus").keys.clients().values())


def test_what_was_written_wrongly_is_told_between_words(short_folder: Path) -> None:
    """As any other error."""
    shell = Shell(short_folder)
    with terminal(shell, "--key", "some.key", "daemon", "stop", columns=60) as shown:
        lines = shown.end(2).splitlines()
    assert max(map(len, lines)) <= 60
    assert "is about a profile of the host on which it runs" in " ".join(lines)
