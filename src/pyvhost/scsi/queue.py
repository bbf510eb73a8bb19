"""A request virtqueue: its ring in a worker's loop, and the chains of it that are Python's.

Promises: a chain that the loop took is finished exactly once, through the loop or here; one whose life is over is
never written to; the walk of a chain in Python leaves the loop's record alone.
Never: knows what a request says.
"""

from __future__ import annotations

import ctypes
import errno
import logging
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from pyvhost.dataplane import blocks
from pyvhost.dataplane import scsi_blocks as layout
from pyvhost.dataplane.dirty_log import mark
from pyvhost.dataplane.scsi_loop import sweep
from pyvhost.dataplane.walk import walk
from pyvhost.host.poller import Poller
from pyvhost.scsi.plane import DiskWorker
from pyvhost.vhost import faults
from pyvhost.vhost.chains import Chain, chain_in
from pyvhost.vhost.worker import Int64s, WorkerPlace

_log = logging.getLogger(__name__)

#: Handles a chain; the queue's `finish` is due some time.
Handler = Callable[["RequestQueue", Chain], None]
#: Told that an operation has ended (`scsi_blocks.TODO_ENDED` or `TODO_DRAINED`), and which one.
Ended = Callable[[int, int], None]


class RequestQueue(WorkerPlace):
    """A place (`vring.Place`). `units`: address and mask of the device's table of logical units."""

    def __init__(
        self, worker: DiskWorker, name: str, row: Int64s, poller: Poller, handler: Handler, ended: Ended
    ) -> None:
        with worker.paused():
            port = worker.add_port()
            ring = worker.add_ring(port, row, name)
            record = worker.ports[port]
            record["tx"] = ring
            record["header"] = 51
            record["python_fd"] = worker.python_fd
        super().__init__(worker, port, ring)
        self.disk_worker = worker
        self.name = name
        self._handler = handler
        self._ended = ended
        self._walk: Any = np.zeros(1, blocks.RING)
        self._batch = np.zeros(blocks.BATCH_BYTES // 8, np.int64)
        self._chains: set[Chain] = set()
        worker.own(ring, self._told, poller)

    def use_units(self, address: int, mask: int) -> None:
        """Takes over the device's table of logical units. While paused."""
        record = self.worker.ports[self.port]
        record["units"], record["unit_mask"] = address, mask

    @property
    def in_flight(self) -> int:
        """Chains that were taken and are not used."""
        return int(self.worker.ports[self.port]["in_flight"])

    def hold_back(self, held: bool) -> None:
        """Has the loop take no more chains; Python is told when the last one is used."""
        with self.worker.paused():
            self.worker.ports[self.port]["held_back"] = int(held)
            if not held:
                self.worker.activate(self.port)

    def sweep(self) -> None:
        """Has everything that is available taken, and Python told of it."""
        with self.worker.paused():
            if self.record["running"]:
                sweep(self.worker._records[0], self.worker.rings, self.worker.ports, self.port)
        self.disk_worker.serve()

    @property
    def dead(self) -> bool:
        """Whether another queue has to take its place."""
        return bool(self.worker.ports[self.port]["orphan"])

    def alive(self, chain: Chain) -> bool:
        """Whether somebody waits for a chain."""
        return chain in self._chains

    def orphan(self) -> None:
        """Nobody waits for its chains any more: what is under way ends without a trace."""
        with self.worker.paused():
            self.worker.ports[self.port]["orphan"] = 1
            self.worker.ports[self.port]["held_back"] = 1
        self._chains.clear()

    def leave(self) -> None:
        """Gives up its place, now or when the last of its chains has ended."""
        if self.in_flight == 0:
            self.close()
        else:
            self.orphan()

    def finish(self, chain: Chain, written: int) -> None:
        """A chain of Python's is done with: its response and data are written."""
        if chain not in self._chains:
            # Its life is over; the loop's count of it is not.
            self.disk_worker.finish(self.ring, chain.head, 0)
            return
        self._chains.remove(chain)
        record = self.record
        if record["log_data"]:
            left = written
            for address, size in chain.logged:
                mark(record["log_data"], record["log_bytes"], address, min(size, left))
                left = max(left - size, 0)
        self.disk_worker.finish(self.ring, chain.head, written)

    def close(self) -> None:
        """Gives up its place; nothing of it is in flight."""
        self.disk_worker.own(self.ring, None, None)
        with self.worker.paused():
            self.worker.remove_ring(self.ring)
            self.worker.remove_port(self.port)

    # --- within -------------------------------------------------------------------------------------------

    def _told(self, kind: int, head: int, extra: int) -> None:
        if kind in (layout.TODO_ENDED, layout.TODO_DRAINED):
            self._ended(kind, extra)
        elif self.worker.ports[self.port]["orphan"]:
            self.disk_worker.finish(self.ring, head, 0)
        else:
            if kind == layout.TODO_FAILED:
                _log.debug(
                    "%s: chain %d: the host said %s", self.name, head, errno.errorcode.get(extra, extra)
                )
            self._begin(head)

    def _begin(self, head: int) -> None:
        # A copy, for the loop has the record; what a walk reads of it only changes on this thread.
        self._walk[0] = self.record
        record = self._walk[0]
        record["hit_size"] = record["fault"] = 0
        base = int(self._batch.ctypes.data)
        iov = base + blocks.SLOTS * blocks.SLOT_BYTES
        if walk(record, head, base, iov, base + blocks.BATCH_SCRATCH) < 0:
            # It was whole when the loop took it: the guest has changed it, or its memory has gone.
            _log.error("%s: %s", self.name, faults.describe(record))
            self.disk_worker.finish(self.ring, head, 0)
            return
        chain = chain_in(base, record)
        self._chains.add(chain)
        self._handler(self, chain)


def zeroed(size: int) -> tuple[Any, int]:
    """Memory and its address."""
    memory = (ctypes.c_int64 * (size // 8))()
    return memory, ctypes.addressof(memory)


ROW_BYTES: Final = 8 * len(blocks.COUNTERS)
