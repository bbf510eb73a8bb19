"""The back end's session: what each message does to the device, what is answered, and what ends it."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator

import pytest

from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.host import memfd
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost_user.backend import BackendSession, SessionError
from pyvhost.vhost_user.codec import Decoder, Message, Stream, decode_one, encode
from pyvhost.vhost_user.offer import NOT_OFFERED, PROTOCOL_FEATURES
from pyvhost.vhost_user.payloads import (
    ALWAYS_ANSWERED,
    ANSWERED_WITH_RESULT,
    REQUESTS,
    U64,
    UNKNOWN,
    Config,
    Iotlb,
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
    IN_ORDER,
    RecordingDevice,
    conversation,
    conversations,
    is_open,
    no_fd_leaks,
    spare_fd,
)

BIT_30 = 1 << abi.F_PROTOCOL_FEATURES
REPLY_ACK = 1 << abi.PROTOCOL_F_REPLY_ACK
CONFIG = 1 << abi.PROTOCOL_F_CONFIG
BACKEND_REQ = 1 << abi.PROTOCOL_F_BACKEND_REQ


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


class Talk:
    """A front end that says one thing after another to a session."""

    def __init__(self, device: RecordingDevice) -> None:
        self.device = device
        self.session = BackendSession(device)

    def raw(self, data: bytes, fds: list[int] | None = None) -> list[Message]:
        decoder = Decoder(Stream.REQUEST)
        message = decoder.feed(data[:12], fds or [])
        if message is None:
            message = decoder.feed(data[12:])
        assert message is not None
        return [decode_one(Stream.REPLY, answer) for answer in self.session.receive(message)]

    def say(
        self,
        request: int,
        payload: Payload | None = None,
        *,
        fds: list[int] | None = None,
        need_reply: bool = False,
    ) -> Payload | str | None:
        """The answer's payload; "silence" if there was none."""
        flags = abi.FLAG_NEED_REPLY if need_reply else 0
        answers = self.raw(encode(request, payload, flags=flags), fds)
        if not answers:
            return "silence"
        (answer,) = answers
        assert answer.request == request
        assert answer.flags == abi.VERSION | abi.FLAG_REPLY, "UML wants exactly this"
        return answer.payload

    def negotiate(self, bits: int) -> None:
        assert self.say(Request.SET_PROTOCOL_FEATURES, U64(bits)) == "silence"

    def kick(self, index: int) -> None:
        self.say(Request.SET_VRING_KICK, VringFile(index), fds=[spare_fd()])

    def enable(self, index: int, on: bool = True) -> None:
        self.say(Request.SET_VRING_ENABLE, VringState(index, int(on)))


@pytest.fixture
def talk(device: RecordingDevice) -> Iterator[Talk]:
    with no_fd_leaks():
        talk = Talk(device)
        yield talk
        talk.session.close()


# --- real front ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", conversations())
def test_recorded_front_ends_get_through_and_leave_nothing_open(name: str) -> None:
    device = RecordingDevice(features=FEATURES | IN_ORDER | 1 << 26)
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
            data = recorded.data
            if recorded.request == Request.SET_PROTOCOL_FEATURES:
                # DPDK offers what is not offered here.
                bits = int.from_bytes(data[12:], "little") & PROTOCOL_FEATURES
                data = data[:12] + bits.to_bytes(8, "little")
            answers = talk.raw(data, fds)
            need_reply = recorded.data[4] & abi.FLAG_NEED_REPLY
            if need_reply:
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
    # MQ, RARP, REPLY_ACK, MTU, BACKEND_REQ, CONFIG, BACKEND_SEND_FD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS
    assert bits == [0, 2, 3, 4, 5, 9, 10, 13, 15, 16]


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
    with pytest.raises(SessionError, match=r"SET_PROTOCOL_FEATURES.*not offered: 0x1000 \(INFLIGHT_SHMFD\)"):
        talk.say(Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK | 1 << 12))


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


# --- ring states: the specification's, one test for each of the usual mistakes --------------------------


