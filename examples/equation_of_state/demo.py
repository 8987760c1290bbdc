"""A daemon computes the equations of state of seven metals, and is disturbed while it does.

    python demo.py [FOLDER FOR THE PLOTS]

Exit code 0 if everything came out as it would have undisturbed, to a billionth; else 1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import prunus
import reference
from prunus.persistence.persister import Event, Query, Record
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Config, Profile
from workflow import METALS, EquationOfState

HERE = Path(__file__).resolve().parent
RESULTS = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE / "results"
DELAY_S = 1.5
"""Added to each energy, so that there is something to disturb."""
SLOTS = 64
"""For each worker: all processes run at once, so that those of a dead worker find room at once."""
TIME_LIMIT_S = 90.0
TOLERANCE = 1e-9
"""How far the results may be off the plain script (relative)."""

PAUSED, KILLED, DEAD_WORKER = "Pd", "Ag", "worker-1"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="prunus-demo-") as folder:
        profile = Profile.create(Path(folder) / "profile", Config(slots=SLOTS, import_from=[str(HERE)]))
        print(f"A new profile in {profile.path}, and its daemon:")
        try:
            prunus_command(profile, "daemon", "start", "-w", "2")
            all_is_well = asyncio.run(asyncio.wait_for(disturbed_run(profile), TIME_LIMIT_S))
        except (OSError, TimeoutError, subprocess.CalledProcessError, prunus.PrunusError) as error:
            print(f"!! {type(error).__name__}: {error}", flush=True)
            all_is_well = False
        finally:
            prunus_command(profile, "daemon", "stop")
    print()
    if all_is_well:
        print("All is well: every number agrees with the plain script, and nothing was lost with the worker.")
        return 0
    print("Something is wrong: see the lines marked with !!.")
    return 1


async def disturbed_run(profile: Profile) -> bool:
    """Launch, disturb, wait, compare. True if all is as it should be."""
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    async with prunus.connect(profile) as controller:
        handles: dict[str, prunus.ProcessHandle] = {}
        for metal in METALS:
            inputs = {"element": metal, "delay_s": DELAY_S, "folder": str(RESULTS)}
            handles[metal] = await controller.launch(EquationOfState, inputs, tags=["demo", metal])
        tell(f"launched EquationOfState for {', '.join(METALS)}")

        await handles[PAUSED].pause("looking at it")
        before = await handles[PAUSED].record()
        tell(f"paused {PAUSED}: it is {before.play}, in state {before.state}")

        killed = handles[KILLED]
        await killed.kill("changed my mind")
        tell(f"killed {KILLED}: it is {(await killed.record()).state}; launching it again")
        inputs = {"element": KILLED, "delay_s": DELAY_S, "folder": str(RESULTS)}
        handles[KILLED] = await controller.launch(EquationOfState, inputs, tags=["demo", KILLED])

        async with controller.events() as events:  # until the worker has something to lose
            while not any("EnergyAtScale" in held.class_id for held in await held_by(controller, DEAD_WORKER)):
                await anext(events)
        holder = read_holder(profile.lock(DEAD_WORKER))
        assert holder is not None, "a worker that holds processes holds its lock"
        os.kill(holder.pid, signal.SIGSTOP)  # so that what it holds does not change while we look
        victims = await held_by(controller, DEAD_WORKER)
        killed_at = time.time()
        os.kill(holder.pid, signal.SIGKILL)
        tell(f"kill -9 of {DEAD_WORKER} (process {holder.pid}), which held {len(victims)} processes")

        others = [handle for metal, handle in handles.items() if metal != PAUSED]
        await asyncio.gather(*(handle.result() for handle in others))
        after = await handles[PAUSED].record()
        tell(f"the other six have finished; {PAUSED} is still {after.play}: playing it")
        await handles[PAUSED].play()
        results = {metal: await handle.result() for metal, handle in handles.items()}
        tell(f"{PAUSED} went on and finished as well")

        good = before.play == after.play == "paused" and (await killed.record()).state == "killed"
        print()
        print("metal     a0 (Å)    B (GPa)   plain script: a0, B    agree to 1e-9")
        for metal, result in results.items():
            found = (result.outputs.lattice_constant, result.outputs.bulk_modulus)
            expected = await asyncio.to_thread(reference.equation_of_state, metal)
            agree = all(abs(x - y) <= TOLERANCE * abs(y) for x, y in zip(found, expected, strict=True))
            good &= agree
            print("{:<5} {:10.6f} {:10.4f}".format(metal, *found), end="   ")
            print("{:10.6f} {:10.4f}".format(*expected), "  yes" if agree else "  !! no")
        print(f"The plots are in {RESULTS}.")

        print()
        print(f"What {DEAD_WORKER} held when it died, and who went on with it:")
        print("pid                                   class            metal  resumed by      after     and is now")
        roots = {handle.pid: metal for metal, handle in handles.items()} | {killed.pid: KILLED}
        for victim in victims:
            handle = controller.handle(victim.pid)
            now = await handle.record()
            heir = next((e for e in await handle.history() if e.at >= killed_at and e.by != victim.owner), None)
            goes_along = victim.parent == killed.pid and now.state == "killed"
            fine = heir is not None and (now.state == "finished" or goes_along)
            good &= fine
            kind = victim.class_id.rpartition(":")[2]
            print(f"{victim.pid}  {kind:<15}  {roots[victim.parent or victim.pid]:<5}  {fate(heir, killed_at)}", end="")
            print(f"  {now.state}" if fine else f"  !! {now.state}")
        return good


async def held_by(controller: prunus.ProcessController, worker: str) -> list[Record]:
    """The processes that `worker` holds now."""
    records = await controller.find(Query(unfinished=True, limit=200))
    return [record for record in records if record.owner is not None and record.owner.startswith(f"{worker}-")]


def fate(heir: Event | None, killed_at: float) -> str:
    """Who went on, and after how long."""
    if heir is None or heir.by is None:
        return f"{'!! nobody':<14}  {'':<8}"
    worker = heir.by.rpartition("-")[0]
    shown = f"{worker} (new)" if worker == DEAD_WORKER else worker  # the daemon has started it again
    return f"{shown:<14}  {1000 * (heir.at - killed_at):5.0f} ms"


def prunus_command(profile: Profile, *arguments: str) -> None:
    """What a user would type."""
    print("$ prunus", *arguments, flush=True)
    program = Path(sys.executable).with_name("prunus")
    command = [str(program)] if program.exists() else [sys.executable, "-m", "prunus.runtime.cli"]
    subprocess.run([*command, *arguments], check=True, env=os.environ | {"PRUNUS_PROFILE": str(profile.path)})


if __name__ == "__main__":
    sys.exit(main())
