"""Keys as files: closed to others whatever the umask, no links, and nothing that is not a key."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from prunus.errors import ProfileError
from prunus.files import private_folder
from prunus.messaging.access import Principal, Role
from prunus.messaging.keys import ClientKey, KeyFolder, KeyPair, Keyring, check_place

PLACE = "tcp://10.0.0.1:5010"


@pytest.fixture(params=[0o000, 0o022, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    return KeyFolder(tmp_path / "keys")


def modes(folder: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.lstat().st_mode) for file in folder.iterdir()}


def test_nobody_else_reads_them(folder: KeyFolder, tmp_path: Path, umask: None) -> None:
    """Every file is 0600 and the folder 0700, whatever the umask."""
    folder.path.parent.chmod(0o755)
    folder.path.mkdir()
    folder.path.chmod(0o700)
    folder.add("a", Role.WORKER, [PLACE], tmp_path / "a.key")
    folder.add("b", Role.VIEWER, [PLACE], tmp_path / "b.key")
    folder.revoke("a")
    assert modes(folder.path) == {"server.yaml": 0o600, "clients.yaml": 0o600}
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    assert ClientKey.read(tmp_path / "b.key").role is Role.VIEWER


def test_an_open_folder_is_refused(folder: KeyFolder, tmp_path: Path) -> None:
    """A folder that others may enter, and one that is a link, hold no keys."""
    folder.path.mkdir()
    folder.path.chmod(0o777)
    with pytest.raises(ProfileError, match="chmod 700"):
        folder.make()
    folder.path.chmod(0o700)
    folder.make()
    folder.path.chmod(0o750)
    with pytest.raises(ProfileError, match="chmod 700"):
        Keyring(folder)
    folder.path.chmod(0o700)
    (tmp_path / "link").symlink_to(folder.path)
    with pytest.raises(ProfileError, match="is a link"):
        private_folder(tmp_path / "link")
    with pytest.raises(ProfileError, match="can't be made"):
        private_folder(tmp_path / "keys" / "server.yaml" / "x")


def test_a_client_file_holds_all_that_a_client_needs(folder: KeyFolder, tmp_path: Path) -> None:
    """Endpoints, the broker's public key, a pair of its own; and the broker keeps the public half only."""
    made = folder.add("laptop", Role.CONTROLLER, [PLACE, "tcp://[::1]:5010"], tmp_path / "laptop.key")
    read = ClientKey.read(tmp_path / "laptop.key")
    assert read == made
    assert (read.name, read.role, read.endpoints) == ("laptop", Role.CONTROLLER, [PLACE, "tcp://[::1]:5010"])
    assert read.server_key == folder.server().public_key
    [known] = folder.clients().values()
    assert (known.name, known.role, known.public_key) == ("laptop", Role.CONTROLLER, read.public_key)
    kept = "".join(file.read_text() for file in folder.path.iterdir())
    assert read.secret_key not in kept
    assert folder.server().secret_key not in (tmp_path / "laptop.key").read_text()
    for secret in (read.secret_key, folder.server().secret_key):
        assert secret not in repr(read) + repr(folder.server()) + repr(folder)


def test_a_file_that_others_read_is_refused(folder: KeyFolder, tmp_path: Path) -> None:
    """Also a link to a good one, what is no file, what belongs to another, and what is too large."""
    file = tmp_path / "a.key"
    folder.add("a", Role.WORKER, [PLACE], file)
    file.chmod(0o640)
    with pytest.raises(ProfileError, match="chmod 600"):
        ClientKey.read(file)
    file.chmod(0o600)
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(ProfileError, match="is a link"):
        ClientKey.read(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for no_file in ("pipe", "."):
        with pytest.raises(ProfileError, match="is no file"):
            ClientKey.read(tmp_path / no_file)
    with pytest.raises(ProfileError, match="there is no key file"):
        ClientKey.read(tmp_path / "nothing")
    file.write_text(file.read_text() + "#" * 2_000_000)
    with pytest.raises(ProfileError, match="larger than"):
        ClientKey.read(file)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(folder: KeyFolder, tmp_path: Path) -> None:
    """Who can't have written a key may have put it there for a reason."""
    folder.add("a", Role.WORKER, [PLACE], tmp_path / "a.key")
    os.chown(tmp_path / "a.key", 12345, 12345)
    with pytest.raises(ProfileError, match="belongs to another user"):
        ClientKey.read(tmp_path / "a.key")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no key file"),
        ("{", "damaged"),
        ("\xff", "is no key file|damaged"),
        ("name: x", "is no key file, or a damaged one: it has no role"),
        ("a: &a [*a]", "damaged|is no key file"),
        ("- 1", "is no key file"),
        ("!!python/object/apply:os.system [true]", "damaged"),
    ],
)
def test_what_is_no_key_is_said(tmp_path: Path, text: str, words: str) -> None:
    """Every kind of nonsense is a `ProfileError` that names the file."""
    file = tmp_path / "x.key"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ProfileError, match=words) as error:
        ClientKey.read(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("secret_key", "too short", "its secret_key is not of the right form"),
        ("server_key", None, "its server_key is not of the right form"),
        ("endpoints", ["10.0.0.1:5010"], "its endpoints is not of the right form"),
        ("role", "king", "its role is not of the right form"),
        ("secret", "x", "it has a line that no key file has"),
    ],
)
def test_damage_is_said_in_words(folder: KeyFolder, tmp_path: Path, field: str, value: object, words: str) -> None:
    """Which file it is, what is wrong with it and what makes a new one; no pattern, and nothing of what it holds."""
    made = folder.add("a", Role.WORKER, [PLACE], tmp_path / "a.key")
    good = msgspec.to_builtins(made)
    (tmp_path / "a.key").write_text(json.dumps({**good, field: value}))
    with pytest.raises(ProfileError) as error:
        ClientKey.read(tmp_path / "a.key")
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'a.key'} is no key file, or a damaged one: {words}; ")
    assert "`prunus key revoke NAME` and `prunus key add NAME --role ROLE`" in text
    assert not re.search(r"regex|\^|\\|too short|king|\$", text.replace(str(tmp_path), ""))


