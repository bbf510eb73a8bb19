"""The object that `pyvhost.open` gives: what its methods take and answer, whoever calls and however often.

What the ioctls themselves answer is compared with the kernel's recordings: tests/kernel.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import pyvhost
from in_process import open_fds
from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.vhost.handle import FIOCLEX, FIONBIO, FIONCLEX, Handle
from requirements import need

NET_FEATURES = 0x33D008000
PLATFORM = struct.pack("Q", 1 << virtio.F_ACCESS_PLATFORM)


@pytest.fixture
def vhost() -> Iterator[Handle]:
    with pyvhost.open("/dev/vhost-net") as handle:
        yield handle


def refused(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


def test_nothing_of_that_name() -> None:
    for path in ("/dev/vhost-net2", "vhost-net", "/dev/null"):
        with refused(errno.ENOENT):
            pyvhost.open(path)


# --- arguments, as fcntl.ioctl has them ---------------------------------------------------------------------


def test_bytes_come_back_with_the_answer(vhost: Handle) -> None:
    assert vhost.ioctl(abi.GET_FEATURES, bytes(8)) == struct.pack("Q", NET_FEATURES)
    assert vhost.ioctl(abi.GET_FEATURES, bytes(10)) == struct.pack("Q", NET_FEATURES) + bytes(2)


@pytest.mark.parametrize(
    "buffer", [bytearray(8), array.array("Q", [0]), ctypes.c_uint64(0), memoryview(bytearray(8))]
)
def test_a_buffer_is_written_to(vhost: Handle, buffer: object) -> None:
    assert vhost.ioctl(abi.GET_FEATURES, buffer) == 0
    assert bytes(buffer) == struct.pack("Q", NET_FEATURES)  # type: ignore[call-overload]


def test_a_buffer_that_is_not_to_be_changed(vhost: Handle) -> None:
    buffer = bytearray(8)
    assert vhost.ioctl(abi.GET_FEATURES, buffer, False) == struct.pack("Q", NET_FEATURES)
    assert buffer == bytes(8)


def test_an_integer_is_an_address(vhost: Handle) -> None:
    where = ctypes.c_uint64(0)
    assert vhost.ioctl(abi.GET_FEATURES, ctypes.addressof(where)) == 0
    assert where.value == NET_FEATURES


def test_no_argument_is_a_null_pointer(vhost: Handle) -> None:
    assert vhost.ioctl(abi.SET_OWNER) == 0
    with refused(errno.EFAULT):
        vhost.ioctl(abi.GET_FEATURES)


@pytest.mark.parametrize("address", [-1, -(1 << 63), 1 << 63, (1 << 64) - 1, 1 << 80])
def test_any_integer_will_do(vhost: Handle, address: int) -> None:
    with refused(errno.EFAULT):
        vhost.ioctl(abi.GET_FEATURES, address)


def test_the_request_has_32_bits(vhost: Handle) -> None:
    negative = abi.GET_FEATURES - (1 << 32)
    assert vhost.ioctl(negative, bytes(8)) == struct.pack("Q", NET_FEATURES)


@pytest.mark.parametrize("argument", ["text", 1.5, object(), [1]])
def test_nothing_else_will_do(vhost: Handle, argument: object) -> None:
    with pytest.raises(TypeError):
        vhost.ioctl(abi.GET_FEATURES, argument)


def test_a_buffer_that_is_too_short_is_a_fault(vhost: Handle) -> None:
    vhost.ioctl(abi.SET_OWNER)
    for argument in (b"", bytes(7), bytearray(7)):
        with refused(errno.EFAULT):
            vhost.ioctl(abi.SET_VRING_NUM, argument)


# --- descriptors --------------------------------------------------------------------------------------------


def test_eventfds_stay_the_callers_as_they_were(vhost: Handle) -> None:
    vhost.ioctl(abi.SET_OWNER)
    for flags, blocking in ((0, True), (os.EFD_NONBLOCK, False)):
        fd = os.eventfd(0, flags)
        for request in (abi.SET_VRING_KICK, abi.SET_VRING_CALL, abi.SET_VRING_ERR):
            vhost.ioctl(request, abi.VringFile(0, fd))
        assert os.get_blocking(fd) is blocking
        os.close(fd)


def test_close_gives_back_every_descriptor() -> None:
    before = open_fds()
    handle = pyvhost.open("/dev/vhost-net")
    handle.ioctl(abi.SET_OWNER)
    fd = os.eventfd(0)
    for request in (abi.SET_VRING_KICK, abi.SET_VRING_CALL, abi.SET_VRING_ERR):
        handle.ioctl(request, abi.VringFile(1, fd))
    handle.ioctl(abi.SET_LOG_FD, struct.pack("i", fd))
    handle.ioctl(abi.NEW_WORKER, bytes(4))
    os.close(fd)
    handle.close()
    handle.close()
    assert open_fds() == before


def test_after_close_it_is_no_descriptor() -> None:
    handle = pyvhost.open("/dev/vhost-net")
    handle.close()
    assert handle.closed
    calls: tuple[Callable[[], object], ...] = (
        lambda: handle.ioctl(abi.SET_OWNER),
        lambda: handle.read(72),
        lambda: handle.write(bytes(72)),
    )
    for call in calls:
        with refused(errno.EBADF):
            call()
    with pytest.raises(ValueError, match="closed"):
        handle.fileno()


# --- messages -------------------------------------------------------------------------------------------------


def update(iova: int = 0, size: int = 0x1000, uaddr: int = 0, perm: int = 3) -> bytes:
    return bytes(abi.Msg(abi.IOTLB_MSG, iotlb=abi.IotlbMsg(iova, size, uaddr, perm, abi.IOTLB_UPDATE)))


def test_read_and_write_as_it_was_opened() -> None:
    with pyvhost.open("/dev/vhost-net", os.O_RDONLY) as handle:
        handle.ioctl(abi.SET_FEATURES, PLATFORM)
        with refused(errno.EBADF):
            handle.write(update())
    with pyvhost.open("/dev/vhost-net", os.O_WRONLY) as handle:
        handle.ioctl(abi.SET_FEATURES, PLATFORM)
        assert handle.write(update()) == 72
        with refused(errno.EBADF):
            handle.read(72)


def test_reading_waits_or_not(vhost: Handle) -> None:
    with refused(errno.EBADFD):
        vhost.read(72)
    vhost.ioctl(FIONBIO, struct.pack("i", 1))
    assert not os.get_blocking(vhost.fileno())
    with refused(errno.EAGAIN):
        vhost.read(72)
    assert vhost.read(71) == b""
    vhost.ioctl(FIONBIO, struct.pack("i", 0))
    assert os.get_blocking(vhost.fileno())
    with pyvhost.open("/dev/vhost-net", os.O_RDWR | os.O_NONBLOCK) as other, refused(errno.EAGAIN):
        other.read(72)


def test_close_on_exec(vhost: Handle) -> None:
    vhost.ioctl(FIONCLEX)
    assert os.get_inheritable(vhost.fileno())
    vhost.ioctl(FIOCLEX)
    assert not os.get_inheritable(vhost.fileno())


def miss(vhost: Handle) -> None:
    """Ring 1 is to be bound, and its used ring is not known: that is asked for."""
    vhost.ioctl(abi.SET_OWNER)
    vhost.ioctl(abi.SET_FEATURES, PLATFORM)
    vhost.ioctl(abi.SET_MEM_TABLE, abi.Memory())
    vhost.ioctl(abi.SET_VRING_ADDR, abi.VringAddr(1, 0, 0x1000, 0x3000, 0x2000, 0))
    with unattached_tap() as fd, refused(errno.EFAULT):
        vhost.ioctl(abi.NET_SET_BACKEND, abi.VringFile(1, fd))


@contextmanager
def unattached_tap() -> Iterator[int]:
    """What a ring can be bound to as far as anybody looks before its used ring."""
    need(os.path.exists("/dev/net/tun"), "modprobe tun, or give the container /dev/net/tun")
    fd = os.open("/dev/net/tun", os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("v2", [False, True])
def test_a_miss_can_be_polled_and_read(vhost: Handle, v2: bool) -> None:
    vhost.ioctl(abi.SET_BACKEND_FEATURES, struct.pack("Q", v2 << abi.BACKEND_F_IOTLB_MSG_V2))
    poll = select.poll()
    poll.register(vhost.fileno(), select.POLLIN | select.POLLRDNORM | select.POLLOUT)
    assert poll.poll(0) == []
    miss(vhost)
    assert poll.poll(0) == [(vhost.fileno(), select.POLLIN | select.POLLRDNORM)]
    message = (abi.MsgV2 if v2 else abi.Msg).from_buffer_copy(vhost.read(100))
    assert message.type == (abi.IOTLB_MSG_V2 if v2 else abi.IOTLB_MSG)
    told = message.iotlb
    assert (told.type, told.iova, told.size, told.uaddr, told.perm) == (
        abi.IOTLB_MISS,
        0x3000,
        0,
        0,
        abi.ACCESS_RO,
    )
    assert poll.poll(0) == []


def test_a_thread_waits_for_a_miss(vhost: Handle) -> None:
    vhost.ioctl(abi.SET_FEATURES, PLATFORM)
    answers: list[bytes] = []
    reader = threading.Thread(target=lambda: answers.append(vhost.read(72)))
    reader.start()
    miss(vhost)
    reader.join(30)
    assert len(answers[0]) == 72


def test_a_thread_that_waits_hears_of_the_end(vhost: Handle) -> None:
    vhost.ioctl(abi.SET_FEATURES, PLATFORM)
    codes: list[int | None] = []

    def wait() -> None:
        try:
            vhost.read(72)
        except OSError as error:
            codes.append(error.errno)

    reader = threading.Thread(target=wait)
    reader.start()
    vhost.close()
    reader.join(30)
    assert codes == [errno.EBADF]


# --- a forked child ---------------------------------------------------------------------------------------------

CHILD = """
import errno, os, struct
import pyvhost
from pyvhost.abi import vhost as abi

