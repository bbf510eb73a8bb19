"""The back end's session: negotiation, memory, configuration, and what a refusal comes to."""

from __future__ import annotations

import errno
import logging
import os
import socket

import pytest

from fronts import BIT_30, Talk
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.host import memfd
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost_user.backend import SessionError
from pyvhost.vhost_user.codec import Stream, decode_one
from pyvhost.vhost_user.offer import NOT_OFFERED, PROTOCOL_FEATURES
from pyvhost.vhost_user.payloads import (
    ALWAYS_ANSWERED,
    ANSWERED_WITH_RESULT,
    REQUESTS,
    U64,
    UNKNOWN,
    Config,
    MemReg,
    MemTable,
    Payload,
    Raw,
    Region,
    VringAddr,
    VringFile,
    VringState,
)
from recording_device import (
    FEATURES,
    RecordingDevice,
    conversation,
    conversations,
    is_open,
    no_fd_leaks,
    spare_fd,
)

REPLY_ACK = 1 << abi.PROTOCOL_F_REPLY_ACK
CONFIG = 1 << abi.PROTOCOL_F_CONFIG
BACKEND_REQ = 1 << abi.PROTOCOL_F_BACKEND_REQ


#: What the recorded front ends acknowledge is in it.
FEATURES_OF_ALL = (1 << 40) - 1 & ~BIT_30

# --- real front ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", conversations())
def test_recorded_front_ends_get_through_and_leave_nothing_open(name: str) -> None:
    device = RecordingDevice(features=FEATURES_OF_ALL)
    with no_fd_leaks():
        talk = Talk(device)
        for recorded in conversation(name):
            if not recorded.front or recorded.backend_channel:
                continue
            fds = [spare_fd() for _ in range(recorded.fds)]
            if recorded.request == Request.SET_BACKEND_REQ_FD:
                os.close(fds.pop())
                ours, theirs = socket.socketpair()
                fds = [theirs.detach()]
                ours.close()
            if recorded.request == Request.SET_LOG_BASE:
                os.close(fds.pop())
                fds = [memfd.create("log", 1 << 20)]
            data = recorded.data
            if recorded.request == Request.SET_PROTOCOL_FEATURES:
                # DPDK offers what is not offered here.
                bits = int.from_bytes(data[12:], "little") & PROTOCOL_FEATURES
                data = data[:12] + bits.to_bytes(8, "little")
            answers = talk.raw(data, fds)
            need_reply = recorded.data[4] & abi.FLAG_NEED_REPLY
            if recorded.request == Request.SET_LOG_BASE:
                assert [a.payload for a in answers] == [decode_one(Stream.REQUEST, data).payload]
            elif need_reply:
                assert [a.payload for a in answers] == [U64(0)]
        # Whoever started its rings stopped them again, or left the session to do it.
        assert device.called("set_vring_running")
        talk.session.close()
    assert device.resets == 1


def test_the_rings_of_a_qemu_with_four_queue_pairs_run_as_its_guest_uses_them(
    device: RecordingDevice,
) -> None:
    """iPXE uses one pair of four; QEMU enables it before it starts it, and a reboot later again."""
    talk = Talk(device)
    for recorded in conversation("qemu-7.2-mq"):
        if recorded.front and recorded.request != Request.SET_BACKEND_REQ_FD:
            talk.raw(recorded.data, [spare_fd() for _ in range(recorded.fds)])
    talk.session.close()
    once = [(0, True), (1, True), (0, False), (1, False)]
    assert device.called("set_vring_running") == once + once
    # Its memory came once: it must have outlived the SET_STATUS 0 in between.
    assert len(device.called("add_mem_region")) == 2
    assert not device.called("remove_mem_region")


# --- features and negotiation ----------------------------------------------------------------------


def test_features_have_bit_30_and_it_is_not_the_devices(talk: Talk, device: RecordingDevice) -> None:
    assert talk.say(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    assert device.called("set_features") == [(FEATURES,)]


def test_protocol_features_are_legal_before_set_features_and_without_asking(talk: Talk) -> None:
    assert talk.say(Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK)) == "silence"
    assert talk.say(Request.GET_PROTOCOL_FEATURES) == U64(PROTOCOL_FEATURES)
    assert talk.session.protocol_features == REPLY_ACK


