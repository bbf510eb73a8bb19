"""A vring whose chains are handled in plain Python: for work that is rare, or that a user has written.

Promises: a chain's memory is a list of memoryviews straight into the guest's regions, checked by the same
compiled walk as everyone's; a handler that raises costs its chain alone; a guest that never stops kicking
leaves the control thread time for others.
Never: touches a chain after it was finished, or after its ring has stopped.
"""

from __future__ import annotations

import ctypes
import logging
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from pyvhost.dataplane import blocks
from pyvhost.dataplane.dirty_log import log_slot, mark
from pyvhost.dataplane.inflight import begin
from pyvhost.dataplane.plain import load64
from pyvhost.dataplane.split_ring import collect, publish, stop_at_fault, take, use, want_kicks
from pyvhost.host import eventfd
from pyvhost.host.poller import Poller
from pyvhost.vhost import faults
from pyvhost.vhost.vring import Vring
from pyvhost.vhost.worker import Int64s

_log = logging.getLogger(__name__)

#: Chains handled in a row before the control thread looks at anything else.
_A_TURN: Final = 64


@dataclass(frozen=True, eq=False)
class Chain:
    """What the driver sent, and where an answer goes."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]
    #: Of the words in it: a legacy guest's own (virtio 1.3, 1.4.1).
    byteorder: Literal["little", "big"] = "little"
    #: Address in the dirty log and bytes of each writable piece.
    logged: tuple[tuple[int, int], ...] = ()

    def read(self, limit: int = 1 << 16) -> bytes:
        """The readable bytes, `limit` at most."""
        taken = bytearray()
        for view in self.readable:
            taken += view[: limit - len(taken)]
        return bytes(taken)

    def write(self, data: bytes) -> int:
        """Writes as much of `data` as fits, from the first writable byte on; how much."""
        done = 0
        for view in self.writable:
            part = data[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)
        return done


#: Handles a chain; how many bytes of its writable part were written, None: `PythonRing.finish` will say.
Handler = Callable[[Chain], int | None]


def _views(iov: int, count: int) -> list[memoryview]:
    views = []
    for i in range(count):
        memory = (ctypes.c_ubyte * load64(iov + i * 16 + 8)).from_address(load64(iov + i * 16))
        views.append(memoryview(memory).cast("B"))
    return views


def byteorder_of(record: Any) -> Literal["little", "big"]:
    """The byte order of a ring's driver."""
    return "big" if (sys.byteorder == "big") != bool(record["swap"]) else "little"


def chain_in(slot: int, record: Any) -> Chain:
    """The chain that was walked into `slot` (`blocks.SLOT_*`), of the ring with this record."""
    iov = load64(slot + blocks.SLOT_IOV)
    outs, ins = load64(slot + blocks.SLOT_OUT), load64(slot + blocks.SLOT_IN)
    behind = iov + 16 * outs
    return Chain(
        load64(slot + blocks.SLOT_HEAD),
        _views(iov, outs),
        _views(behind, ins),
        byteorder_of(record),
        tuple((load64(behind + 16 * i + blocks.IOV_LOG), load64(behind + 16 * i + 8)) for i in range(ins)),
    )


def log_chain(record: Any, chain: Chain, written: int) -> None:
    """Logs the first `written` writable bytes of a chain, if its ring's buffers are logged."""
    if record["log_data"]:
        left = written
        for address, size in chain.logged:
            mark(record["log_data"], record["log_bytes"], address, min(size, left))
            left = max(left - size, 0)
        if record["log_fd"] >= 0:
            eventfd.signal(int(record["log_fd"]))


