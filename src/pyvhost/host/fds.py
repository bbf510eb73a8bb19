"""Descriptors: who owns one, and how they travel over a Unix socket.

Promises: a descriptor that is received is closed on exec, and either returned to the caller or closed, also
when the kernel had to cut the list short. Never: blocks longer than the socket's own mode has it.
"""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
from collections.abc import Iterable, Sequence
from types import TracebackType

#: What Linux lets travel in one message (SCM_MAX_FD).
MAX_FDS = 253

_INT = array.array("i").itemsize


class Fd:
    """A descriptor with one owner: closed once, by `close`, the end of a `with`, or when it is forgotten."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd
        if fd < 0:
            raise OSError(errno.EBADF, f"{fd} is no descriptor")

    @property
    def closed(self) -> bool:
        """Whether there is nothing left to own."""
        return self._fd < 0

    def fileno(self) -> int:
        """The number, still owned here. OSError EBADF: closed or detached."""
        if self._fd < 0:
            raise OSError(errno.EBADF, "the descriptor is closed")
        return self._fd

    def detach(self) -> int:
        """The number, now the caller's to close."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Close it; nothing happens the second time."""
        fd, self._fd = self._fd, -1
        close(fd)

    def __enter__(self) -> Fd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fd({self._fd})"


def close(fd: int) -> None:
    """Close `fd` unless it is negative. One that is not open is no error: there is nothing to save."""
    if fd >= 0:
        try:
            os.close(fd)
        except OSError:
            pass


def room_for(number: int) -> int:
    """How many descriptors this process may have, after its limit was raised to `number` as far as that goes.

    What is raised is the soft limit of RLIMIT_NOFILE, up to the hard one; not where this process may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return number if soft == resource.RLIM_INFINITY else soft
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        # A filter on system calls, or fs.nr_open that was lowered since.
        return soft
    return wanted


def close_all(fds: Iterable[int]) -> None:
    """Close every one of them."""
    for fd in fds:
        close(fd)


def send(sock: socket.socket, data: bytes | bytearray | memoryview, fds: Sequence[int] = ()) -> int:
    """Send `data` with `fds` attached to its first byte; the number of bytes that went.

    The descriptors stay the caller's. If fewer bytes went than there are, the descriptors went with them: the
    rest is to be sent without. OSError as sendmsg(2); no SIGPIPE.
    """
    ancillary = []
    if fds:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)))
    return sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def recv(sock: socket.socket, size: int, max_fds: int = MAX_FDS) -> tuple[bytes, list[int]]:
    """Receive up to `size` bytes and the descriptors that rode with them, now the caller's to close.

    b"" is the peer's end. OSError EMSGSIZE: more than `max_fds` descriptors came, or more than this process
    may still open; those that arrived are closed, the bytes lost. OSError as recvmsg(2) otherwise.
    """
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(max_fds * _INT), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % _INT])
    # The room is rounded up to 8 bytes, so that one descriptor too many may still have fitted.
    if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
        close_all(fds)
        raise OSError(
            errno.EMSGSIZE, f"more descriptors came than the {max_fds} expected, or than may be open"
        )
    return data, fds.tolist()
