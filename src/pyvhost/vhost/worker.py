"""Workers: threads that sit in a compiled loop, and how control gets them out of it and in again.

The loop's entry and exit play the part of the seed's rcu_read_lock and flush_work: what a loop reads is only
changed inside `paused`, and when `paused` has begun, no loop holds what was there before.

Promises: entering `paused` takes as long as a batch, and as long as another thread is in one; nested and repeated
uses are fine; a worker has a thread once it has a port.
Never: runs Python while a ring waits, but to tell of a fault.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import logging
import os
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pyvhost.dataplane import blocks, guard
from pyvhost.vhost import faults, lent

if TYPE_CHECKING:
    from pyvhost.vhost.vring import Vring

_log = logging.getLogger(__name__)

_libc = ctypes.CDLL(None, use_errno=True)
_ADD: Final = 1
_DEL: Final = 2
_EPOLLET: Final = 1 << 31
_FOR_EVER: Final = 1 << 62

Int64s = npt.NDArray[np.int64]
#: A compiled loop: worker, rings and ports in, a reason out.
Loop = Callable[[Any, Any, Any], int]


#: Devices are used by threads of their own and share workers. One for all workers: who holds several has taken them
#: in an order of its own.
_changing: Final = threading.RLock()


class _Thread(threading.Thread):
    """A worker's."""


class _EpollEvent(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("index", ctypes.c_uint32), ("kind", ctypes.c_uint32))


class Slots:
    """Indices of an array, given out and taken back, lowest first."""

    def __init__(self, capacity: int, what: str) -> None:
        self._capacity = capacity
        self._what = what
        self._free: list[int] = []
        self._next = 0

    def take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        if self._next == self._capacity:
            raise RuntimeError(f"a worker has room for {self._capacity} {self._what}")
        self._next += 1
        return self._next - 1

    def give_back(self, index: int) -> None:
        heapq.heappush(self._free, index)


