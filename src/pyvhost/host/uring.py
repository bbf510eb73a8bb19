"""io_uring: an instance of it, set up and mapped, for a compiled loop to drive (io_uring_setup(2)).

Promises: what `Uring` gives are the addresses of its rings in this process; closed once. Never: submits.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

#: The same on every architecture that came after 5.1, and on x86-64.
_SETUP: Final = 425
_SETUP_CLAMP: Final = 1 << 4
#: What an operation leaves to do when it ends is done at the next system call, and interrupts nobody (Linux 5.19).
_SETUP_COOP_TASKRUN: Final = 1 << 8
#: The submission queue's flags say when there is some.
_SETUP_TASKRUN_FLAG: Final = 1 << 9
_FEAT_SINGLE_MMAP: Final = 1 << 0
_FEAT_NODROP: Final = 1 << 1
_FEAT_SUBMIT_STABLE: Final = 1 << 2
_OFF_SQ_RING: Final = 0
_OFF_SQES: Final = 0x10000000
_SQE_BYTES: Final = 64
_CQE_BYTES: Final = 16


class _SqOffsets(ctypes.Structure):
    _fields_ = [
        *[
            (n, ctypes.c_uint32)
            for n in ("head", "tail", "mask", "entries", "flags", "dropped", "array", "resv1")
        ],
        ("user_addr", ctypes.c_uint64),
    ]


class _CqOffsets(ctypes.Structure):
    _fields_ = [
        *[
            (n, ctypes.c_uint32)
            for n in ("head", "tail", "mask", "entries", "overflow", "cqes", "flags", "resv1")
        ],
        ("user_addr", ctypes.c_uint64),
    ]


class _Params(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_uint32) for n in ("sq_entries", "cq_entries", "flags", "sq_thread_cpu")],
        *[(n, ctypes.c_uint32) for n in ("sq_thread_idle", "features", "wq_fd")],
        ("resv", ctypes.c_uint32 * 3),
        ("sq", _SqOffsets),
        ("cq", _CqOffsets),
    ]


class Uring:
    """An io_uring of `entries` submissions. OSError: the host has none (ENOSYS, EPERM), or too old a one."""

    def __init__(self, entries: int) -> None:
        for flags in (_SETUP_CLAMP | _SETUP_COOP_TASKRUN | _SETUP_TASKRUN_FLAG, _SETUP_CLAMP):
            params = _Params(flags=flags)
            self.fd = int(_libc.syscall(_SETUP, entries, ctypes.byref(params)))
            code = ctypes.get_errno() if self.fd < 0 else 0
            if code != errno.EINVAL:
                break
        if self.fd < 0:
            raise OSError(code, f"io_uring_setup: {os.strerror(code)}")
        os.set_inheritable(self.fd, False)
        self._maps: list[tuple[int, int]] = []
        try:
            needed = _FEAT_SINGLE_MMAP | _FEAT_NODROP | _FEAT_SUBMIT_STABLE
            if params.features & needed != needed:
                raise OSError(
                    errno.ENOSYS, f"io_uring has features {params.features:#x}, {needed:#x} are needed"
                )
            self.entries = params.sq_entries
            sq_bytes = params.sq.array + params.sq_entries * 4
            cq_bytes = params.cq.cqes + params.cq_entries * _CQE_BYTES
            base = self._map(max(sq_bytes, cq_bytes), _OFF_SQ_RING)
            self.sqes = self._map(params.sq_entries * _SQE_BYTES, _OFF_SQES)
        except BaseException:
            self.close()
            raise
        self.sq_tail = base + params.sq.tail
        self.sq_array = base + params.sq.array
        self.sq_flags = base + params.sq.flags
        self.sq_mask = params.sq_entries - 1
        self.cq_head = base + params.cq.head
        self.cq_tail = base + params.cq.tail
        self.cqes = base + params.cq.cqes
        self.cq_mask = params.cq_entries - 1

    def _map(self, size: int, offset: int) -> int:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        base = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.fd, offset)
        if base == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "io_uring's rings can't be mapped")
        self._maps.append((base, size))
        return int(base)

    def close(self) -> None:
        """Gives it up; what is under way ends by itself."""
        for base, size in self._maps:
            _libc.munmap(base, size)
        self._maps = []
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
