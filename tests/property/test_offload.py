"""Offloads on any frame at all: compiled and plain Python agree, and touch nothing but their buffers.

Promises: frames lie against a page that cannot be touched, in front and behind; what is not to be written is
compared afterwards.
"""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from guarded import Guarded
from plain_twin import plain_twin
from pyvhost.dataplane import _words, offload

PLAIN: Any = plain_twin(offload, sum_block=_words._plain_sum_block)

small = st.integers(0, 255)
half = st.one_of(st.sampled_from([0, 1, 7, 8, 20, 40, 1448, 0x7FFF, 0x8000, 0xFFFF]), st.integers(0, 0xFFFF))
gso_types = st.one_of(st.sampled_from([0x01, 0x81, 0x03, 0x04, 0x84, 0x05]), small)


@st.composite
def almost_frames(draw: Any) -> bytes:
    """Frames whose headers mostly make sense, with any field wrong and cut anywhere."""
    body = draw(st.binary(max_size=200)) * draw(st.sampled_from([1, 1, 20]))
    tags = b"".join(
        struct.pack("!HH", draw(st.sampled_from([0x8100, 0x88A8])), 5) for _ in range(draw(st.integers(0, 3)))
    )
    protocol = draw(st.sampled_from([6, 17]))
    if protocol == 6:
        words = draw(st.sampled_from([5, 8, 15, 4, 0]))
        transport = struct.pack("!HHIIBBHHH", 1, 2, 0xFFFFFFF0, 4, words << 4, draw(small), 6, 7, 8)
        transport += bytes(max(0, words - 5) * 4)
    else:
        transport = struct.pack("!HHHH", 1, 2, draw(half), 0)
    inner = transport + body
    if draw(st.booleans()):
        options = bytes(draw(st.sampled_from([0, 0, 4, 40])))
        first = 0x45 + len(options) // 4
        total = draw(st.one_of(st.just(20 + len(options) + len(inner)), st.just(0), half))
        ip = struct.pack("!BBHHHBBHII", first, 0, total & 0xFFFF, 65535, 0x4000, 64, protocol, 0, 5, 6)
        network, ethertype = ip + options + inner, 0x0800
    else:
        kinds = draw(st.lists(st.sampled_from([0, 43, 44, 51, 60]), max_size=12))
        extensions = b""
        following = protocol
        for kind in reversed(kinds):
            size = draw(st.sampled_from([0, 0, 0, 1, 255]))
            extensions = (
                bytes([following, size, 0, draw(st.sampled_from([0, 0, 1]))])
                + bytes(8 * min(size, 1) + 4)
                + extensions
            )
            following = kind
        total = draw(st.one_of(st.just(len(extensions) + len(inner)), st.just(0), half))
        ip = struct.pack("!IHBB", 6 << 28, total & 0xFFFF, following, 64) + bytes(range(32))
        network, ethertype = ip + extensions + inner, 0x86DD
    frame = bytearray(bytes(12) + tags + struct.pack("!H", ethertype) + network)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        frame[draw(st.integers(0, min(len(frame), 100) - 1))] = draw(small)
    if draw(st.integers(0, 3)) == 0:
        del frame[draw(st.integers(0, min(len(frame), 130))) :]
    return bytes(frame)


@settings(deadline=None, max_examples=300)
@given(
    frame=st.one_of(almost_frames(), st.binary(max_size=120)),
    gso_type=gso_types,
    gso_size=half,
    indices=st.lists(st.integers(-1, 2100), max_size=3),
    room=st.one_of(st.none(), st.integers(0, 300)),
)
def test_segments(frame: bytes, gso_type: int, gso_size: int, indices: list[int], room: int | None) -> None:
    source = Guarded.of(frame)
    arguments = (source.address, len(frame), gso_type, gso_size)
    count = offload.segment_count(*arguments)
    assert count == PLAIN.segment_count(*arguments)
    assert count in (offload.MALFORMED, offload.UNSUPPORTED) or 1 <= count <= offload.MAX_SEGMENTS
    for index in [0, 1, count - 1, count, *indices]:
        size = len(frame) + 8 if room is None else room
        compiled, plain = Guarded(size), Guarded(size)
        made = offload.segment(*arguments, index, compiled.address, size, 1 << 31)
        assert made == PLAIN.segment(*arguments, index, plain.address, size, 1 << 31)
        assert made <= size
        if count < 0:
            assert made == count
        elif not 0 <= index < count:
            assert made == offload.MALFORMED
        else:
            assert made > 0 or made == offload.NO_ROOM
        assert compiled.get() == plain.get()
        # What lies beyond the segment, or all of it on error, is as it was.
        assert compiled.get(max(made, 0)) == bytes(size - max(made, 0))
        assert compiled.intact()
    assert source.get() == frame
    assert source.intact()


@settings(deadline=None)
@given(frame=st.binary(max_size=300), csum_start=half, csum_offset=half)
def test_finish_checksum(frame: bytes, csum_start: int, csum_offset: int) -> None:
    compiled, plain = Guarded.of(frame), Guarded.of(frame)
    answer = offload.finish_checksum(compiled.address, len(frame), csum_start, csum_offset)
    assert answer == PLAIN.finish_checksum(plain.address, len(frame), csum_start, csum_offset)
    assert compiled.get() == plain.get()
    assert compiled.intact()
    field = csum_start + csum_offset
    assert (answer == 0) == (field + 2 <= len(frame))
    after = bytearray(compiled.get())
    if answer == 0:
        after[field : field + 2] = frame[field : field + 2]
    assert bytes(after) == frame


@settings(deadline=None)
@given(data=st.binary(max_size=300), skipped=st.integers(0, 7), initial=st.integers(0, 0xFFFF))
def test_checksum(data: bytes, skipped: int, initial: int) -> None:
    memory = Guarded.of(bytes(skipped) + data)
    ours = offload.checksum(memory.address + skipped, len(data), initial)
    assert ours == PLAIN.checksum(memory.address + skipped, len(data), initial)
    # Ones' complement: modulo 0xFFFF, where 0 stays 0 and every other multiple becomes 0xFFFF.
    whole = initial + sum(value << (8 * (place & 1)) for place, value in enumerate(data))
    assert ours == (whole and (whole % 0xFFFF or 0xFFFF))