handle = pyvhost.open("/dev/vhost-net")
{before}
pid = os.fork()
if pid == 0:
    answers = []
    for call in (
        lambda: handle.ioctl(abi.GET_FEATURES, bytes(8)) and None,
        lambda: handle.ioctl(abi.SET_OWNER),
        lambda: handle.ioctl(abi.GET_VRING_BASE, bytes(8)),
        lambda: handle.ioctl(abi.RESET_OWNER),
        lambda: handle.ioctl(abi.SET_FEATURES, bytes(8)),
        lambda: handle.write(bytes(72)),
    ):
        try:
            answers.append(str(call()))
        except OSError as error:
            answers.append(errno.errorcode[error.errno])
    handle.close()
    print(*answers, flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print(handle.ioctl(abi.GET_FEATURES, bytes(8)).hex())
"""


@pytest.mark.parametrize(("before", "set_owner"), [("", "EPERM"), ("handle.ioctl(abi.SET_OWNER)", "EBUSY")])
def test_a_childs_copy_is_refused(before: str, set_owner: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.split() == ["None", set_owner, "EPERM", "EPERM", "EPERM", "EPERM", "0080003d03000000"]


# --- what differs from fcntl by its nature -------------------------------------------------------------------


def test_fcntl_itself_says_that_it_is_no_device(vhost: Handle) -> None:
    with pytest.raises(OSError, match=r"Inappropriate|Invalid"):
        fcntl.ioctl(vhost.fileno(), abi.GET_FEATURES, bytes(8))
