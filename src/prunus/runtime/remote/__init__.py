"""Hosts that processes work on: connections that are shared, and the transports behind them.

::

    async def submit(self):                          # a step
        async with prunus.connection("cluster") as host:
            done = await host.run(["sbatch", "job.sh"], cwd="work")

Endpoints have names; the profile's ``config.yaml`` says what is behind each. Every worker has one `ResourceQueue`,
which opens a connection when the first process asks for it and shares it between all of them.
"""

from __future__ import annotations

from prunus.runtime.remote.connections import Connections, connection
from prunus.runtime.remote.queue import Request, ResourceQueue, Usage
from prunus.runtime.remote.sharing import Limits
from prunus.runtime.remote.transport import Completed, Transport

__all__ = ["Completed", "Connections", "Limits", "Request", "ResourceQueue", "Transport", "Usage", "connection"]
