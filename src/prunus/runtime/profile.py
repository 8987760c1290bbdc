"""A profile: the folder in which one daemon keeps everything it has.

::

    config.yaml     settings, made by `prunus init`, edited by people
    prunus.db       the database; only the broker opens it
    keys/           who may come over a network (see `prunus.messaging.keys`)
    run/            locks, the daemon's wish (daemon.json), the socket, where the broker listens
    logs/           a file for each service

Only its owner may enter the folder (0700). `Profile.find` says which profile is meant; a folder is a profile if
it holds a ``config.yaml``. The endpoint of the broker is the same for everybody and after every restart: where
the path of the folder is too long for a Unix socket, the first who asks writes the substitute down in ``run/``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import msgspec

from prunus.errors import ProfileError
from prunus.files import private_folder, why_refused, write_whole

if TYPE_CHECKING:
    from prunus.messaging.keys import KeyFolder

FOLDER_NAME = ".prunus"
"""The profile of a project's folder."""
DEFAULT_NAME = "default"
"""The user's own profile that is taken if there is no other."""
ENVIRONMENT_VARIABLE = "PRUNUS_PROFILE"
"""A name or a path: the profile that is taken if none is named."""
MAX_SOCKET_PATH_BYTES = 100
"""Linux allows 107 bytes for a Unix socket, macOS 103."""
MAX_CONFIG_BYTES = 1024 * 1024
"""A larger config.yaml is not read."""


