"""A guest's memory, made by chance, and the chains that its driver describes there, mostly hostile.

Promises: every region lies against pages that cannot be touched (`guarded`). With an IOTLB some of it has no
entry, or one that does not allow everything. Never: calls a kernel.
"""

from __future__ import annotations

import ctypes
import random
from typing import Any

import numpy as np

from guarded import Guarded
from model import split_ring_model as model
from pyvhost.dataplane import blocks

NEXT, WRITE, INDIRECT = model.NEXT, model.WRITE, model.INDIRECT
TOP = 1 << 64
_SIZES = (16, 48, 100, 4096, 4100, 65536, 1 << 20)
_HUGE = 5 << 30


def signed(value: int) -> int:
    """As an int64 holds it."""
    return (value + (1 << 63)) % TOP - (1 << 63)


class Guest:
    """Memory, and chains in it for a ring of `num` descriptors."""

    def __init__(self, dice: random.Random, small: bool = False) -> None:
        self.dice = dice
        self.small = small
        self.num = 1 << dice.choice((0, 1, 2) if small else (0, 1, 2, 3, 4, 5, 6, 6, 8, 10))
        #: How much of what the driver does is wrong; without any, chains of every length are walked to the end.
        self.wildness = dice.choice((0.0, 0.0, 0.01, 0.2))
        #: A legacy guest's numbers may be of the other byte order.
        self.order = dice.choice("<<>")
        self.layout = model.DESCRIPTORS[self.order]
        self.iotlb = dice.random() < 0.4
        self.tables_left = 0
        self._make_memory()
        self._make_entries()
        self.map_memory()

    def _make_memory(self) -> None:
        dice = self.dice
        self.memory: list[Guarded] = []
        starts: list[int] = []
        at = dice.choice(
            (0, 0, 0x1000, (1 << 32) - 100, (1 << 63) - 5000, TOP - (1 << 20), dice.randrange(TOP))
        )
        for _ in range(dice.choice((1, 1, 2, 3, 3, 8))):
            size = dice.choice(_SIZES)
            if dice.random() < 0.02:
                size = _HUGE
            if at + size > TOP:
                break
            starts.append(at)
            self.memory.append(Guarded(size))
            # Often one follows right after another: ranges may cross.
            at += size + dice.choice((0, 0, 0, 1, 16, 1 << 20, 1 << 40))
        if not starts:
            starts, self.memory = [0], [Guarded(4096)]
        self.starts = starts
        if dice.random() < 0.2 and at < TOP and starts[0] and starts[-1] + self.memory[-1].size < TOP:
            # One that ends with the address space.
            size = min(dice.choice(_SIZES), TOP - starts[-1] - self.memory[-1].size)
            starts.append(TOP - size)
            self.memory.append(Guarded(size))

    def _make_entries(self) -> None:
        """What the front end knows of each region: where it lies for the dirty log, and what may be done there."""
        dice = self.dice
        self.logs, self.perms = list(self.starts), [model.RW] * len(self.starts)
        #: Without an IOTLB all of memory is in the table.
        self.known = [True] * len(self.starts)
        if self.iotlb:
            tame = dice.random() < 0.5
            self.logs = [
                dice.choice((start, 0, 5000, 1 << 63, dice.randrange(1 << 32))) for start in self.starts
            ]
            self.perms = [model.RW if tame else dice.choice((0, 1, 2, 3, 3, 3)) for _ in self.starts]
            self.known = [dice.random() < 0.6 for _ in self.starts]

    def map_memory(self) -> None:
        """The table that kernels read, and the model's, of what is known now."""
        rows = [
            (start, memory, log, perm)
            for start, memory, log, perm, known in zip(
                self.starts, self.memory, self.logs, self.perms, self.known, strict=True
            )
            if known
        ]
        #: The regions by their place in the table.
        self.mapped = [memory for _, memory, _, _ in rows]
        self.table: Any = np.array(
            [
                (signed(start), memory.size, memory.address, signed(log), perm)
                for start, memory, log, perm in rows
            ],
            dtype=np.int64,
        ).reshape(-1, 5)
        self.model_memory = model.Memory(
            [
                model.Region(start, self._view(memory), memory.size, log, perm)
                for start, memory, log, perm in rows
            ],
            self.iotlb,
        )

    def answer(self, iova: int) -> None:
        """The front end's: an entry for a miss, if there is memory to be had."""
        for place, (start, memory) in enumerate(zip(self.starts, self.memory, strict=True)):
            if start <= iova < start + memory.size:
                self.known[place] = True
        self.map_memory()

    @staticmethod
    def _view(memory: Guarded) -> memoryview:
        return memoryview((ctypes.c_ubyte * memory.size).from_address(memory.address)).cast("B")

    def address(self) -> tuple[int, int]:
        """A guest address, and how many bytes from there on are in its region (0 or less: it is wild)."""
        dice = self.dice
        place = dice.randrange(len(self.starts))
        start, size = self.starts[place], self.memory[place].size
        kind = dice.random()
        if kind < self.wildness / 6:
            return dice.randrange(TOP), 0
        if kind < self.wildness / 3:
            return (start + dice.choice((-1, -16, size, size + 1))) % TOP, 0
        offset = dice.choice((0, max(size - dice.choice((1, 16, 17, 64)), 0), dice.randrange(size)))
        return start + offset, size - offset

    def descriptor(self, flags: int, following: int) -> bytes:
        """A descriptor of guest memory, mostly right."""
        dice = self.dice
        address, room = self.address()
        if dice.random() >= self.wildness:
            length = dice.choice((1, 12, 64, 1514, room)) if room > 0 else 64
            length = max(min(length, room), 1) if dice.random() < 0.97 else 0
        else:
            length = dice.choice((room + 1, room + 16, 0, 0xFFFFFFFF, 0x80000000, dice.randrange(1 << 32)))
        return self.layout.pack(address, max(length, 0) & 0xFFFFFFFF, flags, following)

    def fill_table(self, size: int, allow_indirect: bool) -> tuple[bytes, list[int]]:
        """A table of chains that mostly make sense, and their heads."""
        dice = self.dice
        order = list(range(size))
        if dice.random() < 0.5:
            dice.shuffle(order)
        entries = [b""] * size
        heads = []
        longest = dice.choice((1, 1, 3, 8, size))
        while order:
            count = min(dice.randint(1, longest), len(order))
            chain, order = order[:count], order[count:]
            heads.append(chain[0])
            writable_from = dice.choice((0, count, dice.randint(0, count)))
            for place, index in enumerate(chain):
                flags = WRITE if place >= writable_from else 0
                final = place == count - 1
                if final and allow_indirect and self.tables_left and dice.random() < 0.3:
                    self.tables_left -= 1
                    entries[index] = self.indirect(dice.choice((0, WRITE)))
                    continue
                following = chain[place + 1] if not final else dice.choice((0, dice.randrange(65536)))
                entries[index] = self.descriptor(flags | (0 if final else NEXT), following)
        for _ in range(dice.choice((0, 1, 3)) if self.wildness else 0):
            index = dice.randrange(size)
            entries[index] = self.hostile(entries[index], size)
        return b"".join(entries), heads

    def hostile(self, entry: bytes, size: int) -> bytes:
        """The same descriptor with something wrong."""
        dice = self.dice
        addr, length, flags, following = self.layout.unpack(entry)
        kind = dice.randrange(6)
        if kind == 0:
            flags, following = flags | NEXT, dice.randrange(min(size, 65536))  # perhaps a loop
        elif kind == 1:
            flags, following = flags | NEXT, min(dice.choice((size, size + 1, 65535)), 65535)
        elif kind == 2:
            flags ^= WRITE
        elif kind == 3:
            flags = dice.randrange(65536)
        elif kind == 4:
            flags |= INDIRECT
        else:
            return dice.randbytes(16)
        return self.layout.pack(addr, length, flags, following)

    def indirect(self, flags: int) -> bytes:
        """A descriptor of an indirect table, which is written to guest memory."""
        dice = self.dice
        address, room = self.address()
        sizes = (1, 2, 3) if self.small else (1, 2, 3, 16, 300, blocks.MAX_CHAIN, blocks.MAX_CHAIN + 1)
        count = dice.choice(sizes)
        # Across into the next region if there is one; small tables in small regions.
        spare = 0 if dice.random() < 0.7 else 40
        count = max(1, min(count, (room + spare) // 16))
        if dice.random() < 0.6:
            content = self.run(count, self.address())
        else:
            content, _ = self.fill_table(count, allow_indirect=dice.random() < 0.1)
        self.write(address, content)
        length = 16 * count
        if dice.random() < self.wildness:
            length = dice.choice((0, 8, length + 1, length + 16, 16 * 65536, 16 * 65537, 0xFFFFFFF0))
        return self.layout.pack(address, length, flags | INDIRECT, dice.choice((0, dice.randrange(65536))))

    def run(self, count: int, data: tuple[int, int]) -> bytes:
        """A table that is one long chain from entry 0, as drivers make them, of a few bytes over and over."""
        dice = self.dice
        where, room = data
        length = max(1, min(room, 64))
        writable_from = dice.choice((0, count, dice.randint(0, count)))
        return b"".join(
            self.layout.pack(
                where,
                length,
                (NEXT if place < count - 1 else 0) | (WRITE if place >= writable_from else 0),
                (place + 1) % count,
            )
            for place in range(count)
        )

    def fill_long(self) -> tuple[bytes, list[int]]:
        """A few chains that fill a batch's room for iovecs to the last, then many of one descriptor."""
        dice = self.dice
        place = max(range(len(self.starts)), key=lambda i: self.memory[i].size)
        at, end = self.starts[place], self.starts[place] + self.memory[place].size
        data = at, self.memory[place].size
        exact = dice.choice((0, 0, 1, 12))
        entries: list[bytes] = []
        for _ in range(min(dice.choice((1, 2, 3, 3, 4)), self.num)):
            count = dice.choice((blocks.SLOTS, blocks.MAX_CHAIN)) - dice.randint(0, exact)
            if at + 16 * count <= end:
                self.write(at, self.run(count, data))
                entries.append(self.layout.pack(at, 16 * count, INDIRECT, 0))
                at += 16 * count
        entries += [self.layout.pack(data[0], 16, dice.choice((0, WRITE)), 0)] * (self.num - len(entries))
        return b"".join(entries), list(range(self.num))

    def write(self, address: int, content: bytes) -> None:
        """To guest memory, as far as there is any."""
        for start, memory in zip(self.starts, self.memory, strict=True):
            low, high = max(address, start), min(address + len(content), start + memory.size)
            if low < high:
                memory.put(low - start, content[low - address : high - address])
