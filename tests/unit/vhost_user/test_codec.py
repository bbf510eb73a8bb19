"""The codec against bytes that UML, QEMU and DPDK sent, and against bytes that nobody should send."""

from __future__ import annotations

import struct

import pytest

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.vhost_user.codec import Decoder, Fds, Message, Stream, decode_one, encode
from pyvhost.vhost_user.payloads import (
    BACKEND_REQUESTS,
    REQUESTS,
    U64,
    CodecError,
    Config,
    DeviceState,
    Inflight,
    Iotlb,
    Log,
    MemReg,
    MemTable,
    Raw,
    Region,
    VringAddr,
    VringArea,
    VringFile,
    VringState,
)
from recording_device import (
    conversation,
    conversations,
    is_open,
    no_fd_leaks,
    spare_fd,
)

NEED_REPLY = abi.FLAG_NEED_REPLY


def header(request: int, size: int, flags: int = 1) -> bytes:
    return struct.pack("=III", request, flags, size)


def decode(
    stream: Stream, data: bytes, fds: list[int] | None = None, *, step: int = 1 << 20
) -> list[Message]:
    """Everything in `data`, `step` bytes at a time; all descriptors come with the first byte."""
    decoder = Decoder(stream)
    messages = []
    left = list(fds or [])
    while data:
        piece = data[: min(step, decoder.wanted)]
        data = data[len(piece) :]
        message = decoder.feed(piece, left)
        left = []
        if message is not None:
            messages.append(message)
    return messages


def stream_of(front: bool, backend_channel: bool) -> Stream:
    if backend_channel:
        return Stream.BACKEND_REPLY if front else Stream.BACKEND_REQUEST
    return Stream.REQUEST if front else Stream.REPLY


# --- bytes from the field --------------------------------------------------------------------------


@pytest.mark.parametrize("name", conversations())
@pytest.mark.parametrize("step", [1, 5, 1 << 20])
def test_every_recorded_message_is_read_and_written_back_to_the_same_bytes(name: str, step: int) -> None:
    for recorded in conversation(name):
        fds = [spare_fd() for _ in range(recorded.fds)]
        with no_fd_leaks():
            (message,) = decode(
                stream_of(recorded.front, recorded.backend_channel), recorded.data, fds, step=step
            )
            assert list(message.fds) == fds
            assert message.request == recorded.request
            again = encode(message.request, message.payload, flags=message.flags & ~abi.VERSION_MASK)
            if isinstance(message.payload, Iotlb):
                # QEMU sends what its stack had in C's padding behind the last field.
                assert again[12:38] == recorded.data[12:38]
            else:
                # UML has room for two regions in a table, whatever their number: the rest is zeros.
                assert recorded.data[12:].startswith(again[12:])
                assert not any(recorded.data[len(again) :])
        message.fds.close()
        assert not any(is_open(fd) for fd in fds)


def test_uml_shares_its_memory_in_a_table_with_room_for_two_regions() -> None:
    table = next(m for m in conversation("uml-6.1") if m.request == Request.SET_MEM_TABLE)
    assert len(table.data) == 12 + 72
    (message,) = decode(Stream.REQUEST, table.data, [spare_fd()])
    with message.fds:
        assert isinstance(message.payload, MemTable)
        (region,) = message.payload.regions
        assert region.memory_size == 0x7579000
        assert region.userspace_addr == region.mmap_offset
        assert message.need_reply


def test_uml_acknowledges_a_configuration_change_on_the_back_ends_socket() -> None:
    asked, answered = [m for m in conversation("uml-6.1") if m.backend_channel]
    assert decode_one(Stream.BACKEND_REQUEST, asked.data).request == BackendRequest.CONFIG_CHANGE_MSG
    answer = decode_one(Stream.BACKEND_REPLY, answered.data)
    assert (answer.name, answer.payload) == ("CONFIG_CHANGE_MSG", U64(0))


def test_qemu_adds_memory_region_by_region_and_asks_for_an_answer() -> None:
    added = [m for m in conversation("qemu-7.2") if m.request == Request.ADD_MEM_REG and m.front]
    pieces = []
    for recorded in added:
        (message,) = decode(Stream.REQUEST, recorded.data, [spare_fd()])
        with message.fds:
            assert message.need_reply
            assert isinstance(message.payload, MemReg)
            pieces.append((message.payload.region.guest_phys_addr, message.payload.region.memory_size))
    assert pieces == [(0, 0xA0000), (0xC0000, 0x7F40000)]


