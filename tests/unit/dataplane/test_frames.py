"""Frames between pieces, and into receive buffers: every byte arrives, and none beyond.

All memory lies against pages that can't be touched, so that a byte too many ends the process.
"""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guarded import Guarded
from pyvhost.abi import virtio_net as abi
from pyvhost.dataplane import blocks, frames

#: Lengths of pieces.
cuts = st.lists(st.integers(1, 40), min_size=1, max_size=8)


class Pieces:
    """Memory in pieces, and the struct iovec that list them."""

    def __init__(self, lengths: list[int], content: bytes | None = None) -> None:
        self.parts = [Guarded(length) for length in lengths]
        rows = [(part.address, part.size) for part in self.parts]
        self._rows = Guarded.of(np.array(rows, np.int64).tobytes())
        self.iov = self._rows.address
        self.size = sum(lengths)
        self.put(content if content is not None else bytes(self.size))

    def put(self, content: bytes) -> None:
        assert len(content) == self.size
        for part in self.parts:
            part.put(0, content[: part.size])
            content = content[part.size :]

    def get(self) -> bytes:
        assert all(part.intact() for part in self.parts)
        return b"".join(part.get() for part in self.parts)


@st.composite
def spans(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Pieces, and a range in them."""
    lengths = draw(cuts)
    skip = draw(st.integers(0, sum(lengths)))
    return lengths, skip, draw(st.integers(0, sum(lengths) - skip))


@settings(deadline=None)
@given(spans())
def test_gather(span: tuple[list[int], int, int]) -> None:
    lengths, skip, length = span
    content = os.urandom(sum(lengths))
    source, to = Pieces(lengths, content), Guarded(length)
    frames.gather(source.iov, skip, to.address, length)
    assert to.get() == content[skip : skip + length]
    assert to.intact()


@settings(deadline=None)
@given(spans())
def test_scatter(span: tuple[list[int], int, int]) -> None:
    lengths, skip, length = span
    before, content = os.urandom(sum(lengths)), os.urandom(length)
    to, source = Pieces(lengths, before), Guarded.of(content)
    frames.scatter(source.address, to.iov, skip, length)
    assert to.get() == before[:skip] + content + before[skip + length :]


@settings(deadline=None)
@given(spans(), spans())
def test_transfer(one: tuple[list[int], int, int], two: tuple[list[int], int, int]) -> None:
    (lengths, skip, most), (to_lengths, to_skip, to_most) = one, two
    length = min(most, to_most)
    content, before = os.urandom(sum(lengths)), os.urandom(sum(to_lengths))
    source, to = Pieces(lengths, content), Pieces(to_lengths, before)
    frames.transfer(source.iov, skip, to.iov, to_skip, length)
    assert to.get() == before[:to_skip] + content[skip : skip + length] + before[to_skip + length :]


# Headers


@pytest.mark.parametrize("size", [10, 12])
@pytest.mark.parametrize("lengths", [[64], [10, 54], [12, 52], [1, 63], [9, 1, 1, 1, 52], [1] * 64], ids=str)
def test_a_header_is_found_in_one_piece(lengths: list[int], size: int) -> None:
    content = bytes(range(1, 65))
    chain, scratch = Pieces(lengths, content), Guarded(size)
    slot = np.array([0, chain.iov, len(lengths), 0, 64, 0], np.int64)
    at = int(frames.header_at(slot.ctypes.data, size, scratch.address, 0))
    assert at == (chain.parts[0].address if lengths[0] >= size else scratch.address)
    found = chain.parts[0].get(0, size) if lengths[0] >= size else scratch.get()
    assert found == content[:size]
    assert scratch.intact()


def word(flags: int, gso: int, hdr_len: int = 0, size: int = 0, start: int = 0) -> int:
    (value,) = struct.unpack("<q", struct.pack("<BBHHH", flags, gso, hdr_len, size, start))
    return int(value)


KINDS = (abi.HDR_GSO_TCPV4, abi.HDR_GSO_TCPV6, abi.HDR_GSO_UDP, abi.HDR_GSO_UDP_L4)


def test_of_the_flags_only_needs_csum_reaches_another_guest() -> None:
    for flags in range(256):
        said = frames.sane(word(flags, 0, 54, 0, 0xFFFF)) % (1 << 64)
        assert said == word(flags & abi.HDR_F_NEEDS_CSUM, 0, 54, 0, 0xFFFF) % (1 << 64)


@pytest.mark.parametrize("ecn", [0, abi.HDR_GSO_ECN])
def test_a_gso_type_that_is_none_or_begins_no_checksum_is_no_gso(ecn: int) -> None:
    for gso in range(128):
        whole = word(abi.HDR_F_NEEDS_CSUM, gso | ecn, 54, 1460, 34)
        if gso in KINDS:
            assert frames.sane(whole) == whole
        else:
            assert frames.sane(whole) == word(abi.HDR_F_NEEDS_CSUM, 0, 54, 0, 34)
        # Cutting it would leave the checksum to nobody.
        assert frames.sane(word(0, gso | ecn, 54, 1460, 34)) == word(0, 0, 54, 0, 34)


# Into receive buffers


class Ring:
    """A port, a ring to use chains of, and a batch of receive buffers."""

    def __init__(
        self, buffers: list[list[int]], header: int = 12, mergeable: bool = True, num: int = 64
    ) -> None:
        self._port: Any = np.zeros(1, blocks.PORT)
        self._ring: Any = np.zeros(1, blocks.RING)
        self.port, self.ring = self._port[0], self._ring[0]
        self.port["header"], self.port["mergeable"] = header, int(mergeable)
        self.used = Guarded(6 + 8 * num)
        self.ring["used"], self.ring["num"] = self.used.address, num
        self.ring["used_idx"] = 65535
        self.header = header
        self.buffers = [Pieces(lengths) for lengths in buffers]
        for buffer in self.buffers:
            buffer.put(b"\xee" * buffer.size)
        slots = [
            (100 + i, buffer.iov, 0, len(buffer.parts), 0, buffer.size)
            for i, buffer in enumerate(self.buffers)
        ]
        self.slots = Guarded.of(np.array(slots, np.int64).tobytes())
        self.batch = self.slots.address
        self.scratch = Guarded(12)

    def buffers_for(self, length: int, at: int = 0) -> int:
        return int(frames.buffers_for(self.port, self.batch, at, len(self.buffers), length))

    def put(self, at: int, count: int, chain: Pieces, skip: int, length: int) -> None:
        flags = word(1, 1, 54, 1460, 34)
        arguments = (self.port, self.ring, self.batch, at, count, flags, 16, chain.iov, skip, length)
        frames.put(*arguments, self.scratch.address)

    def elements(self, count: int) -> list[tuple[int, int]]:
        """The next used elements, from index 65535 on, which is the last slot."""
        num = int(self.ring["num"])
        return [struct.unpack("<II", self.used.get(4 + 8 * ((65535 + i) % num), 8)) for i in range(count)]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=6),
    cuts,
    st.integers(0, 20),
    st.integers(0, 5),
    st.sampled_from([10, 12]),
    st.booleans(),
)
def test_a_frame_lies_in_as_many_buffers_as_it_needs(
    buffers: list[list[int]], chain: list[int], skip: int, at: int, header: int, mergeable: bool
) -> None:
    at = min(at, len(buffers) - 1)
    skip = min(skip, sum(chain) - 1)
    length = sum(chain) - skip
    ring = Ring(buffers, header, mergeable)
    rooms = [buffer.size for buffer in ring.buffers[at:]]
    made = ring.buffers_for(length, at)
    # Written out again from virtio 1.2, 5.1.6.3.2 and 5.1.6.4.1.
    fitting = [n for n in range(1, len(rooms) + 1) if sum(rooms[:n]) >= length + header]
    if rooms[0] < header or (not mergeable and 1 not in fitting):
        assert made == -1
        return
    if not fitting:
        assert made == 0
        return
    assert made == min(fitting)
    content = os.urandom(sum(chain))
    ring.put(at, made, Pieces(chain, content), skip, length)
    said = struct.pack("<BBHHHH", 1, 1, 54, 1460, 34, 16)
    if header == 12:
        said += struct.pack("<H", made)
    whole = said + content[skip:]
    assert int(ring.ring["used_idx"]) == (65535 + made) & 0xFFFF
    left = whole
    for i, (head, written) in enumerate(ring.elements(made)):
        buffer = ring.buffers[at + i]
        assert head == 100 + at + i
        assert written == min(len(left), buffer.size)
        assert buffer.get() == left[:written] + b"\xee" * (buffer.size - written)
        left = left[written:]
    assert left == b""
    others = ring.buffers[:at] + ring.buffers[at + made :]
    assert all(set(buffer.get()) <= {0xEE} for buffer in others)


def test_without_buffers_there_is_nothing_to_say_yet() -> None:
    ring = Ring([[100]])
    assert frames.buffers_for(ring.port, ring.batch, 0, 0, 60) == 0
    assert frames.buffers_for(ring.port, ring.batch, 1, 1, 60) == 0


@pytest.mark.parametrize(
    "lengths", [[65_600], [12, 65_588], [10, 2, 588, 65_000], [7] * 9372], ids=lambda x: str(len(x))
)
def test_the_longest_frame(lengths: list[int]) -> None:
    length = blocks.LONGEST_FRAME - 64
    content = random.Random(1).randbytes(length + 10)
    ring = Ring([lengths])
    assert ring.buffers_for(length) == 1
    ring.put(0, 1, Pieces([10, 1000, length - 1000], content), 10, length)
    assert ring.elements(1) == [(100, length + 12)]
    assert ring.buffers[0].get()[12 : 12 + length] == content[10:]
