"""The system calls of stores for which Python has no name: fallocate, statx for direct I/O, block devices' ioctls.

Promises: a failure is an OSError with its errno; the GIL is released while the kernel works.
Never: opens or closes anything.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

#: linux/falloc.h
KEEP_SIZE: Final = 0x01
PUNCH_HOLE: Final = 0x02
ZERO_RANGE: Final = 0x10

# linux/fs.h
_BLKSSZGET: Final = 0x1268
_BLKROGET: Final = 0x125E
_BLKPBSZGET: Final = 0x127B
_BLKZEROOUT: Final = 0x127F
# fcntl.h: locks of an open file, not of a process, so that two disks of one process part as well
_OFD_SETLK: Final = 37
# linux/stat.h
_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). OSError EOPNOTSUPP: the file system can't do that."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, f"fallocate: {os.strerror(number)}")


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """How buffers' addresses, and offsets and lengths, must be aligned for O_DIRECT; None where that isn't known.

    (0, 0): the file can't be read directly. Linux tells from 6.1 on, for the file systems that have learnt to.
    """
    answer = (ctypes.c_char * 256)()
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return None
    (mask,) = struct.unpack_from("I", answer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("II", answer, 0x98)
    return memory, offset


def sector_size(fd: int) -> int:
    """Bytes of a block device's logical sector."""
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def physical_sector_size(fd: int) -> int:
    """Bytes of a block device's physical sector: what it writes in one piece."""
    return int(struct.unpack("I", fcntl.ioctl(fd, _BLKPBSZGET, bytes(4)))[0])


def device_read_only(fd: int) -> bool:
    """Whether the block device as a whole takes no writes."""
    return bool(struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])


def zero_out(fd: int, offset: int, length: int) -> None:
    """Have a block device's range read as zeroes, by writing them if it knows no other way."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("QQ", offset, length))


def discard_granularity(device: int) -> int:
    """Bytes that the block device (st_rdev) discards as one; 0: it doesn't discard."""
    here = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (here / "queue", here / ".." / "queue"):  # a partition's is its disk's
        try:
            if int((queue / "discard_max_bytes").read_text()) == 0:
                return 0
            return int((queue / "discard_granularity").read_text())
        except (OSError, ValueError):
            continue
    return 0


def try_lock(fd: int, *, exclusive: bool) -> bool:
    """Take the whole file for this open file alone, or with others that don't want it alone; False: it is taken.

    The lock ends with the last descriptor of the open file. A file system without locks says OSError.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    return _set_lock(fd, kind)


def unlock(fd: int) -> None:
    """Give the lock back before the descriptor is closed."""
    _set_lock(fd, fcntl.F_UNLCK)


def _set_lock(fd: int, kind: int) -> bool:
    # struct flock: l_type, l_whence, l_start, l_len (0: to the end, wherever that may come to lie), l_pid
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, _OFD_SETLK, request)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def get_flags(fd: int) -> int:
    """The open file's flags (F_GETFL)."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def set_flags(fd: int, flags: int) -> None:
    """Set those of them that can be changed (F_SETFL). OSError EINVAL: no O_DIRECT here."""
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