# --- every layout ----------------------------------------------------------------------------------

LAYOUTS = [
    (Stream.REQUEST, Request.SET_FEATURES, U64(0x1_4000_0000), "0000004001000000"),
    (Stream.REQUEST, Request.SET_VRING_NUM, VringState(3, 256), "0300000000010000"),
    (
        Stream.REQUEST,
        Request.SET_VRING_ADDR,
        VringAddr(1, 1, 0x1000, 0x2000, 0x3000, 0x4000),
        "01000000010000000010000000000000002000000000000000300000000000000040000000000000",
    ),
    (Stream.REQUEST, Request.SET_VRING_CALL, VringFile(2, no_fd=True), "0201000000000000"),
    (
        Stream.REQUEST,
        Request.REM_MEM_REG,
        MemReg(Region(0x1000, 0x2000, 0x7000, 0x10)),
        "00000000000000000010000000000000002000000000000000700000000000001000000000000000",
    ),
    (Stream.REQUEST, Request.SET_MEM_TABLE, MemTable(()), "0000000000000000"),
    (Stream.REQUEST, Request.SET_LOG_BASE, Log(0x1000, 0x20), "00100000000000002000000000000000"),
    (Stream.REQUEST, Request.SET_LOG_BASE, U64(0x1000), "0010000000000000"),
    (
        Stream.REQUEST,
        Request.IOTLB_MSG,
        Iotlb(0x1000, 0x2000, 0x7000, 3, 2),
        "0010000000000000002000000000000000700000000000000302000000000000",
    ),
    (Stream.REQUEST, Request.SET_CONFIG, Config(6, 1, b"\x01\x02"), "0600000002000000010000000102"),
    (
        Stream.REQUEST,
        Request.GET_INFLIGHT_FD,
        Inflight(0, 0, 2, 256),
        "000000000000000000000000000000000200000100000000",
    ),
    (Stream.REPLY, Request.GET_VRING_BASE, VringState(1, 77), "010000004d000000"),
    (Stream.REPLY, Request.SET_VRING_NUM, U64(22), "1600000000000000"),
    (Stream.REPLY, Request.SET_LOG_BASE, None, ""),
    (Stream.REPLY, Request.GET_CONFIG, None, ""),
    (Stream.REPLY, Request.SET_MEM_TABLE, U64(0), "0000000000000000"),
    (
        Stream.REPLY,
        Request.SET_MEM_TABLE,
        MemTable((Region(1, 2, 3, 4),)),
        "01000000000000000100000000000000020000000000000003000000000000000400000000000000",
    ),
    (Stream.BACKEND_REQUEST, BackendRequest.VRING_CALL, VringState(1, 0), "0100000000000000"),
    (
        Stream.BACKEND_REQUEST,
        BackendRequest.VRING_HOST_NOTIFIER_MSG,
        VringArea(0x101, 0x1000, 0x2000),
        "010100000000000000100000000000000020000000000000",
    ),
    (Stream.BACKEND_REPLY, BackendRequest.IOTLB_MSG, U64(0), "0000000000000000"),
    (Stream.REQUEST, 77, Raw(b"abc"), "616263"),
]


