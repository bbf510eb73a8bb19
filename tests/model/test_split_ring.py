"""The split ring's kernels against a model of virtio 1.2, 2.7 that shares no code with them."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guarded import Guarded
from model.ring_scene import INDIRECT, NEXT, WRITE, Scene
from model.split_ring_model import DESCRIPTOR
from plain_twin import plain_twin
from pyvhost.dataplane import blocks, split_ring

# In plain Python an index is a NumPy scalar, which warns where a machine word wraps silently.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")

relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck))


def play(scene: Scene) -> None:
    try:
        scene.play()
    finally:
        scene.close()


@relaxed
@given(dice=st.randoms(use_true_random=False))
def test_small_rings(dice: random.Random) -> None:
    play(Scene(dice, small=True))


@settings(relaxed, max_examples=200)
@given(seed=st.integers(0, 2**64 - 1))
def test_rings_of_all_sizes(seed: int) -> None:
    play(Scene(random.Random(seed)))


@settings(relaxed, max_examples=30)
@given(seed=st.integers(0, 2**64 - 1))
def test_the_same_as_plain_python(seed: int) -> None:
    play(Scene(random.Random(seed), module=plain_twin(split_ring), small=True))


class Bench:
    """A ring of 64 whose memory is one region from 0; table and entries are set by hand."""

    def __init__(self, num: int = 64) -> None:
        self.num = num
        self.memory = Guarded(1 << 20)
        self.desc = Guarded(16 * num)
        self.avail = Guarded(6 + 2 * num)
        self.used = Guarded(6 + 8 * num)
        self.batch = Guarded(blocks.BATCH_BYTES)
        self.row = Guarded(8 * len(blocks.COUNTERS))
        self.table = np.array([(0, self.memory.size, self.memory.address, 0, 3)], dtype=np.int64)
        self._ring: Any = np.zeros(1, blocks.RING)
        self.ring = self._ring[0]
        values = {
            "desc": self.desc.address,
            "avail": self.avail.address,
            "used": self.used.address,
            "num": num,
            "regions": self.table.ctypes.data,
            "region_count": 1,
            "call_fd": -1,
            "err_fd": -1,
            "log_fd": -1,
            "located": 1,
            "running": 1,
            "row": self.row.address,
        }
        for name, value in values.items():
            self.ring[name] = value
        self._tables = 1 << 16

    def describe(self, index: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.desc.put(16 * index, DESCRIPTOR.pack(addr, length, flags, following))

    def chain_of(self, index: int, pieces: int) -> None:
        """An indirect descriptor of a chain of `pieces` readable bytes."""
        for place in range(pieces):
            final = place == pieces - 1
            self.memory.put(
                self._tables + 16 * place,
                DESCRIPTOR.pack(place, 1, 0 if final else NEXT, (place + 1) & 0xFFFF),
            )
        self.describe(index, self._tables, 16 * pieces, INDIRECT)
        self._tables += 16 * pieces

    def offer(self, count: int, idx: int | None = None) -> None:
        for entry in range(self.num):
            self.avail.put(4 + 2 * entry, struct.pack("<H", entry))
        self.avail.put(2, struct.pack("<H", count if idx is None else idx))

    def collect(self, start: int, want: int, plain: int = 0) -> int:
        return int(split_ring.collect(self.ring, self.batch.address, start, want, plain, 2))

    def slot(self, index: int) -> tuple[int, ...]:
        return struct.unpack("<6q", self.batch.get(index * blocks.SLOT_BYTES, 48))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    for part in (made.memory, made.desc, made.avail, made.used, made.batch, made.row):
        assert part.intact()


def test_long_chains_end_a_batch_before_its_room_does(bench: Bench) -> None:
    # The last of the long ones ends where the iovecs' room ends; the short ones behind it want some too.
    for index, pieces in enumerate((blocks.MAX_CHAIN, blocks.SLOTS, blocks.MAX_CHAIN)):
        bench.chain_of(index, pieces)
    for index in range(3, 64):
        bench.describe(index, 0, 64)
    bench.offer(64)
    made = bench.collect(0, blocks.BATCH)
    assert 2 <= made <= 32
    *_, iov, readable, writable, _, _ = bench.slot(made - 1)
    end = iov + 16 * (readable + writable) - bench.batch.address
    assert end <= blocks.SLOTS * blocks.SLOT_BYTES + 16 * blocks.BATCH_IOVECS


def test_a_driver_that_takes_entries_back_leaves_the_batch_as_it_was(bench: Bench) -> None:
    for index in range(64):
        bench.describe(index, 0, 64)
    bench.offer(8)
    assert bench.collect(0, 8) == 8
    before = bench.batch.get(0, 8 * blocks.SLOT_BYTES)
    bench.offer(8, idx=3)
    # "`start` and more".
    assert bench.collect(8, 8) == 8
    assert bench.batch.get(0, 8 * blocks.SLOT_BYTES) == before


def test_the_longest_chain_and_one_longer(bench: Bench) -> None:
    bench.chain_of(0, blocks.MAX_CHAIN)
    bench.chain_of(1, blocks.MAX_CHAIN + 1)
    bench.offer(2)
    assert bench.collect(0, 2) == 1
    assert bench.slot(0)[2:] == (blocks.MAX_CHAIN, 0, blocks.MAX_CHAIN, 0)
    split_ring.take(bench.ring, 1)
    assert bench.collect(0, 1) == -blocks.FAULT_TOO_LONG


def test_a_write_flag_on_an_indirect_descriptor_means_nothing(bench: Bench) -> None:
    # 2.7.5.3.2: the device MUST ignore it.
    bench.chain_of(0, 2)
    bench.describe(0, 1 << 16, 32, INDIRECT | WRITE)
    bench.offer(1)
    assert bench.collect(0, 1, WRITE) == 1
    assert bench.slot(0)[2:] == (2, 0, 2, 0)


def test_a_call_is_not_lost_after_65536_that_were_not_asked_about(bench: Bench) -> None:
    # With both features an emptied ring calls without looking at used_event; what was shown meanwhile still
    # counts when it is looked at the next time, however often the index has gone round.
    event = os.eventfd(0, os.EFD_NONBLOCK)
    bench.ring["call_fd"] = event
    bench.ring["event_idx"] = bench.ring["notify_on_empty"] = 1
    bench.describe(0, 0, 64)

    def show(count: int, emptied: bool) -> bool:
        used = (int(bench.ring["used_idx"]) + count) & 0xFFFF
        bench.ring["used_idx"] = bench.ring["last_avail"] = used
        bench.avail.put(2, struct.pack("<H", used if emptied else (used + 1) & 0xFFFF))
        split_ring.publish(bench.ring)
        try:
            return os.eventfd_read(event) > 0
        except BlockingIOError:
            return False

    try:
        bench.avail.put(4 + 2 * bench.num, struct.pack("<H", 0))
        assert show(1, emptied=False)
        for _ in range(65536 // 64 - 1):
            assert show(64, emptied=True)
        # 63 more and then 2: the driver waits for the first of the two.
        assert show(63, emptied=True)
        event_at = int(bench.ring["used_idx"])
        bench.avail.put(4 + 2 * bench.num, struct.pack("<H", event_at))
        assert show(2, emptied=False)
    finally:
        os.close(event)


def test_used_elements_that_overtake_each_other_are_logged_inside_their_ring(bench: Bench) -> None:
    # Chains of a former life, and a driver that has nevertheless filled its ring.
    heads, inflight, log = Guarded(8 * 64), Guarded(16 + 16 * 64), Guarded(4)
    heads.put(0, struct.pack("<64q", *range(64)))
    for index in range(64):
        bench.describe(index, 0, 64)
    bench.offer(64)
    bench.ring["used_idx"] = bench.ring["published"] = 40
    bench.ring["replay"], bench.ring["replay_left"] = heads.address, 64
    bench.ring["inflight"] = inflight.address
    bench.ring["log_used"], bench.ring["log_bytes"] = log.address, log.size
    # The elements end with a page.
    bench.ring["log_used_at"] = 2 * 4096 - 4 - 8 * 64
    assert bench.collect(0, 128) == 128
    split_ring.use_batch(bench.ring, bench.batch.address, 128)
    split_ring.publish(bench.ring)
    assert log.get() == b"\2\0\0\0"


def test_a_chain_that_is_too_long_leaves_no_entry_that_was_not_looked_at(bench: Bench) -> None:
    # The longest chain's last piece is one more, and lies in an entry that may only be read; then comes a write.
    end = 1 << 20
    limited = np.array([(end, 4096, bench.memory.address, 0, 1)], dtype=np.int64)
    table = np.concatenate([bench.table, limited])
    bench.ring["regions"], bench.ring["region_count"], bench.ring["iotlb"] = table.ctypes.data, 2, 1
    bench.chain_of(0, blocks.MAX_CHAIN)
    last = 16 * (blocks.MAX_CHAIN - 1)
    bench.memory.put((1 << 16) + last, DESCRIPTOR.pack(end - 1, 2, 0, 0))
    bench.describe(1, end, 64, WRITE)
    bench.offer(1)
    assert bench.collect(0, 1) == -blocks.FAULT_TOO_LONG
    bench.avail.put(4, struct.pack("<H", 1))
    assert bench.collect(0, 1, WRITE) == -blocks.FAULT_PERMISSION
