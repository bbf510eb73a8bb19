"""The vhost-user codec on messages and bytes that hypothesis makes up."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.vhost_user.codec import HEADER_SIZE, Decoder, Message, Stream, decode_one, encode, shape_of
from pyvhost.vhost_user.describe import describe, summary
from pyvhost.vhost_user.payloads import (
    REQUESTS,
    U64,
    UNKNOWN,
    CodecError,
    Config,
    Inflight,
    Iotlb,
    Log,
    MemReg,
    MemTable,
    Payload,
    Raw,
    Region,
    VringAddr,
    VringFile,
    VringState,
)
from recording_device import is_open, no_fd_leaks, spare_fd

u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
regions = st.builds(Region, u64, u64, u64, u64)
configs = st.builds(Config, u32, u32, st.binary(max_size=abi.MAX_CONFIG_SIZE))
states = st.builds(VringState, u32, u32)
files = st.builds(VringFile, u8, st.booleans())
PAYLOADS: dict[int, st.SearchStrategy[Payload | None]] = {
    Request.SET_OWNER: st.none(),
    Request.GET_FEATURES: st.none(),
    Request.SET_FEATURES: st.builds(U64, u64),
    Request.SET_VRING_NUM: states,
    Request.GET_VRING_BASE: states,
    Request.SET_VRING_ADDR: st.builds(VringAddr, u32, u32, u64, u64, u64, u64),
    Request.SET_MEM_TABLE: st.lists(regions, max_size=8).map(lambda r: MemTable(tuple(r))),
    Request.REM_MEM_REG: st.builds(MemReg, regions),
    Request.ADD_MEM_REG: st.builds(MemReg, regions),
    Request.SET_VRING_KICK: files,
    Request.SET_VRING_ERR: files,
    Request.SET_LOG_BASE: st.builds(Log, u64, u64) | st.builds(U64, u64),
    Request.IOTLB_MSG: st.builds(Iotlb, u64, u64, u64, u8, u8),
    Request.GET_CONFIG: configs,
    Request.SET_CONFIG: configs,
    Request.GET_INFLIGHT_FD: st.builds(Inflight, u64, u64, u16, u16),
    200: st.binary(min_size=1, max_size=4096).map(Raw),
}


@st.composite
def sound(draw: st.DrawFn) -> tuple[int, Payload | None, int]:
    """A request, its payload, and how many descriptors it needs."""
    request = draw(st.sampled_from(sorted(PAYLOADS)))
    payload = draw(PAYLOADS[request])
    fds = shape_of(Stream.REQUEST, request).fds[0]
    if isinstance(payload, MemTable):
        fds = len(payload.regions)
    if isinstance(payload, VringFile):
        fds = 0 if payload.no_fd else 1
    return request, payload, fds


def feed_in_pieces(decoder: Decoder, data: bytes, fds: list[int], sizes: list[int]) -> list[Message]:
    """All of `data`, cut where `sizes` says; the descriptors come with the first byte."""
    messages = []
    position = 0
    while position < len(data):
        size = sizes[position % len(sizes)] if sizes else len(data)
        piece = data[position : position + min(size, decoder.wanted)]
        position += len(piece)
        message = decoder.feed(piece, fds)
        fds = []
        if message is not None:
            messages.append(message)
    return messages


cuts = st.lists(st.integers(1, 64), max_size=8)


@given(sound(), cuts, st.booleans())
def test_what_was_encoded_is_decoded_however_it_is_cut(
    message: tuple[int, Payload | None, int], sizes: list[int], need_reply: bool
) -> None:
    request, payload, count = message
    data = encode(request, payload, flags=abi.FLAG_NEED_REPLY if need_reply else 0)
    with no_fd_leaks():
        fds = [spare_fd() for _ in range(count)]
        (decoded,) = feed_in_pieces(Decoder(Stream.REQUEST), data, list(fds), sizes)
        with decoded.fds:
            assert (decoded.request, decoded.payload, decoded.need_reply) == (request, payload, need_reply)
            assert list(decoded.fds) == fds
            assert describe(decoded, 1).startswith("front end: ")
            assert "\n" not in summary(decoded, 1)


@given(st.lists(st.sampled_from([Request.SET_OWNER, Request.SET_FEATURES, Request.SET_VRING_NUM])), cuts)
def test_a_row_of_messages_is_the_same_row_however_it_is_cut(
    requests: list[Request], sizes: list[int]
) -> None:
    data = b"".join(encode(r, Raw(bytes(REQUESTS[r].low))) for r in requests)
    messages = feed_in_pieces(Decoder(Stream.REQUEST), data, [], sizes)
    assert [m.request for m in messages] == requests


headers = st.builds(
    lambda request, flags, size: struct.pack("=III", request, flags, size),
    st.sampled_from([*Request]) | u32,
    st.sampled_from([1, 5, 9, 0xD]) | u32,
    st.integers(0, 300) | u32,
)
noise = st.lists(st.binary(max_size=300) | headers, max_size=6).map(b"".join)


@given(
    st.sampled_from(list(Stream)),
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), min_size=1, max_size=30),
    noise,
)
def test_no_bytes_and_no_descriptors_anywhere_do_more_than_end_the_stream(
    stream: Stream, pieces: list[tuple[int, int]], data: bytes
) -> None:
    decoder = Decoder(stream)
    position = 0
    with no_fd_leaks():
        try:
            for size, count in pieces:
                assert 0 < decoder.wanted <= max(HEADER_SIZE, UNKNOWN.high)
                piece = data[position : position + min(size, decoder.wanted)]
                position += len(piece)
                message = decoder.feed(piece, [spare_fd() for _ in range(count)])
                if message is not None:
                    with message.fds:
                        assert len(message.fds) <= abi.MAX_FDS
                        assert describe(message)
            decoder.end()
        except CodecError:
            pass
        decoder.close()


@given(st.sampled_from(list(Stream)), headers)
def test_a_header_announces_no_more_than_is_read(stream: Stream, header: bytes) -> None:
    decoder = Decoder(stream)
    try:
        decoder.feed(header)
    except CodecError:
        return
    assert decoder.wanted <= max(HEADER_SIZE, UNKNOWN.high)


@given(sound(), st.integers(0, 10))
def test_a_message_has_the_descriptors_it_needs_or_is_refused_and_they_are_closed(
    message: tuple[int, Payload | None, int], count: int
) -> None:
    request, payload, needed = message
    low, high = (needed, needed)
    if not isinstance(payload, MemTable | VringFile):
        low, high = shape_of(Stream.REQUEST, request).fds
    fds = [spare_fd() for _ in range(count)]
    try:
        (decoded,) = feed_in_pieces(Decoder(Stream.REQUEST), encode(request, payload), list(fds), [])
    except CodecError:
        assert not low <= count <= high
    else:
        assert low <= count <= high
        decoded.fds.close()
    assert not any(is_open(fd) for fd in fds)


@given(st.sampled_from([*BackendRequest][1:]), st.binary(max_size=50))
def test_the_back_ends_requests_are_judged_too(request: BackendRequest, body: bytes) -> None:
    try:
        message = decode_one(Stream.BACKEND_REQUEST, encode(request, Raw(body)))
    except CodecError:
        return
    assert message.name == request.name
