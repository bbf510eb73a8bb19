"""Prepared requests for a disk, which a compiled driver keeps under way: what loads a back end in `bench scsi`.

A request is laid out in guest memory once (header, data, verdict, and an indirect table that names them), so that
the driver's part of an I/O is a few stores, and never the limit.

Promises: what is measured is between the first request and the last verdict; a bad verdict is an error.
Never: starts a process.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyvhost.abi import virtio
from pyvhost.abi import virtio_blk as blk
from pyvhost.abi import virtio_scsi as scsi
from pyvhost.dataplane import load
from pyvhost.driver import cdb
from pyvhost.driver.errors import DeviceError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.queue import Queue
from pyvhost.driver.scsi_command import Format, address

#: A ring's entries; the deepest workload has as many requests.
RING: int = 128
SECTOR: int = 512
_READABLE, _WRITABLE = 0, virtio.VRING_DESC_F_WRITE


@dataclass(frozen=True)
class Workload:
    """What is asked of a disk: `size` bytes at a time, `depth` of them under way, at places that are `random` or
    follow each other.
    """

    writes: bool
    random: bool
    size: int
    depth: int

    @property
    def key(self) -> str:
        """A word for it."""
        return f"{self.fio}-{self.size}-{self.depth}"

    @property
    def fio(self) -> str:
        """What fio calls the pattern."""
        return ("rand" if self.random else "") + ("write" if self.writes else "read")

    @property
    def title(self) -> str:
        """For people."""
        size = f"{self.size >> 20} MiB" if self.size >= 1 << 20 else f"{self.size >> 10} KiB"
        order = "random " if self.random else ""
        return f"{size} {order}{'write' if self.writes else 'read'}, {self.depth}"


@dataclass(frozen=True)
class Loaded:
    """What came of a slice: requests, the seconds they took, kicks and sleeps of the driver."""

    ios: int
    seconds: float
    kicks: int
    sleeps: int


class Loader:
    """Loads one queue of a device whose rings run, and which nobody else uses meanwhile.

    `kind` is "scsi" (LUN 0 of target 0, blocks of 512 bytes) or "blk"; `disk_size` in bytes.
    """

    def __init__(
        self, memory: GuestMemory, queue: Queue, kind: str, disk_size: int, *, event_idx: bool
    ) -> None:
        self._memory = memory
        self._queue = queue
        self._kind = kind
        self._disk_size = disk_size
        self._event_idx = event_idx
        self._epoll = select.epoll()
        self._epoll.register(queue.call_fd, select.EPOLLIN | select.EPOLLET)
        self._loads: Any = np.zeros(1, load.LOAD)
        self._scratch = np.zeros(16, np.int64)
        self._requests = np.zeros((RING, load.REQUEST_BYTES // 8), np.int64)
        load.prepare(self._loads)

    def close(self) -> None:
        """Gives up what it has; the queue stays the caller's."""
        self._epoll.close()

    @contextlib.contextmanager
    def prepared(self, workload: Workload) -> Iterator[Prepared]:
        """The workload's requests in guest memory, for as long as the block lasts."""
        rooms = [self._lay_out(number, workload) for number in range(workload.depth)]
        ring = self._queue.ring
        one = self._loads[0]
        at = ring.addresses
        one["avail"], one["used"], one["num"] = at.avail, at.used, ring.size
        one["event_idx"] = self._event_idx
        one["avail_idx"], one["used_idx"] = ring.avail_idx, ring.used_idx
        one["kick_fd"], one["epoll"] = self._queue.kick_fd, self._epoll.fileno()
        one["requests"], one["depth"] = self._requests.ctypes.data, workload.depth
        one["places"], one["stride"] = self._disk_size // workload.size, workload.size // SECTOR
        one["big32"], one["sequential"] = self._kind == "scsi", not workload.random
        one["state"] = 0 if not workload.random else 20261122
        one["pending"] = 0xFFFF if self._kind == "scsi" else 0xFF
        one["scratch"] = self._scratch.ctypes.data
        try:
            yield Prepared(self._loads)
        finally:
            for room in rooms:
                self._memory.free(room)

    def _lay_out(self, number: int, workload: Workload) -> int:
        header = self._header(number, workload)
        data = 0
        verdict_bytes, verdict_at = (108, 10) if self._kind == "scsi" else (1, 0)
        # Table, header and verdict, each on a line of its own; then the data on a page.
        room = self._memory.allocate(4096 + workload.size, 4096)
        table, head, verdict, data = room, room + 64, room + 192, room + 4096
        self._memory.write(head, header)
        self._memory.write(verdict, bytes(112))
        if workload.writes:
            self._memory.write(data, os.urandom(4096) * (workload.size // 4096))
        parts = [(head, len(header), _READABLE)]
        if self._kind == "blk" or workload.writes:
            parts.append((data, workload.size, _READABLE if workload.writes else _WRITABLE))
        parts.append((verdict, verdict_bytes, _WRITABLE))
        if self._kind == "scsi" and not workload.writes:
            parts.append((data, workload.size, _WRITABLE))
        entries = b""
        for at, (where, length, flags) in enumerate(parts, 1):
            more = virtio.VRING_DESC_F_NEXT if at < len(parts) else 0
            entries += where.to_bytes(8, "little") + length.to_bytes(4, "little")
            entries += (flags | more).to_bytes(2, "little") + at.to_bytes(2, "little")
        self._memory.write(table, entries)
        self._queue.ring.desc.set(number, table, len(entries), virtio.VRING_DESC_F_INDIRECT)
        place = 8 if self._kind == "blk" else 19 + 2
        self._requests[number] = (
            self._memory.user_address(head) + place,
            self._memory.user_address(verdict) + verdict_at,
        )
        return room

    def _header(self, number: int, workload: Workload) -> bytes:
        if self._kind == "blk":
            return bytes(blk.Outhdr(blk.T_OUT if workload.writes else blk.T_IN, 0, 0))
        command = cdb.write10 if workload.writes else cdb.read10
        return Format().command(
            address(0, 0), number + 1, command(0, workload.size // SECTOR), attribute=scsi.S_SIMPLE
        )


class Prepared:
    """A workload that can be run."""

    def __init__(self, loads: Any) -> None:
        self._loads = loads

    def run(self, seconds: float) -> Loaded:
        """Loads the device for so long. DeviceError: a verdict was bad, or nothing comes back."""
        one = self._loads[0]
        for counter in ("done", "bad", "kicks", "sleeps"):
            one[counter] = 0
        took = load.drive(self._loads, time.monotonic_ns() + round(seconds * 1e9))
        if took < 0:
            raise DeviceError(f"nothing came back for 10 s, after {one['done']} requests")
        if one["bad"]:
            raise DeviceError(f"{one['bad']} of {one['done']} requests failed")
        return Loaded(int(one["done"]), took / 1e9, int(one["kicks"]), int(one["sleeps"]))
