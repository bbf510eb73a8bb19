"""A request virtqueue: its ring in a worker's loop, and the chains of it that are Python's.

Promises: a chain that the loop took is finished exactly once, through the loop or here; one whose life is over is
never written to; the walk of a chain in Python leaves the loop's record alone.
Never: knows what a request says.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np

from pyvhost.dataplane import blocks
from pyvhost.dataplane import scsi_blocks as layout
from pyvhost.dataplane.scsi_loop import sweep
from pyvhost.dataplane.walk import walk
from pyvhost.host.poller import Poller
from pyvhost.scsi.plane import Counted, DiskWorker
from pyvhost.scsi.units import UnitTable
from pyvhost.vhost import faults
from pyvhost.vhost.chains import Chain, chain_in, log_chain
from pyvhost.vhost.worker import Int64s, WorkerPlace

_log = logging.getLogger(__name__)

_WORD: Final = (1 << 64) - 1

#: Handles a chain that came at that time.monotonic_ns(); the queue's `finish` is due some time.
Handler = Callable[["RequestQueue", Chain, int], None]


class Owner(Protocol):
    """The device, as a queue knows it."""

    def loop_ended(self, serial: int) -> None:
        """A watched operation of the loop has ended."""

    def loop_drained(self) -> None:
        """The last operation of a watched unit has ended."""

    def chain_ended(self, chain: Chain) -> None:
        """Nobody uses a chain's memory any more."""

    def queue_waits(self, queue: RequestQueue, iova: int, perm: int) -> None:
        """A chain that is Python's needs an entry of the IOTLB; `look` says when to try again."""


