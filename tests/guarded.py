"""Memory between two pages that cannot be touched: an access beyond its end ends the process.

Promises: the bytes end exactly where the forbidden page starts; those before them, down to the forbidden page
below, hold a pattern that `intact` looks at. Never: frees itself while somebody has its address.
"""

from __future__ import annotations

import ctypes
import mmap

_PAGE = mmap.PAGESIZE
_CANARY = 0xA5
_NORESERVE = 0x4000  # MAP_NORESERVE: gigabytes that nobody touches cost nothing
_libc = ctypes.CDLL(None, use_errno=True)


def _forbid(address: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


class Guarded:
    """`size` bytes at `address`."""

    def __init__(self, size: int) -> None:
        self.size = size
        body = -(-max(size, 1) // _PAGE) * _PAGE
        self._slack = body - size
        self._map = mmap.mmap(-1, body + 2 * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = start + _PAGE + self._slack
        _forbid(start)
        _forbid(start + _PAGE + body)
        ctypes.memset(start + _PAGE, _CANARY, self._slack)
        self._below = start + _PAGE

    @classmethod
    def of(cls, content: bytes) -> Guarded:
        """As large as `content`, and holding it."""
        made = cls(len(content))
        made.put(0, content)
        return made

    def put(self, offset: int, content: bytes) -> None:
        assert 0 <= offset <= self.size - len(content)
        ctypes.memmove(self.address + offset, content, len(content))

    def get(self, offset: int = 0, length: int | None = None) -> bytes:
        length = self.size - offset if length is None else length
        assert 0 <= offset <= self.size - length
        return ctypes.string_at(self.address + offset, length)

    def intact(self) -> bool:
        """Whether nothing was written below the bytes."""
        return ctypes.string_at(self._below, self._slack) == bytes([_CANARY]) * self._slack
