"""A broker that starts on what is there: every process that somebody has to look at gets its task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from prunus.messaging.exchange import NewTask
from prunus.messaging.liveness import boottime
from prunus.persistence import NewProcess, ProcessStore, open_database
from prunus.runtime import broker
from prunus.runtime.broker import Broker


def test_missing_tasks_are_put_in_bounded_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: none of the commits is long, and the next start finds nothing to do."""
    monkeypatch.setattr(broker, "RECONCILED_AT_ONCE", 2)
    path = tmp_path / "prunus.db"
    with closing(open_database(path)) as connection:
        store = ProcessStore(connection)
        for number in range(5):
            store.create(NewProcess(pid=f"p{number}", class_id="a:B", checkpoint=b"c", created_at=1.0, queue="gpu"))
    for expected in ([2, 2, 1], []):
        one = Broker(path)
        sizes: list[int] = []

        def put(tasks: Sequence[NewTask], one: Broker = one, sizes: list[int] = sizes) -> None:
            sizes.append(len(tasks))
            one.exchange.put(boottime(), tasks)

        one.look_after(boottime(), put)
        assert sizes == expected
        assert one.exchange.statistics().queues["gpu"].ready == 5
        one.close()
