"""``prunus init --listen``, ``prunus key`` and ``--key``: what they say, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import prunus
from prunus.errors import ProfileError
from prunus.messaging.access import Role
from prunus.messaging.keys import ClientKey
from prunus.runtime.cli import cli
from prunus.runtime.cli.keys import ROLES, places_for_clients
from prunus.runtime.profile import Config, Profile

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
    assert run("init", "--profile", "./other", "--listen", PLACE, "--listen", "tcp://*:0").exit_code == 0
    other = Profile.find("./other")
    assert other.config.listen == [PLACE, "tcp://*:0"]
    assert other.keys.server().public_key


def test_a_bad_place_makes_no_profile(run: Prunus, tmp_path: Path) -> None:
    """It is looked at first."""
    assert says(run("init", "--listen", "10.0.0.1:5010"), "must be tcp://ADDRESS:PORT")
    assert not (tmp_path / ".prunus").exists()


def test_add_list_and_revoke(run: Prunus, tmp_path: Path) -> None:
    """The life of a key."""
    run("init", "--listen", PLACE)
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
    profile.note_listening(["tcp://0.0.0.0:5010", "tcp://127.0.0.1:40001"])
    assert places_for_clients(profile) == ["tcp://host.example.org:5010", "tcp://127.0.0.1:40001"]
    profile.note_listening(["tcp://0.0.0.0:5010"])
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
    assert not (profile.run_folder / "broker.sock").exists()


async def test_a_profile_and_a_key_are_not_said_together(tmp_path: Path) -> None:
    """It would not be clear which broker is meant."""
    with pytest.raises(TypeError, match="not both"):
        async with prunus.connect(tmp_path, key=tmp_path / "x.key"):
            pass
