"""The device's half of a split ring, as short as it can be: what the driver's half is tested against.

Written from virtio 1.3, 2.7 with struct alone, and shares nothing with the driver but guest memory's bytes.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass

from pyvhost.driver import barrier
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.split_ring import SplitRing

NEXT, WRITE, INDIRECT = 1, 2, 4


@dataclass
class Taken:
    """A chain that the device took: its head, and (address, length, flags) of each buffer."""

    head: int
    buffers: list[tuple[int, int, int]]

    def sizes(self, flag: int) -> list[int]:
        return [length for _, length, flags in self.buffers if flags & WRITE == flag]


class StubDevice:
    """Takes chains and uses them, and keeps every word that a device keeps."""

    def __init__(self, ring: SplitRing, *, event_idx: bool | None = None) -> None:
        self.memory: GuestMemory = ring.memory
        self.desc, self.avail, self.used = ring.layout
        self.size = ring.size
        self.order = "<" if ring.byteorder == "little" else ">"
        self.native = ring.byteorder == sys.byteorder
        self.event_idx = ring.event_idx if event_idx is None else event_idx
        self.last_avail = self.used_idx = self.u16(self.used + 2)
        self.signalled = self.used_idx

    def u16(self, address: int) -> int:
        word = self.memory.words(address, 1, "H")[0]
        return word if self.native else (word & 0xFF) << 8 | word >> 8

    def put16(self, address: int, value: int) -> None:
        # One store, for a driver that looks at the same time.
        value &= 0xFFFF
        self.memory.words(address, 1, "H")[0] = value if self.native else (value & 0xFF) << 8 | value >> 8

    def take(self, limit: int = 1 << 16) -> list[Taken]:
        """Every chain that is available, up to `limit` of them."""
        taken: list[Taken] = []
        while self.last_avail != self.u16(self.avail + 2) and len(taken) < limit:
            head = self.u16(self.avail + 4 + 2 * (self.last_avail % self.size))
            self.last_avail = (self.last_avail + 1) & 0xFFFF
            taken.append(Taken(head, self.walk(self.desc, self.size, head)))
        return taken

    def walk(self, table: int, count: int, index: int) -> list[tuple[int, int, int]]:
        buffers = []
        for _ in range(count):
            assert index < count, f"descriptor {index} in a table of {count}"
            addr, length, flags, following = struct.unpack(
                self.order + "QIHH", self.memory.read(table + 16 * index, 16)
            )
            if flags & INDIRECT:
                assert flags == INDIRECT
                return self.walk(addr, length // 16, 0)
            buffers.append((addr, length, flags))
            if not flags & NEXT:
                return buffers
            index = following
        raise AssertionError("the chain has a loop")

    def use(self, head: int, written: int = 0, *, publish: bool = True) -> None:
        """Put a chain into the used ring; the driver sees it once the index is published."""
        at = self.used + 4 + 8 * (self.used_idx % self.size)
        self.memory.write(at, struct.pack(self.order + "II", head, written))
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        if publish:
            self.publish()

    def publish(self) -> None:
        barrier.release()
        self.put16(self.used + 2, self.used_idx)
        # Before `call_due`: either the driver sees this index, or we see that it wants a call.
        barrier.full()

    def call_due(self) -> bool:
        """Whether the driver wants a call for what was published since this was last asked (2.7.7.2)."""
        before, self.signalled = self.signalled, self.used_idx
        if self.event_idx:
            event = self.u16(self.avail + 4 + 2 * self.size)
            passed = [(before + step) & 0xFFFF for step in range((self.used_idx - before) & 0xFFFF)]
            return event in passed
        return before != self.used_idx and not self.u16(self.avail) & 1

    def want_kicks(self, want: bool) -> None:
        """Ask for a kick with the next chain, or for none (2.7.10)."""
        if self.event_idx:
            event = self.last_avail if want else self.last_avail - 1
            self.put16(self.used + 4 + 8 * self.size, event)
        else:
            self.put16(self.used, 0 if want else 1)
        # Before the next `take`: either the driver sees that we ask, or we see its index.
        barrier.full()

    def gather(self, chain: Taken) -> bytes:
        """What the driver wrote for the device to read."""
        return b"".join(self.memory.read(a, n) for a, n, flags in chain.buffers if not flags & WRITE)

    def scatter(self, chain: Taken, data: bytes) -> int:
        """Write into the chain's writable buffers; returns how many bytes went in."""
        done = 0
        for address, length, flags in chain.buffers:
            if flags & WRITE and done < len(data):
                piece = data[done : done + length]
                self.memory.write(address, piece)
                done += len(piece)
        return done