class Worker:
    """One thread, one loop, and the arrays that the loop reads."""

    def __init__(self, loop: Loop, name: str, row: Int64s, port: np.dtype[np.void] = blocks.PORT) -> None:
        self.name = name
        self._loop = loop
        self._row = row
        self._port = port
        self.rings: Any = np.zeros(blocks.MAX_RINGS, blocks.RING)
        self.ports: Any = np.zeros(blocks.MAX_PORTS, port)
        self._records: Any = np.zeros(1, blocks.WORKER)
        self._memory = {
            "control": np.zeros(8, np.int64),
            "tx_batch": np.zeros(blocks.BATCH_BYTES // 8, np.int64),
            "rx_batch": np.zeros(blocks.BATCH_BYTES // 8, np.int64),
            "scratch": np.zeros(-(-blocks.SCRATCH_BYTES // 8), np.int64),
            "events": np.zeros(blocks.EVENTS * 2, np.int64),
            "active": np.zeros(blocks.MAX_PORTS, np.int64),
        }
        #: Pages of lent memory that the loop found missing: how many, then which (`guard.take_seat`).
        self._missing = np.zeros(1 + guard.LOST_PAGES, np.int64)
        record = self._records[0]
        for field, memory in self._memory.items():
            record[field] = memory.ctypes.data
        record["row"] = row.ctypes.data
        self._epoll = select.epoll()
        record["epoll"] = self._epoll.fileno()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._wake, select.EPOLLIN, blocks.EVENT_WAKE, 0)
        self._ring_slots = Slots(blocks.MAX_RINGS, "rings")
        self._port_slots = Slots(blocks.MAX_PORTS, "ports")
        #: Told, in the worker's thread, of the host's faults: by port index.
        self.on_backend_fault: dict[int, Callable[[int], None]] = {}
        #: Who a ring is, for the log: by ring index.
        self.ring_names: dict[int, str] = {}
        #: Told, in the worker's thread, that a ring waits for the IOTLB: by ring index.
        self.on_wait: dict[int, Callable[[], None]] = {}
        #: Which rings have no kick to wait for: by port index.
        self.polled: dict[int, set[int]] = {}
        #: How long each ring is polled before it rests, nanoseconds: by port index.
        self.busy: dict[int, dict[int, int]] = {}
        self._state = threading.Condition()
        self._pauses = 0
        self._inside = False
        self._closing = False
        self._thread: threading.Thread | None = None
        lent.know(self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this is held, the worker's thread is outside its loop, and no other thread changes any worker."""
        if isinstance(threading.current_thread(), _Thread):
            raise RuntimeError("a worker can't pause itself, nor wait for another's pause")
        with _changing, self._pause():
            yield

    @contextmanager
    def _pause(self) -> Iterator[None]:
        with self._state:
            self._pauses += 1
        try:
            with self._state:
                # Pairs with the loop's ordered load; the lock is the barrier.
                self._memory["control"][blocks.CONTROL_STOP] = 1
                if self._inside:
                    os.eventfd_write(self._wake, 1)
                while self._inside:
                    self._state.wait()
            yield
        finally:
            with self._state:
                self._pauses -= 1
                if self._pauses == 0:
                    self._memory["control"][blocks.CONTROL_STOP] = 0
                    self._state.notify_all()

    # --- what the loop serves; all of these only while paused -------------------------------------------

    def add_port(self) -> int:
        """A port's index in `ports`; its record is all zeros but for what means "none"."""
        index = self._port_slots.take()
        record = self.ports[index]
        self.ports[index] = np.zeros(1, self._port)[0]
        for field, value in (("fd", -1), ("tx", -1), ("rx", -1), ("left", -1), ("expect", 1514)):
            if field in (self._port.names or ()):
                record[field] = value
        record["used"] = 1
        self._records[0]["ports"] += 1
        self._start()
        return index

    def remove_port(self, index: int) -> None:
        """Takes a port out; its rings are not running any more."""
        self.deactivate(index)
        self.ports[index]["used"] = 0
        self.on_backend_fault.pop(index, None)
        self.polled.pop(index, None)
        self.busy.pop(index, None)
        self._records[0]["ports"] -= 1
        self._port_slots.give_back(index)

    def add_ring(self, port: int, row: Int64s, name: str) -> int:
        """A ring's index in `rings`, for `port`."""
        index = self._ring_slots.take()
        self.rings[index] = np.zeros(1, blocks.RING)[0]
        record = self.rings[index]
        record["port"] = port
        record["row"] = row.ctypes.data
        record["call_fd"] = record["err_fd"] = record["log_fd"] = -1
        self.ring_names[index] = name
        return index

    def remove_ring(self, index: int) -> None:
        """Takes a ring out that does not run."""
        self.ring_names.pop(index, None)
        self.on_wait.pop(index, None)
        self._ring_slots.give_back(index)

    def activate(self, port: int) -> None:
        """Has the loop look at a port at once."""
        record, worker = self.ports[port], self._records[0]
        if not record["active"]:
            record["active"] = 1
            record["idle_since"] = 0
            self._memory["active"][worker["active_count"]] = port
            worker["active_count"] += 1

    def deactivate(self, port: int) -> None:
        """Has the loop forget that a port was active."""
        worker, active = self._records[0], self._memory["active"]
        if self.ports[port]["active"]:
            count = int(worker["active_count"])
            kept = [index for index in active[:count] if index != port]
            active[: len(kept)] = kept
            worker["active_count"] = len(kept)
            self.ports[port]["active"] = 0

    def watch(self, fd: int, events: int, kind: int, index: int) -> None:
        """Has epoll wake the loop, edge-triggered; `kind` and `index` as `blocks.EVENT_*` say."""
        event = _EpollEvent(events | _EPOLLET, index, kind)
        if _libc.epoll_ctl(self._epoll.fileno(), _ADD, fd, ctypes.byref(event)) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"descriptor {fd} can't be watched: {os.strerror(code)}")
        if kind == blocks.EVENT_PORT:
            self._records[0]["watched"] += 1

    def unwatch(self, fd: int, kind: int) -> None:
        """Ends `watch`, before the descriptor is closed."""
        _libc.epoll_ctl(self._epoll.fileno(), _DEL, fd, ctypes.byref(_EpollEvent()))
        if kind == blocks.EVENT_PORT:
            self._records[0]["watched"] -= 1

    def use_fd(self, port: int, old: int, new: int) -> int:
        """Puts a port's descriptor in place of another, -1 for none; the new one. The old one is still open.

        OSError: the new one can't be watched, and nothing has changed.
        """
        with self.paused():
            record = self.ports[port]
            # A port of one ring is not woken by what only concerns another's.
            events = select.EPOLLIN if record["rx"] >= 0 or record["row"] else 0
            events |= select.EPOLLOUT if record["tx"] >= 0 or record["row"] else 0
            if old >= 0:
                self.unwatch(old, blocks.EVENT_PORT)
            if new >= 0:
                try:
                    self.watch(new, events, blocks.EVENT_PORT, port)
                except OSError:
                    if old >= 0:
                        self.watch(old, events, blocks.EVENT_PORT, port)
                    raise
            for field in ("held", "stream_have", "stream_at", "unsent_bytes", "error", "error_told"):
                record[field] = 0
            record["fd"] = new
            record["readable"] = record["writable"] = int(new >= 0)
            if new >= 0:
                self.activate(port)
        return new

    # --- the thread -------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            self._thread = _Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        seat = guard.take_seat(
            self.rings.ctypes.data, self._memory["control"].ctypes.data, self._missing.ctypes.data
        )
        try:
            self._serve(seat)
        finally:
            guard.leave_seat(seat)

    def _serve(self, seat: int) -> None:
        while True:
            with self._state:
                while self._pauses and not self._closing:
                    self._state.wait()
                if self._closing:
                    return
                self._inside = True
            try:
                guard.enter(seat)
                try:
                    reason = self._loop(self._records, self.rings, self.ports)
                finally:
                    guard.leave(seat)
                if self._missing[0]:
                    self._tell_of_pages()
                self._tell(reason)
            except Exception:
                _log.exception("%s: what the loop came back for", self.name)
            finally:
                with self._state:
                    self._inside = False
                    if not self._pauses:
                        # It was the guard that had the loop stop.
                        self._memory["control"][blocks.CONTROL_STOP] = 0
                    self._state.notify_all()

    def _tell_of_pages(self) -> None:
        pages = [int(page) for page in self._missing[1 : 1 + self._missing[0]]]
        self._missing[0] = 0
        lent.stop(self, pages)
        lent.tell_others(self, pages)

    def _tell(self, reason: int) -> None:
        record = self._records[0]
        if reason & blocks.REASON_RING:
            rings = self.rings
            untold = (rings["fault"] != 0) & (rings["fault_told"] == 0) & (rings["running"] == 0)
            for ring in np.flatnonzero(untold):
                self._tell_of_ring(int(ring))
        if reason & blocks.REASON_BACKEND_FAULT:
            port = int(record["reason_port"])
            told = self.on_backend_fault.get(port)
            if told is not None:
                told(int(self.ports[port]["error"]))

    def _tell_of_ring(self, ring: int) -> None:
        record = self.rings[ring]
        record["fault_told"] = 1
        if record["fault"] != blocks.IOTLB_MISS:
            name = self.ring_names.get(ring, f"ring {ring}")
            _log.error("%s: stopped: %s", name, faults.describe(record))
        elif (waits := self.on_wait.get(ring)) is not None:
            waits()

    def close(self) -> None:
        """Ends the thread."""
        with self.paused(), self._state:
            self._closing = True
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._epoll.close()
        os.close(self._wake)


W = TypeVar("W", bound=Worker)


class WorkerPlace:
    """A place (`device.Place`): a ring of a worker's port."""

    def __init__(self, worker: Worker, port: int, ring: int) -> None:
        self.worker = worker
        self.port = port
        self.ring = ring

    @property
    def record(self) -> Any:
        """The ring's record."""
        return self.worker.rings[self.ring]

    def paused(self) -> AbstractContextManager[None]:
        """The worker's pause."""
        return self.worker.paused()

    def begin(self, vring: Vring) -> None:
        """Listens for kicks, or polls for ever where there is none to listen for; looks at once."""
        if vring.kick >= 0:
            self.worker.watch(vring.kick, select.EPOLLIN, blocks.EVENT_KICK, self.ring)
        else:
            self.worker.polled.setdefault(self.port, set()).add(self.ring)
        self.poll_for(vring)
        self.look()

    def end(self, vring: Vring) -> None:
        """Stops listening."""
        if vring.kick >= 0:
            self.worker.unwatch(vring.kick, blocks.EVENT_KICK)
        self.worker.polled.get(self.port, set()).discard(self.ring)
        self.worker.busy.get(self.port, {}).pop(self.ring, None)
        self._set_busy()

    def look(self) -> None:
        """Has the loop look at the port at once."""
        record = self.worker.ports[self.port]
        record["readable"] = int(record["fd"] >= 0)
        self.worker.activate(self.port)

    def poll_for(self, vring: Vring) -> None:
        """Takes over the vring's `busyloop_timeout`, whose unit is 1024 ns as on Linux."""
        self.worker.busy.setdefault(self.port, {})[self.ring] = vring.busyloop_timeout << 10
        self._set_busy()

    @property
    def on_wait(self) -> Callable[[], None] | None:
        """Called in the worker's thread when the ring waits for the IOTLB."""
        return self.worker.on_wait.get(self.ring)

    @on_wait.setter
    def on_wait(self, waits: Callable[[], None] | None) -> None:
        if waits is None:
            self.worker.on_wait.pop(self.ring, None)
        else:
            self.worker.on_wait[self.ring] = waits

    def _set_busy(self) -> None:
        """A port is polled for ever while one of its rings has no kick, and not a moment longer."""
        polled = self.worker.polled.get(self.port)
        longest = max(self.worker.busy.get(self.port, {}).values(), default=0)
        self.worker.ports[self.port]["busy_ns"] = _FOR_EVER if polled else longest


class Workers(Generic[W]):
    """The process's workers of one device type: made when needed, shared by key or in turn.

    `make`: one, given its name. `count`: how many threads; None: one a processor, eight at most.
    """

    def __init__(self, make: Callable[[str], W], kind: str, count: int | None = None) -> None:
        self._make = make
        self._kind = kind
        self.count = count or min(len(os.sched_getaffinity(0)), 8)
        self._workers: list[W] = []
        self._keys: dict[str, W] = {}
        self._turn = itertools.count()
        # A collector may close a device, which takes one, in the middle of another's.
        self._lock = threading.RLock()

    def take(self, key: str | None = None) -> W:
        """The worker for what has to be together (`key`), or the next in turn. From any thread."""
        with self._lock:
            if key is not None and key in self._keys:
                return self._keys[key]
            turn = next(self._turn) % self.count
            if turn >= len(self._workers):
                self._workers.append(self._make(f"{self._kind}-worker{turn}"))
            worker = self._workers[turn]
            if key is not None:
                self._keys[key] = worker
            return worker
