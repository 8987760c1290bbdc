"""Which folder is meant, what its file may say, and where the socket is."""

import os
import stat
from pathlib import Path

import pytest

from prunus.errors import ProfileError
from prunus.files import private_folder
from prunus.runtime.profile import MAX_SOCKET_PATH_BYTES, Config, Profile, user_profiles


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))
    monkeypatch.delenv("PRUNUS_PROFILE", raising=False)
    monkeypatch.chdir(home)
    return home


def write(profile: Profile, text: str) -> Path:
    (profile.path / "config.yaml").write_text(text)
    return profile.path


# --- finding ----------------------------------------------------------------------------------------


def test_without_a_name_the_nearest_folder_counts(tmp_path: Path) -> None:
    """`.prunus` is looked for here and upwards, the nearest first."""
    outer, inner = Profile.create(tmp_path / ".prunus"), Profile.create(tmp_path / "a" / ".prunus")
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "c").mkdir()
    assert Profile.find(start=tmp_path / "a" / "b") == inner
    assert Profile.find(start=tmp_path / "c") == outer


def test_the_order_of_what_is_meant(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name beats the environment, that beats the folder, that beats the user's default."""
    with pytest.raises(ProfileError, match="`prunus init` makes one"):
        Profile.find()
    default = Profile.create(Profile.path_of("default"))
    assert Profile.find() == default
    here = Profile.create(".prunus")
    assert Profile.find() == here
    mine = Profile.create(Profile.path_of("mine"))
    monkeypatch.setenv("PRUNUS_PROFILE", "mine")
    assert Profile.find() == mine
    monkeypatch.setenv("PRUNUS_PROFILE", str(here.path))
    assert Profile.find() == here
    assert Profile.find("default") == default
    assert Profile.find("./.prunus") == Profile.find(".prunus") == here


def test_a_name_with_a_slash_is_a_path(home: Path) -> None:
    """Other names are the user's own profiles, and some are no names."""
    assert Profile.path_of("a/b") == home / "a" / "b"
    assert Profile.path_of("~/x") == Path("~/x").expanduser()
    assert Profile.path_of("ab") == user_profiles() / "ab" == home / "data" / "prunus" / "profiles" / "ab"
    with pytest.raises(ProfileError, match="not a name"):
        Profile.path_of("a b")


def test_a_profile_that_does_not_exist_is_said(home: Path) -> None:
    """With the command that makes it."""
    with pytest.raises(ProfileError, match="`prunus init --profile other` makes one"):
        Profile.find("other")
    (home / ".prunus").mkdir()
    with pytest.raises(ProfileError, match=r"is not a profile: it has no config.yaml"):
        Profile.find()


def test_a_profile_of_which_others_can_write_is_refused(home: Path) -> None:
    """Whoever can write to a profile can have code run by its daemon."""
    profile = Profile.create(".prunus")
    profile.path.chmod(0o770)
    with pytest.raises(ProfileError, match="chmod 700"):
        Profile.find()


# --- making -----------------------------------------------------------------------------------------


def test_a_new_profile_is_its_owners_alone(home: Path) -> None:
    """0700, whatever the umask says; nothing of it gets into a repository."""
    before = os.umask(0)
    try:
        profile = Profile.create(".prunus")
    finally:
        os.umask(before)
    assert stat.S_IMODE(profile.path.stat().st_mode) == 0o700
    assert (profile.path / ".gitignore").read_text() == "*\n"
    assert profile.database == home / ".prunus" / "prunus.db"
    assert profile.lock("broker") == home / ".prunus" / "run" / "broker.lock"
    assert profile.log("worker-1") == home / ".prunus" / "logs" / "worker-1.log"
    assert profile.import_folders == [home]
    with pytest.raises(ValueError, match="name of a service"):
        profile.lock("../x")


def test_nothing_is_overwritten(home: Path) -> None:
    """A profile is made once, and never in a folder that holds something else."""
    Profile.create(".prunus")
    with pytest.raises(ProfileError, match="a profile already"):
        Profile.create(".prunus")
    (home / "empty").mkdir(mode=0o755)
    assert stat.S_IMODE(Profile.create("empty").path.stat().st_mode) == 0o700
    (home / "x").mkdir(mode=0o755)
    (home / "x" / "file").touch()
    with pytest.raises(ProfileError, match="not an empty folder"):
        Profile.create("x")
    assert stat.S_IMODE((home / "x").stat().st_mode) != 0o700
    with pytest.raises(ProfileError, match="not an empty folder"):
        Profile.create("x/file")


def test_the_generated_file_says_what_the_config_is(home: Path) -> None:
    """Every setting with a comment, and reading it gives the same settings back."""
    config = Config(workers=5, grace_s=2.5, import_from=["..", "/a 'b\" #c"], modules=["x.*"])
    profile = Profile.create(".prunus", config)
    assert Profile.find().config == config
    text = (profile.path / "config.yaml").read_text()
    for name in ("workers", "slots", "grace_s", "import_from", "modules"):
        assert f"\n# {name}: " in text
        assert f"\n{name}: " in text


# --- reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("workers: x", "workers: expected int, got str; it is 'x'"),
        ("workers: 0.5", "workers: expected int, got float"),
        ("workers: -1", "workers: expected int >= 0; it is -1"),
        ("slots: 0", "slots: expected int >= 1; it is 0"),
        ("grace_s: .inf", "grace_s: expected float <= "),
        ("grace_s: .nan", "grace_s: expected "),
        ("import_from: [1]", "import_from: expected str, got int"),
        ("modules: '*'", "modules: expected array, got str"),
        ("listen: [10.0.0.1:5010]", "listen: '10.0.0.1:5010' is no place to listen at; it must be tcp://ADDRESS:PORT"),
        ("slotz: 3", "slotz: there is no such setting .*slots"),
        ("1: 3", "1: there is no such setting"),
        ("[1, 2]", "expected lines of the form"),
        ("a: [", "not valid YAML at line 1"),
        ("a: !!python/object/apply:os.getpid []", "not valid YAML at line 1"),
        ("a: \x00", "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
        ("#" * 2_000_000, "is larger than"),
    ],
)
def test_a_wrong_setting_is_named(home: Path, text: str, complaint: str) -> None:
    """The file, the key, what was expected and what is there."""
    path = write(Profile.create(".prunus"), text)
    with pytest.raises(ProfileError, match=complaint) as error:
        Profile.find()
    assert str(path / "config.yaml") in str(error.value)


