"""The scsi workers: threads in `scsi_loop`, their io_uring, and the queues between them and the control thread.

Promises: what the loop hands over comes to its owner on the control thread, in order; what Python has finished
goes back without a pause of the loop; without io_uring on the host all commands are Python's.
Never: knows a command.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

import numpy as np

from pyvhost.dataplane import blocks, policy
from pyvhost.dataplane import scsi_blocks as layout
from pyvhost.dataplane.plain import load64, load64_acquire, store64, store64_release
from pyvhost.dataplane.scsi_loop import scsi_loop, sweep
from pyvhost.dataplane.walk import walk
from pyvhost.host import eventfd
from pyvhost.host.poller import Poller
from pyvhost.host.uring import Uring
from pyvhost.vhost.shared import Shared, called_by_python
from pyvhost.vhost.worker import Int64s, Worker, Workers

_log = logging.getLogger(__name__)

#: Told of an entry from the loop: what it says (`scsi_blocks.TODO_*`), head, and a third number.
Owner = Callable[[int, int, int], None]
#: Says whether an operation of the loop is meant, by its unit's entry and its tag as the driver wrote it.
Chosen = Callable[[int, int], bool]


class Counted(NamedTuple):
    """What a command that was Python's adds to a unit's row, which has one writer, the loop."""

    #: The row's address.
    row: int
    failed: bool
    #: Offset of the counter for commands of its kind.
    kind: int
    #: Bytes moved.
    length: int
    nanoseconds: int


class DiskWorker(Worker):
    """One thread in the scsi loop."""

    def __init__(self, name: str, row: Int64s) -> None:
        super().__init__(scsi_loop, name, row, layout.QUEUE)
        self._disks = np.zeros(layout.DISKS_BYTES // 8, np.int64)
        self._ops = np.zeros(layout.OPS * layout.OP_BYTES // 8, np.int64)
        self._todo = np.zeros(layout.ENTRIES * layout.ENTRY_BYTES // 8, np.int64)
        self._done = np.zeros(layout.ENTRIES * layout.DONE_BYTES // 8, np.int64)
        self._taken = np.zeros(8, np.int64)
        self._lock = threading.Lock()
        self._owners: dict[int, Owner] = {}
        #: Signalled by the loop when there is something for Python.
        self.python_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pollers: set[Poller] = set()
        #: Told when something of a ring that takes nothing more has ended: each gives back whether it stays here.
        self._leaving: list[Callable[[], bool]] = []
        self.disks = int(self._disks.ctypes.data)
        self.ops = int(self._ops.ctypes.data)
        for at, value in (
            (layout.DISKS_URING_FD, -1),
            (layout.DISKS_OPS, self.ops),
            (layout.DISKS_FREE, -1),
            (layout.DISKS_TODO, int(self._todo.ctypes.data)),
            (layout.DISKS_TODO_TAKEN, int(self._taken.ctypes.data)),
            (layout.DISKS_DONE, int(self._done.ctypes.data)),
        ):
            store64(self.disks + at, value)
        self._records[0]["disks"] = self.disks
        self._uring = self._make_uring()

    @property
    def has_uring(self) -> bool:
        """Whether READ and WRITE may take the short way at all."""
        return self._uring is not None

    def _make_uring(self) -> Uring | None:
        try:
            uring = Uring(layout.OPS)
        except OSError as error:
            _log.warning("%s: no io_uring, so all commands take the long way: %s", self.name, error.strerror)
            # An empty completion queue, for the loop to look at.
            store64(self.disks + layout.DISKS_CQ_HEAD, int(self._taken.ctypes.data) + 32)
            store64(self.disks + layout.DISKS_CQ_TAIL, int(self._taken.ctypes.data) + 32)
            store64(self.disks + layout.DISKS_SQ_FLAGS, int(self._taken.ctypes.data) + 32)
            return None
        for at, value in (
            (layout.DISKS_URING_FD, uring.fd),
            (layout.DISKS_SQ_TAIL, uring.sq_tail),
            (layout.DISKS_SQ_MASK, uring.sq_mask),
            (layout.DISKS_SQ_ARRAY, uring.sq_array),
            (layout.DISKS_SQ_FLAGS, uring.sq_flags),
            (layout.DISKS_SQES, uring.sqes),
            (layout.DISKS_CQ_HEAD, uring.cq_head),
            (layout.DISKS_CQ_TAIL, uring.cq_tail),
            (layout.DISKS_CQ_MASK, uring.cq_mask),
            (layout.DISKS_CQES, uring.cqes),
            (layout.DISKS_FREE, 0),
        ):
            store64(self.disks + at, value)
        for number in range(layout.OPS):
            following = number + 1 if number + 1 < layout.OPS else -1
            store64(self.ops + number * layout.OP_BYTES + layout.OP_NEXT, following)
        self.watch(uring.fd, select.EPOLLIN, blocks.EVENT_WAKE, 0)
        return uring

    def own(self, ring: int, owner: Owner | None, poller: Poller | None) -> None:
        """Says who is told of a ring's entries, on `poller`'s thread; None: nobody any more."""
        if owner is None:
            self._owners.pop(ring, None)
            return
        self._owners[ring] = owner
        if poller is not None and poller not in self._pollers:
            self._pollers.add(poller)
            poller.register(self.python_fd, select.EPOLLIN, lambda _events: self.serve(), inner=True)

    def serve(self) -> None:
        """Tells the owners of what the loop has handed over. On the control thread."""
        eventfd.drain(self.python_fd)
        # Pairs with the loop's release store, behind the entries.
        put = load64_acquire(self.disks + layout.DISKS_TODO_PUT)
        # An owner may come here itself: each entry is whose who counts it as taken.
        while (taken := int(self._taken[0])) < put:
            entry = load64(self.disks + layout.DISKS_TODO) + (taken % layout.ENTRIES) * layout.ENTRY_BYTES
            kind, ring, head, extra = (load64(entry + 8 * i) for i in range(4))
            store64_release(int(self._taken.ctypes.data), taken + 1)
            owner = self._owners.get(ring)
            if owner is not None:
                try:
                    owner(kind, head, extra)
                except Exception:
                    _log.exception("%s: chain %d of ring %d", self.name, head, ring)
        leaving, self._leaving = self._leaving, []
        self._leaving += [stays for stays in leaving if stays()]

    def see_off(self, stays: Callable[[], bool]) -> None:
        """Calls `stays` now and then, from the control thread, until it says no."""
        if stays():
            self._leaving.append(stays)

    def finish(self, ring: int, head: int, written: int, counted: Counted | None = None) -> None:
        """Has the loop use a chain that was Python's, and count it. From any thread."""
        numbers = (ring, head, written, *(counted or ()))
        with self._lock:
            put = load64(self.disks + layout.DISKS_DONE_PUT)
            entry = load64(self.disks + layout.DISKS_DONE) + (put % layout.ENTRIES) * layout.DONE_BYTES
            store64(entry + layout.DONE_ROW, 0)
            for i, value in enumerate(numbers):
                store64(entry + 8 * i, value)
            # Pairs with the loop's acquire load of the number.
            store64_release(self.disks + layout.DISKS_DONE_PUT, put + 1)
        os.eventfd_write(self._wake, 1)

    def operations(self, ports: Container[int], chosen: Chosen) -> Iterator[int]:
        """The addresses of the operations under way for some queues. While paused."""
        states = self._ops[layout.OP_STATE // 8 :: layout.OP_BYTES // 8]
        for number in np.flatnonzero(states).tolist():
            op = self.ops + number * layout.OP_BYTES
            if load64(op + layout.OP_QUEUE) in ports:
                tag = load64(op + layout.OP_TAG) & 0xFFFFFFFFFFFFFFFF
                if chosen(load64(op + layout.OP_UNIT), tag):
                    yield op

    def watch_operations(self, ports: Container[int], chosen: Chosen, code: int = 0) -> list[int]:
        """Has the loop tell when operations end; with `code`, it answers them so. Their serial numbers."""
        watched = []
        with self.paused():
            for op in self.operations(ports, chosen):
                if code and not load64(op + layout.OP_ABORT):
                    store64(op + layout.OP_ABORT, code)
                watched.append(self._watch(op))
        return watched

    def watch_writing(self, ports: Container[int], chosen: Callable[[int, int], bool]) -> list[int]:
        """The same of operations that may yet write to guest memory of which `chosen(address, bytes)`."""
        with self.paused():
            return [
                self._watch(op)
                for op in self.operations(ports, lambda unit, tag: True)
                if any(chosen(*piece) for piece in self._pieces(op))
            ]

    @staticmethod
    def _watch(op: int) -> int:
        store64(op + layout.OP_WATCHED, 1)
        return load64(op + layout.OP_SERIAL)

    @staticmethod
    def _pieces(op: int) -> Iterator[tuple[int, int]]:
        for i in range(load64(op + layout.OP_PIECES)):
            piece = op + layout.OP_PIECE + 16 * i
            yield load64(piece), load64(piece + 8)

    def close(self) -> None:
        """Ends the thread."""
        super().close()
        for poller in self._pollers:
            poller.unregister(self.python_fd)
        if self._uring is not None:
            self._uring.close()
        os.close(self.python_fd)


class Plane(Shared):
    """What the scsi devices of one process share: workers and counters."""

    def __init__(self, workers: int | None = None) -> None:
        super().__init__()
        self.workers = self._make_workers("scsi", workers)
        #: Of devices that are opened in process: a worker tells one control thread, and theirs is the process's own.
        self.in_process = self._make_workers("scsi-opened", workers)

    def _make_workers(self, kind: str, count: int | None) -> Workers[DiskWorker]:
        return Workers(lambda name: DiskWorker(name, self.row(name, "worker", "-", "-")), kind, count)

    @staticmethod
    def prepare() -> None:
        """Has the data plane compiled, or loaded from the cache."""
        worker, rings, queues = (np.zeros(1, kind) for kind in (blocks.WORKER, blocks.RING, layout.QUEUE))
        ring = rings[0]
        policy.prepare(
            "the scsi data plane",
            [
                (scsi_loop, (worker, rings, queues)),
                (sweep, (worker[0], rings, queues, 0)),
                (walk, (ring, 0, 0, 0, 0)),
                *called_by_python(ring),
            ],
        )
