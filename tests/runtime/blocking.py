"""A process that blocks the loop of its worker."""

from __future__ import annotations

import time
from pathlib import Path

from prunus import Process

POLL_S = 0.01


class Blocks(Process):
    """Writes a line to `begun` each time that it begins, and blocks the loop until there is a file `go`; only the first
    `only` times."""

    @classmethod
    def define(cls, spec):  # type: ignore[no-untyped-def]
        super().define(spec)
        spec.input("begun", valid_type=str)
        spec.input("go", valid_type=str)
        spec.input("only", valid_type=int, default=1_000_000)
        spec.output("attempt", valid_type=int)

    async def run(self) -> None:
        self.block()

    def block(self) -> None:
        begun = Path(self.inputs.begun)
        with begun.open("a") as file:
            file.write("begun\n")
        attempt = len(begun.read_text().splitlines())
        while attempt <= self.inputs.only and not Path(self.inputs.go).exists():
            time.sleep(POLL_S)
        self.out("attempt", attempt)
