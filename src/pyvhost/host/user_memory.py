"""Bytes at an address that somebody named: the kernel's copy_from_user and copy_to_user, for this process.

Promises: an address with nothing there, or nothing that may be written, is an OSError EFAULT and never a signal:
the kernel itself does the copying, through a pipe. Never: writes a part of what was asked for and says nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

#: Bytes that are copied at a time: what a pipe takes without anybody at its other end.
_STEP: Final = 4096

_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.read, _libc.write):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


def read(address: int, size: int) -> bytes:
    """`size` bytes from `address`. OSError EFAULT: they can't all be read."""
    taken = bytearray()
    inward, outward = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        while len(taken) < size:
            step = min(_STEP, size - len(taken))
            if _libc.write(outward, (address + len(taken)) & _MASK, step) != step:
                raise _fault(address, size)
            taken += os.read(inward, step)
    finally:
        os.close(inward)
        os.close(outward)
    return bytes(taken)


def write(address: int, data: bytes) -> None:
    """Puts `data` at `address`. OSError EFAULT: it can't all be written there; what came first may have been."""
    inward, outward = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for at in range(0, len(data), _STEP):
            step = data[at : at + _STEP]
            os.write(outward, step)
            if _libc.read(inward, (address + at) & _MASK, len(step)) != len(step):
                raise _fault(address, len(data))
    finally:
        os.close(inward)
        os.close(outward)


_MASK: Final = (1 << 64) - 1


def _fault(address: int, size: int) -> OSError:
    return OSError(errno.EFAULT, f"{size} bytes at {address:#x} are not all this process's to use")
