"""The keys of a broker that listens on a network, as files: who may come, as what, and what a client needs for it.

::

    keys/                the broker's folder (0700)
      server.yaml        its own pair of keys
      clients.yaml       the public keys of those who may come: name, role, since when
    laptop.key           what one client needs, and all that it needs: where, whom to trust, its own pair

Every file is written 0600 whatever the umask, a link in its place is refused, and so is one that others may read.
``clients.yaml`` is replaced as a whole; the broker looks at it before it hears what came from the network
(`Keyring.changed`), so that a revoked key is worth nothing from that moment on.

The keys are those of CurveZMQ (Curve25519, RFC 26), in Z85.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from prunus.errors import ProfileError
from prunus.files import private_folder, why_refused
from prunus.messaging.access import Principal, Role

MAX_FILE_BYTES = 1024 * 1024
"""A larger file holds no keys."""
MAX_CLIENTS = 10_000
"""Keys that one broker knows."""
NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
"""What a key may be called."""

ENDPOINT_PATTERN = r"tcp://(\*|[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.%a-z]+\]):(\*|[0-9]{1,5})"
"""A place on a network: a name, an IPv4 address, an IPv6 address in brackets or ``*`` (all), and a port."""
MAX_PORT = 65535

KeyName = Annotated[str, msgspec.Meta(pattern=rf"^{NAME_PATTERN}\Z")]
Z85Key = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z")]
T = TypeVar("T")


class KeyPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A public key, and the secret one that belongs to it."""

    public_key: Z85Key
    secret_key: Z85Key

    @classmethod
    def new(cls) -> KeyPair:
        import zmq  # reading keys needs no ZeroMQ

        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    def __repr__(self) -> str:
        return f"KeyPair({self.public_key!r})"  # the secret belongs into no log


class KnownKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who may come."""

    name: KeyName
    role: Role
    public_key: Z85Key
    added_at: float
    """Wall-clock time, seconds since 1970."""

    @property
    def principal(self) -> Principal:
        return Principal(self.name, self.role)


class ClientKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client needs to reach a broker over a network."""

    name: KeyName
    role: Role
    """As the broker knew it when the file was written; what counts is what the broker knows."""
    endpoints: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=rf"^{ENDPOINT_PATTERN}\Z")]], msgspec.Meta(min_length=1)
    ]
    """Where the broker is; they are tried in turn."""
    server_key: Z85Key
    """The public key of the broker: whoever has another one is not it."""
    public_key: Z85Key
    secret_key: Z85Key

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> ClientKey:
        """Raises `ProfileError` if the file is none of a key, or if others can read it."""
        return _read(
            Path(file),
            cls,
            "on the broker's host, `prunus key revoke NAME` and `prunus key add NAME --role ROLE` make a new one",
        )

    def write(self, file: str | os.PathLike[str]) -> None:
        """Make the file (0600). Raises `ProfileError` if there is one already."""
        words = (
            f"# The key {self.name!r} for a Prunus broker. Whoever has this file may do there what a {self.role} may."
        )
        _create(Path(file), f"{words}\n{_as_yaml(self)}")

    def __repr__(self) -> str:
        return f"ClientKey({self.name!r}, role={self.role.value!r}, endpoints={self.endpoints!r})"


def check_place(place: str) -> None:
    """Raises `ProfileError` if this is no place on a network where a broker can listen."""
    found = re.fullmatch(ENDPOINT_PATTERN, place)
    if found is None or (found[2] != "*" and int(found[2]) > MAX_PORT):
        raise ProfileError(f"{place!r} is no place to listen at; it must be tcp://ADDRESS:PORT, as tcp://10.0.0.1:5010")


