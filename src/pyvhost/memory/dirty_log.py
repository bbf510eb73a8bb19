"""The dirty log's memory: a bitmap that a front end gave, by pointer or by file (VHOST_SET_LOG_BASE).

Promises: its size is known, so that no kernel writes outside it; a mapping is unmapped once.
Never: sets or clears a bit.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from pyvhost.memory.mapped import Guard, Mapped
from pyvhost.memory.regions import Usable

#: Bytes of guest memory that a byte of the log stands for: 8 pages of 4096.
BYTES_A_BYTE = 8 * 4096


class DirtyLog:
    """A log of `size` bytes at `address` of this process."""

    def __init__(self, address: int, size: int, mapped: Mapped | None = None) -> None:
        self.address = address
        self.size = size
        self._mapped = mapped

    @classmethod
    def at(cls, address: int, usable: Usable, top: int) -> DirtyLog:
        """This process's own memory, as much of it as there is for guest memory below `top`."""
        wanted = min(-(-top // BYTES_A_BYTE), (1 << 64) - address)
        parts = [size for start, size in usable(address, wanted) if start == address] if wanted > 0 else []
        return cls(address, parts[0] if parts else 0)

    @classmethod
    def mapped(cls, fd: int, offset: int, size: int, guard: Guard | None = None) -> DirtyLog:
        """`size` bytes of a file from `offset` on; closes the descriptor. OSError: why it can't be."""
        try:
            if size <= 0:
                raise OSError(errno.EINVAL, f"a dirty log of {size} bytes")
            mapped = Mapped.of(fd, offset, size, f"dirty log {offset:#x}+{size:#x}", guard)
        finally:
            with suppress(OSError):
                os.close(fd)
        return cls(mapped.address, size, mapped)

    def covers(self, last: int) -> bool:
        """Whether it has a bit for the guest address `last`."""
        return last // BYTES_A_BYTE < self.size

    def close(self) -> None:
        """Unmaps what was mapped."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    @property
    def lost(self) -> bool:
        """Whether its file was made smaller, so that bits are set nowhere."""
        return self._mapped is not None and self._mapped.lost