@pytest.mark.parametrize(("stream", "request_", "payload", "expected"), LAYOUTS, ids=lambda v: str(v)[:40])
def test_a_layout_is_the_specifications(
    stream: Stream, request_: int, payload: object, expected: str
) -> None:
    flags = abi.FLAG_REPLY if stream.is_reply else 0
    data = encode(request_, payload, flags=flags)  # type: ignore[arg-type]
    assert data[12:].hex() == expected
    assert data[:12] == header(request_, len(expected) // 2, 1 | flags)
    assert decode_one(stream, data).payload == payload


def test_an_inflight_description_without_cs_padding_is_read_as_well() -> None:
    body = struct.pack("=QQHH", 1, 2, 3, 4)
    assert decode_one(Stream.REQUEST, header(31, 20) + body).payload == Inflight(1, 2, 3, 4)


def test_the_device_states_descriptor_rides_with_its_direction() -> None:
    data = encode(Request.SET_DEVICE_STATE_FD, DeviceState(1, 0))
    (message,) = decode(Stream.REQUEST, data, [spare_fd()])
    with message.fds:
        assert message.payload == DeviceState(1, 0)


def test_every_request_of_the_specification_has_a_shape_but_the_session_of_a_crypto_device() -> None:
    assert set(Request) - set(REQUESTS) == {Request.NONE, Request.CREATE_CRYPTO_SESSION}
    assert set(BackendRequest) - set(BACKEND_REQUESTS) == {BackendRequest.NONE}


# --- pieces and descriptors ------------------------------------------------------------------------


def test_messages_that_follow_each_other_are_read_one_by_one() -> None:
    data = (
        encode(Request.SET_OWNER)
        + encode(Request.SET_VRING_NUM, VringState(0, 256))
        + encode(Request.GET_FEATURES)
    )
    for step in range(1, len(data) + 1):
        messages = decode(Stream.REQUEST, data, step=step)
        assert [m.name for m in messages] == ["SET_OWNER", "SET_VRING_NUM", "GET_FEATURES"]


def test_wanted_is_the_header_and_then_the_payload() -> None:
    decoder = Decoder(Stream.REQUEST)
    assert decoder.wanted == 12
    assert decoder.feed(header(8, 8)[:7]) is None
    assert decoder.wanted == 5
    assert decoder.feed(header(8, 8)[7:]) is None
    assert decoder.wanted == 8
    assert decoder.feed(bytes(8)) is not None
    assert decoder.wanted == 12


def test_more_than_was_wanted_is_the_callers_fault_and_its_descriptors_are_closed() -> None:
    fd = spare_fd()
    with pytest.raises(ValueError, match="13 bytes were read where 12 were wanted"):
        Decoder(Stream.REQUEST).feed(bytes(13), [fd])
    assert not is_open(fd)


def test_a_taken_descriptor_is_the_takers_and_the_others_are_closed() -> None:
    fds = [spare_fd(), spare_fd()]
    table = MemTable((Region(0, 4096, 0, 0), Region(8192, 4096, 8192, 0)))
    (message,) = decode(Stream.REQUEST, encode(Request.SET_MEM_TABLE, table), list(fds))
    with message.fds:
        assert message.fds.take(1) == fds[1]
    assert not is_open(fds[0])
    assert is_open(fds[1])
    message.fds.close()
    Fds([fds[1]]).close()
    assert not is_open(fds[1])


def test_a_descriptor_is_taken_once() -> None:
    fds = Fds([spare_fd()])
    mine = Fds([fds.take()])
    with pytest.raises(ValueError, match="taken already"):
        fds.take()
    mine.close()


def test_descriptors_after_the_first_byte_are_refused_and_closed() -> None:
    first, second = spare_fd(), spare_fd()
    decoder = Decoder(Stream.REQUEST)
    decoder.feed(header(12, 8), [first])
    with pytest.raises(CodecError, match="SET_VRING_KICK: 1 descriptors came 12 bytes into it"):
        decoder.feed(bytes(4), [second])
    assert not is_open(first)
    assert not is_open(second)
    with pytest.raises(ValueError, match="failed"):
        decoder.feed(b"x")


def test_closing_closes_the_descriptors_of_a_message_under_way() -> None:
    fd = spare_fd()
    decoder = Decoder(Stream.REQUEST)
    decoder.feed(header(12, 8), [fd])
    decoder.close()
    assert not is_open(fd)


# --- what nobody should send -----------------------------------------------------------------------

REGION = bytes(32)
BAD = [
    (header(8, 8, 0), 0, "SET_VRING_NUM: flags 0x0 have version 0, expected 1"),
    (header(8, 8, 2), 0, "SET_VRING_NUM: flags 0x2 have version 2, expected 1"),
    (header(8, 8, 5), 0, "SET_VRING_NUM: flags 0x5 have the reply flag, but it is a request"),
    (header(8, 9), 0, "SET_VRING_NUM: size is 9 bytes, expected 8"),
    (header(8, 0xFFFFFFFF), 0, "SET_VRING_NUM: size is 4294967295 bytes, expected 8"),
    (header(1, 8), 0, "GET_FEATURES: size is 8 bytes, expected 0"),
    (header(5, 7), 0, "SET_MEM_TABLE: size is 7 bytes, expected 8 to 264"),
    (header(5, 265), 0, "SET_MEM_TABLE: size is 265 bytes, expected 8 to 264"),
    (header(24, 11), 0, "GET_CONFIG: size is 11 bytes, expected 12 to 268"),
    (header(77, 4097), 0, "request 77: size is 4097 bytes, expected 0 to 4096"),
    (header(0, 8, 0), 0, "request 0: flags 0x0 have version 0"),
    (header(3, 0), 1, "SET_OWNER: 1 descriptors came with it, expected 0"),
    (header(21, 0), 0, "SET_BACKEND_REQ_FD: 0 descriptors came with it, expected 1"),
    (header(12, 8), 2, "SET_VRING_KICK: 2 descriptors came with it, expected 0 to 1"),
    (header(37, 40), 0, "ADD_MEM_REG: 0 descriptors came with it, expected 1"),
    (header(5, 264), 9, "SET_MEM_TABLE: 9 descriptors came with it, expected 0 to 8"),
    (header(77, 0), 9, "request 77: 9 descriptors came with it, expected 0 to 8"),
    (header(5, 264) + b"\x09" + bytes(263), 8, "SET_MEM_TABLE: nregions is 9, at most 8 fit"),
    (header(5, 40) + b"\x02" + bytes(39), 2, "nregions is 2, which takes 72 bytes, but the payload has 40"),
    (header(5, 40) + b"\x01" + bytes(39), 2, r"2 descriptors came with it, expected 1 \(1 regions\)"),
    (header(5, 72) + b"\x02" + bytes(71), 1, r"1 descriptors came with it, expected 2 \(2 regions\)"),
    (header(12, 8) + bytes(8), 0, r"0 descriptors came with it, expected 1 \(no_fd = 0\)"),
    (header(13, 8) + b"\x00\x01" + bytes(6), 1, r"1 descriptors came with it, expected 0 \(no_fd = 1\)"),
    (header(12, 8) + b"\x00\x02" + bytes(6), 0, "SET_VRING_KICK: u64 0x200 has bits beside"),
    (header(25, 14) + struct.pack("=III", 0, 3, 0) + b"ab", 0, "SET_CONFIG: size is 3, but 2 bytes follow"),
    (header(6, 12) + bytes(12), 0, "SET_LOG_BASE: the payload has 12 bytes, expected 8 or 16"),
]


@pytest.mark.parametrize(("data", "count", "message"), BAD, ids=[bad[2][:50] for bad in BAD])
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_a_bad_request_is_refused_by_name_and_numbers_and_leaks_nothing(
    data: bytes, count: int, message: str, step: int
) -> None:
    fds = [spare_fd() for _ in range(count)]
    with pytest.raises(CodecError, match=message):
        decode(Stream.REQUEST, data, fds, step=step)
    assert not any(is_open(fd) for fd in fds)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(1, 8, 1) + bytes(8), "GET_FEATURES: flags 0x1 lack the reply flag"),
        (header(1, 0, 5), "GET_FEATURES: size is 0 bytes, expected 8"),
        (header(24, 5, 5) + bytes(5), "GET_CONFIG: the payload has 5 bytes, expected at least 12"),
        (header(37, 12, 5) + bytes(12), "ADD_MEM_REG: the reply has 12 bytes, expected 8 or 40"),
        (header(6, 4, 5) + bytes(4), "SET_LOG_BASE: the payload has 4 bytes"),
    ],
)
def test_a_bad_reply_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode(Stream.REPLY, data)


def test_an_oversized_payload_is_refused_before_a_byte_of_it_is_read() -> None:
    decoder = Decoder(Stream.REQUEST)
    with pytest.raises(CodecError):
        decoder.feed(header(2, 1 << 30))


@pytest.mark.parametrize("length", range(1, 20))
def test_a_conversation_that_ends_within_a_message_says_where(length: int) -> None:
    data = encode(Request.SET_FEATURES, U64(0))
    decoder = Decoder(Stream.REQUEST)
    for start in (0, 12):
        decoder.feed(data[start : min(length, start + 12)])
    what = "a message's header" if length < 12 else "SET_FEATURES"
    lacking = 12 - length if length < 12 else 20 - length
    with pytest.raises(
        CodecError, match=f"{what}: the connection ended after {length} bytes of it, {lacking} bytes short"
    ):
        decoder.end()


def test_a_conversation_that_ends_between_messages_is_no_fault() -> None:
    decoder = Decoder(Stream.REQUEST)
    decoder.feed(encode(Request.SET_OWNER))
    decoder.end()