@dataclass(frozen=True)
class KeyFolder:
    """The keys of one broker. `path` need not exist before `make`."""

    path: Path

    @property
    def exists(self) -> bool:
        """Whether the broker has a pair of keys. Raises `ProfileError` if that can't be seen."""
        file = self.path / "server.yaml"
        try:
            return file.exists()
        except OSError as error:
            raise ProfileError(f"the key file {file} can't be read: {why_refused(file, error)}") from error

    def make(self) -> KeyPair:
        """Make the broker's own pair of keys, if it has none yet. Raises `ProfileError`."""
        private_folder(self.path, parents=True)
        with self._locked():
            if self.exists:
                return self.server()
            pair = KeyPair.new()
            _create(self.path / "server.yaml", f"# The broker's own keys.\n{_as_yaml(pair)}")
            return pair

    def server(self) -> KeyPair:
        """The broker's own pair of keys. Raises `ProfileError` if it has none, or if others can read it."""
        if not self.exists:
            raise ProfileError(
                f"there are no keys in {self.path}, and without keys a broker listens on no network; "
                "make some with: prunus key add NAME --role worker|controller|viewer"
            )
        private_folder(self.path, parents=True)
        return _read(
            self.path / "server.yaml",
            KeyPair,
            f"restore it from a backup, or make all keys anew: rm -r {self.path}, then prunus key add NAME --role ROLE "
            "for each client",
        )

    def clients(self) -> dict[str, KnownKey]:
        """Who may come, by name. Raises `ProfileError`."""
        file = self.path / "clients.yaml"
        advice = f"restore it from a backup, or: rm {file}, then prunus key add NAME --role ROLE for each client"
        known = _read(file, list[KnownKey], advice, missing=[])
        names = {one.name: one for one in known}
        if len(names) != len(known) or len({one.public_key for one in known}) != len(known):
            raise ProfileError(f"{file} holds a name or a key twice; remove one of the two")
        return names

    def add(self, name: str, role: Role, endpoints: Sequence[str], file: Path) -> ClientKey:
        """Let a new key come, and write the file that its client needs.

        Raises `ProfileError`; nothing was added then.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise ProfileError(f"{name!r} is not a name for a key: use up to 64 letters, digits, '.', '_' and '-'")
        pair, server = KeyPair.new(), self.make()
        client = ClientKey(name, role, list(endpoints), server.public_key, pair.public_key, pair.secret_key)
        with self._locked():
            known = self.clients()
            if name in known:
                raise ProfileError(f"there is a key {name!r} already (prunus key revoke {name})")
            if len(known) >= MAX_CLIENTS:
                raise ProfileError(f"there are {len(known)} keys, no more are possible; revoke some that nobody needs")
            client.write(file)
            try:
                self._write_clients([*known.values(), KnownKey(name, role, pair.public_key, time.time())])
            except BaseException:
                file.unlink(missing_ok=True)
                raise
        return client

    def revoke(self, name: str) -> KnownKey:
        """From now on this key is worth nothing. Raises `ProfileError` if there is none of that name."""
        if not self.path.is_dir():
            raise ProfileError(f"there is no key {name!r}: no key was ever added")
        with self._locked():
            known = self.clients()
            if (key := known.pop(name, None)) is None:
                raise ProfileError(f"there is no key {name!r} (prunus key list shows those that exist)")
            self._write_clients(list(known.values()))
        return key

    def _write_clients(self, known: list[KnownKey]) -> None:
        lines = ["# Who may come over the network; edited by `prunus key add` and `prunus key revoke`."]
        lines += [f"- {json.dumps(msgspec.to_builtins(one))}" for one in known] or ["[]"]
        _replace(self.path / "clients.yaml", "\n".join(lines) + "\n")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ProfileError(f"the folder {self.path} can't be opened: {why_refused(self.path, error)}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class Keyring:
    """Who may come *now*: the key folder as a running broker sees it."""

    def __init__(self, folder: KeyFolder) -> None:
        """Raises `ProfileError` if the broker has no keys, or keys that others can read."""
        self._folder = folder
        self.server = folder.server()
        self.problem: str | None = None
        """Why ``clients.yaml`` can't be read, if so: then nobody may come."""
        self._principals: dict[str, Principal] = {}
        self._seen: object = None
        self.changed()

    def principal(self, public_key: str) -> Principal | None:
        """Who comes with this key; None: nobody who may."""
        return self._principals.get(public_key)

    def principals(self) -> frozenset[Principal]:
        """All who may come."""
        return frozenset(self._principals.values())

    def changed(self) -> bool:
        """Look at the file; whether it is not what it was. Costs one stat(2) if it is."""
        try:
            found = os.stat(self._folder.path / "clients.yaml", follow_symlinks=False)
            seen: object = found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode
        except OSError as error:
            seen = error.errno
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            self._principals = {one.public_key: one.principal for one in self._folder.clients().values()}
            self.problem = None
        except ProfileError as error:
            self._principals, self.problem = {}, str(error)
        return True


# --- files that are nobody else's business -----------------------------------------------------------


def _read(file: Path, kind: type[T], advice: str, missing: T | None = None) -> T:
    """What a key file holds; `ProfileError` that ends with the advice if that is not a `kind`."""
    import yaml

    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise ProfileError(f"there is no key file {file}") from error
    except OSError as error:
        if os.path.islink(file):
            raise ProfileError(f"the key file {file} is a link; use the file that it points to") from error
        raise ProfileError(f"the key file {file} can't be read: {why_refused(file, error)}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ProfileError(f"{file} is no file, so it is no key file")
        if status.st_uid not in (0, os.getuid()):
            raise ProfileError(f"the key file {file} belongs to another user; use one of your own")
        if status.st_mode & 0o077:
            raise ProfileError(f"the key file {file} is open to other users; close it with: chmod 600 {file}")
        if status.st_size > MAX_FILE_BYTES:
            raise ProfileError(f"{file} is larger than {MAX_FILE_BYTES:,} bytes: it is no key file")
        content = os.read(descriptor, MAX_FILE_BYTES)
    finally:
        os.close(descriptor)
    try:
        found: Any = yaml.safe_load(content.decode())
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{file} is no key file, or a damaged one: {_damage(error)}; {advice}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise ProfileError(f"the key file {file} is damaged{line}: it is not YAML; {advice}") from None


def _damage(error: msgspec.ValidationError) -> str:
    """What is wrong, without a word of what the file holds: that is secret."""
    text, _, place = str(error).partition(" - at ")
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
        return f"it has no {missing[1]}"
    if text.startswith("Object contains unknown field"):
        return "it has a line that no key file has"
    field = re.search(r"\.(\w+)", place)
    return f"its {field[1]} is not of the right form" if field else "it holds no key"


def _as_yaml(value: msgspec.Struct) -> str:
    return "".join(f"{name}: {json.dumps(part)}\n" for name, part in msgspec.to_builtins(value).items())


def _create(file: Path, text: str) -> None:
    """A new file, durable, 0600. Raises `ProfileError` if there is something in its place."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise ProfileError(f"there is a file {file} already; choose another name, or remove it") from error
    except OSError as error:
        raise ProfileError(f"the file {file} can't be made: {why_refused(file, error)}") from error
    try:
        with open(descriptor, "w", encoding="utf-8") as opened:
            os.fchmod(descriptor, 0o600)
            opened.write(text)
            opened.flush()
            os.fsync(descriptor)
        _sync_folder(file.parent)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise ProfileError(f"the file {file} can't be written: {error.strerror}") from error


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    _create(temporary, text)
    try:
        temporary.replace(file)
        _sync_folder(file.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ProfileError(f"the file {file} can't be written: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
