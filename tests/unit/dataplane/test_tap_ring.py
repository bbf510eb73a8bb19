"""The recording's ring: what a loop puts in is whole pcapng blocks, wherever the ring's end cuts them."""

from __future__ import annotations

import ctypes
import os
import random
import struct
import threading
from itertools import pairwise

import numpy as np
import pytest

from pyvhost.dataplane import blocks, policy, tap_ring

Block = tuple[int, int, int, bytes, int, int]


class Ring:
    """A ring and its reader, in plain Python. `start`: how many bytes went through it before."""

    def __init__(self, size: int = 4096, snaplen: int = 65535, start: int = 0, interface: int = 3) -> None:
        self.size = size
        self.words = np.zeros(tap_ring.RING_BYTES // 8 + 8, np.int64)
        self.bytes = np.full(size, 0xEE, np.uint8)
        self.address = -(-self.words.ctypes.data // 64) * 64
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self[tap_ring.RING_DATA] = self.bytes.ctypes.data
        self[tap_ring.RING_SIZE] = size
        self[tap_ring.RING_SNAPLEN] = snaplen
        self[tap_ring.RING_INTERFACE] = interface
        self[tap_ring.RING_WAKE] = self.wake
        self[tap_ring.RING_HEAD] = self[tap_ring.RING_TAIL] = start
        self[tap_ring.RING_OPEN] = 1
        self[tap_ring.RING_EPOCH] = 1_700_000_000_000_000_000

    def __getitem__(self, word: int) -> int:
        return ctypes.c_int64.from_address(self.address + word).value

    def __setitem__(self, word: int, value: int) -> None:
        ctypes.c_int64.from_address(self.address + word).value = value

    def take(self) -> bytes:
        """What is there now, in the order of the file."""
        head, tail = tap_ring.filled(self.address), self[tap_ring.RING_TAIL]
        data = bytes(self.bytes[number % self.size] for number in range(tail, head))
        tap_ring.give_back(self.address, head)
        return data

    def put(
        self, frame: bytes, direction: int = tap_ring.INBOUND, *, cuts: tuple[int, ...] = (), skip: int = 0
    ) -> bool:
        """Records `frame`, in pieces that end at `cuts`, behind `skip` bytes that are none of its."""
        iov, _keep = pieces(b"\xdd" * skip + frame, cuts)
        return bool(
            tap_ring.record(self.address, iov.ctypes.data, len(iov) // 2, len(frame), skip, direction)
        )


def pieces(data: bytes, cuts: tuple[int, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """struct iovec of the parts of `data` between the cuts, and what they point to."""
    edges = (0, *cuts, len(data))
    parts = [np.frombuffer(data[a:b] or b"\0", np.uint8).copy() for a, b in pairwise(edges)]
    sizes = [b - a for a, b in pairwise(edges)]
    numbers = [n for part, size in zip(parts, sizes, strict=True) for n in (part.ctypes.data, size)]
    return np.array(numbers, np.int64), parts


def parse(data: bytes) -> list[Block]:
    """Enhanced Packet Blocks: interface, time, length, frame, direction, the block's bytes."""
    found = []
    while data:
        kind, total, interface, high, low, kept, length = struct.unpack_from("=7I", data)
        assert kind == 6
        assert total % 4 == 0
        padded = -(-kept // 4) * 4
        assert total == 28 + padded + 16
        assert data[28 + kept : 28 + padded] == bytes(padded - kept)
        code, size, flags, end, again = struct.unpack_from("=HHIII", data, 28 + padded)
        assert (code, size, end, again) == (2, 4, 0, total)
        found.append((interface, high << 32 | low, length, data[28 : 28 + kept], flags, total))
        data = data[total:]
    return found


FRAME = bytes(range(200))


def test_a_frame_is_a_block() -> None:
    ring = Ring()
    assert ring.put(FRAME, tap_ring.OUTBOUND)
    ((interface, when, length, frame, flags, _),) = parse(ring.take())
    assert (interface, length, frame, flags) == (3, 200, FRAME, 2)
    assert when > ring[tap_ring.RING_EPOCH]
    assert (ring[tap_ring.RING_FRAMES], ring[tap_ring.RING_LOST]) == (1, 0)


def test_time_goes_on() -> None:
    ring = Ring()
    for _ in range(3):
        ring.put(FRAME)
    times = [block[1] for block in parse(ring.take())]
    assert times == sorted(times)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 59, 60, 61, 62, 63, 64])
def test_padding(length: int) -> None:
    ring = Ring()
    ring.put(FRAME[:length])
    ((_, _, _, frame, _, _),) = parse(ring.take())
    assert frame == FRAME[:length]


@pytest.mark.parametrize("cuts", [(), (1,), (12,), (14, 14, 15), (0, 0, 100, 203, 212), (211,)])
def test_pieces_of_a_frame_behind_a_header(cuts: tuple[int, ...]) -> None:
    ring = Ring()
    ring.put(FRAME, cuts=cuts, skip=12)
    assert [block[3] for block in parse(ring.take())] == [FRAME]


def test_a_long_frame_loses_its_end() -> None:
    ring = Ring(snaplen=61)
    ring.put(FRAME, cuts=(50, 60, 70))
    ((_, _, length, frame, _, _),) = parse(ring.take())
    assert (length, frame) == (200, FRAME[:61])


def test_pieces_that_hold_less_than_was_said() -> None:
    ring = Ring()
    iov, _keep = pieces(FRAME, (100,))
    tap_ring.record(ring.address, iov.ctypes.data, 1, 200, 0, 1)
    ((_, _, length, frame, _, _),) = parse(ring.take())
    assert (length, frame) == (200, FRAME[:100]), "what else was in memory is nobody's business"


@pytest.mark.parametrize("start", range(4096 - 260, 4096 + 4, 4))
def test_the_rings_end_cuts_anywhere(start: int) -> None:
    ring = Ring(start=start)
    ring.put(FRAME, cuts=(77,))
    ring.put(FRAME[:33])
    assert [block[3] for block in parse(ring.take())] == [FRAME, FRAME[:33]]


def test_numbers_of_bytes_may_be_large() -> None:
    ring = Ring(start=(1 << 62) - 64)
    ring.put(FRAME)
    assert [block[3] for block in parse(ring.take())] == [FRAME]


def test_without_room_a_frame_is_lost_and_counted() -> None:
    ring = Ring(size=4096)
    block = 28 + 200 + 16
    fitting = 4096 // block
    assert [ring.put(FRAME) for _ in range(fitting + 2)] == [True] * fitting + [False] * 2
    assert (ring[tap_ring.RING_FRAMES], ring[tap_ring.RING_LOST]) == (fitting, 2)
    # A smaller one still fits, to the last byte.
    left = 4096 - fitting * block
    assert not ring.put(FRAME[: left - 44 + 1])
    assert ring.put(FRAME[: left - 44])
    assert len(parse(ring.take())) == fitting + 1
    assert ring.put(FRAME)


def test_a_frame_larger_than_the_ring() -> None:
    ring = Ring(size=4096)
    assert not ring.put(bytes(5000))
    assert ring[tap_ring.RING_LOST] == 1
    assert ring.put(FRAME)


def test_nobody_writes_any_more() -> None:
    ring = Ring()
    ring[tap_ring.RING_OPEN] = 0
    assert not ring.put(FRAME)
    assert ring[tap_ring.RING_LOST] == 1
    assert ring.take() == b""


def signals(ring: Ring) -> int:
    try:
        return os.eventfd_read(ring.wake)
    except BlockingIOError:
        return 0


def test_a_writer_that_sleeps_is_woken_once() -> None:
    ring = Ring()
    ring.put(FRAME)
    assert signals(ring) == 0, "it is awake"
    assert not tap_ring.falls_asleep(ring.address), "there is something"
    ring.take()
    assert tap_ring.falls_asleep(ring.address)
    for _ in range(3):
        ring.put(FRAME)
    assert signals(ring) == 1


def test_a_batch_that_was_sent() -> None:
    ring = Ring()
    memory, keep = batch(
        [[b"\xdd" * 12 + FRAME[:60]], [b"\xdd" * 5, b"\xdd" * 7 + FRAME[:9], FRAME[9:100]]], out=True
    )
    tap_ring.record_sent(ring.address, memory.ctypes.data, 0, 2, 12)
    assert [(block[3], block[4]) for block in parse(ring.take())] == [(FRAME[:60], 2), (FRAME[:100], 2)]
    tap_ring.record_sent(ring.address, memory.ctypes.data, 1, 2, 12)
    assert len(parse(ring.take())) == 1
    assert keep


def test_a_frame_in_several_receive_buffers() -> None:
    ring = Ring()
    other, first, second = (
        [b"\xaa" * 100],
        [b"\xdd" * 12, FRAME[:70]],
        [FRAME[70:130], FRAME[130:200] + b"\xbb" * 9],
    )
    memory, keep = batch([other, first, second], out=False)
    tap_ring.record_received(ring.address, memory.ctypes.data, 1, 2, 12, 200)
    assert [(block[3], block[4]) for block in parse(ring.take())] == [(FRAME, 1)]
    assert keep


def batch(chains: list[list[bytes]], *, out: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    """A batch as `split_ring.collect` leaves one, of these chains' pieces."""
    memory = np.zeros(blocks.BATCH_BYTES // 8, np.int64)
    keep = []
    iov = blocks.SLOTS * blocks.SLOT_BYTES // 8
    for number, chain in enumerate(chains):
        slot = number * blocks.SLOT_BYTES // 8
        size = sum(map(len, chain))
        memory[slot + blocks.SLOT_IOV // 8] = memory.ctypes.data + 8 * iov
        memory[slot + (blocks.SLOT_OUT if out else blocks.SLOT_IN) // 8] = len(chain)
        memory[slot + (blocks.SLOT_OUT_BYTES if out else blocks.SLOT_IN_BYTES) // 8] = size
        for piece in chain:
            keep.append(np.frombuffer(piece, np.uint8).copy())
            memory[iov : iov + 2] = keep[-1].ctypes.data, len(piece)
            iov += 2
    return memory, keep


def test_a_frame_in_one_piece() -> None:
    ring = Ring()
    data = np.frombuffer(FRAME, np.uint8).copy()
    scratch = np.zeros(2, np.int64)
    tap_ring.record_piece(ring.address, data.ctypes.data, 200, scratch.ctypes.data, tap_ring.INBOUND)
    assert [block[3] for block in parse(ring.take())] == [FRAME]


def test_two_threads_lose_nothing_but_what_is_counted() -> None:
    ring = Ring(size=4096)
    frames = 300 if policy.PLAIN else 3000
    read = bytearray()
    done = threading.Event()

    def write_out() -> None:
        while True:
            ended = done.is_set()
            read.extend(ring.take())
            if ended:
                return
            if tap_ring.falls_asleep(ring.address):
                os.set_blocking(ring.wake, True)
                os.eventfd_read(ring.wake)

    thread = threading.Thread(target=write_out)
    thread.start()
    lengths = random.Random(7)
    sent = []
    for number in range(frames):
        frame = struct.pack("=I", number) + FRAME[: lengths.randrange(196)]
        if ring.put(frame):
            sent.append(frame)
    done.set()
    os.eventfd_write(ring.wake, 1)
    thread.join()
    assert [block[3] for block in parse(bytes(read))] == sent
    assert ring[tap_ring.RING_FRAMES] == len(sent)
    assert ring[tap_ring.RING_LOST] == frames - len(sent)