def test_what_is_offered_is_what_the_specification_gives_these_bits(talk: Talk) -> None:
    bits = [bit for bit in range(64) if PROTOCOL_FEATURES >> bit & 1]
    # MQ, LOG_SHMFD, RARP, REPLY_ACK, MTU, BACKEND_REQ, CROSS_ENDIAN, CONFIG, BACKEND_SEND_FD, INFLIGHT_SHMFD,
    # RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS, GET_VRING_BASE_INFLIGHT, GET_VRING_BASE_SKIP_DRAIN
    assert bits == [0, 1, 2, 3, 4, 5, 6, 9, 10, 12, 13, 15, 16, 20, 23]


def test_reply_ack_takes_effect_inside_set_protocol_features_itself(talk: Talk) -> None:
    assert talk.say(Request.SET_PROTOCOL_FEATURES, U64(0x228), need_reply=True) == U64(0)


def test_need_reply_is_nothing_before_reply_ack_is_negotiated(talk: Talk) -> None:
    assert talk.say(Request.SET_OWNER, need_reply=True) == "silence"
    assert talk.say(Request.SET_PROTOCOL_FEATURES, U64(CONFIG), need_reply=True) == "silence"


def test_a_message_with_an_answer_of_its_own_ignores_need_reply(talk: Talk) -> None:
    talk.negotiate(REPLY_ACK)
    assert talk.say(Request.GET_FEATURES, need_reply=True) == U64(FEATURES | BIT_30)
    assert talk.say(Request.GET_VRING_BASE, VringState(1, 0), need_reply=True) == VringState(1, 0)


def test_a_protocol_feature_that_was_not_offered_is_refused_by_name(talk: Talk) -> None:
    with pytest.raises(SessionError, match=r"SET_PROTOCOL_FEATURES.*not offered: 0x100 \(PAGEFAULT\)"):
        talk.say(Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK | 1 << 8))


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (1 << 20, r"0x100000 \(GET_VRING_BASE_INFLIGHT\) is nothing without 0x1000 \(INFLIGHT_SHMFD\)"),
        (1 << 23 | 1 << 12, r"GET_VRING_BASE_SKIP_DRAIN\) is nothing without .*GET_VRING_BASE_INFLIGHT"),
    ],
)
def test_protocol_features_that_need_others_are_refused_alone(talk: Talk, bits: int, words: str) -> None:
    with pytest.raises(SessionError, match=words):
        talk.say(Request.SET_PROTOCOL_FEATURES, U64(bits))


def test_the_front_end_owns_the_device_whether_it_says_so_or_not(device: RecordingDevice) -> None:
    silent, polite, insistent = Talk(device), Talk(device), Talk(device)
    silent.say(Request.SET_FEATURES, U64(BIT_30))
    polite.say(Request.SET_OWNER)
    insistent.say(Request.SET_OWNER)
    insistent.say(Request.SET_OWNER)
    assert device.called("set_owner") == [(), (), ()]


def test_queue_number_and_memory_slots_are_the_devices(talk: Talk) -> None:
    assert talk.say(Request.GET_QUEUE_NUM) == U64(4)
    assert talk.say(Request.GET_MAX_MEM_SLOTS) == U64(509)


# --- rings, memory, configuration ------------------------------------------------------------------


def test_ring_settings_reach_the_device(talk: Talk, device: RecordingDevice) -> None:
    call, err = spare_fd(), spare_fd()
    talk.say(Request.SET_VRING_NUM, VringState(1, 256))
    talk.say(Request.SET_VRING_BASE, VringState(1, 7))
    talk.say(Request.SET_VRING_ADDR, VringAddr(1, 0, 1, 2, 3, 4))
    talk.say(Request.SET_VRING_CALL, VringFile(1), fds=[call])
    talk.say(Request.SET_VRING_ERR, VringFile(1), fds=[err])
    talk.say(Request.SET_VRING_CALL, VringFile(1, no_fd=True))
    assert device.calls[1:] == [
        ("set_vring_num", 1, 256),
        ("set_vring_base", 1, 7),
        ("set_vring_addr", 1, 0, 1, 2, 3, 4),
        ("set_vring_call", 1, call),
        ("set_vring_err", 1, err),
        ("set_vring_call", 1, -1),
    ]