def test_all_wrong_settings_are_named_at_once(home: Path) -> None:
    """One look at the message is enough to mend the file."""
    write(Profile.create(".prunus"), "workers: x\nslots: y\n")
    with pytest.raises(ProfileError, match=r"workers: .*\n  slots: "):
        Profile.find()


def test_what_is_not_said_is_the_default(home: Path) -> None:
    """An empty file is a configuration."""
    write(Profile.create(".prunus"), "")
    assert Profile.find().config == Config()
    write(Profile.find(), "grace_s: 3")
    assert Profile.find().config == Config(grace_s=3.0)


def test_bytes_that_are_no_text_are_said(home: Path) -> None:
    """As is a file that can't be read at all."""
    profile = Profile.create(".prunus")
    (profile.path / "config.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ProfileError, match=r"config.yaml is not valid YAML"):
        Profile.find()


# --- the socket -------------------------------------------------------------------------------------


def test_the_socket_is_in_the_profile_if_its_path_is_short(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in the same place by whatever name the profile was found."""
    monkeypatch.setattr("prunus.runtime.profile.MAX_SOCKET_PATH_BYTES", 4096)
    profile = Profile.create(".prunus")
    (home / "link").symlink_to(home / ".prunus")
    assert profile.endpoint == Profile.find("./link").endpoint == f"ipc://{home}/.prunus/run/broker.sock"


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for sockets whose path is short enough for the tests, however long that of their own folder is."""
    base = tmp_path_factory.mktemp("x")
    monkeypatch.setattr("prunus.runtime.profile.MAX_SOCKET_PATH_BYTES", len(os.fsencode(base)) + 60)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    return base


def test_a_long_path_gets_a_short_socket(home: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays the same after a restart and in another environment, and differs from that of another profile."""
    profile, other = Profile.create(f"{'x' * 200}/.prunus"), Profile.create(f"{'y' * 200}/.prunus")
    socket = Path(profile.endpoint.removeprefix("ipc://"))
    assert socket.parent == short / f"prunus-{os.getuid()}"
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert other.endpoint != profile.endpoint
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert Profile.load(profile.path).endpoint == profile.endpoint


def test_the_limit_holds_for_real_paths(home: Path) -> None:
    """Whatever the profile's path is, the socket's fits into the address of a Unix socket."""
    for length in (1, 60, 200):
        profile = Profile.create(f"{'ä' * (length // 2)}z/.prunus")
        assert len(os.fsencode(profile.endpoint.removeprefix("ipc://"))) <= MAX_SOCKET_PATH_BYTES < 107


def test_a_copied_profile_has_a_socket_of_its_own(home: Path, short: Path) -> None:
    """Though the note of the original comes with it."""
    import shutil

    profile = Profile.create(f"{'x' * 200}/.prunus")
    before = profile.endpoint
    shutil.copytree(profile.path, home / ("y" * 200))
    copy = Profile.load(home / ("y" * 200))
    assert copy.endpoint != before


def test_a_folder_that_others_prepared_is_not_used(home: Path) -> None:
    """Neither a link nor a folder that others may look into."""
    (home / "real").mkdir(mode=0o700)
    (home / "link").symlink_to(home / "real")
    (home / "open").mkdir()
    (home / "open").chmod(0o755)
    (home / "file").touch()
    for name in ("link", "open", "file"):
        with pytest.raises(ProfileError):
            private_folder(home / name)
    assert private_folder(home / "real") == home / "real"


def test_a_folder_for_sockets_that_is_gone_is_replaced(home: Path, short: Path) -> None:
    """After a reboot without a login the noted folder can be missing: it is made again, or another is chosen."""
    profile = Profile.create(f"{'x' * 200}/.prunus")
    before = profile.endpoint
    (short / f"prunus-{os.getuid()}").rmdir()
    assert Profile.load(profile.path).endpoint == before
    (short / f"prunus-{os.getuid()}").rmdir()
    (short / f"prunus-{os.getuid()}").touch()
    assert Profile.load(profile.path).endpoint != before
