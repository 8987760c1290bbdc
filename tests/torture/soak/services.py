"""The supervisor and the broker of a soak: the real ones, and the broker looks at its database after its commits.

``python -m tests.torture.soak.services daemon --profile FOLDER`` is a supervisor whose broker is
``... services broker --profile FOLDER``. What the auditor (`tests.guarantees.audit`) finds is a line in the file
``audit`` of the profile. It looks at some commits in a row, then lets some pass: each look reads every live process.
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

from prunus.runtime import broker, supervisor
from prunus.runtime.profile import Profile
from prunus.runtime.roster import BROKER
from tests.guarantees.audit import Auditor

LOOKED_AT, LET_PASS = 100, 300
"""Commits."""
FILE = "audit"


class SomeCommits:
    """A failpoint of the broker: an auditor for some commits, and then for none."""

    def __init__(self, connection: sqlite3.Connection, file: Path) -> None:
        self._connection, self._file = connection, file
        self._number = 0
        self._auditor: Auditor | None = None

    def __call__(self, failpoint: str) -> None:
        if failpoint != "after_commit":
            return
        number, self._number = self._number, (self._number + 1) % (LOOKED_AT + LET_PASS)
        if number == 0:
            self._auditor = Auditor(self._connection)
        if self._auditor is None:
            return
        self._auditor(failpoint)
        if self._auditor.complaints or number == LOOKED_AT - 1:
            self._write(self._auditor)
            self._auditor = None

    def _write(self, auditor: Auditor) -> None:
        lines = [f"looked {auditor.commits} {auditor.releases}\n", *(f"{line}\n" for line in auditor.complaints)]
        with self._file.open("a") as file:
            file.write("".join(lines))


class AuditedBroker(broker.Broker):
    """A broker with an auditor."""

    def __init__(self, database: Path, *more: object, **options: object) -> None:
        super().__init__(database, *more, **options)  # type: ignore[arg-type]
        self.exchange.failpoint = SomeCommits(self._connection, database.with_name(FILE))


def command(name: str, profile: Path) -> list[str]:
    """A command that starts one of these two, also where nobody knows these tests."""
    from tests.torture.batch import environment

    path = f"PYTHONPATH={environment()['PYTHONPATH']}"
    module = "tests.torture.soak.services"
    return ["/usr/bin/env", path, sys.executable, "-m", module, name, "--profile", str(profile)]


def main() -> None:
    role, _, folder = sys.argv[1:]
    if role == "broker":
        broker.Broker = AuditedBroker  # type: ignore[misc]
        broker.main(["--profile", folder])
        return
    profile = Profile.load(Path(folder))

    def command_for(name: str) -> list[str]:
        if name == BROKER:
            return command("broker", profile.path)
        return supervisor.module_command("prunus.runtime.worker", profile, "--name", name)

    sys.exit(supervisor.main(["--profile", folder], command_for))


if __name__ == "__main__":
    main()