@pytest.mark.parametrize(
    ("request_", "payload", "fds"),
    [
        (Request.SET_VRING_NUM, VringState(8, 256), 0),
        (Request.SET_VRING_BASE, VringState(8, 0), 0),
        (Request.GET_VRING_BASE, VringState(8, 0), 0),
        (Request.SET_VRING_ADDR, VringAddr(8, 0, 0, 0, 0, 0), 0),
        (Request.SET_VRING_ENABLE, VringState(8, 1), 0),
        (Request.SET_VRING_KICK, VringFile(8), 1),
        (Request.SET_VRING_CALL, VringFile(8), 1),
        (Request.SET_VRING_ERR, VringFile(8), 1),
        (Request.SET_VRING_ENDIAN, VringState(8, 1), 0),
        (Request.SET_VRING_NUM, VringState(0xFFFFFFFF, 256), 0),
    ],
)
def test_a_ring_that_isnt_there_is_named(
    talk: Talk, device: RecordingDevice, request_: Request, payload: Payload, fds: int
) -> None:
    index = getattr(payload, "index")  # noqa: B009
    with pytest.raises(
        SessionError, match=rf"{request_.name} index={index}.*: there is no vring {index}: .* has 8"
    ):
        talk.say(request_, payload, fds=[spare_fd() for _ in range(fds)])
    assert [call[0] for call in device.calls] == ["set_owner"]


def test_enable_is_0_or_1(talk: Talk) -> None:
    with pytest.raises(SessionError, match="SET_VRING_ENABLE index=1 num=2: vring 1: num is 2, expected 0"):
        talk.say(Request.SET_VRING_ENABLE, VringState(1, 2))


def test_memory_goes_to_the_device_with_its_descriptors(talk: Talk, device: RecordingDevice) -> None:
    one, two, three = (memfd.create("test", 4096) for _ in range(3))
    table = MemTable((Region(0, 4096, 0x7000, 0), Region(8192, 4096, 0x9000, 0)))
    talk.say(Request.SET_MEM_TABLE, table, fds=[one, two])
    talk.say(Request.ADD_MEM_REG, MemReg(Region(16384, 4096, 0xB000, 0)), fds=[three])
    assert device.called("set_mem_table") == [
        (MemoryRegion(0, 4096, 0x7000, 0, one), MemoryRegion(8192, 4096, 0x9000, 0, two))
    ]
    assert device.called("add_mem_region") == [(MemoryRegion(16384, 4096, 0xB000, 0, three),)]
    assert is_open(one)


def test_a_descriptor_with_rem_mem_reg_is_closed_unused(talk: Talk, device: RecordingDevice) -> None:
    fd = spare_fd()
    talk.say(Request.REM_MEM_REG, MemReg(Region(0, 4096, 0x7000, 0)), fds=[fd])
    talk.say(Request.REM_MEM_REG, MemReg(Region(0, 4096, 0x7000, 0)))
    assert device.called("remove_mem_region") == [(MemoryRegion(0, 4096, 0x7000, 0, -1),)] * 2
    assert not is_open(fd)


def test_configuration_is_read_with_the_length_that_was_asked_for(
    talk: Talk, device: RecordingDevice
) -> None:
    assert talk.say(Request.GET_CONFIG, Config(2, 0, bytes(3))) == Config(2, 0, b"\2\3\4")
    device.config = b"\1\2"
    assert talk.say(Request.GET_CONFIG, Config(0, 1, bytes(4))) == Config(0, 1, b"\1\2\0\0")


def test_configuration_that_cant_be_read_is_answered_with_no_bytes(
    talk: Talk, device: RecordingDevice
) -> None:
    assert talk.say(Request.GET_CONFIG, Config(0, 0, b"")) is None
    device.refuse("get_config")
    assert talk.say(Request.GET_CONFIG, Config(0, 0, bytes(4))) is None
    assert talk.say(Request.GET_FEATURES) == U64(FEATURES | BIT_30)


