"""A split ring and its guest's memory, made by chance and mostly hostile, and the kernels' answers judged.

A scene is made from a `random.Random`, by the fuzz target from a seed and by hypothesis from its own choices: rings
of either byte order, with a memory table or an IOTLB, that log what they write or not, that begin with chains of a
former life or not. Every part lies against pages that cannot be touched (`guarded`), the batch and the log as well.

Promises: `Scene.play` ends, and raises AssertionError, or the process dies, where a kernel broke its contract.
"""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import numpy as np

from guarded import Guarded
from model import split_ring_model as model
from model.ring_guest import INDIRECT, NEXT, TOP, WRITE, Guest, signed
from plain_twin import plain_twin
from pyvhost.dataplane import blocks, dirty_log
from pyvhost.dataplane import split_ring as kernels

__all__ = ["INDIRECT", "NEXT", "WRITE", "Scene"]

#: The model's words for what a driver did wrong, and the kernels'.
FAULTS = {
    name.removeprefix("FAULT_"): int(code) for name, code in vars(blocks).items() if name.startswith("FAULT_")
} | {"MISS": blocks.IOTLB_MISS}
_FAULT_FIELDS = ("fault", "fault_descriptor", "fault_a", "fault_b")


class Scene(Guest):
    """One ring, its memory, and what the device thinks of it."""

    def __init__(self, dice: random.Random, module: Any = kernels, small: bool = False) -> None:
        super().__init__(dice, small)
        self.kernels = module
        self.logging = dirty_log if module is kernels else plain_twin(dirty_log)
        self.desc = Guarded(16 * self.num)
        self.avail = Guarded(6 + 2 * self.num)
        self.used = Guarded(6 + 8 * self.num)
        self.batch = Guarded(blocks.BATCH_BYTES)
        self.row = Guarded(8 * len(blocks.COUNTERS))
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.log_event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ring: Any = np.zeros(1, blocks.RING)
        self.ring = self._ring[0]
        self._start_ring()
        self._start_log()
        self._start_replay()
        self.point()

    def close(self) -> None:
        os.close(self.call)
        os.close(self.log_event)

    # Making it.

    def _start_ring(self) -> None:
        dice = self.dice
        last = dice.choice((0, 0, 65535, 65536 - self.num, dice.randrange(65536))) & 0xFFFF
        used = dice.choice((last, dice.randrange(65536)))
        self.last = last
        self.event_idx = dice.random() < 0.5
        self.on_empty = dice.random() < 0.2
        values = {
            "desc": self.desc.address,
            "avail": self.avail.address,
            "used": self.used.address,
            "num": self.num,
            "iotlb": int(self.iotlb),
            "last_avail": last,
            "seen_avail": last,
            "used_idx": used,
            "published": used,
            "event_idx": int(self.event_idx),
            "notify_on_empty": int(self.on_empty),
            "swap": int(self.order == ">"),
            "call_fd": self.call if dice.random() < 0.9 else -1,
            "err_fd": -1,
            "log_fd": self.log_event if dice.random() < 0.9 else -1,
            "located": 1,
            "running": 1,
            "row": self.row.address,
        }
        for name, value in values.items():
            self.ring[name] = value
        self.avail.put(2, struct.pack(self.order + "H", last))
        self.device = model.Device(
            self.num, self.event_idx, self.on_empty, bytearray(self.used.size), used, used, last, self.order
        )

    def _start_log(self) -> None:
        """A log of this memory, or of less of it, that is dirty already in places."""
        dice = self.dice
        self.log_data, self.log_used = dice.random() < 0.5, dice.random() < 0.5
        top = max(log + memory.size for log, memory in zip(self.logs, self.memory, strict=True))
        enough = min(-(-top // (8 * model.PAGE)), 1 << 18)
        self.log = Guarded(max(dice.choice((enough, enough, enough // 2, 1)), 1))
        if dice.random() < 0.3:
            self.log.put(0, bytes([dice.randrange(256)]) * self.log.size)
        self.model_log = model.Log(self.log.get())
        # Mostly across the end of a page.
        start = dice.choice((*self.starts, dice.randrange(1 << 32), TOP - self.used.size))
        self.used_at = min(
            start + dice.choice((0, 4096 - dice.randrange(self.used.size))), TOP - self.used.size
        )
        self.used_at = max(self.used_at, 0) & ~3
        if self.iotlb:
            # Or into the next region.
            place = dice.randrange(len(self.starts))
            spare = self.memory[place].size - self.used.size
            self.used_at = max(self.starts[place] + dice.choice((0, spare, spare + 100)), 0) & ~3
        self.ring["log_data"] = self.log.address if self.log_data else 0
        self.ring["log_bytes"] = self.log.size
        self.ring["log_used_at"] = signed(self.used_at)

    def _start_replay(self) -> None:
        """Chains of a former life, some of which are done with by now."""
        dice = self.dice
        self.replay: list[int] = []
        self.inflight = Guarded(blocks.INFLIGHT_DESC + blocks.INFLIGHT_DESC_BYTES * self.num)
        self.heads = Guarded(8 * self.num)
        if dice.random() < 0.3:
            self.inflight.put(0, bytes([dice.randint(1, 255)]) * self.inflight.size)
            self.ring["inflight"] = self.inflight.address
            self.replay = dice.sample(range(self.num), dice.randint(0, min(self.num, 40)))
            self.heads.put(0, struct.pack(f"<{len(self.replay)}q", *self.replay))
            self.ring["replay"] = self.heads.address
            self.ring["replay_left"] = len(self.replay)
        self.marks = bytearray(self.inflight.get())

    def point(self) -> None:
        """Has the ring's record mean memory as it is known now."""
        self.ring["regions"] = self.table.ctypes.data
        self.ring["region_count"] = len(self.table)
        self.ring["hit_size"] = 0
        # A ring that is not all in the IOTLB waits, and writes nothing.
        self.logs_ring = self.log_used and (not self.iotlb or self.has_used())
        self.ring["log_used"] = self.log.address if self.logs_ring else 0

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
            self.avail.put(4 + 2 * entry, struct.pack(self.order + "H", head))
        if dice.random() < self.wildness:
            ahead = dice.choice((self.num + 1, 65535, dice.randrange(65536)))
        self.avail.put(0, struct.pack(self.order + "H", dice.choice((0, 0, 1, 0xFFFE))))
        self.offer(ahead)
        event = dice.choice(
            (self.device.idx, self.device.idx - 1, self.device.idx + 3, dice.randrange(65536))
        )
        self.avail.put(4 + 2 * self.num, struct.pack(self.order + "H", event % 65536))

    def has_used(self) -> bool:
        """Whether the IOTLB has all of the used ring."""
        try:
            return bool(list(self.model_memory.pieces(self.used_at, self.used.size, model.WO)))
        except (KeyError, model.Fault):
            return False

    def offer(self, ahead: int) -> None:
        """The driver says that so many are available."""
        self.avail.put(2, struct.pack(self.order + "H", (self.last + ahead) % 65536))

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
            for memory in self.mapped
        )

    def check_ranges(self, slots: int) -> None:
        """Nothing outside the guest's memory, whatever the guest did meanwhile."""
        for index in range(slots):
            words, iovecs = self.slot(index)
            assert words[2] >= 0
            assert words[3] >= 0
            assert len(iovecs) <= blocks.MAX_CHAIN
            for address, length in iovecs:
                assert self.inside(address, length), f"iovec {address:#x}+{length:#x} is outside the regions"
            assert sum(length for _, length in iovecs[: words[2]]) == words[4]
            assert sum(length for _, length in iovecs[words[2] :]) == words[5]
        assert not self.ring["hit_size"] or self.ring["hit_access"] == model.RW, (
            "a hit is not looked at again"
        )

    def waiting(self, avail: bytes, wanted: int) -> int:
        """How many chains there are to walk; Fault. The index is looked at only if what was seen does not do."""
        seen = (int(self.ring["seen_avail"]) - self.last) % 65536
        if len(self.replay) + seen < wanted:
            (idx,) = struct.unpack_from(self.order + "H", avail, 2)
            seen = model.waiting(idx, self.last, self.num)
        return len(self.replay) + seen

    def head(self, avail: bytes, index: int) -> int:
        """The head of the chain that comes `index` chains after the last one taken."""
        if index < len(self.replay):
            return self.replay[index]
        return model.head_at(avail, self.num, self.last + index - len(self.replay), self.order)

    def collect(self, start: int, want: int, plain: int) -> int:
        """Calls `collect` and judges its answer by the model; the slots that the batch has now."""
        avail, content = self.avail.get(), self.desc.get()
        ahead: int | model.Fault
        try:
            ahead = self.waiting(avail, start + want)
        except model.Fault as fault:
            ahead = fault
        before = self.batch.get(0, start * blocks.SLOT_BYTES)
        made = int(
            self.kernels.collect(self.ring, self.batch.address, start, want, plain, self.dice.randint(0, 2))
        )
        assert self.batch.get(0, start * blocks.SLOT_BYTES) == before, "a slot from before was changed"
        assert int(self.ring["last_avail"]) == self.last, "collect does not consume"
        assert int(self.ring["replay_left"]) == len(self.replay), "collect does not consume"
        if isinstance(ahead, model.Fault):
            self.check_fault(made, ahead)
            return made
        end = max(min(ahead, start + want, blocks.SLOTS), start)
        assert made <= end
        self.check_ranges(max(made, 0))
        assert made < 0 or int(self.ring["fault"]) == 0, "a fault is told of with the chain that has it"
        pieces = sum(sum(self.slot(i)[0][2:4]) for i in range(start))
        for index in range(start, end):
            head = self.head(avail, index)
            try:
                chain = model.walk(self.model_memory, content, self.num, head, blocks.MAX_CHAIN, self.order)
                if plain == kernels.WRITABLE and chain.readable:
                    raise model.Fault("DIRECTION")
                if plain == kernels.WRITABLE and not chain.writable:
                    raise model.Fault("LENGTH")
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
            pieces += self.check_slot(index, chain)
        assert made == end
        return made

    def check_slot(self, index: int, chain: model.Chain) -> int:
        """Compares a slot with a chain; how many pieces it has."""
        words, iovecs = self.slot(index)
        assert words[0] == chain.head
        places = [*chain.readable, *chain.writable]
        expected = [(self.mapped[piece.region].address + piece.offset, piece.length) for piece in places]
        assert iovecs == expected
        logs = self.batch.get(words[1] - self.batch.address + blocks.IOV_LOG, 16 * len(iovecs))
        assert [struct.unpack_from("<Q", logs, 16 * i)[0] for i in range(len(iovecs))] == [
            self.log_address(piece) % TOP for piece in places
        ]
        assert words[2:] == [
            len(chain.readable),
            len(chain.writable),
            chain.readable_bytes,
            chain.writable_bytes,
        ]
        return len(iovecs)

    def log_address(self, piece: model.Piece) -> int:
        """The guest physical address of a piece."""
        return self.model_memory.regions[piece.region].log + piece.offset

    @staticmethod
    def is_full(pieces: int) -> bool:
        """Whether a batch may end here: a chain of any length, and one piece a slot, might not fit."""
        return pieces + blocks.MAX_CHAIN + blocks.SLOTS > blocks.BATCH_IOVECS

    def check_fault(self, made: int, fault: model.Fault) -> None:
        allowed = {FAULTS[word] for word in fault.words}
        assert -made in allowed, f"answered {made}, expected {fault} ({sorted(allowed)})"
        assert int(self.ring["fault"]) == -made
        if -made == blocks.IOTLB_MISS:
            assert (int(self.ring["fault_a"]) % TOP, int(self.ring["fault_b"])) == fault.miss

    # The dirty log.

    def log_written(self, slots: range, length: int) -> bool:
        """Marks the first `length` writable bytes of some chains in the model's log; whether there were any."""
        any_of_it = False
        for index in slots if self.log_data else ():
            words, iovecs = self.slot(index)
            logs = self.batch.get(words[1] - self.batch.address + blocks.IOV_LOG, 16 * len(iovecs))
            for place in range(words[2], len(iovecs)):
                run = min(iovecs[place][1], length)
                (address,) = struct.unpack_from("<Q", logs, 16 * place)
                any_of_it |= self.model_log.mark(address, run)
                length -= run
        return any_of_it

    def log_ring(self) -> bool:
        """Marks what the model's device has written to its used ring; whether there was anything."""
        any_of_it = False
        for offset, length in self.device.written if self.logs_ring else ():
            if not self.iotlb:
                any_of_it |= self.model_log.mark(self.used_at + offset, length)
                continue
            for piece in self.model_memory.pieces(self.used_at + offset, length, model.WO):
                any_of_it |= self.model_log.mark(self.log_address(piece), piece.length)
        self.device.written.clear()
        return any_of_it

    def check_log(self, any_of_it: bool) -> None:
        """Exactly what was written has its bits, and whoever reads the log was told."""
        assert self.log.get() == self.model_log.content
        told = _drain(self.log_event) > 0
        if self.ring["log_fd"] >= 0 and any_of_it:
            assert told, "something was logged and nobody told"
        assert not told or self.log_data or self.log_used

    # Consuming.

    def use_some(self, chains: int) -> bool:
        """Uses and takes chains in one of the ways that there are; whether anything was logged."""
        dice = self.dice
        heads = [self.slot(index)[0][0] for index in range(chains)]
        room = [self.slot(index)[0][5] for index in range(chains)]
        logged = False
        way = dice.randrange(3)
        if way == 0:
            self.kernels.use_batch(self.ring, self.batch.address, chains)
            lengths = [0] * chains
        else:
            # `log_slots` is only given what the chains have room for.
            lengths = room if way == 1 else [dice.choice((0, 12, size, 0xFFFFFFFF)) for size in room]
            lengths = [length & 0xFFFFFFFF for length in lengths]
            for index, length in enumerate(lengths):
                if way == 1:
                    self.kernels.use(self.ring, heads[index], length)
                else:
                    self.kernels.use_written(
                        self.ring, self.batch.address + index * blocks.SLOT_BYTES, length
                    )
                    logged |= self.log_written(range(index, index + 1), length)
            if way == 1 and self.log_data and chains:
                total = dice.choice((sum(room), dice.randint(0, sum(room))))
                self.logging.log_slots(self.ring, self.batch.address, total)
                logged |= self.log_written(range(chains), total)
            self.kernels.take(self.ring, chains)
        for head, length in zip(heads, lengths, strict=True):
            self.device.use(head, length)
        return logged

    def took(self, chains: int) -> None:
        """What the record and the inflight memory have of so many chains that were taken."""
        again = min(chains, len(self.replay))
        del self.replay[:again]
        self.last = self.device.last_avail = (self.last + chains - again) % 65536
        assert int(self.ring["last_avail"]) == self.last
        assert int(self.ring["replay_left"]) == len(self.replay)

    def mark_used(self, first: int, end: int) -> None:
        """What a publication leaves in the inflight memory: its chains as a list, none of them marked."""
        (last,) = struct.unpack_from("<H", self.marks, 12)
        for number in range((end - first) % 65536):
            place = 4 + 8 * ((first + number) % self.num)
            (head,) = struct.unpack_from(self.device.order + "I", self.device.used, place)
            struct.pack_into("<H", self.marks, 16 + 16 * head + 6, last)
            last = head
        struct.pack_into("<H", self.marks, 12, last)
        for _ in range((end - first) % 65536):
            if last >= self.num:
                break
            self.marks[16 + 16 * last] = 0
            (last,) = struct.unpack_from("<H", self.marks, 16 + 16 * last + 6)
        struct.pack_into("<H", self.marks, blocks.INFLIGHT_USED_IDX, end)

    def consume(self, slots: int) -> None:
        """Uses some of the batch, publishes, and compares the used ring, the log and the call."""
        dice = self.dice
        chains = dice.randint(0, slots)
        told = [int(self.ring[name]) for name in _FAULT_FIELDS]
        logged = self.use_some(chains)
        self.took(chains)
        self.kernels.publish(self.ring)
        shown = self.device.shown
        wanted = self.device.publish(self.avail.get())
        if chains:
            if self.ring["inflight"]:
                self.mark_used(shown, self.device.idx)
            logged |= self.log_ring()
        assert self.inflight.get() == self.marks
        called = _drain(self.call) > 0 if int(self.ring["call_fd"]) >= 0 else wanted
        # With both features a call more than was asked for is allowed; one less never is.
        allowed = (True, wanted) if self.event_idx and self.on_empty else (wanted,)
        assert called in allowed, f"called: {called}, the driver wants it: {wanted}"
        ask = dice.random() < 0.5
        self.kernels.want_kicks(self.ring, ask)
        self.device.ask_for_kicks(ask, int(self.ring["seen_avail"]))
        logged |= self.log_ring()
        assert self.used.get() == bytes(self.device.used)
        self.check_log(logged)
        assert told == [int(self.ring[name]) for name in _FAULT_FIELDS], (
            "a fault that nobody was told of is gone"
        )

    def play(self) -> None:
        """Some rounds of a driver that adds and a device that takes."""
        dice = self.dice
        for _ in range(dice.randint(1, 4)):
            self.add()
            plain = dice.choice((0, WRITE, kernels.WRITABLE))
            have = self.collect(0, dice.choice((1, 32, 32, blocks.SLOTS)), plain)
            for _ in range(4):
                if have != -blocks.IOTLB_MISS or dice.random() < 0.3:
                    break
                # Answered, the same chain is walked again, further than before.
                self.answer(int(self.ring["fault_a"]) % TOP)
                self.point()
                self.ring["fault"] = 0
                have = self.collect(0, dice.choice((1, 32, 32, blocks.SLOTS)), plain)
            while 0 < have < blocks.SLOTS and dice.random() < 0.3:
                grown = self.collect(have, dice.choice((1, 32, blocks.SLOTS)), plain)
                if grown <= have:
                    break
                have = grown
            self.consume(max(have, 0))
            self.ring["fault"] = 0
        self.check_memory()

    def check_memory(self) -> None:
        parts = (self.desc, self.avail, self.used, self.batch, self.row, self.log, self.inflight, self.heads)
        for part in (*self.memory, *parts):
            assert part.intact(), "written below a part's start"


def _drain(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0