def test_what_to_do_about_damaged_keys_of_a_broker(folder: KeyFolder, tmp_path: Path) -> None:
    """Each of its two files has an advice of its own; what it says to do helps."""
    folder.add("a", Role.WORKER, [PLACE], tmp_path / "a.key")
    clients, server = folder.path / "clients.yaml", folder.path / "server.yaml"
    clients.write_text(clients.read_text().replace("worker", "king"))
    with pytest.raises(ProfileError, match=f"its role is not of the right form; .*: rm {clients}, then prunus key add"):
        folder.clients()
    clients.unlink()
    folder.add("a", Role.WORKER, [PLACE], tmp_path / "new.key")
    server.write_text(server.read_text()[:60])
    with pytest.raises(ProfileError, match=f"rm -r {folder.path}, then prunus key add"):
        folder.server()
    shutil.rmtree(folder.path)
    folder.add("a", Role.WORKER, [PLACE], tmp_path / "newest.key")
    assert folder.server().public_key == ClientKey.read(tmp_path / "newest.key").server_key


def test_an_error_shows_no_secret(tmp_path: Path, folder: KeyFolder) -> None:
    """A damaged file is not quoted."""
    made = folder.add("a", Role.WORKER, [PLACE], tmp_path / "a.key")
    text = (tmp_path / "a.key").read_text()
    for broken in (text.replace("tcp://", ""), text.replace('secret_key: "', 'secret_key: "&'), text + "\n  {"):
        (tmp_path / "a.key").write_text(broken)
        with pytest.raises(ProfileError) as error:
            ClientKey.read(tmp_path / "a.key")
        assert made.secret_key not in str(error.value)


def test_nothing_is_overwritten(folder: KeyFolder, tmp_path: Path) -> None:
    """A name that exists, a file that exists (a link too) and a bad name are refused, and nothing is added then."""
    folder.add("a", Role.WORKER, [PLACE], tmp_path / "a.key")
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name, file, words in (
        ("a", "other", "already"),
        ("b", "there", "there is a file"),
        ("b", "link", "there is a file"),
        ("b", "no/folder", "can't be made"),
        ("../b", "other", "is not a name"),
        ("", "other", "is not a name"),
        ("b" * 65, "other", "is not a name"),
    ):
        with pytest.raises(ProfileError, match=words):
            folder.add(name, Role.WORKER, [PLACE], tmp_path / file)
    assert list(folder.clients()) == ["a"]
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "there").read_text() == "mine"


def test_revoking_what_is_not_there(folder: KeyFolder, tmp_path: Path) -> None:
    """Says so."""
    with pytest.raises(ProfileError, match="no key 'a'"):
        folder.revoke("a")
    folder.add("b", Role.WORKER, [PLACE], tmp_path / "b.key")
    with pytest.raises(ProfileError, match="no key 'a'"):
        folder.revoke("a")


def test_a_keyring_knows_what_is_so_now(folder: KeyFolder, tmp_path: Path) -> None:
    """Adding and revoking are seen at the next look, and no look costs more than it must."""
    with pytest.raises(ProfileError, match="without keys"):
        Keyring(folder)
    folder.make()
    keyring = Keyring(folder)
    assert not keyring.changed()
    a = folder.add("a", Role.WORKER, [PLACE], tmp_path / "a.key")
    assert keyring.principal(a.public_key) is None
    assert keyring.changed()
    assert not keyring.changed()
    assert keyring.principal(a.public_key) == Principal("a", Role.WORKER)
    folder.revoke("a")
    assert keyring.changed()
    assert keyring.principal(a.public_key) is None
    assert keyring.principals() == frozenset()


def test_a_damaged_list_of_keys_lets_nobody_in(folder: KeyFolder, tmp_path: Path) -> None:
    """Whoever can't be looked up does not come; the broker goes on, and says why."""
    a = folder.add("a", Role.WORKER, [PLACE], tmp_path / "a.key")
    keyring = Keyring(folder)
    file = folder.path / "clients.yaml"
    good = file.read_text()
    for bad, words in (("{", "damaged"), (good + good, "twice"), (good.replace("worker", "king"), "no key file")):
        file.write_text(bad)
        assert keyring.changed()
        assert keyring.principal(a.public_key) is None
        assert keyring.problem is not None
        assert words in keyring.problem
    file.write_text(good)
    assert keyring.changed()
    assert keyring.problem is None
    assert keyring.principal(a.public_key) is not None
    file.chmod(0o644)
    assert keyring.changed()
    assert keyring.principal(a.public_key) is None


def test_places() -> None:
    """Where a broker can listen, and where not."""
    for good in (PLACE, "tcp://*:0", "tcp://[::1]:5010", "tcp://host.example.org:65535", "tcp://eth0:*"):
        check_place(good)
    for bad in (
        "",
        "ipc:///x",
        "tcp://10.0.0.1",
        "tcp://10.0.0.1:65536",
        "tcp://:1",
        "tcp://a b:1",
        "tcp://a:1\n",
        "tcp://a:-1",
    ):
        with pytest.raises(ProfileError, match="no place to listen"):
            check_place(bad)


def test_each_pair_is_a_new_one() -> None:
    """And public and secret key belong together."""
    import zmq

    first, second = KeyPair.new(), KeyPair.new()
    assert first != second
    assert zmq.curve_public(first.secret_key.encode()).decode() == first.public_key
