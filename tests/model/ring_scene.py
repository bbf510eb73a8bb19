"""A split ring and its guest's memory, made by chance and mostly hostile, and the kernels' answers judged.

A scene is made from a `random.Random`, by the fuzz target from a seed and by hypothesis from its own choices.
Every part lies against pages that cannot be touched (`guarded`), the batch as well.

Promises: `Scene.play` ends, and raises AssertionError, or the process dies, where a kernel broke its contract.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
from typing import Any

import numpy as np

from guarded import Guarded
from model import split_ring_model as model
from pyvhost.dataplane import blocks
from pyvhost.dataplane import split_ring as kernels

#: The model's words for what a driver did wrong, and the kernels'.
FAULTS = {
    name.removeprefix("FAULT_"): int(code) for name, code in vars(blocks).items() if name.startswith("FAULT_")
}
NEXT, WRITE, INDIRECT = model.NEXT, model.WRITE, model.INDIRECT
_TOP = 1 << 64
_SIZES = (16, 48, 100, 4096, 4100, 65536, 1 << 20)
_HUGE = 5 << 30


def signed(value: int) -> int:
    """As an int64 holds it."""
    return (value + (1 << 63)) % _TOP - (1 << 63)


class Scene:
    """One ring, its memory, and what the device thinks of it."""

    def __init__(self, dice: random.Random, module: Any = kernels, small: bool = False) -> None:
        self.dice = dice
        self.kernels = module
        self.small = small
        self.num = 1 << dice.choice((0, 1, 2) if small else (0, 1, 2, 3, 4, 5, 6, 6, 8, 10))
        #: How much of what the driver does is wrong; without any, chains of every length are walked to the end.
        self.wildness = dice.choice((0.0, 0.0, 0.01, 0.2))
        self._make_memory()
        self.desc = Guarded(16 * self.num)
        self.avail = Guarded(6 + 2 * self.num)
        self.used = Guarded(6 + 8 * self.num)
        self.batch = Guarded(blocks.BATCH_BYTES)
        self.row = Guarded(8 * len(blocks.COUNTERS))
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ring: Any = np.zeros(1, blocks.RING)
        self.ring = self._ring[0]
        self._start_ring()

    def close(self) -> None:
        os.close(self.call)

    # Making it.

    def _make_memory(self) -> None:
        dice = self.dice
        self.memory: list[Guarded] = []
        starts: list[int] = []
        at = dice.choice(
            (0, 0, 0x1000, (1 << 32) - 100, (1 << 63) - 5000, _TOP - (1 << 20), dice.randrange(_TOP))
        )
        for _ in range(dice.choice((1, 1, 2, 3, 3, 8))):
            size = dice.choice(_SIZES)
            if dice.random() < 0.02:
                size = _HUGE
            if at + size > _TOP:
                break
            starts.append(at)
            self.memory.append(Guarded(size))
            # Often one follows right after another: ranges may cross.
            at += size + dice.choice((0, 0, 0, 1, 16, 1 << 20, 1 << 40))
        if not starts:
            starts, self.memory = [0], [Guarded(4096)]
        self.starts = starts
        if dice.random() < 0.2 and at < _TOP and starts[0] and starts[-1] + self.memory[-1].size < _TOP:
            # One that ends with the address space.
            size = min(dice.choice(_SIZES), _TOP - starts[-1] - self.memory[-1].size)
            starts.append(_TOP - size)
            self.memory.append(Guarded(size))
        self.table = np.array(
            [
                (signed(start), memory.size, memory.address, signed(start), 3)
                for start, memory in zip(starts, self.memory, strict=True)
            ],
            dtype=np.int64,
        ).reshape(-1, 5)
        self.model_memory = model.Memory(
            [
                model.Region(start, self._view(memory), memory.size)
                for start, memory in zip(starts, self.memory, strict=True)
            ]
        )

    @staticmethod
    def _view(memory: Guarded) -> memoryview:
        return memoryview((ctypes.c_ubyte * memory.size).from_address(memory.address)).cast("B")

    def _start_ring(self) -> None:
        dice = self.dice
        last = dice.choice((0, 0, 65535, 65536 - self.num, dice.randrange(65536))) & 0xFFFF
        used = dice.choice((last, dice.randrange(65536)))
        self.last = last
        self.tables_left = 0
        self.event_idx = dice.random() < 0.5
        self.on_empty = dice.random() < 0.2
        values = {
            "desc": self.desc.address,
            "avail": self.avail.address,
            "used": self.used.address,
            "num": self.num,
            "regions": self.table.ctypes.data,
            "region_count": len(self.table),
            "last_avail": last,
            "seen_avail": last,
            "used_idx": used,
            "published": used,
            "event_idx": int(self.event_idx),
            "notify_on_empty": int(self.on_empty),
            "call_fd": self.call if dice.random() < 0.9 else -1,
            "err_fd": -1,
            "log_fd": -1,
            "located": 1,
            "running": 1,
            "row": self.row.address,
        }
        for name, value in values.items():
            self.ring[name] = value
        self.avail.put(2, struct.pack("<H", last))
        self.device = model.Device(
            self.num, self.event_idx, self.on_empty, bytearray(self.used.size), used, used, last
        )

    def address(self) -> tuple[int, int]:
        """A guest address, and how many bytes from there on are in its region (0 or less: it is wild)."""
        dice = self.dice
        place = dice.randrange(len(self.starts))
        start, size = self.starts[place], self.memory[place].size
        kind = dice.random()
        if kind < self.wildness / 6:
            return dice.randrange(_TOP), 0
        if kind < self.wildness / 3:
            return (start + dice.choice((-1, -16, size, size + 1))) % _TOP, 0
        offset = dice.choice((0, max(size - dice.choice((1, 16, 17, 64)), 0), dice.randrange(size)))
        return start + offset, size - offset

    def descriptor(self, flags: int, following: int) -> bytes:
        """A descriptor of guest memory, mostly right."""
        dice = self.dice
        address, room = self.address()
        if dice.random() >= self.wildness:
            length = dice.choice((1, 12, 64, 1514, room)) if room > 0 else 64
            length = max(min(length, room), 1)
        else:
            length = dice.choice((room + 1, room + 16, 0, 0xFFFFFFFF, 0x80000000, dice.randrange(1 << 32)))
        return model.DESCRIPTOR.pack(address, max(length, 0) & 0xFFFFFFFF, flags, following)

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
        addr, length, flags, following = model.DESCRIPTOR.unpack(entry)
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
        return model.DESCRIPTOR.pack(addr, length, flags, following)

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
        return model.DESCRIPTOR.pack(
            address, length, flags | INDIRECT, dice.choice((0, dice.randrange(65536)))
        )

    def run(self, count: int, data: tuple[int, int]) -> bytes:
        """A table that is one long chain from entry 0, as drivers make them, of a few bytes over and over."""
        dice = self.dice
        where, room = data
        length = max(1, min(room, 64))
        writable_from = dice.choice((0, count, dice.randint(0, count)))
        return b"".join(
            model.DESCRIPTOR.pack(
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
                entries.append(model.DESCRIPTOR.pack(at, 16 * count, INDIRECT, 0))
                at += 16 * count
        entries += [model.DESCRIPTOR.pack(data[0], 16, dice.choice((0, WRITE)), 0)] * (
            self.num - len(entries)
        )
        return b"".join(entries), list(range(self.num))

    def write(self, address: int, content: bytes) -> None:
        """To guest memory, as far as there is any."""
        for start, memory in zip(self.starts, self.memory, strict=True):
            low, high = max(address, start), min(address + len(content), start + memory.size)
            if low < high:
                memory.put(low - start, content[low - address : high - address])

    def add(self) -> None:
        """The driver fills its table anew and makes chains available, or says it has."""
        dice = self.dice
        self.tables_left = 8
        if self.num >= 8 and dice.random() < 0.3:
            content, heads = self.fill_long()
        else:
            content, heads = self.fill_table(self.num, allow_indirect=True)
        self.desc.put(0, content)
        in_order = dice.random() < 0.5
        if not in_order and dice.random() < 0.5:
            heads = dice.sample(heads, min(len(heads), dice.randint(1, 4)))
        seen = int(self.ring["seen_avail"])
        ahead = (seen - self.last) % 65536
        # What the device has seen stays available: a driver that takes it back is met elsewhere.
        ahead = dice.choice((self.num, dice.randint(min(ahead, self.num), self.num)))
        for entry in range(self.num):
            head = heads[(entry - self.last) % self.num % len(heads)] if in_order else dice.choice(heads)
            if dice.random() < self.wildness / 10:
                head = dice.choice((self.num, 65535, dice.randrange(65536)))
            self.avail.put(4 + 2 * entry, struct.pack("<H", head))
        if dice.random() < self.wildness:
            ahead = dice.choice((self.num + 1, 65535, dice.randrange(65536)))
        self.avail.put(0, struct.pack("<HH", dice.choice((0, 0, 1, 0xFFFE)), (self.last + ahead) % 65536))
        event = dice.choice(
            (self.device.idx, self.device.idx - 1, self.device.idx + 3, dice.randrange(65536))
        )
        self.avail.put(4 + 2 * self.num, struct.pack("<H", event % 65536))

    # Judging it.

    def slot(self, index: int) -> tuple[list[int], list[tuple[int, int]]]:
        """A slot's words, and its struct iovec."""
        words = list(struct.unpack("<6q", self.batch.get(index * blocks.SLOT_BYTES, 48)))
        place = words[1] - self.batch.address
        count = words[2] + words[3]
        low = blocks.SLOTS * blocks.SLOT_BYTES
        assert low <= place, "an iovec before the iovecs' place"
        assert place + 16 * count <= low + 16 * blocks.BATCH_IOVECS, "iovecs beyond their place"
        raw = self.batch.get(place, 16 * count)
        return words, [struct.unpack_from("<qq", raw, 16 * i) for i in range(count)]

    def inside(self, address: int, length: int) -> bool:
        """Whether a host range lies in one region."""
        return length > 0 and any(
            memory.address <= address and address + length <= memory.address + memory.size
            for memory in self.memory
        )

    def check_ranges(self, slots: int) -> None:
        """Nothing outside the guest's memory, whatever the guest did meanwhile."""
        for index in range(slots):
            words, iovecs = self.slot(index)
            assert words[2] >= 0
            assert words[3] >= 0
            assert 0 < len(iovecs) <= blocks.MAX_CHAIN
            for address, length in iovecs:
                assert self.inside(address, length), f"iovec {address:#x}+{length:#x} is outside the regions"
            assert sum(length for _, length in iovecs[: words[2]]) == words[4]
            assert sum(length for _, length in iovecs[words[2] :]) == words[5]

    def collect(self, start: int, want: int, plain: int) -> int:
        """Calls `collect` and judges its answer by the model; the slots that the batch has now."""
        avail, content = self.avail.get(), self.desc.get()
        cached = (int(self.ring["seen_avail"]) - self.last) % 65536
        (idx,) = struct.unpack_from("<H", avail, 2)
        before = self.batch.get(0, start * blocks.SLOT_BYTES)
        made = int(
            self.kernels.collect(self.ring, self.batch.address, start, want, plain, self.dice.randint(0, 2))
        )
        assert self.batch.get(0, start * blocks.SLOT_BYTES) == before, "a slot from before was changed"
        assert int(self.ring["last_avail"]) == self.last, "collect does not consume"
        try:
            ahead = cached if cached >= start + want else model.waiting(idx, self.last, self.num)
        except model.Fault as fault:
            self.check_fault(made, fault)
            return made
        end = max(min(ahead, start + want, blocks.SLOTS), start)
        assert made <= end
        self.check_ranges(max(made, 0))
        assert made < 0 or int(self.ring["fault"]) == 0, "a fault is told of with the chain that has it"
        pieces = sum(sum(self.slot(i)[0][2:4]) for i in range(start))
        for index in range(start, end):
            head = model.head_at(avail, self.num, self.last + index)
            try:
                chain = model.walk(self.model_memory, content, self.num, head, blocks.MAX_CHAIN)
                if plain == kernels.WRITABLE and chain.readable:
                    raise model.Fault("DIRECTION")
            except model.Fault as fault:
                if made == index and self.is_full(pieces):
                    return made
                if index == start:
                    self.check_fault(made, fault)
                elif made != index:
                    raise AssertionError(f"slot {index}: {fault}, and not {made} slots") from None
                return made
            if made == index:
                assert self.is_full(pieces), f"answered {made}, slot {index} is good"
                return made
            assert made > index
            words, iovecs = self.slot(index)
            assert words[0] == head
            expected = [
                (self.memory[piece.region].address + piece.offset, piece.length)
                for piece in (*chain.readable, *chain.writable)
            ]
            assert iovecs == expected
            assert words[2:] == [
                len(chain.readable),
                len(chain.writable),
                chain.readable_bytes,
                chain.writable_bytes,
            ]
            pieces += len(iovecs)
        assert made == end
        return made

    @staticmethod
    def is_full(pieces: int) -> bool:
        """Whether a batch may end here: a chain of any length, and one piece a slot, might not fit."""
        return pieces + blocks.MAX_CHAIN + blocks.SLOTS > blocks.BATCH_IOVECS

    def check_fault(self, made: int, fault: model.Fault) -> None:
        allowed = {FAULTS[word] for word in fault.words}
        assert -made in allowed, f"answered {made}, expected {fault} ({sorted(allowed)})"
        assert int(self.ring["fault"]) == -made

    def consume(self, slots: int) -> None:
        """Uses some of the batch, publishes, and compares the used ring and the call."""
        dice = self.dice
        chains = dice.randint(0, slots)
        heads = [self.slot(index)[0][0] for index in range(chains)]
        if dice.random() < 0.5:
            self.kernels.use_batch(self.ring, self.batch.address, chains)
            lengths = [0] * chains
        else:
            lengths = [dice.choice((0, 12, 0xFFFFFFFF)) for _ in heads]
            for head, length in zip(heads, lengths, strict=True):
                self.kernels.use(self.ring, head, length)
            self.kernels.take(self.ring, chains)
        for head, length in zip(heads, lengths, strict=True):
            self.device.use(head, length)
        self.last = self.device.last_avail = (self.last + chains) % 65536
        assert int(self.ring["last_avail"]) == self.last
        self.kernels.publish(self.ring)
        wanted = self.device.publish(self.avail.get())
        called = _drain(self.call) > 0 if int(self.ring["call_fd"]) >= 0 else wanted
        # With both features a call more than was asked for is allowed; one less never is.
        allowed = (True, wanted) if self.event_idx and self.on_empty else (wanted,)
        assert called in allowed, f"called: {called}, the driver wants it: {wanted}"
        ask = dice.random() < 0.5
        self.kernels.want_kicks(self.ring, ask)
        self.device.ask_for_kicks(ask, int(self.ring["seen_avail"]))
        assert self.used.get() == bytes(self.device.used)

    def play(self) -> None:
        """Some rounds of a driver that adds and a device that takes."""
        dice = self.dice
        for _ in range(dice.randint(1, 4)):
            self.add()
            plain = dice.choice((0, WRITE, kernels.WRITABLE))
            have = self.collect(0, dice.choice((1, 32, 32, blocks.SLOTS)), plain)
            while 0 < have < blocks.SLOTS and dice.random() < 0.3:
                grown = self.collect(have, dice.choice((1, 32, blocks.SLOTS)), plain)
                if grown <= have:
                    self.ring["fault"] = 0
                    break
                have = grown
            self.consume(max(have, 0))
            if have < 0:
                self.ring["fault"] = 0
        self.check_memory()

    def check_memory(self) -> None:
        for part in (*self.memory, self.desc, self.avail, self.used, self.batch, self.row):
            assert part.intact(), "written below a part's start"


def _drain(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0
