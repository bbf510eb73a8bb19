"""What `pyvhost.open` gives: an open `/dev/vhost-*` without a kernel's module, in this process.

    with pyvhost.open("/dev/vhost-net") as vhost:
        vhost.ioctl(abi.SET_OWNER)

Addresses are this process's own. `ioctl` takes and gives what `fcntl.ioctl` does; an IOTLB's messages are written
and read, and `fileno()` polls as the character device would.

Promises: any thread may call anything; a call never crashes the process, whatever it points at; what was lent
(descriptors) is duplicated, what was taken is given back by `close`.
Never: serves another process: a forked child's copy is refused what needs the owner.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, TypeVar

from pyvhost.abi import vhost as abi
from pyvhost.host import fds, user_memory
from pyvhost.vhost import ioctls, messages
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.kernel_device import KernelDevice

#: Ioctls that every open file has (asm-generic/ioctls.h), before its driver sees them.
FIONCLEX: Final = 0x5450
FIOCLEX: Final = 0x5451
FIONBIO: Final = 0x5421

_T = TypeVar("_T")
_MASK: Final = (1 << 64) - 1
_MODES: Final = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


class _Taking:
    """Descriptors that the caller named: duplicated, and left in the mode they were in."""

    def __init__(self) -> None:
        self._blocking: list[int] = []

    def take_fd(self, fd: int) -> int:
        """A duplicate of the caller's descriptor. OSError EBADF."""
        if fd < 0:
            raise VhostError(errno.EBADF, f"{fd} is no descriptor")
        try:
            taken = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError as error:
            raise VhostError(error.errno or errno.EBADF, f"descriptor {fd}: {error.strerror}") from None
        if os.get_blocking(fd):
            self._blocking.append(fd)
        return taken

    def give_back(self) -> None:
        """The caller's descriptors are as they were: whether one blocks is its owner's to say."""
        for fd in self._blocking:
            os.set_blocking(fd, True)


class _Pointer(_Taking):
    """An argument that is an address."""

    def __init__(self, address: int) -> None:
        super().__init__()
        self._address = address & _MASK

    def read(self, size: int, offset: int = 0) -> bytes:
        return user_memory.read((self._address + offset) & _MASK, size)

    def write(self, data: bytes, offset: int = 0) -> None:
        user_memory.write((self._address + offset) & _MASK, data)


