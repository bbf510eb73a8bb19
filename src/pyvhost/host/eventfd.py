"""Eventfds: making, checking, signalling and draining them.

Promises: `require` answers as the kernel's vhost does for a descriptor it is given (EBADF, EINVAL); `signal`
and `drain` never block on a descriptor that `create` made or `require` let pass.
Never: takes ownership of a descriptor.
"""

from __future__ import annotations

import errno
import os
import stat


def create(initial: int = 0) -> int:
    """A new eventfd: non-blocking, closed on exec."""
    return os.eventfd(initial, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def is_eventfd(fd: int) -> bool:
    """Whether `fd` is an eventfd. OSError EBADF: it is not open.

    Without a /proc the answer is only that it is an anonymous inode, which has no file type.
    """
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as info:
            # The kernel writes this line for eventfds alone (fs/eventfd.c, eventfd_show_fdinfo).
            return any(line.startswith(b"eventfd-count:") for line in info.read(4096).splitlines())
    except (FileNotFoundError, PermissionError):
        return kind == 0


def require(fd: int) -> None:
    """Check that `fd` is an eventfd and make it non-blocking.

    OSError EBADF: not open; EINVAL: open, but no eventfd. (VHOST_SET_VRING_KICK, CALL and ERR answer so.)
    """
    try:
        good = is_eventfd(fd)
    except OSError as error:
        raise OSError(error.errno, f"descriptor {fd}: {os.strerror(error.errno or 0)}") from None
    if not good:
        raise OSError(errno.EINVAL, f"descriptor {fd} is not an eventfd")
    os.set_blocking(fd, False)


def signal(fd: int) -> None:
    """Add one. A counter that is full has been signalled already: no error."""
    try:
        os.eventfd_write(fd, 1)
    except BlockingIOError:
        pass


def drain(fd: int) -> int:
    """Take the count, and set it to 0; 0 if nothing was signalled."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
