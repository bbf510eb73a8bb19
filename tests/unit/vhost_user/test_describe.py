"""The trace: one line a message that a person can read."""

from __future__ import annotations

import logging

import pytest

from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.vhost_user.codec import Decoder, Fds, Message, Stream
from pyvhost.vhost_user.describe import TRACE, byte_size, describe, features, status, summary
from pyvhost.vhost_user.payloads import (
    U64,
    Config,
    DeviceState,
    Inflight,
    Iotlb,
    Log,
    MemReg,
    MemTable,
    Payload,
    Raw,
    Region,
    VringAddr,
    VringArea,
    VringFile,
    VringState,
)
from recording_device import conversation, conversations

NET, SCSI = 1, 8
REGION = Region(0xC0000, 0x7F40000, 0x7F2A5C0BF000, 0xC0000)
R, A, B = Stream.REQUEST, Stream.REPLY, Stream.BACKEND_REQUEST

LINES = [
    (R, Request.SET_OWNER, None, "front end: SET_OWNER"),
    (
        R,
        Request.SET_FEATURES,
        U64(1 << 0 | 1 << 15 | 1 << 22 | 1 << 29 | 1 << 30 | 1 << 32 | 1 << 43),
        "front end: SET_FEATURES 0x80160408001 "
        "(CSUM, MRG_RXBUF, MQ, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1, bit 43)",
    ),
    (A, Request.GET_FEATURES, U64(1 << 26), "back end: GET_FEATURES 0x4000000 (LOG_ALL)"),
    (A, Request.SET_FEATURES, U64(0), "back end: SET_FEATURES ack: success"),
    (A, Request.SET_FEATURES, U64(22), "back end: SET_FEATURES ack: FAILURE (22)"),
    (
        R,
        Request.SET_PROTOCOL_FEATURES,
        U64(0x228),
        "front end: SET_PROTOCOL_FEATURES 0x228 (REPLY_ACK, BACKEND_REQ, CONFIG)",
    ),
    (A, Request.GET_QUEUE_NUM, U64(4), "back end: GET_QUEUE_NUM 4"),
    (A, Request.GET_MAX_MEM_SLOTS, U64(509), "back end: GET_MAX_MEM_SLOTS 509"),
    (
        R,
        Request.SET_STATUS,
        U64(0xF),
        "front end: SET_STATUS 0xf (ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK)",
    ),
    (A, Request.GET_STATUS, U64(0), "back end: GET_STATUS 0 (reset)"),
    (R, Request.SET_VRING_NUM, VringState(1, 256), "front end: SET_VRING_NUM index=1 num=256"),
    (R, Request.SET_VRING_ENABLE, VringState(1, 1), "front end: SET_VRING_ENABLE index=1 on"),
    (R, Request.SET_VRING_ENABLE, VringState(1, 0), "front end: SET_VRING_ENABLE index=1 off"),
    (R, Request.SET_VRING_ENABLE, VringState(1, 7), "front end: SET_VRING_ENABLE index=1 num=7"),
    (
        R,
        Request.SET_VRING_ADDR,
        VringAddr(0, 1, 0x1000, 0x2000, 0x3000, 0x4000),
        "front end: SET_VRING_ADDR index=0 flags=0x1 (F_LOG) desc=0x1000 used=0x2000 avail=0x3000 log=0x4000",
    ),
    (R, Request.SET_VRING_CALL, VringFile(3, True), "front end: SET_VRING_CALL index=3 no descriptor"),
    (R, Request.SEND_RARP, U64(0x563412005452), "front end: SEND_RARP mac=52:54:00:12:34:56"),
    (R, Request.NET_SET_MTU, U64(9000), "front end: NET_SET_MTU mtu=9000"),
    (R, Request.SET_LOG_BASE, U64(4096), "front end: SET_LOG_BASE u64=0x1000"),
    (R, Request.SET_LOG_BASE, Log(4096, 0), "front end: SET_LOG_BASE mmap_size=0x1000 mmap_offset=0x0"),
    (A, Request.SET_LOG_BASE, Log(4096, 0), "back end: SET_LOG_BASE mmap_size=0x1000 mmap_offset=0x0"),
    (A, Request.SET_LOG_BASE, U64(0x2000), "back end: SET_LOG_BASE u64=0x2000"),
    (A, Request.SET_LOG_BASE, None, "back end: SET_LOG_BASE"),
    (
        R,
        Request.SET_FEATURES,
        U64(1 << 26 | 1 << 33),
        "front end: SET_FEATURES 0x204000000 (LOG_ALL, ACCESS_PLATFORM)",
    ),
    (R, Request.SET_VRING_ENDIAN, VringState(1, 0), "front end: SET_VRING_ENDIAN index=1 little-endian"),
    (R, Request.SET_VRING_ENDIAN, VringState(1, 1), "front end: SET_VRING_ENDIAN index=1 big-endian"),
    (R, Request.SET_VRING_ENDIAN, VringState(1, 2), "front end: SET_VRING_ENDIAN index=1 num=2"),
    (
        A,
        Request.GET_VRING_BASE_SKIP_DRAIN,
        VringState(1, 7),
        "back end: GET_VRING_BASE_SKIP_DRAIN index=1 num=7",
    ),
    (R, Request.GET_CONFIG, Config(0, 0, bytes(6)), "front end: GET_CONFIG offset=0 size=6 flags=0x0"),
    (A, Request.GET_CONFIG, Config(0, 0, b"\x52\x54"), "back end: GET_CONFIG offset=0 size=2 flags=0x0 5254"),
    (A, Request.GET_CONFIG, None, "back end: GET_CONFIG refused"),
    (
        R,
        Request.ADD_MEM_REG,
        MemReg(REGION),
        "front end: ADD_MEM_REG guest 0xc0000-0x7ffffff (130304 KiB) user 0x7f2a5c0bf000 mmap_offset 0xc0000",
    ),
    (
        R,
        Request.IOTLB_MSG,
        Iotlb(0x1000, 0x1000, 0x2000, 3, 2),
        "front end: IOTLB_MSG UPDATE iova=0x1000 size=0x1000 uaddr=0x2000 perm=RW",
    ),
    (
        R,
        Request.IOTLB_MSG,
        Iotlb(0x1000, 0x1000, 0, 0, 3),
        "front end: IOTLB_MSG INVALIDATE iova=0x1000 size=0x1000",
    ),
    (A, Request.IOTLB_MSG, U64(14), "back end: IOTLB_MSG ack: FAILURE (14)"),
    (
        B,
        BackendRequest.IOTLB_MSG,
        Iotlb(0x1000, 0, 0, 2, 1),
        "back end's request: IOTLB_MSG MISS iova=0x1000 perm=WO",
    ),
    (
        B,
        BackendRequest.IOTLB_MSG,
        Iotlb(0, 1, 2, 0, 9),
        "back end's request: IOTLB_MSG type=9 iova=0x0 size=0x1 uaddr=0x2 perm=0",
    ),
    (
        A,
        Request.GET_INFLIGHT_FD,
        Inflight(4096, 0, 2, 256),
        "back end: GET_INFLIGHT_FD mmap_size=0x1000 mmap_offset=0x0 num_queues=2 queue_size=256",
    ),
    (
        A,
        Request.GET_INFLIGHT_FD,
        Inflight(0, 0, 2, 256),
        "back end: GET_INFLIGHT_FD refused (mmap_size=0x0 mmap_offset=0x0 num_queues=2 queue_size=256)",
    ),
    (
        R,
        Request.GET_INFLIGHT_FD,
        Inflight(0, 0, 2, 256),
        "front end: GET_INFLIGHT_FD mmap_size=0x0 mmap_offset=0x0 num_queues=2 queue_size=256",
    ),
    (
        R,
        Request.SET_DEVICE_STATE_FD,
        DeviceState(0, 0),
        "front end: SET_DEVICE_STATE_FD direction=0 (save) phase=0",
    ),
    (R, 77, Raw(b"\xab\xcd"), "front end: request 77 abcd"),
    (R, 77, Raw(bytes(100)), "front end: request 77 " + "00" * 64 + "... (100 bytes)"),
    (B, BackendRequest.CONFIG_CHANGE_MSG, None, "back end's request: CONFIG_CHANGE_MSG"),
    (B, BackendRequest.VRING_CALL, VringState(1, 0), "back end's request: VRING_CALL index=1 num=0"),
    (
        B,
        BackendRequest.VRING_HOST_NOTIFIER_MSG,
        VringArea(1, 4096, 0),
        "back end's request: VRING_HOST_NOTIFIER_MSG u64=0x1 size=0x1000 offset=0x0",
    ),
    (
        Stream.BACKEND_REPLY,
        BackendRequest.CONFIG_CHANGE_MSG,
        U64(0),
        "front end's reply: CONFIG_CHANGE_MSG ack: success",
    ),
]


