"""What a migration and a return need of the session: dirty log, inflight memory, vring bases, byte order."""

from __future__ import annotations

import errno
import os

import pytest

from fronts import BIT_30, Talk
from pyvhost.abi import vhost
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import Request
from pyvhost.dataplane.plain import store8
from pyvhost.host import memfd
from pyvhost.vhost.inflight import Inflight as InflightRegion
from pyvhost.vhost_user.backend import SessionError
from pyvhost.vhost_user.codec import Stream, decode_one, encode
from pyvhost.vhost_user.payloads import U64, Inflight, Log, Payload, VringAddr, VringState
from recording_device import FEATURES, RecordingDevice, conversation, is_open, no_fd_leaks, spare_fd

REPLY_ACK = 1 << abi.PROTOCOL_F_REPLY_ACK
LOG_SHMFD = 1 << abi.PROTOCOL_F_LOG_SHMFD
LOG_ALL = 1 << vhost.F_LOG_ALL


# --- the dirty log ---------------------------------------------------------------------------------


def test_qemu_waits_for_the_log_and_then_says_what_is_to_be_logged() -> None:
    """The recorded order: the log, LOG_ALL, F_LOG for each vring. By the end everything is taken back, or stopped."""
    told = [
        m
        for m in conversation("qemu-7.2-migration")
        if m.request in (Request.SET_LOG_BASE, Request.SET_FEATURES, Request.SET_VRING_ADDR)
    ]
    at = next(i for i, m in enumerate(told) if m.request == Request.SET_LOG_BASE)
    asked, answered, with_log, *_ = told[at:]
    assert (asked.fds, answered.fds) == (1, 0)
    assert answered.data == encode(Request.SET_LOG_BASE, decoded(asked.data), flags=abi.FLAG_REPLY)
    assert with_log.request == Request.SET_FEATURES
    payload = decoded(with_log.data)
    assert isinstance(payload, U64)
    assert payload.value & LOG_ALL
    logged = [decoded(m.data) for m in told[at:] if m.request == Request.SET_VRING_ADDR and len(m.data) == 52]
    assert [p.flags for p in logged if isinstance(p, VringAddr)] == [1, 1]


def decoded(data: bytes) -> Payload | None:
    return decode_one(Stream.REQUEST, data).payload


def log_file(size: int = 8192) -> int:
    return memfd.create("log", size)


def test_the_log_is_a_piece_of_the_file_and_the_answer_is_the_requests_own_payload(
    talk: Talk, device: RecordingDevice
) -> None:
    """28 bytes: rust-vmm's front end waits for as many, QEMU for what the header says."""
    talk.negotiate(LOG_SHMFD)
    fd = log_file()
    mine = os.dup(fd)
    (answer,) = talk.raw(encode(Request.SET_LOG_BASE, Log(1024, 4096)), [fd])
    assert encode(answer.request, answer.payload, flags=abi.FLAG_REPLY).hex() == (
        "060000000500000010000000" + "0004000000000000" + "0010000000000000"
    )
    assert device.log is not None
    assert device.log.size == 1024
    store8(device.log.address + 1023, 0x80)
    assert os.pread(mine, 1, 4096 + 1023) == b"\x80"
    os.close(mine)
    assert not is_open(fd)


def test_with_need_reply_there_is_still_one_answer(talk: Talk) -> None:
    talk.negotiate(LOG_SHMFD | REPLY_ACK)
    assert talk.say(Request.SET_LOG_BASE, Log(4096, 0), fds=[log_file()], need_reply=True) == Log(4096, 0)


@pytest.mark.parametrize(
    ("payload", "count", "words"),
    [
        (Log(4096, 0), 0, "no descriptor came with it"),
        (U64(0x7F0000000000), 1, "an address, 0x7f0000000000, is of no use"),
        (Log(0, 0), 1, "no file has a log of 0x0 bytes at 0x0"),
        (Log(1 << 62, 1 << 62), 1, "no file has a log of 0x4000000000000000 bytes at 0x4000000000000000"),
        (Log((1 << 64) - 1, 1), 1, "no file has a log of 0xffffffffffffffff bytes at 0x1"),
        (Log(8193, 0), 1, "SET_LOG_BASE .*mmap_size=0x2001 mmap_offset=0x0.*: .*of a file of 0x2000"),
        (Log(4096, 8192), 1, "of a file of 0x2000"),
    ],
)
def test_a_log_that_cant_be_ends_the_connection(
    device: RecordingDevice, payload: Payload, count: int, words: str
) -> None:
    """The answer has no way to say no."""
    with no_fd_leaks():
        talk = Talk(device)
        talk.negotiate(LOG_SHMFD | REPLY_ACK)
        with pytest.raises(SessionError, match=words):
            talk.say(Request.SET_LOG_BASE, payload, fds=[log_file() for _ in range(count)], need_reply=True)
        talk.session.close()
    assert device.called("set_log_base") == []


def test_a_log_that_the_device_refuses_ends_the_connection(talk: Talk, device: RecordingDevice) -> None:
    talk.negotiate(LOG_SHMFD)
    device.refuse("set_log_base", errno.EFAULT, "vring 0: used ring is not covered")
    with pytest.raises(SessionError, match=r"SET_LOG_BASE.*vring 0: used ring is not covered"):
        talk.say(Request.SET_LOG_BASE, Log(4096, 0), fds=[log_file()])


def test_without_log_shmfd_there_is_no_answer_and_no_log(talk: Talk, device: RecordingDevice) -> None:
    talk.negotiate(REPLY_ACK)
    answer = talk.say(Request.SET_LOG_BASE, Log(4096, 0), fds=[log_file()], need_reply=True)
    assert answer == U64(errno.EOPNOTSUPP)
    with pytest.raises(SessionError, match="without LOG_SHMFD"):
        talk.say(Request.SET_LOG_BASE, U64(0x1000))
    assert device.called("set_log_base") == []


