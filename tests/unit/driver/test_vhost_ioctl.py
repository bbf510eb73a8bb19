"""The ioctl front end against a handle that keeps what it is given, byte by byte, and answers by a table."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from pyvhost.driver.dirty_log import DirtyLog
from pyvhost.driver.errors import DeviceError, DriverError
from pyvhost.driver.iommu import Miss
from pyvhost.driver.memory import GuestMemory, Region, Span
from pyvhost.driver.queue import Queue
from pyvhost.driver.split_ring import SplitRing
from pyvhost.driver.vhost_ioctl import VhostFrontend, VhostNetFrontend, open_kernel
from pyvhost.host import eventfd

# linux/vhost.h, written out: type 0xAF, the argument's size, 1 written by the caller, 2 read by it.
W, R, WR = 0x4000_AF00, 0x8000_AF00, 0xC000_AF00
GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER = R | 8 << 16, W | 8 << 16, 0xAF01, 0xAF02
MEM_TABLE, LOG_BASE, LOG_FD = W | 8 << 16 | 3, W | 8 << 16 | 4, W | 4 << 16 | 7
NUM, ADDR, BASE, GET_BASE = W | 8 << 16 | 0x10, W | 40 << 16 | 0x11, W | 8 << 16 | 0x12, WR | 8 << 16 | 0x12
ENDIAN, GET_ENDIAN, KICK, CALL, ERR, BUSY, GET_BUSY = (
    W | 8 << 16 | number for number in (0x13, 0x14, 0x20, 0x21, 0x22, 0x23, 0x24)
)
SET_BACKEND_FEATURES, GET_BACKEND_FEATURES = W | 8 << 16 | 0x25, R | 8 << 16 | 0x26
NET_BACKEND = W | 8 << 16 | 0x30

TABLE = [Region(0x1000, 0x2000, 0x7000_0000, 0x99, -1), Region(1 << 40, 1 << 20, 0x7100_0000, 0, -1)]


class ScriptedHandle:
    """Keeps every ioctl as (request, bytes); `answers` may change the argument, or raise."""

    def __init__(self) -> None:
        self.came: list[tuple[int, bytes | int]] = []
        self.answers: dict[int, Callable[[bytes], bytes]] = {}
        self.messages: deque[bytes] = deque()
        self.written: list[bytes] = []
        self.fd = eventfd.create()

    def ioctl(self, request: int, argument: bytearray | int = 0) -> object:
        if isinstance(argument, int):
            self.came.append((request, argument))
            return 0
        self.came.append((request, bytes(argument)))
        if request in self.answers:
            answer = self.answers[request](bytes(argument))
            assert len(answer) == len(argument)
            argument[:] = answer
        return 0

    def say(self, message: bytes) -> None:
        self.messages.append(message)
        eventfd.signal(self.fd)

    def read(self, size: int, /) -> bytes:
        message = self.messages.popleft()
        if not self.messages:
            eventfd.drain(self.fd)
        return message[:size]

    def write(self, data: bytes, /) -> int:
        self.written.append(data)
        return len(data)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def handle() -> Iterator[ScriptedHandle]:
    handle = ScriptedHandle()
    yield handle
    handle.close()


def state(index: int, num: int) -> bytes:
    return struct.pack("=Ii", index, num)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def raising(code: int) -> Callable[[bytes], bytes]:
    def refuse(_: bytes) -> bytes:
        raise OSError(code, os.strerror(code))

    return refuse


def test_every_ioctl_has_its_number_and_its_bytes(handle: ScriptedHandle) -> None:
    front = VhostNetFrontend(handle)
    calls: list[tuple[Callable[[], object], int, bytes | int]] = [
        (front.set_owner, SET_OWNER, 0),
        (front.reset_owner, RESET_OWNER, 0),
        (front.get_features, GET_FEATURES, u64(0)),
        (lambda: front.set_features(1 << 63 | 5), SET_FEATURES, u64(1 << 63 | 5)),
        (front.get_backend_features, GET_BACKEND_FEATURES, u64(0)),
        (lambda: front.set_backend_features(2), SET_BACKEND_FEATURES, u64(2)),
        (
            lambda: front.set_mem_table(TABLE),
            MEM_TABLE,
            struct.pack("=II8Q", 2, 0, 0x1000, 0x2000, 0x7000_0000, 0, 1 << 40, 1 << 20, 0x7100_0000, 0),
        ),
        (lambda: front.set_mem_table([]), MEM_TABLE, bytes(8)),
        (lambda: front.set_log_base(0x1234_5678_9ABC), LOG_BASE, u64(0x1234_5678_9ABC)),
        (lambda: front.set_log_fd(-1), LOG_FD, b"\xff" * 4),
        (lambda: front.set_vring_num(1, 256), NUM, state(1, 256)),
        (lambda: front.set_vring_base(1, 65535), BASE, state(1, 65535)),
        (lambda: front.get_vring_base(1), GET_BASE, state(1, 0)),
        (
            lambda: front.set_vring_addr(1, 2, 3, 4, flags=1, log_guest_addr=5),
            ADDR,
            struct.pack("=II4Q", 1, 1, 2, 3, 4, 5),
        ),
        (lambda: front.set_vring_endian(0, 1), ENDIAN, state(0, 1)),
        (lambda: front.get_vring_endian(1), GET_ENDIAN, state(1, 0)),
        (lambda: front.set_vring_busyloop_timeout(1, 50), BUSY, state(1, 50)),
        (lambda: front.get_vring_busyloop_timeout(1), GET_BUSY, state(1, 0)),
        (lambda: front.set_vring_kick(1, 77), KICK, state(1, 77)),
        (lambda: front.set_vring_call(1), CALL, state(1, -1)),
        (lambda: front.set_vring_err(0, 3), ERR, state(0, 3)),
        (lambda: front.set_backend(1, 9), NET_BACKEND, state(1, 9)),
    ]
    for call, *expected in calls:
        handle.came.clear()
        call()
        assert handle.came == [tuple(expected)]


def test_what_the_device_answers(handle: ScriptedHandle) -> None:
    front = VhostNetFrontend(handle)
    handle.answers = {
        GET_FEATURES: lambda _: u64(0x3_3D00_8000),
        GET_BACKEND_FEATURES: lambda _: u64(2),
        GET_BASE: lambda given: given[:4] + struct.pack("=I", 9),
        GET_ENDIAN: lambda given: given[:4] + struct.pack("=I", 1),
        GET_BUSY: lambda given: given[:4] + struct.pack("=I", 50),
    }
    assert front.get_features() == 0x3_3D00_8000
    assert front.get_backend_features() == 2
    assert (front.get_vring_base(1), front.get_vring_endian(1), front.get_vring_busyloop_timeout(1)) == (
        9,
        1,
        50,
    )
    assert (front.get_queue_num(), front.fileno()) == (1, -1)
    front.set_status(15)
    with pytest.raises(DriverError, match="configuration"):
        front.get_config(0, 6)


def test_a_refusal_is_the_kernels_errno(handle: ScriptedHandle) -> None:
    handle.answers = {NUM: raising(errno.EBUSY)}
    with pytest.raises(OSError, match="busy") as caught:
        VhostFrontend(handle).set_vring_num(0, 4)
    assert caught.value.errno == errno.EBUSY


def test_negotiation_owns_once_and_takes_what_is_offered(handle: ScriptedHandle) -> None:
    handle.answers = {GET_FEATURES: lambda _: u64(0xF0)}
    front = VhostNetFrontend(handle)
    assert front.negotiate(0x3C) == 0x30
    assert front.negotiate(0x18) == 0x10
    assert [request for request, _ in handle.came] == [
        SET_OWNER,
        GET_FEATURES,
        SET_FEATURES,
        GET_FEATURES,
        SET_FEATURES,
    ]
    front.change_features(0x30)
    assert handle.came[-1] == (SET_FEATURES, u64(0x30))


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_a_ring_is_brought_up_and_taken_down(handle: ScriptedHandle, byteorder: str) -> None:
    handle.answers = {GET_BASE: lambda given: given[:4] + struct.pack("=I", 9)}
    front = VhostNetFrontend(handle, backend=(11, 12))
    with GuestMemory(1 << 16, anonymous=True) as memory:
        ring = SplitRing(memory, 16, start=5, byteorder="big" if byteorder == "big" else "little")
        user, layout = memory.user_address, ring.layout
        with Queue(ring) as queue:
            front.start_ring(1, queue)
            address = struct.pack("=II4Q", 1, 0, user(layout.desc), user(layout.used), user(layout.avail), 0)
            endian = [(ENDIAN, state(1, 1))] if byteorder == "big" else []
            assert handle.came == [
                (NUM, state(1, 16)),
                (BASE, state(1, 5)),
                *endian,
                (ADDR, address),
                (CALL, state(1, queue.call_fd)),
                (ERR, state(1, queue.err_fd)),
                (KICK, state(1, queue.kick_fd)),
                (NET_BACKEND, state(1, 12)),
            ]
            handle.came.clear()
            assert front.stop_ring(1) == 9
            assert handle.came == [
                (NET_BACKEND, state(1, -1)),
                (GET_BASE, state(1, 0)),
                (KICK, state(1, -1)),
                (CALL, state(1, -1)),
                (ERR, state(1, -1)),
            ]


def test_a_byte_order_told_once_is_taken_back(handle: ScriptedHandle) -> None:
    front = VhostNetFrontend(handle)
    with GuestMemory(1 << 16, anonymous=True) as memory:
        for byteorder in ("big", "big", "little", "little"):
            with Queue(SplitRing(memory, 4, byteorder="big" if byteorder == "big" else "little")) as queue:
                front.start_ring(0, queue)
    told = [argument for request, argument in handle.came if request == ENDIAN]
    assert told == [state(0, 1), state(0, 1), state(0, 0)]


def test_logging_is_by_pointer_and_by_guest_address(handle: ScriptedHandle) -> None:
    front = VhostNetFrontend(handle)
    with (
        GuestMemory([Span(1 << 32, 1 << 16)], anonymous=True) as memory,
        DirtyLog.covering(memory) as log,
        Queue(SplitRing(memory, 4)) as queue,
    ):
        front.set_log(log)
        front.set_ring_addr(1, queue, log=True)
        used = queue.ring.layout.used
    assert handle.came[0] == (LOG_BASE, u64(log.address))
    request, argument = handle.came[1]
    assert request == ADDR
    assert isinstance(argument, bytes)
    index, flags, *_, log_at = struct.unpack("=II4Q", argument)
    assert (index, flags, log_at) == (1, 1, used)
    assert used >= 1 << 32, "a guest address, no user address"


MISS = struct.pack("=i4x", 1) + struct.pack("=QQQBB", 0x1000, 0, 0, 2, 1)
MISS_V2 = struct.pack("=II", 2, 0) + struct.pack("=QQQBB", 0x1000, 0, 0, 2, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_iotlb_messages(handle: ScriptedHandle, version: int) -> None:
    front = VhostNetFrontend(handle, message_v2=version == 2)
    handle.answers = {GET_FEATURES: lambda _: u64(1 << 33), GET_BACKEND_FEATURES: lambda _: u64(6)}
    front.negotiate(1 << 33)
    assert ((SET_BACKEND_FEATURES, u64(2)) in handle.came) == (version == 2)
    assert front.iotlb_fileno() == handle.fd
    assert front.take_miss() is None
    handle.say((MISS if version == 1 else MISS_V2).ljust(72, b"\0"))
    assert front.take_miss() == Miss(0x1000, 2)
    assert front.take_miss() is None
    front.iotlb_update(0x1000, 0x2000, 0x7000, 3)
    front.iotlb_invalidate(0x1000, 0x2000)
    head = struct.pack("=II", version, 0)
    assert handle.written == [
        (head + struct.pack("=QQQBB", 0x1000, 0x2000, 0x7000, 3, 2)).ljust(72, b"\0"),
        (head + struct.pack("=QQQBB", 0x1000, 0x2000, 0, 0, 3)).ljust(72, b"\0"),
    ]


@pytest.mark.parametrize(
    "message",
    [
        MISS_V2.ljust(72, b"\0"),
        MISS[:-1].ljust(72, b"\2"),
        MISS.ljust(71, b"\0"),
        b"",
    ],
    ids=["the other version", "an update", "too short", "nothing"],
)
def test_what_is_no_miss(handle: ScriptedHandle, message: bytes) -> None:
    handle.say(message)
    with pytest.raises(DeviceError, match=r"message|expected a miss"):
        VhostNetFrontend(handle).take_miss()


def test_messages_of_version_2_are_not_everywhere(handle: ScriptedHandle) -> None:
    with pytest.raises(DriverError, match="version 2"):
        VhostNetFrontend(handle, message_v2=True).negotiate(0)


def test_only_a_device_that_moves_data_can_be_started(handle: ScriptedHandle) -> None:
    for start in (VhostFrontend(handle).bind, VhostFrontend(handle).unbind):
        with pytest.raises(NotImplementedError):
            start(0)


def test_a_kernels_device_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="vhost-nowhere"):
        open_kernel("/dev/vhost-nowhere")


def test_a_kernels_handle_is_a_descriptor() -> None:
    with open_kernel("/dev/null") as device:
        with pytest.raises(OSError, match="Inappropriate ioctl"):
            device.ioctl(SET_OWNER)
        assert device.write(bytes(72)) == 72
        assert device.read(72) == b""
        fd = device.fileno()
        assert not os.get_inheritable(fd)
    device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_arguments_are_of_the_size_that_the_request_says(handle: ScriptedHandle) -> None:
    front = VhostFrontend(handle)

    class Four(ctypes.Structure):
        _fields_ = (("value", ctypes.c_uint32),)

    handle.answers = {0x1234: lambda given: bytes(reversed(given))}
    assert front.ioctl(0x1234, Four(0x11223344)).value == 0x44332211