@pytest.mark.parametrize(
    ("stream", "request_", "payload", "line"), LINES, ids=[line[3][:50] for line in LINES]
)
def test_a_message_is_one_line_with_names(
    stream: Stream, request_: int, payload: Payload | None, line: str
) -> None:
    assert describe(Message(stream, request_, 1, payload, Fds()), NET) == line


def test_need_reply_odd_flags_and_descriptors_are_shown() -> None:
    message = Message(R, Request.SET_VRING_KICK, 0x19, VringFile(0), Fds([-1]))
    assert describe(message) == "front end: SET_VRING_KICK need_reply flags=0x19 index=0"
    numbered = Message(R, Request.SET_VRING_KICK, 1, VringFile(0), Fds([1]))
    assert describe(numbered) == "front end: SET_VRING_KICK index=0 fd 1"


def test_regions_have_a_line_each_with_their_descriptors() -> None:
    table = MemTable((Region(0, 0xA0000, 0x7F2A5BFFF000, 0), REGION))
    message = Message(R, Request.SET_MEM_TABLE, 9, table, Fds([1, 2]))
    assert describe(message).splitlines() == [
        "front end: SET_MEM_TABLE need_reply nregions=2 fd 1, 2",
        "    region 0: guest 0x0-0x9ffff (640 KiB) user 0x7f2a5bfff000 mmap_offset 0x0 fd 1",
        "    region 1: guest 0xc0000-0x7ffffff (130304 KiB) user 0x7f2a5c0bf000 mmap_offset 0xc0000 fd 2",
    ]
    assert len(summary(message).splitlines()) == 1


