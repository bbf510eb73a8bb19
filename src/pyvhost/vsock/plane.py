"""The vsock workers: threads in `vsock_loop`, the connections they carry, and how much memory these may take.

Promises: what a guest may have under way is bounded for each connection, and for all together: who comes late is
granted less. Never: knows what a packet says.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar, Final

import numpy as np

from pyvhost.dataplane import blocks, inflight, policy, split_ring
from pyvhost.dataplane import vsock_blocks as layout
from pyvhost.dataplane.dirty_log import log_slot, log_used
from pyvhost.dataplane.vsock_loop import vsock_loop
from pyvhost.vhost import counters
from pyvhost.vhost.worker import Int64s, Slots, Worker, Workers

#: What connections are granted at least, bytes, and all of them together before that is all they get.
LEAST: Final = 16 << 10
BUDGET: Final = 256 << 20


class VsockWorker(Worker):
    """One thread in the vsock loop."""

    def __init__(self, name: str, row: Int64s) -> None:
        self.connections: Any = np.zeros(layout.MAX_CONNECTIONS, layout.CONNECTION)
        self.slots = Slots(layout.MAX_CONNECTIONS, "connections")
        super().__init__(
            lambda records, rings, guests: vsock_loop(records, rings, guests, self.connections),
            name,
            row,
            layout.GUEST,
        )


class Plane:
    """What the vsock devices of one process share: workers, counters, and memory for what is under way."""

    _the: ClassVar[Plane | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, workers: int | None = None) -> None:
        self.counters = counters.of_process()
        self.workers: Workers[VsockWorker] = Workers(
            lambda name: VsockWorker(name, self.row(name, "worker", "-", "-")), "vsock", workers
        )
        self._granted = 0
        self._serial = 0

    @classmethod
    def get(cls) -> Plane:
        """The process's own."""
        with cls._lock:
            if cls._the is None:
                cls._the = cls()
            return cls._the

    @staticmethod
    def prepare() -> None:
        """Has the data plane compiled, or loaded from the cache."""
        worker, rings, guests, connections = (
            np.zeros(1, kind) for kind in (blocks.WORKER, blocks.RING, layout.GUEST, layout.CONNECTION)
        )
        ring = rings[0]
        policy.prepare(
            "the vsock data plane",
            [
                (vsock_loop, (worker, rings, guests, connections)),
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
            ],
        )

    def row(self, device: str, kind: str, queue: str, backend: str) -> Int64s:
        """A row of counters."""
        return self.counters.row({"device": device, "kind": kind, "queue": queue, "backend": backend})

    def serial(self) -> int:
        """A connection's number, which no other has or will have."""
        with self._lock:
            self._serial += 1
            return self._serial

    def grant(self, wanted: int) -> int:
        """How much a connection's guest may have under way, bytes: a power of two, less the more is granted."""
        with self._lock:
            share = max(LEAST, min(wanted, (BUDGET - self._granted) // 16))
            share = 1 << (share.bit_length() - 1)
            self._granted += share
            return share

    def give_back(self, granted: int) -> None:
        """A connection has ended."""
        with self._lock:
            self._granted -= granted