def test_a_ring_runs_once_it_is_both_started_and_enabled_in_either_order(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.say(Request.SET_FEATURES, U64(BIT_30))
    talk.kick(0)
    assert not device.running
    talk.enable(0)
    assert device.running == {0: True}
    talk.enable(1)
    assert device.running == {0: True}
    talk.kick(1)
    assert device.running == {0: True, 1: True}


def test_a_ring_starts_with_set_vring_kick_not_with_the_first_kick(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.enable(0)
    fd = spare_fd()
    talk.say(Request.SET_VRING_KICK, VringFile(0), fds=[fd])
    assert device.running == {0: True}
    os.set_blocking(fd, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)


def test_a_ring_starts_without_a_kick_descriptor_too_and_is_polled(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.enable(0)
    talk.say(Request.SET_VRING_KICK, VringFile(0, no_fd=True))
    assert device.called("set_vring_kick") == [(0, -1)]
    assert device.running == {0: True}


def test_without_bit_30_set_features_enables_all_rings(talk: Talk, device: RecordingDevice) -> None:
    talk.say(Request.SET_FEATURES, U64(FEATURES))
    for index in (0, 7):
        talk.kick(index)
    assert device.running == {0: True, 7: True}


def test_without_bit_30_rings_that_started_before_set_features_run_from_then_on(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.kick(3)
    assert not device.running
    talk.say(Request.SET_FEATURES, U64(FEATURES))
    assert device.running == {3: True}


def test_a_repeated_set_features_disables_no_ring(talk: Talk, device: RecordingDevice) -> None:
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    talk.kick(0)
    talk.enable(0)
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    assert device.called("set_vring_running") == [(0, True)]


def test_set_vring_kick_neither_disables_nor_enables(talk: Talk, device: RecordingDevice) -> None:
    talk.enable(0)
    talk.kick(0)
    talk.kick(0)
    talk.kick(1)
    assert device.called("set_vring_running") == [(0, True)]


def test_get_vring_base_stops_the_ring_and_does_not_reset_it(talk: Talk, device: RecordingDevice) -> None:
    talk.say(Request.SET_VRING_BASE, VringState(0, 100))
    talk.kick(0)
    talk.enable(0)
    device.bases[0] = 123
    assert talk.say(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 123)
    assert device.running == {0: False}
    assert talk.say(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 123)
    names = [call[0] for call in device.calls]
    stop = device.calls.index(("set_vring_running", 0, False))
    assert stop < names.index("get_vring_base")
    assert not device.called("set_vring_num")


def test_a_stopped_ring_stays_enabled_and_runs_again_with_the_next_kick(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.enable(0)
    talk.kick(0)
    talk.say(Request.GET_VRING_BASE, VringState(0, 0))
    talk.kick(0)
    assert device.called("set_vring_running") == [(0, True), (0, False), (0, True)]


def test_qemu_disables_before_it_reads_the_base(talk: Talk, device: RecordingDevice) -> None:
    talk.enable(0)
    talk.kick(0)
    talk.enable(0, on=False)
    assert device.running == {0: False}
    assert talk.say(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 0)
    talk.enable(0)
    assert device.running == {0: False}


def test_the_kick_descriptor_that_came_before_enable_is_the_one_that_is_used(
    talk: Talk, device: RecordingDevice
) -> None:
    """A kick before SET_VRING_ENABLE stays in its eventfd: nobody has read it when the ring begins to run."""
    fd = spare_fd()
    talk.say(Request.SET_VRING_KICK, VringFile(0), fds=[fd])
    os.eventfd_write(fd, 1)
    talk.enable(0)
    assert device.called("set_vring_kick") == [(0, fd)]
    assert os.eventfd_read(fd) == 1


def test_set_status_0_stops_the_rings_and_forgets_nothing(talk: Talk, device: RecordingDevice) -> None:
    """QEMU 7.2 sends it before GET_VRING_BASE, and afterwards not its memory again."""
    talk.enable(0)
    talk.kick(0)
    device.bases[0] = 5
    talk.say(Request.SET_STATUS, U64(0xF))
    before = len(device.calls)
    talk.say(Request.SET_STATUS, U64(0))
    assert device.calls[before:] == [("set_vring_running", 0, False)]
    assert talk.say(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 5)
    talk.kick(0)
    assert device.running == {0: True}


def test_reset_owner_disables_all_rings_and_forgets_nothing(talk: Talk, device: RecordingDevice) -> None:
    for index in (0, 1):
        talk.enable(index)
        talk.kick(index)
    talk.say(Request.RESET_OWNER)
    assert device.running == {0: False, 1: False}
    assert device.resets == 0
    talk.enable(0)
    assert device.running == {0: True, 1: False}


def test_reset_device_stops_and_disables_and_keeps_owner_memory_and_connection(
    talk: Talk, device: RecordingDevice
) -> None:
    talk.negotiate(REPLY_ACK)
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    talk.enable(0)
    talk.kick(0)
    talk.say(Request.SET_STATUS, U64(0xF))
    assert talk.say(Request.RESET_DEVICE, need_reply=True) == U64(0)
    assert device.running == {0: False}
    assert device.called("set_features")[-1] == (0,)
    assert device.called("set_vring_base") == [(i, 0) for i in range(8)]
    assert talk.say(Request.GET_STATUS) == U64(0)
    talk.kick(0)
    assert device.running == {0: False}, "it was disabled"
    talk.enable(0)
    assert device.running == {0: True}
    assert device.resets == 0
    assert device.called("set_owner") == [()]


def test_a_ring_that_the_device_cant_run_stays_as_it_was(talk: Talk, device: RecordingDevice) -> None:
    talk.negotiate(REPLY_ACK)
    talk.enable(0)
    device.refuse("set_vring_running", errno.EFAULT, "vring 0: it has no addresses")
    kick = spare_fd()
    assert talk.say(Request.SET_VRING_KICK, VringFile(0), fds=[kick], need_reply=True) == U64(errno.EFAULT)
    assert (talk.session.rings[0].started, talk.session.rings[0].enabled) == (False, True)
    device.refusals.clear()
    talk.kick(0)
    assert device.running == {0: True}


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


def test_an_iotlb_message_is_always_answered_and_refused(talk: Talk) -> None:
    assert talk.say(Request.IOTLB_MSG, Iotlb(0, 4096, 0, 3, 2)) == U64(errno.EOPNOTSUPP)


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


# --- the back end's own requests -------------------------------------------------------------------


class Channel:
    """A session with a socket of SET_BACKEND_REQ_FD, and what is told on it."""

    def __init__(self, talk: Talk, bits: int) -> None:
        self.talk = talk
        talk.negotiate(bits)
        self.theirs, ours = socket.socketpair()
        talk.say(Request.SET_BACKEND_REQ_FD, fds=[ours.detach()])
        self.fd = talk.session.take_backend_fd()
        self.roused = 0
        talk.session.on_backend_output = self.rouse

    def rouse(self) -> None:
        self.roused += 1

    def told(self) -> list[Message]:
        """Take what the session has to say, as whoever sends it does."""
        messages = []
        while self.talk.session.backend_output:
            data = bytes(self.talk.session.backend_output)
            self.talk.session.backend_output.clear()
            messages.append(decode_one(Stream.BACKEND_REQUEST, data))
            self.talk.session.announce()
        return messages

    def acknowledge(self, value: int = 0) -> None:
        data = encode(BackendRequest.CONFIG_CHANGE_MSG, U64(value), flags=abi.FLAG_REPLY)
        self.talk.session.receive_backend_reply(decode_one(Stream.BACKEND_REPLY, data))

    def close(self) -> None:
        self.theirs.close()
        os.close(self.fd)


@pytest.fixture
def channel(talk: Talk) -> Iterator[Channel]:
    channel = Channel(talk, CONFIG | BACKEND_REQ | REPLY_ACK)
    yield channel
    channel.close()


def change(device: RecordingDevice) -> None:
    assert device.config_changed is not None
    device.config_changed()


def test_a_change_of_the_configuration_is_told_and_its_answer_awaited(
    talk: Talk, device: RecordingDevice, channel: Channel
) -> None:
    talk.kick(0)
    change(device)
    assert channel.roused == 1
    (message,) = channel.told()
    assert (message.name, message.need_reply) == ("CONFIG_CHANGE_MSG", True)
    change(device)
    change(device)
    assert channel.told() == []
    channel.acknowledge()
    assert len(channel.told()) == 1
    channel.acknowledge()
    assert channel.told() == []


def test_a_suspended_front_end_is_told_when_a_ring_starts(
    talk: Talk, device: RecordingDevice, channel: Channel
) -> None:
    change(device)
    assert channel.told() == []
    talk.kick(0)
    assert len(channel.told()) == 1
    channel.acknowledge()
    talk.say(Request.GET_VRING_BASE, VringState(0, 0))
    change(device)
    assert channel.told() == []


def test_without_reply_ack_no_answer_is_awaited(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk, CONFIG | BACKEND_REQ)
    talk.kick(0)
    for _ in range(2):
        change(device)
        (message,) = channel.told()
        assert not message.need_reply
    channel.close()


def test_what_was_not_sent_yet_is_not_said_twice(talk: Talk, device: RecordingDevice) -> None:
    channel = Channel(talk, CONFIG | BACKEND_REQ)
    talk.kick(0)
    for _ in range(1000):
        change(device)
    assert len(talk.session.backend_output) == 12
    channel.close()


def test_without_config_or_without_the_socket_nothing_is_told(talk: Talk, device: RecordingDevice) -> None:
    talk.negotiate(CONFIG | BACKEND_REQ)
    talk.kick(0)
    change(device)
    assert not talk.session.backend_output
    channel = Channel(talk, BACKEND_REQ)
    change(device)
    assert channel.told() == []
    channel.close()


def test_nothing_is_told_once_nobody_listens(talk: Talk, device: RecordingDevice, channel: Channel) -> None:
    talk.kick(0)
    talk.session.backend_channel_closed()
    change(device)
    assert channel.told() == []


def test_a_refused_announcement_is_logged(
    talk: Talk, device: RecordingDevice, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    talk.kick(0)
    change(device)
    channel.told()
    with caplog.at_level(logging.WARNING):
        channel.acknowledge(1)
    assert "refused CONFIG_CHANGE_MSG (1)" in caplog.text


def test_the_back_ends_socket_must_be_one(talk: Talk) -> None:
    with pytest.raises(SessionError, match=r"SET_BACKEND_REQ_FD.*is not a socket"):
        talk.say(Request.SET_BACKEND_REQ_FD, fds=[spare_fd()])


def test_a_socket_that_nobody_took_is_closed_with_its_successor_and_with_the_session(
    device: RecordingDevice,
) -> None:
    with no_fd_leaks():
        talk = Talk(device)
        for _ in range(2):
            ours, theirs = socket.socketpair()
            ours.close()
            talk.say(Request.SET_BACKEND_REQ_FD, fds=[theirs.detach()])
        talk.session.close()


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