def test_the_logs_eventfd_is_the_devices(talk: Talk, device: RecordingDevice) -> None:
    fd = spare_fd()
    talk.say(Request.SET_LOG_FD, fds=[fd])
    talk.say(Request.SET_LOG_FD)
    assert device.called("set_log_fd") == [(fd,), (-1,)]
    assert is_open(fd)


def test_logging_goes_on_and_off_under_running_rings_and_disturbs_none(talk: Talk) -> None:
    """What QEMU says: features and addresses again, with and without the log."""
    device = talk.device
    device.features |= LOG_ALL
    talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30))
    for index in (0, 1):
        talk.kick(index)
        talk.enable(index)
    told = len(device.called("set_vring_running"))
    for on in (1, 0, 1, 0):
        talk.say(Request.SET_FEATURES, U64(FEATURES | BIT_30 | on * LOG_ALL))
        for index in (0, 1):
            talk.say(Request.SET_VRING_ADDR, VringAddr(index, on, 0x1000, 0x2000, 0x3000, 0x9000))
    assert len(device.called("set_vring_running")) == told
    assert all(ring.running for ring in talk.session.rings[:2])
    assert device.called("set_features")[1:] == [(FEATURES | LOG_ALL,), (FEATURES,)] * 2
    assert device.called("set_vring_addr")[:2] == [
        (0, 1, 0x1000, 0x2000, 0x3000, 0x9000),
        (1, 1, 0x1000, 0x2000, 0x3000, 0x9000),
    ]


# --- inflight memory -------------------------------------------------------------------------------


def test_inflight_memory_is_made_handed_out_and_taken_back(talk: Talk, device: RecordingDevice) -> None:
    answer = talk.say(Request.GET_INFLIGHT_FD, Inflight(0, 0, 2, 128))
    assert answer == Inflight(4096, 0, 2, 128)
    fd = talk.answer_fds.take()
    # Before any SET_VRING_BASE, as QEMU has it.
    talk.say(Request.SET_INFLIGHT_FD, Inflight(4096, 0, 2, 128), fds=[fd])
    assert device.called("make_inflight") == [(2, 128)]
    assert device.called("set_inflight") == [(InflightRegion(fd, 4096, 0, 2, 128),)]
    assert is_open(fd)


def test_inflight_memory_that_cant_be_had_is_an_answer_of_no_size_without_a_descriptor(
    talk: Talk, device: RecordingDevice
) -> None:
    device.refuse("make_inflight", errno.ENOMEM, "no memory")
    assert talk.say(Request.GET_INFLIGHT_FD, Inflight(0, 0, 8, 1024)) == Inflight(0, 0, 8, 1024)
    assert len(talk.answer_fds) == 0
    assert talk.say(Request.GET_INFLIGHT_FD, Inflight(0, 0, 9, 1024)) == Inflight(0, 0, 9, 1024)
    assert len(device.called("make_inflight")) == 1


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (Inflight(4096, 0, 0, 128), "num_queues is 0, expected 1 to the device's 8"),
        (Inflight(4096, 0, 9, 128), "num_queues is 9, expected 1 to the device's 8"),
        (Inflight(4096, 0, 2, 0), "queue_size is 0"),
        (Inflight(0, 0, 2, 128), "no file has a region of 0x0 bytes at 0x0"),
        (Inflight((1 << 64) - 1, 1, 2, 128), "no file has a region of 0xffffffffffffffff bytes at 0x1"),
        (Inflight(4096, (1 << 63) - 1, 2, 128), "no file has a region of 0x1000 bytes"),
    ],
)
def test_inflight_memory_that_cant_be_is_refused_with_its_numbers(
    talk: Talk, device: RecordingDevice, payload: Inflight, words: str
) -> None:
    with pytest.raises(SessionError, match=f"SET_INFLIGHT_FD .*{words}"):
        talk.say(Request.SET_INFLIGHT_FD, payload, fds=[spare_fd()])
    talk.negotiate(REPLY_ACK)
    answer = talk.say(Request.SET_INFLIGHT_FD, payload, fds=[spare_fd()], need_reply=True)
    assert answer == U64(errno.EINVAL)
    assert device.called("set_inflight") == []


# --- vrings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [Request.GET_VRING_BASE, Request.GET_VRING_BASE_SKIP_DRAIN])
def test_both_requests_for_a_base_stop_the_vring_and_answer_alike(
    talk: Talk, device: RecordingDevice, request_: Request
) -> None:
    talk.say(Request.SET_VRING_BASE, VringState(1, 77))
    talk.kick(1)
    talk.enable(1)
    assert talk.say(request_, VringState(1, 0)) == VringState(1, 77)
    assert device.called("set_vring_running") == [(1, True), (1, False)]
    # A front end of QEMU 10's drafts said 1 where 0 belongs: it is reserved, and ignored.
    assert talk.say(request_, VringState(1, 1)) == VringState(1, 77)


def test_byte_order_is_the_devices_to_judge(talk: Talk, device: RecordingDevice) -> None:
    for num in (1, 0):
        talk.say(Request.SET_VRING_ENDIAN, VringState(1, num))
    assert device.called("set_vring_endian") == [(1, 1), (1, 0)]
    device.refuse("set_vring_endian", errno.EINVAL, "vring 1: byte order 2")
    with pytest.raises(SessionError, match="SET_VRING_ENDIAN index=1 num=2: vring 1: byte order 2"):
        talk.say(Request.SET_VRING_ENDIAN, VringState(1, 2))