def test_feature_bits_are_named_by_the_kind_of_device() -> None:
    assert features(1, NET) == "0x1 (CSUM)"
    assert features(1, SCSI) == "0x1 (INOUT)"
    assert features(1) == "0x1 (bit 0)"
    assert features(0, NET) == "0x0"


def test_numbers_have_their_units() -> None:
    assert [byte_size(n) for n in (0, 1, 1024, 1 << 20, 3 << 30, 1 << 40, (1 << 20) + 1)] == [
        "0 B",
        "1 B",
        "1 KiB",
        "1 MiB",
        "3 GiB",
        "1 TiB",
        "1048577 B",
    ]
    assert status(0x80) == "0x80 (FAILED)"


@pytest.mark.parametrize("name", conversations())
def test_every_recorded_message_can_be_described(name: str) -> None:
    for recorded in conversation(name):
        if recorded.fds or recorded.backend_channel:
            continue
        decoder = Decoder(R if recorded.front else A)
        message = decoder.feed(recorded.data[:12]) or decoder.feed(recorded.data[12:])
        assert message is not None
        line = describe(message, NET)
        assert "object" not in line
        assert line.startswith(("front end: ", "back end: "))


def test_the_level_of_the_trace_has_a_name() -> None:
    assert logging.getLevelName(TRACE) == "TRACE"
    assert TRACE < logging.DEBUG
