"""What the net devices of one process share: workers and the counters' file.

Promises: made when first needed; `configure` comes before that. Never: knows a device.
"""

from __future__ import annotations

import threading
from typing import ClassVar

import numpy as np

from pyvhost.dataplane import blocks, inflight, policy, split_ring
from pyvhost.dataplane.dirty_log import log_slot, log_used
from pyvhost.dataplane.net_loop import net_loop
from pyvhost.dataplane.switch_table import learn
from pyvhost.vhost import counters
from pyvhost.vhost.worker import Int64s, Worker, Workers


class Process:
    """The shared part. `workers`: how many threads serve queue pairs; None: one a processor."""

    _the: ClassVar[Process | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, workers: int | None = None) -> None:
        self.counters = counters.of_process()
        self._own: dict[Worker, Int64s] = {}
        self._workers = Workers(lambda name: Worker(net_loop, name, self._worker_row(name)), "net", workers)

    @classmethod
    def get(cls) -> Process:
        """The process's own."""
        with cls._lock:
            if cls._the is None:
                cls._the = cls()
            return cls._the

    @classmethod
    def configure(cls, *, workers: int | None) -> None:
        """Says how many worker threads there are to be, before the first device."""
        with cls._lock:
            if cls._the is not None:
                raise RuntimeError("the number of workers can't change once there is a device")
            cls._the = cls(workers)

    @staticmethod
    def prepare() -> None:
        """Has the data plane compiled, or loaded from the cache."""
        worker, rings, ports = (np.zeros(1, kind) for kind in (blocks.WORKER, blocks.RING, blocks.PORT))
        ring = rings[0]
        policy.prepare(
            "the net data plane",
            [
                (net_loop, (worker, rings, ports)),
                (split_ring.collect, (ring, 0, 0, 0, 0, 0)),
                (split_ring.use, (ring, 0, 0)),
                (split_ring.use_written, (ring, 0, 0)),
                (inflight.begin, (ring, 0)),
                (split_ring.take, (ring, 0)),
                (split_ring.publish, (ring,)),
                (split_ring.want_kicks, (ring, True)),
                (split_ring.stop_at_fault, (ring,)),
                (log_used, (ring, 0, 0)),
                (log_slot, (ring, 0, 0)),
                (learn, (0, 0, 0)),
            ],
        )

    def row(self, device: str, kind: str, queue: str, backend: str) -> Int64s:
        """A row of counters."""
        return self.counters.row({"device": device, "kind": kind, "queue": queue, "backend": backend})

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
