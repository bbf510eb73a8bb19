"""Memory files: shared memory that has a descriptor and no name in the file system.

Promises: what `create` returns has its size and its seals, or nothing was made.
Never: maps anything.
"""

from __future__ import annotations

import errno
import fcntl
import os

SEAL_SEAL = fcntl.F_SEAL_SEAL
SEAL_SHRINK = fcntl.F_SEAL_SHRINK
SEAL_GROW = fcntl.F_SEAL_GROW
SEAL_WRITE = fcntl.F_SEAL_WRITE


def create(name: str, size: int, *, seals: int = SEAL_SHRINK | SEAL_GROW) -> int:
    """A new memory file of `size` bytes, all zero, closed on exec.

    `name` is only what /proc/PID/maps shows. By default its size is sealed, so that whoever it is shared with
    can't turn an access to the mapping into SIGBUS. OSError as memfd_create(2), ftruncate(2) and F_ADD_SEALS.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def seals(fd: int) -> int:
    """The seals of a file; 0 where the file knows none (a plain file, hugetlbfs before it had them)."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return 0
        raise


def can_shrink(fd: int) -> bool:
    """Whether whoever else holds the file could make it smaller than a mapping of it."""
    return not seals(fd) & SEAL_SHRINK
