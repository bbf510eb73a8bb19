"""What the net devices of one process share: workers and the counters' file.

Promises: made when first needed; `configure` comes before that. Never: knows a device.
"""

from __future__ import annotations

import numpy as np

from pyvhost.dataplane import blocks, policy
from pyvhost.dataplane.net_loop import net_loop
from pyvhost.dataplane.switch_table import learn
from pyvhost.vhost.shared import Shared, called_by_python
from pyvhost.vhost.worker import Int64s, Worker, Workers


class Process(Shared):
    """The shared part. `workers`: how many threads serve queue pairs; None: one a processor."""

    def __init__(self, workers: int | None = None) -> None:
        super().__init__()
        self._own: dict[Worker, Int64s] = {}
        self._workers = Workers(lambda name: Worker(net_loop, name, self._worker_row(name)), "net", workers)

    @classmethod
    def configure(cls, *, workers: int | None) -> None:
        """Says how many worker threads there are to be, before the first device."""
        with Shared._making:
            if cls in Shared._made:
                raise RuntimeError("the number of workers can't change once there is a device")
            Shared._made[cls] = cls(workers)

    @staticmethod
    def prepare() -> None:
        """Has the data plane compiled, or loaded from the cache."""
        worker, rings, ports = (np.zeros(1, kind) for kind in (blocks.WORKER, blocks.RING, blocks.PORT))
        ring = rings[0]
        policy.prepare(
            "the net data plane",
            [
                (net_loop, (worker, rings, ports)),
                *called_by_python(ring),
                (learn, (0, 0, 0)),
            ],
        )

    def worker(self, key: str | None = None) -> Worker:
        """The worker for what has to be together, or the next in turn."""
        return self._workers.take(key)

    def own_worker(self, name: str) -> Worker:
        """A worker for its owner alone, who ends it."""
        row = self._worker_row(name)
        worker = Worker(net_loop, name, row)
        self._own[worker] = row
        return worker

    def end_worker(self, worker: Worker) -> None:
        """Ends one of `own_worker`; it has no port any more."""
        worker.close()
        self.counters.release(self._own.pop(worker))

    def _worker_row(self, name: str) -> Int64s:
        return self.row(name, "worker", "-", "-")