class RequestQueue(WorkerPlace):
    """A place (`vring.Place`), over the device's table of logical units."""

    def __init__(
        self,
        worker: DiskWorker,
        name: str,
        row: Int64s,
        poller: Poller,
        handler: Handler,
        owner: Owner,
        units: UnitTable,
    ) -> None:
        with worker.paused():
            port = worker.add_port()
            ring = worker.add_ring(port, row, name)
            record = worker.ports[port]
            record["tx"] = ring
            record["header"] = 51
            record["python_fd"] = worker.python_fd
            record["units"], record["unit_mask"] = units.address, units.mask
        super().__init__(worker, port, ring)
        self.disk_worker = worker
        self.name = name
        self._handler = handler
        self._owner = owner
        self._poller = poller
        #: As long as the loop has anything of ours under way it reads there.
        self._units = units
        #: Called when nothing of a queue that nobody waits for is in flight.
        self._on_left: Callable[[], object] = lambda: None
        #: Heads whose chain waits for the IOTLB, and since when they are there.
        self._parked: list[tuple[int, int]] = []
        self._walk: Any = np.zeros(1, blocks.RING)
        self._batch = np.zeros(blocks.BATCH_BYTES // 8, np.int64)
        self._chains: set[Chain] = set()
        worker.own(ring, self._told, poller)

    @property
    def header(self) -> int:
        """Bytes that a request begins with, before the driver's data."""
        return int(self.worker.ports[self.port]["header"])

    @header.setter
    def header(self, size: int) -> None:
        if size != self.header:
            with self.worker.paused():
                self.worker.ports[self.port]["header"] = size

    @property
    def in_flight(self) -> int:
        """Chains that were taken and are not used."""
        return int(self.worker.ports[self.port]["in_flight"])

    @property
    def begun(self) -> int:
        """The same without those that Python has not begun: they wait for the IOTLB."""
        return self.in_flight - len(self._parked)

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
                if self.record["fault"] and not self.record["running"] and not self.record["fault_told"]:
                    # The loop is out, and will not tell.
                    self.worker._tell_of_ring(self.ring)
        self.disk_worker.serve()

    @property
    def dead(self) -> bool:
        """Whether another queue has to take its place."""
        return bool(self.worker.ports[self.port]["orphan"])

    def alive(self, chain: Chain) -> bool:
        """Whether somebody waits for a chain."""
        return not self.dead and chain in self._chains

    @property
    def pending(self) -> list[Chain]:
        """Chains of Python's whose memory is used, whether somebody waits for them or not."""
        return list(self._chains)

    def orphan(self) -> None:
        """Nobody waits for its chains any more: what is under way ends without a trace."""
        with self.worker.paused():
            self.worker.ports[self.port]["orphan"] = 1
            self.worker.ports[self.port]["held_back"] = 1
        for head, _ in self._parked:
            self.disk_worker.finish(self.ring, head, 0)
        self._parked.clear()

    def leave(self, left: Callable[[], object] = lambda: None) -> None:
        """Gives up its place, now or when the last of its chains has ended; `left` is called then."""
        if self.in_flight:
            self.orphan()
        self._on_left = left
        self.disk_worker.see_off(self._stays)

    def look(self) -> None:
        """Looks at the ring, and at what waits for the IOTLB, again."""
        super().look()
        if self._parked:
            self._poller.call_soon_threadsafe(self._try_again)

    def finish(self, chain: Chain, written: int, counted: Counted | None = None) -> None:
        """A chain of Python's is done with: its response and data are written. `counted`: what it counts as."""
        if chain not in self._chains:
            _log.error("%s: chain %d was finished before", self.name, chain.head)
            return
        self._chains.remove(chain)
        if self.dead:
            # Its life is over; the loop's count of it is not.
            self.disk_worker.finish(self.ring, chain.head, 0)
            self._owner.chain_ended(chain)
            return
        log_chain(self.record, chain, written)
        self.disk_worker.finish(self.ring, chain.head, written, counted)
        self._owner.chain_ended(chain)

    def close(self) -> None:
        """Gives up its place; nothing of it is in flight."""
        self.disk_worker.own(self.ring, None, None)
        with self.worker.paused():
            self.worker.remove_ring(self.ring)
            self.worker.remove_port(self.port)

    # --- within -------------------------------------------------------------------------------------------

    def _told(self, kind: int, head: int, extra: int) -> None:
        if kind == layout.TODO_ENDED:
            self._owner.loop_ended(extra)
        elif kind == layout.TODO_DRAINED:
            self._owner.loop_drained()
        elif self.worker.ports[self.port]["orphan"]:
            self.disk_worker.finish(self.ring, head, 0)
        else:
            if kind == layout.TODO_FAILED:
                _log.debug(
                    "%s: chain %d: the host said %s", self.name, head, errno.errorcode.get(extra, extra)
                )
            self._begin(head, extra if kind == layout.TODO_CHAIN else time.monotonic_ns())

    def _stays(self) -> bool:
        if self.in_flight:
            return True
        with self.worker.paused():
            # What the loop has said of it, it has said by now.
            self.disk_worker.serve()
            self.close()
        self._on_left()
        return False

    def _try_again(self) -> None:
        parked, self._parked = self._parked, []
        for head, since in parked:
            self._begin(head, since)

    def _begin(self, head: int, since: int) -> None:
        # A copy, for the loop has the record; what a walk reads of it only changes on this thread.
        self._walk[0] = self.record
        record = self._walk[0]
        record["hit_size"] = record["fault"] = 0
        base = int(self._batch.ctypes.data)
        iov = base + blocks.SLOTS * blocks.SLOT_BYTES
        if walk(record, head, base, iov, base + blocks.BATCH_SCRATCH) < 0:
            if record["fault"] == blocks.IOTLB_MISS:
                # It was there when the loop took the chain.
                self._parked.append((head, since))
                self._owner.queue_waits(self, int(record["fault_a"]) & _WORD, int(record["fault_b"]))
                return
            # It was whole when the loop took it: the guest has changed it, or its memory has gone.
            _log.error("%s: %s", self.name, faults.describe(record))
            self.disk_worker.finish(self.ring, head, 0)
            return
        chain = chain_in(base, record)
        self._chains.add(chain)
        self._handler(self, chain, since)
