"""A daemon under systemd: its unit file, and how it says that it is ready.

The unit has ``KillMode=process``: a stop is said to the supervisor alone, which stops the workers, then the broker; and
if the supervisor itself is killed, broker and workers go on and the supervisor that systemd starts adopts them.
``OOMPolicy=continue``: a worker that the kernel kills for its memory is a matter of the supervisor, and no reason to
stop everything. Sources: systemd.service(5), systemd.kill(5), sd_notify(3).
"""

from __future__ import annotations

import os
import pwd
import socket
import sys
from pathlib import Path

from prunus.runtime.hooks import HOOK_TIMEOUT_S
from prunus.runtime.profile import Profile
from prunus.runtime.roster import KILL_MARGIN_S

STOP_MARGIN_S = 10.0
"""What systemd gives the supervisor on top of the time that it may take."""
PASSED_ON = ("PYTHONPATH", "XDG_RUNTIME_DIR", "XDG_DATA_HOME", "LANG", "LC_ALL", "TZ")
"""Variables of the caller that the unit repeats, if they are set: the services must see the same as the shell."""


def notify(state: str) -> bool:
    """Tell the service manager (``READY=1``, ``STOPPING=1``); False if there is none that wants to know."""
    place = os.environ.get("NOTIFY_SOCKET", "")
    if not place.startswith(("/", "@")):
        return False
    address = f"\0{place[1:]}" if place.startswith("@") else place
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(1.0)
            sender.sendto(state.encode(), address)
    except OSError:
        return False
    return True


def stop_limit_s(grace_s: float) -> float:
    """How long a supervisor may take to stop everything: the workers, then the broker, then its hook."""
    return 2 * (grace_s + KILL_MARGIN_S) + HOOK_TIMEOUT_S


def unit_text(profile: Profile, folder: Path, *, system: bool) -> str:
    """The unit of the daemon of a profile whose services run in `folder`: of the user, or of the `system` for the user
    who calls this."""
    python = [sys.executable, "-P", "-m"]
    run = [*python, "prunus.runtime.supervisor", "--profile", str(profile.path)]
    reload = [*python, "prunus.runtime.cli", "--profile", str(profile.path), "daemon", "reload", "--no-wait"]
    variables = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    variables["PATH"] = os.environ.get("PATH", os.defpath)
    if system:
        variables.pop("XDG_RUNTIME_DIR", None)  # of a session that may not be there
    lines = [
        "[Unit]",
        f"Description=Prunus daemon of {_percent(str(profile.path))}",
        "Documentation=man:systemd.service(5)",
        f"RequiresMountsFor={_quoted(str(profile.path))}",
        *(["After=network.target"] if system else []),
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        *([f"User={pwd.getpwuid(os.getuid()).pw_name}"] if system else []),
        f"WorkingDirectory={_percent(str(folder))}",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in sorted(variables.items())),
        f"ExecStart={_command(run)}",
        f"ExecReload={_command(reload)}",
        "Restart=on-failure",
        "RestartSec=1",
        "# A stop is told to the supervisor alone: it stops the workers, then the broker.",
        "KillMode=process",
        f"TimeoutStopSec={stop_limit_s(profile.config.grace_s) + STOP_MARGIN_S:.0f}",
        "# A worker that runs out of memory is started again, and its processes go on.",
        "OOMPolicy=continue",
        "UMask=0077",
        "",
        "[Install]",
        f"WantedBy={'multi-user.target' if system else 'default.target'}",
    ]
    return "\n".join(lines) + "\n"


def unit_name(profile: Profile) -> str:
    """A name for the unit: ``prunus-NAME.service``."""
    path = profile.path
    name = path.parent.name if path.name == ".prunus" else path.name
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)
    return f"prunus-{plain.strip('-.') or 'daemon'}.service"


def _command(words: list[str]) -> str:
    return " ".join(_quoted(word).replace("$", "$$") for word in words)


def _quoted(text: str) -> str:
    """One word of a unit file."""
    text = _percent(text)
    if all(letter.isalnum() or letter in "/._-=:%+@," for letter in text):
        return text
    escaped = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'


def _percent(text: str) -> str:
    return text.replace("%", "%%")