class _Buffer(_Taking):
    """An argument that is bytes, or a buffer to write to."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view

    def read(self, size: int, offset: int = 0) -> bytes:
        self._check(size, offset)
        return bytes(self._view[offset : offset + size])

    def write(self, data: bytes, offset: int = 0) -> None:
        self._check(len(data), offset)
        self._view[offset : offset + len(data)] = data

    def _check(self, size: int, offset: int) -> None:
        if offset + size > len(self._view):
            raise VhostError(
                errno.EFAULT, f"the argument has {len(self._view)} bytes, {offset + size} are needed"
            )


class Handle:
    """An open device. `flags`: as `os.open`: O_RDONLY, O_WRONLY, O_RDWR, and O_NONBLOCK for `read`."""

    def __init__(self, device: KernelDevice, flags: int = os.O_RDWR) -> None:
        self._device: KernelDevice | None = device
        self._lock = threading.RLock()
        self._mode = flags & _MODES
        self._fd = _file(device)
        os.set_blocking(self._fd, not flags & os.O_NONBLOCK)
        self._process = os.getpid()

    @property
    def name(self) -> str:
        """What was opened."""
        return self._open().name

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._device is None

    def fileno(self) -> int:
        """A descriptor to poll: readable (POLLIN) while `read` would give an IOTLB message; always if there are none.

        os.set_blocking() of it says whether `read` waits. It is this object's to close, and not to be read.
        ValueError: closed.
        """
        if self._device is None:
            raise ValueError("it is closed")
        return self._fd

    def ioctl(self, request: int, argument: Any = None, mutate_flag: bool = True) -> int | bytes:
        """What `fcntl.ioctl(fd, request, argument, mutate_flag)` does with the kernel's device.

        `argument`: an integer is an address of this process (None: 0); bytes are given back with what the ioctl
        has written into them; a writable buffer is written to in place, and the answer is 0. OSError: the kernel's
        errno. TypeError: none of these. What is shorter than the ioctl's structure is EFAULT.
        """
        if argument is None or isinstance(argument, int):
            return self._perform(request, _Pointer(argument or 0))
        if hasattr(argument, "__index__") and not isinstance(argument, memoryview):
            return self._perform(request, _Pointer(argument.__index__()))
        with memoryview(argument) as given:
            if given.readonly or not mutate_flag:
                copy = bytearray(given.tobytes())
                self._perform(request, _Buffer(memoryview(copy)))
                return bytes(copy)
            with given.cast("B") as view:
                return self._perform(request, _Buffer(view))

    def read(self, size: int) -> bytes:
        """The next IOTLB message: 72 bytes, or b"" where `size` is less.

        It waits for one unless the descriptor is non-blocking: then OSError EAGAIN. EBADFD: there is no IOTLB to
        wait for. EBADF: closed, or opened to be written alone. EINVAL: such a device has no messages.
        """
        self._has_messages(self._may(os.O_WRONLY, "read"))
        if size < ctypes.sizeof(abi.Msg):
            return b""
        while True:
            with self._lock:
                device = self._open()
                message = messages.read(device)
                if message is not None:
                    return message
                if not os.get_blocking(self._fd):
                    raise BlockingIOError(errno.EAGAIN, f"{device.name}: no IOTLB message waits")
                if not device.has_iotlb:
                    raise VhostError(errno.EBADFD, f"{device.name}: it has no IOTLB to wait for")
                wait = os.dup(self._fd)
            try:
                # A short look at a time: another thread may close the device, or take the IOTLB away.
                select.select([wait], [], [], _PATIENCE)
            finally:
                os.close(wait)

    def write(self, data: Any) -> int:
        """An IOTLB message, one a call; 72, however long `data` is beyond what is needed.

        OSError EINVAL: it is too short, of no known kind, or an UPDATE of nothing; EFAULT: no IOTLB, an address
        that can't be, or a message that is the device's to send. EBADF: closed, or opened to be read alone.
        """
        self._has_messages(self._may(os.O_RDONLY, "write"))
        with memoryview(data) as view:
            raw = view.tobytes()
        with self._lock:
            device = self._open()
            self._own_process(device)
            return messages.write(device, raw)

    def close(self) -> None:
        """Gives up the device and all that was lent to it; nothing happens the second time."""
        with self._lock:
            device, self._device = self._device, None
            if device is None:
                return
            fds.close(self._fd)
            # A child's copy has no worker that it could stop.
            if os.getpid() == self._process:
                self._call(device, device.close)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        device = getattr(self, "_device", None)
        # When the interpreter ends there are no workers left that could stop, and nothing is left to them.
        if device is None or sys.is_finalizing():
            return
        if device.control is not None and os.getpid() == self._process:
            # The collector may run on a thread that the device waits for.
            self._device = None
            fds.close(self._fd)
            device.control.post(device.close)
            return
        try:
            self.close()
        except RuntimeError:
            # It was a worker that the collector ran on: it can't wait for itself.
            threading.Thread(target=device.close).start()

    # --- within -------------------------------------------------------------------------------------------

    def _perform(self, request: int, argument: _Pointer | _Buffer) -> int:
        request &= 0xFFFFFFFF
        with self._lock:
            device = self._open()
            everyones = self._everyones(request)
            if everyones is not None:
                everyones(argument)
                return 0
            if os.getpid() != self._process and request not in _HARMLESS:
                if request == abi.SET_OWNER:
                    device.require_no_owner()
                self._own_process(device)
            try:
                return self._call(device, lambda: ioctls.perform(device, request, argument))
            finally:
                argument.give_back()

    def _everyones(self, request: int) -> Callable[[_Pointer | _Buffer], None] | None:
        fd = self._fd
        if request == FIONBIO:
            return lambda argument: os.set_blocking(fd, not ioctls.number(argument, 4))
        if request in (FIOCLEX, FIONCLEX):
            return lambda _: os.set_inheritable(fd, request == FIONCLEX)
        return None

    def _open(self) -> KernelDevice:
        if self._device is None:
            raise OSError(errno.EBADF, "it is closed")
        return self._device

    def _may(self, unless: int, what: str) -> KernelDevice:
        device = self._open()
        if self._mode == unless:
            raise OSError(errno.EBADF, f"{device.name}: it was not opened to {what}")
        return device

    @staticmethod
    def _has_messages(device: KernelDevice) -> None:
        if not device.has_messages:
            raise VhostError(errno.EINVAL, f"{device.name}: it has no IOTLB, and no messages")

    def _call(self, device: KernelDevice, function: Callable[[], _T]) -> _T:
        """On the thread that the device's methods belong to; a child's copy is only asked what harms nobody."""
        if device.control is None or os.getpid() != self._process:
            return function()
        return device.control.call(function)

    def _own_process(self, device: KernelDevice) -> None:
        """EPERM: this is a forked child, and the rings are its parent's."""
        if os.getpid() != self._process:
            raise VhostError(errno.EPERM, f"{device.name}: process {self._process} has it, not its child")


def _file(device: KernelDevice) -> int:
    """A descriptor that polls as the character device does."""
    if not device.has_messages:
        # Always ready both ways, and none for an epoll set: as any device without a way to poll it.
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    # An epoll set: readable while a miss waits, and nothing else ever.
    with select.epoll() as epoll:
        epoll.register(device.iotlb_fd, select.EPOLLIN)
        return fcntl.fcntl(epoll.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)


#: What a child may ask of its copy: it only reads.
_HARMLESS: Final = frozenset(
    {
        abi.GET_FEATURES,
        abi.GET_BACKEND_FEATURES,
        abi.GET_FEATURES_ARRAY,
        abi.SCSI_GET_ABI_VERSION,
        abi.SCSI_GET_EVENTS_MISSED,
    }
)
#: Seconds.
_PATIENCE: Final = 0.1