class PythonRing:
    """A place (`device.Place`) whose chains go to `handler`, on the control thread."""

    def __init__(self, name: str, handler: Handler, poller: Poller, row: Int64s) -> None:
        self.name = name
        self._handler = handler
        self._poller = poller
        self._row = row
        self._ring: Any = np.zeros(1, blocks.RING)
        self._batch = np.zeros(blocks.BATCH_BYTES // 8, np.int64)
        self.record["row"] = row.ctypes.data
        self.record["call_fd"] = self.record["err_fd"] = self.record["log_fd"] = -1
        self._kick = -1
        #: Chains whose handler has not finished them.
        self._pending: set[Chain] = set()
        #: Called when the ring waits for the IOTLB.
        self.on_wait: Callable[[], None] | None = None

    @property
    def record(self) -> Any:
        """The ring's record."""
        return self._ring[0]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The control thread is the only one that is ever here."""
        yield

    def begin(self, vring: Vring) -> None:
        """Listens for kicks."""
        self._kick = vring.kick
        if self._kick >= 0:
            self._poller.register(self._kick, select.EPOLLIN, self._kicked)
        self._poller.call_soon_threadsafe(self._serve)

    def end(self, vring: Vring) -> None:
        """Stops listening."""
        if self._kick >= 0:
            self._poller.unregister(self._kick)
        self._kick = -1
        if vring.place is None:
            self._pending.clear()

    @property
    def in_flight(self) -> int:
        """How many chains wait for `finish`."""
        return len(self._pending)

    @property
    def pending(self) -> list[Chain]:
        """Those chains."""
        return list(self._pending)

    def alive(self, chain: Chain) -> bool:
        """Whether somebody waits for a chain; if not, its memory may be gone."""
        return chain in self._pending

    def finish(self, chain: Chain, written: int) -> None:
        """Uses a chain whose handler answered None. Nothing, if its ring has stopped since."""
        if chain not in self._pending:
            return
        self._pending.remove(chain)
        record = self.record
        use(record, chain.head, written)
        log_chain(record, chain, written)
        self._row[blocks.C_PACKETS // 8] += 1
        if record["located"]:
            publish(record)

    def look(self) -> None:
        """Looks at it soon."""
        self._poller.call_soon_threadsafe(self._serve)

    def poll_for(self, vring: Vring) -> None:
        """Nothing: the control thread polls nobody."""

    def _kicked(self, events: int) -> None:
        eventfd.drain(self._kick)
        self._row[blocks.C_KICKS // 8] += 1
        if not self.record["located"]:
            self._waits()
        elif self.record["fault"]:
            self.record["fault"] = 0
            self.record["running"] = 1
        self._serve()

    def _waits(self) -> None:
        if self.on_wait is not None:
            self.on_wait()

    def _serve(self) -> None:
        record = self.record
        if record["located"] and record["used_idx"] != record["published"]:
            # It was used while the ring was nowhere.
            publish(record)
        for _ in range(_A_TURN):
            if not record["running"]:
                return
            found = collect(record, self._batch.ctypes.data, 0, 1, 0, 0)
            if found == 0:
                want_kicks(record, True)
                found = collect(record, self._batch.ctypes.data, 0, 1, 0, 0)
                if found == 0:
                    return
            if found < 0:
                self._stopped_at_fault()
                return
            self._handle(self._batch.ctypes.data)
        self._poller.call_soon_threadsafe(self._serve)

    def _stopped_at_fault(self) -> None:
        record = self.record
        if record["running"] and record["fault"] and stop_at_fault(record):
            record["fault_told"] = 1
            if record["fault"] == blocks.IOTLB_MISS:
                self._waits()
            else:
                _log.error("%s: stopped: %s", self.name, faults.describe(record))

    def _handle(self, slot: int) -> None:
        chain = chain_in(slot, self.record)
        begin(self.record, chain.head)
        take(self.record, 1)
        self._pending.add(chain)
        try:
            written = self._handler(chain)
        except Exception:
            _log.exception("%s: chain %d", self.name, chain.head)
            written = 0
            if self.record["log_data"]:
                # Whatever it has written before that, nobody knows.
                log_slot(self.record, slot, load64(slot + blocks.SLOT_IN_BYTES))
        if written is not None:
            self.finish(chain, written)


class BufferRing(PythonRing):
    """A place whose chains are taken when there is something to put into them, as events are."""

    def __init__(self, name: str, poller: Poller, row: Int64s) -> None:
        super().__init__(name, lambda chain: 0, poller, row)

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """Of the words that the driver expects."""
        return byteorder_of(self.record)

    def put(self, data: bytes) -> bool:
        """Puts `data` into the driver's next buffer; False if there is none that it fits into."""
        record = self.record
        if not self._has_buffer():
            self._stopped_at_fault()
            return False
        chain = chain_in(self._batch.ctypes.data, record)
        take(record, 1)
        self._pending.add(chain)
        written = chain.write(data)
        self.finish(chain, written)
        return written == len(data)

    def _has_buffer(self) -> bool:
        record = self.record
        if not record["running"]:
            return False
        found = collect(record, self._batch.ctypes.data, 0, 1, 0, 0)
        if found == 0:
            # There was none: a kick says when there is.
            want_kicks(record, True)
            found = collect(record, self._batch.ctypes.data, 0, 1, 0, 0)
        return found > 0

    def _serve(self) -> None:
        if self.on_buffers is not None:
            self.on_buffers()

    #: Called when the driver has kicked: there may be buffers now.
    on_buffers: Callable[[], None] | None = None