def test_configuration_mtu_and_rarp_are_the_devices_to_judge(talk: Talk, device: RecordingDevice) -> None:
    talk.say(Request.SET_CONFIG, Config(6, 1, b"ab"))
    talk.say(Request.NET_SET_MTU, U64(9000))
    talk.say(Request.SEND_RARP, U64(int.from_bytes(bytes.fromhex("525400123456"), "little")))
    assert device.calls[1:] == [
        ("set_config", 6, b"ab", 1),
        ("set_mtu", 9000),
        ("send_rarp", bytes.fromhex("525400123456")),
    ]
    talk.negotiate(REPLY_ACK)
    device.refuse("set_mtu", errno.EINVAL, "mtu 10: it is below 68")
    assert talk.say(Request.NET_SET_MTU, U64(10), need_reply=True) == U64(errno.EINVAL)


def test_status_is_kept_and_features_ok_only_if_features_were_accepted(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.negotiate(REPLY_ACK)
    talk.say(Request.SET_STATUS, U64(0xB))
    assert talk.say(Request.GET_STATUS) == U64(0xB)
    assert talk.say(Request.SET_FEATURES, U64(1 << 60), need_reply=True) == U64(errno.EOPNOTSUPP)
    talk.say(Request.SET_STATUS, U64(0xB))
    assert talk.say(Request.GET_STATUS) == U64(0x3)
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    talk.say(Request.SET_STATUS, U64(0xB))
    assert talk.say(Request.GET_STATUS) == U64(0xB)
    assert talk.say(Request.SET_STATUS, U64(0x100), need_reply=True) == U64(errno.EINVAL)


# --- refusals --------------------------------------------------------------------------------------


def test_a_refused_request_is_answered_if_an_answer_was_asked_for_and_the_connection_goes_on(
    talk: Talk, device: RecordingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    talk.negotiate(REPLY_ACK)
    device.refuse("set_vring_num", errno.EINVAL, "vring 1: num 3 is not a power of two")
    with caplog.at_level(logging.ERROR):
        answer = talk.say(Request.SET_VRING_NUM, VringState(1, 3), need_reply=True)
    assert answer == U64(errno.EINVAL)
    (record,) = caplog.records
    assert "SET_VRING_NUM need_reply index=1 num=3: vring 1: num 3 is not a power of two" in record.message
    assert talk.say(Request.GET_FEATURES) == U64(FEATURES | BIT_30)


def test_a_refused_request_ends_the_connection_if_no_answer_was_asked_for(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.negotiate(REPLY_ACK)
    device.refuse("set_vring_num", errno.EINVAL, "vring 1: num 3 is not a power of two")
    with pytest.raises(
        SessionError, match="SET_VRING_NUM index=1 num=3: vring 1: num 3 is not a power of two"
    ):
        talk.say(Request.SET_VRING_NUM, VringState(1, 3))


def test_a_refused_request_whose_answer_cant_say_no_ends_the_connection(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.negotiate(REPLY_ACK)
    device.refuse("get_vring_base", errno.EINVAL, "vring 0: no")
    with pytest.raises(SessionError, match="GET_VRING_BASE need_reply index=0 num=0: vring 0: no"):
        talk.say(Request.GET_VRING_BASE, VringState(0, 0), need_reply=True)


@pytest.mark.parametrize("number", sorted(NOT_OFFERED))
def test_a_request_that_was_not_offered_is_refused_with_the_reason(talk: Talk, number: int) -> None:
    def say(need_reply: bool) -> Payload | str | None:
        shape = REQUESTS.get(number, UNKNOWN)
        fds = [spare_fd() for _ in range(shape.fds[0])]
        return talk.say(number, Raw(bytes(shape.low)), fds=fds, need_reply=need_reply)

    talk.negotiate(REPLY_ACK)
    if number in ANSWERED_WITH_RESULT:
        assert say(False) == say(True) == U64(errno.EOPNOTSUPP)
        return
    if number == Request.SET_DEVICE_STATE_FD:
        assert say(False) == U64(errno.EOPNOTSUPP | abi.DEVICE_STATE_NOFD_MASK)
        return
    if number not in ALWAYS_ANSWERED:
        assert say(True) == U64(errno.EOPNOTSUPP)
    # What has an answer of its own can't be told no: a number would be taken for that answer.
    with pytest.raises(SessionError, match=rf"{Request(number).name}.*was not offered"):
        say(number in ALWAYS_ANSWERED)


def test_a_request_that_nobody_knows_is_refused_and_ends_the_connection_if_it_cant_be_told(
    talk: Talk,
) -> None:
    talk.negotiate(REPLY_ACK)
    assert talk.say(77, U64(1), fds=[spare_fd()], need_reply=True) == U64(errno.EOPNOTSUPP)
    with pytest.raises(SessionError, match=r"request 77 .*: no such request is known here"):
        talk.say(77, U64(1))


def test_memory_that_was_lost_ends_the_connection_after_any_message(
    talk: Talk, device: RecordingDevice
) -> None:
    device.lost_memory = True
    with pytest.raises(SessionError, match="memory file became smaller"):
        talk.say(Request.GET_FEATURES)


@pytest.mark.parametrize(
    "method", ["set_mem_table", "add_mem_region", "set_vring_kick", "set_vring_call", "set_vring_err"]
)
def test_the_descriptors_of_a_refused_request_are_closed_once(device: RecordingDevice, method: str) -> None:
    device.refuse(method)
    region = Region(0, 4096, 0, 0)
    requests: dict[str, tuple[Request, Payload]] = {
        "set_mem_table": (Request.SET_MEM_TABLE, MemTable((region,))),
        "add_mem_region": (Request.ADD_MEM_REG, MemReg(region)),
        "set_vring_kick": (Request.SET_VRING_KICK, VringFile(0)),
        "set_vring_call": (Request.SET_VRING_CALL, VringFile(0)),
        "set_vring_err": (Request.SET_VRING_ERR, VringFile(0)),
    }
    with no_fd_leaks():
        talk = Talk(device)
        with pytest.raises(SessionError):
            talk.say(*requests[method], fds=[spare_fd()])
        talk.session.close()


def test_closing_resets_the_device_once(device: RecordingDevice) -> None:
    talk = Talk(device)
    talk.session.close()
    talk.session.close()
    assert device.resets == 1
    assert device.config_changed is None
    assert device.memory_lost is None


def test_a_devices_own_fault_is_not_taken_for_the_front_ends(talk: Talk, device: RecordingDevice) -> None:
    device.refusals["set_vring_num"] = VhostError(errno.EBUSY, "x")
    with pytest.raises(SessionError):
        talk.say(Request.SET_VRING_NUM, VringState(0, 1))
    device.refusals["set_vring_num"] = ZeroDivisionError("a bug")  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        talk.say(Request.SET_VRING_NUM, VringState(0, 1))


# --- what a person is told ---------------------------------------------------------------------------


def test_a_ring_on_memory_that_was_never_named_draws_a_hint(talk: Talk, device: RecordingDevice) -> None:
    """What QEMU 7.2 says when its memory has no descriptor: everything but ADD_MEM_REG."""
    device.refuse("set_vring_running", errno.EFAULT, "vring 0: descriptor table: not in memory")
    talk.enable(0)
    with pytest.raises(
        SessionError, match=r"SET_VRING_KICK.*not in memory; it has named no memory.*share=on"
    ):
        talk.kick(0)
    talk.say(Request.ADD_MEM_REG, MemReg(Region(0, 4096, 0, 0)), fds=[memfd.create("guest", 4096)])
    with pytest.raises(SessionError, match=r"SET_VRING_KICK.*not in memory$"):
        talk.kick(0)


def test_the_farewell_says_how_far_a_front_end_came(talk: Talk) -> None:
    progress = talk.session.progress
    assert "without a word" in progress.farewell()
    talk.say(Request.GET_FEATURES)
    assert "before SET_FEATURES" in progress.farewell()
    assert not progress.negotiated
    talk.say(Request.SET_FEATURES, U64(BIT_30))
    assert progress.negotiated
    assert "share=on" in progress.farewell()
    talk.say(Request.SET_MEM_TABLE, MemTable(()))
    assert "no ring was ever started" in progress.farewell()
    talk.kick(0)
    assert progress.farewell() == ""
