"""G2: a task is acknowledged in the same transaction as the checkpoint that makes it unnecessary.

G12: every non-terminal process is live on one worker, queued, or parked with a registered wake-up.

Both are statements about what is on the disk, so they are checked after every single commit of a busy daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from prunus import errors
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.audit import Auditor
from tests.runtime import features, workflows
from tests.runtime.waiting import file_has, until


async def test_after_every_commit_each_process_is_ended_watched_or_parked(tmp_path: Path) -> None:
    """Children, timers, messages, pauses, kills, a dying and a leaving worker: not one commit is out of order."""
    file = tmp_path / "journal"
    async with LocalDaemon(workers=2, slots=3) as daemon:
        auditor = Auditor(daemon.connection)
        daemon.broker.exchange.failpoint = auditor
        launch = daemon.controller.launch
        chains = [await launch(workflows.Fan, {"count": 3}) for _ in range(10)]
        journals = [
            await launch(workflows.Journal, {"file": str(file), "steps": 10, "pace_s": 0.001}) for _ in range(5)
        ]
        asks = [await launch(workflows.Ask) for _ in range(5)]
        ledger = await launch(features.Ledger, {"file": str(tmp_path / "ledger"), "count": 3})
        others = [
            await launch(features.SumOfSquares, {"count": 6}),
            await launch(features.AsTheyCome),
            await launch(features.Nap, {"seconds": 0.01}),
        ]
        await file_has(file, 5)
        await ledger.send("entry", 1)
        await daemon.kill_worker("worker-1")
        await ledger.send("entry", 2)
        for handle in journals[:3]:
            with contextlib.suppress(errors.InvalidStateError):
                await handle.pause()
                await handle.play()
        await daemon.start_worker("worker-3")
        await daemon.stop_worker("worker-2")
        await asks[0].kill()
        for handle in asks[1:]:
            await handle.pause()
            await handle.play()
            await until(handle, lambda row: row.state == "waiting")
            await handle.resume(1)
        await ledger.send("entry", 3)
        await asyncio.gather(*(handle.result() for handle in [*chains, *journals, *asks[1:], *others, ledger]))
    assert auditor.complaints == []
    assert auditor.commits > 100
    assert auditor.releases > 50
