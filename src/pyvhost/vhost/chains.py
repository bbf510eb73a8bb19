"""A vring whose chains are handled in plain Python: for work that is rare, or that a user has written.

Promises: a chain's memory is a list of memoryviews straight into the guest's regions, checked by the same
compiled walk as everyone's; a handler that raises costs its chain alone; a guest that never stops kicking
leaves the control thread time for others.
Never: keeps a memoryview beyond the handler's return.
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
from pyvhost.dataplane.dirty_log import log_slot
from pyvhost.dataplane.plain import load64
from pyvhost.dataplane.split_ring import collect, publish, stop_at_fault, take, use_written, want_kicks
from pyvhost.host import eventfd
from pyvhost.host.poller import Poller
from pyvhost.vhost import faults
from pyvhost.vhost.vring import Vring
from pyvhost.vhost.worker import Int64s

_log = logging.getLogger(__name__)

#: Chains handled in a row before the control thread looks at anything else.
_A_TURN: Final = 64


@dataclass(frozen=True)
class Chain:
    """What the driver sent, and where an answer goes."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]
    #: Of the words in it: a legacy guest's own (virtio 1.3, 1.4.1).
    byteorder: Literal["little", "big"] = "little"

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


#: Handles a chain; how many bytes of its writable part were written.
Handler = Callable[[Chain], int]


def _views(iov: int, count: int) -> list[memoryview]:
    views = []
    for i in range(count):
        memory = (ctypes.c_ubyte * load64(iov + i * 16 + 8)).from_address(load64(iov + i * 16))
        views.append(memoryview(memory).cast("B"))
    return views


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
                if stop_at_fault(record):
                    record["fault_told"] = 1
                    if record["fault"] == blocks.IOTLB_MISS:
                        self._waits()
                    else:
                        _log.error("%s: stopped: %s", self.name, faults.describe(record))
                return
            self._handle(self._batch.ctypes.data)
        self._poller.call_soon_threadsafe(self._serve)

    def _handle(self, slot: int) -> None:
        iov = load64(slot + blocks.SLOT_IOV)
        out_pieces = load64(slot + blocks.SLOT_OUT)
        chain = Chain(
            load64(slot + blocks.SLOT_HEAD),
            _views(iov, out_pieces),
            _views(iov + 16 * out_pieces, load64(slot + blocks.SLOT_IN)),
            "big" if (sys.byteorder == "big") != bool(self.record["swap"]) else "little",
        )
        try:
            written = self._handler(chain)
        except Exception:
            _log.exception("%s: chain %d", self.name, chain.head)
            written = 0
            if self.record["log_data"]:
                # Whatever it has written before that, nobody knows.
                log_slot(self.record, slot, load64(slot + blocks.SLOT_IN_BYTES))
        take(self.record, 1)
        use_written(self.record, slot, written)
        self._row[blocks.C_PACKETS // 8] += 1
        publish(self.record)