HookEvent = Literal["started", "worker_ended", "broker_ended", "flapping", "stopped"]
"""What a daemon may run a command for."""
Kept = Literal["dead_letters", "finished", "excepted", "killed"]
"""What can be forgotten after some time: tasks that died, and processes that ended in one of these states."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a profile. The descriptions are the comments of the generated file."""

    workers: Annotated[int, msgspec.Meta(ge=0, le=1024, description="how many workers the daemon starts")] = 2
    slots: Annotated[int, msgspec.Meta(ge=1, le=100_000, description="how many processes one worker runs at once")] = 16
    grace_s: Annotated[
        float, msgspec.Meta(ge=0, le=86_400, description="seconds that running steps get to end when a worker stops")
    ] = 10.0
    import_from: Annotated[
        list[str], msgspec.Meta(description="folders that workers import classes from, relative to this one")
    ] = msgspec.field(default_factory=lambda: [".."])
    modules: Annotated[
        list[str], msgspec.Meta(description="patterns of the modules that process classes may come from")
    ] = msgspec.field(default_factory=lambda: ["*"])
    listen: Annotated[
        list[str],
        msgspec.Meta(description="places on a network (tcp://ADDRESS:PORT) where clients with a key may come"),
    ] = msgspec.field(default_factory=list)
    queues: Annotated[
        list[Annotated[str, msgspec.Meta(min_length=1, max_length=255)]],
        msgspec.Meta(min_length=1, description="the queues that workers take processes from"),
    ] = msgspec.field(default_factory=lambda: ["default"])
    max_crashes: Annotated[
        int,
        msgspec.Meta(ge=0, le=1000, description="a process whose step saw so many workers die is set aside; 0: never"),
    ] = 3
    log_format: Annotated[Literal["text", "json"], msgspec.Meta(description="how logs are written: text or json")] = (
        "text"
    )
    hooks: Annotated[
        dict[HookEvent, Annotated[list[str], msgspec.Meta(min_length=1)]],
        msgspec.Meta(
            description="commands that the daemon runs when something happens, say {broker_ended: [notify, me]}"
        ),
    ] = msgspec.field(default_factory=dict)
    endpoints: Annotated[
        dict[str, dict[str, Any]],
        msgspec.Meta(description="hosts that processes may ask for a connection to, by name"),
    ] = msgspec.field(default_factory=dict)
    retention: Annotated[
        dict[Kept, Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,6}(s|min|h|d)\Z")]],
        msgspec.Meta(description='how long is kept what nobody needs, say {"dead_letters": "30d"}; else for ever'),
    ] = msgspec.field(default_factory=dict)

    def keep_s(self, kind: Kept) -> float | None:
        """For how many seconds what has ended like this is kept; None: for ever."""
        text = self.retention.get(kind)
        return None if text is None else seconds_of(text)

    @classmethod
    def read(cls, file: Path) -> Config:
        """What the file says; `ProfileError` that names the file, the key and what was expected."""
        import yaml

        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise ProfileError(f"{file} is larger than {MAX_CONFIG_BYTES:,} bytes: is it the right file?")
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"{file} can't be read: {why_refused(file, error)}") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            where = getattr(error, "problem_mark", None)
            line = f" at line {where.line + 1}" if where else ""
            reason = getattr(error, "problem", None) or str(error)
            raise ProfileError(f"{file} is not valid YAML{line}: {reason}") from error
        return cls.from_mapping({} if found is None else found, str(file))

    @classmethod
    def from_mapping(cls, found: object, source: str) -> Config:
        """Check plain data; `source` is named in the `ProfileError`, which tells every problem at once."""
        if not isinstance(found, Mapping):
            raise ProfileError(f"{source}: expected lines of the form 'key: value', found {_shown(found)}")
        fields = {field.name: field for field in msgspec.structs.fields(cls)}
        problems, values = [], {}
        for key, value in found.items():
            if key not in fields:
                problems.append(f"{key}: there is no such setting (there are {', '.join(fields)})")
                continue
            try:
                values[key] = msgspec.convert(value, fields[key].type)
            except msgspec.ValidationError as error:
                problems.append(f"{key}: {_expectation(error)}; it is {_shown(value)}")
        if values.get("endpoints"):
            from prunus.runtime.remote.endpoints import problems_with

            problems += problems_with(values["endpoints"])
        problems += _places_that_are_none(values.get("listen", ()))
        if problems:
            raise ProfileError(f"{source}: " + "".join(f"\n  {line}" for line in problems).lstrip())
        return cls(**values)

    def to_text(self) -> str:
        """The same as a file with a comment for every line."""
        lines = ["# A Prunus profile. `prunus daemon restart` makes changes take effect.", ""]
        for field in msgspec.structs.fields(type(self)):
            description = get_args(field.type)[1].description
            lines += [f"# {field.name}: {description}", f"{field.name}: {json.dumps(getattr(self, field.name))}"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Profile:
    """One profile that exists. `path` is its real path, `config` what its file says."""

    path: Path
    config: Config

    @classmethod
    def find(cls, name: str | os.PathLike[str] | None = None, start: Path | None = None) -> Profile:
        """The profile of this name or path, or the one that is meant here.

        A `name` with a slash is a path, any other the user's own profile. Without a name: what ``PRUNUS_PROFILE``
        says, else ``.prunus`` in the folder `start` (the current one) or its nearest parent that has one, else the
        user's profile "default". Raises `ProfileError`.
        """
        return cls.load(_find_folder(name, start))

    @classmethod
    def find_to_stop(
        cls, name: str | os.PathLike[str] | None = None, start: Path | None = None
    ) -> tuple[Profile, ProfileError | None]:
        """The profile for who wants to stop what runs, and so needs no configuration: where that can't be read, the
        default one stands in for it, and the error says what is wrong. Otherwise as `find`."""
        path = _find_folder(name, start).resolve()
        _refuse_what_others_write(path)
        try:
            return cls.load(path), None
        except ProfileError as error:
            if not (path / "run").is_dir():  # nothing ever ran
                raise
            return cls(path, Config()), error

    @classmethod
    def load(cls, path: Path) -> Profile:
        """The profile that is this folder; `ProfileError` if it is none, or if others could have written it."""
        path = path.resolve()
        _refuse_what_others_write(path)
        file = path / "config.yaml"
        if not file.is_file():
            raise ProfileError(f"{path} is not a profile: it has no config.yaml (`prunus init` makes a profile)")
        return cls(path, Config.read(file))

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Config | None = None) -> Profile:
        """Make a new profile; `ProfileError` if there is something already."""
        folder = Path(path).absolute()
        try:
            if (folder / "config.yaml").exists():
                raise ProfileError(f"there is a profile already: {folder}")
            if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                raise ProfileError(f"{folder} exists and is not an empty folder; choose another place for the profile")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            for name in ("run", "logs"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
            (folder / ".gitignore").write_text("*\n")
            with (folder / "config.yaml").open("x", encoding="utf-8") as file:
                file.write((config or Config()).to_text())
        except FileExistsError as error:
            raise ProfileError(f"somebody else makes a profile here at this moment: {folder}") from error
        except OSError as error:
            raise ProfileError(f"the profile {folder} can't be made: {why_refused(folder, error)}") from error
        return cls.load(folder)

    @staticmethod
    def path_of(name: str | os.PathLike[str]) -> Path:
        """Where the profile of this name is, whether it exists or not: with a slash (or a leading dot) it is a path,
        else one of the user's own."""
        text = os.fspath(name)
        if "/" in text or text.startswith((".", "~")):
            return Path(text).expanduser().absolute()
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", text):
            raise ProfileError(f"{text!r} is not a name for a profile: use letters, digits, '.', '_' and '-'")
        return user_profiles() / text

    @property
    def name(self) -> str:
        """For people: the name of a user's own profile, the path of any other."""
        return self.path.name if self.path.parent == user_profiles().resolve() else str(self.path)

    @property
    def database(self) -> Path:
        return self.path / "prunus.db"

    @property
    def blobs(self) -> Path:
        """What is too large for a message; the broker makes this folder when it needs it."""
        return self.path / "blobs"

    @property
    def run_folder(self) -> Path:
        return self._folder("run")

    @property
    def log_folder(self) -> Path:
        return self._folder("logs")

    def lock(self, name: str) -> Path:
        """The lock file that the service `name` holds for life: "daemon", "broker", "worker-1" ..."""
        return self.run_folder / f"{_plain(name)}.lock"

    def log(self, name: str) -> Path:
        """Where the service `name` logs to."""
        return self.log_folder / f"{_plain(name)}.log"

    @cached_property
    def endpoint(self) -> str:
        """The broker's address: ``ipc://`` and a path that is short enough and stable across restarts.

        The folder of the socket exists when this returns, and only this user can write to it.
        """
        inside = self.run_folder / "broker.sock"
        if len(os.fsencode(inside)) <= MAX_SOCKET_PATH_BYTES:
            return f"ipc://{inside}"
        return f"ipc://{self._short_socket()}"

    @property
    def keys(self) -> KeyFolder:
        """Who may come over a network."""
        from prunus.messaging.keys import KeyFolder

        return KeyFolder(self.path / "keys")

    def check_keys(self) -> None:
        """`ProfileError` if the configuration wants the broker to listen on a network, and there are no keys for that,
        or none that can be used: it does not start then."""
        if self.config.listen:
            try:
                self.keys.server()
            except ProfileError as error:
                places = ", ".join(self.config.listen)
                raise ProfileError(
                    f"by {self.path / 'config.yaml'} the broker listens at {places}, but {error}"
                ) from error

    def note_listening(self, places: Mapping[str, str]) -> None:
        """The broker says where on a network it listens: for each place of the configuration the same with the port
        that the system chose."""
        lines = (f"{asked} {bound}\n" for asked, bound in places.items())
        write_whole(self.run_folder / "listening", "".join(lines).encode())

    def listening(self) -> dict[str, str]:
        """Where on a network the broker listens, or listened last: as it was asked, and with the port that it has."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.run_folder / "listening").read_text(encoding="utf-8").splitlines()
            return {asked: bound for asked, _, bound in (line.partition(" ") for line in lines)}
        return {}

    @property
    def import_folders(self) -> list[Path]:
        """The folders of `Config.import_from`, absolute."""
        return [(self.path / Path(folder).expanduser()).resolve() for folder in self.config.import_from]

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ProfileError(f"{folder} can't be made: {why_refused(folder, error)}") from error
        return folder

    def _short_socket(self) -> Path:
        """A socket outside of the profile. The environment may differ between a shell and a cron job, so the first
        choice of a folder is written down and holds for all, as long as that folder can be used."""
        note = self.run_folder / "socket_folder"
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:24] + ".sock"
        with contextlib.suppress(OSError, ValueError, ProfileError):  # never noted, or gone for good: choose
            return private_folder(Path(note.read_text(encoding="utf-8").strip())) / name
        bases = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
        reasons = []
        for base in bases:
            if not base or not os.path.isabs(base) or not os.path.isdir(base):
                continue
            folder = Path(base) / f"prunus-{os.getuid()}"
            if len(os.fsencode(folder / name)) > MAX_SOCKET_PATH_BYTES:
                continue
            try:
                private_folder(folder)
            except ProfileError as error:
                reasons.append(str(error))
                continue
            write_whole(note, f"{folder}\n".encode())
            return folder / name
        raise ProfileError(
            f"the path of the profile {self.path} is too long for a socket, and there is no other place for one"
            f"{''.join(f'; {reason}' for reason in reasons)}"
        )


def seconds_of(duration: str) -> float:
    """``30s``, ``5min``, ``12h`` or ``30d`` as seconds; `ValueError` for anything else."""
    found = re.fullmatch(r"([0-9]{1,6})(s|min|h|d)", duration)
    if found is None:
        raise ValueError(f"{duration!r} is no duration: write a number with s, min, h or d, say 30d")
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600, "d": 86_400}[found[2]]


def user_profiles() -> Path:
    """The folder of the user's own profiles."""
    data = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return base / "prunus" / "profiles"


def _find_folder(name: str | os.PathLike[str] | None, start: Path | None) -> Path:
    """The folder that is meant by `Profile.find`."""
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None:
        path = Profile.path_of(name)
        if not os.path.isdir(path):
            option = f" --profile {os.fspath(name)}"
            raise ProfileError(f"there is no profile {path}; `prunus init{option}` makes one")
        return path
    here = (start or Path.cwd()).resolve()
    for path in (*(folder / FOLDER_NAME for folder in (here, *here.parents)), user_profiles() / DEFAULT_NAME):
        if os.path.isdir(path):
            return path
    raise ProfileError(f"there is no profile in {here} or above it; `prunus init` makes one")


def _refuse_what_others_write(path: Path) -> None:
    """`ProfileError` if this folder is another user's, if others can write to it, or if it can't be entered."""
    try:
        status = path.stat()
        if os.getuid() not in (0, status.st_uid):
            raise ProfileError(f"the profile {path} belongs to another user; make your own: prunus init --profile NAME")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ProfileError(f"other users may write to the profile {path}; `chmod 700 {path}` closes it")
        (path / "config.yaml").exists()
    except FileNotFoundError:  # it is no profile then
        return
    except OSError as error:
        raise ProfileError(f"the profile {path} can't be read: {why_refused(path / 'config.yaml', error)}") from error


def _places_that_are_none(places: Sequence[str]) -> list[str]:
    """What is wrong with those of `Config.listen` at which nobody can listen."""
    if not places:
        return []
    from prunus.messaging.keys import check_place

    problems = []
    for place in places:
        try:
            check_place(place)
        except ProfileError as error:
            problems.append(f"listen: {error}")
    return problems


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is not the name of a service")
    return name


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str) if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _expectation(error: msgspec.ValidationError) -> str:
    text = str(error).partition(" - at ")[0].replace("`", "")
    return text[:1].lower() + text[1:]
