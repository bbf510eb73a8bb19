"""A dirty log from the front end's side: one bit for each page of guest memory that the device writes to.

Page N, of 4096 bytes whatever the machine's own size is, is bit N % 8 of byte N / 8 (VHOST_SET_LOG_BASE,
VHOST_USER_SET_LOG_BASE). The log is a memory file, mapped here: a back end gets the file, a device of this
process or of the kernel the `address`.

    log = DirtyLog.covering(memory)
    driver.start_log(log)
    ...
    for page in log.take(): copy(page)

`take` may run while the device sets bits. Python has no atomic access, but the kernel has one for everybody:
futex(2)'s FUTEX_WAKE_OP clears a bit of a word in one locked instruction. A bit is read first and cleared
then; a bit that the device sets in between was set already, and its page is among those returned, so that a
page copied after `take` is whole up to that time at least.

Words are taken for little-endian, as every machine's are that this runs on.

Promises: a page that the device logs is returned by this `take` or by a later one. Never: clears a bit that it
does not return.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from pyvhost.driver.errors import DriverError
from pyvhost.driver.memory import PAGE, GuestMemory
from pyvhost.host import memfd

LOG_PAGE = 4096
"""Bytes of guest memory that one bit stands for."""

_FUTEX: Final = 202 if platform.machine() == "x86_64" else 98  # asm-generic/unistd.h: Arm, RISC-V and later
_FUTEX_WAKE_OP_PRIVATE: Final = 5 | 128
_OP_ANDN: Final = 3 << 28
_OPARG_SHIFT: Final = 8 << 28
_libc: Final = ctypes.CDLL(None, use_errno=True)


def _clear_bit(address: int, bit: int) -> None:
    """Clear bit `bit` (0 to 31) of the 32-bit word at `address`, atomically."""
    pointer, none = ctypes.c_void_p(address), ctypes.c_long(0)
    operation = ctypes.c_long(_OP_ANDN | _OPARG_SHIFT | bit << 12)
    # Wakes nobody: who waits at such a word? The comparison at its end is of no account either.
    result = _libc.syscall(
        ctypes.c_long(_FUTEX), pointer, _FUTEX_WAKE_OP_PRIVATE, none, none, pointer, operation
    )
    if result < 0:
        code = ctypes.get_errno()
        raise DriverError(f"the dirty log at {address:#x}: futex: {os.strerror(code)}")


class DirtyLog:
    """A log for guest addresses below `end`. `size` and `offset` are bytes in the file `fd`."""

    def __init__(self, end: int) -> None:
        if not 0 < end <= 1 << 64:
            raise ValueError(f"guest addresses below {end:#x} can't be logged")
        wanted = -(-end // (8 * LOG_PAGE))
        self.size = -(-wanted // PAGE) * PAGE
        self.offset = 0
        # Not sealed, like a hypervisor's: it is the back end's business to stand one that shrinks.
        self.fd = memfd.create("dirty-log", self.size, seals=0)
        try:
            self._map = mmap.mmap(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise
        self._words = memoryview(self._map).cast("I")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def covering(cls, memory: GuestMemory) -> Self:
        """A log for all of a guest's memory."""
        return cls(max(region.end for region in memory.regions))

    def pages(self) -> set[int]:
        """The numbers of the pages that are marked; they stay marked."""
        return {32 * at + bit for at, word in self._marked() for bit in _bits(word)}

    def take(self) -> set[int]:
        """The numbers of the pages that are marked, and no longer are. The device may go on meanwhile."""
        taken = set()
        for at, word in self._marked():
            for bit in _bits(word):
                _clear_bit(self.address + 4 * at, bit)
                taken.add(32 * at + bit)
        return taken

    def fill(self, byte: int) -> None:
        """Set every byte, to see what a device leaves alone. Only while it logs nothing."""
        self._map[:] = bytes([byte]) * self.size

    def _marked(self) -> Iterator[tuple[int, int]]:
        """Each word that is not 0, as one load had it, and where it stands."""
        per_page = PAGE // 4
        for first in range(0, len(self._words), per_page):
            if self._map[4 * first : 4 * first + PAGE] == _CLEAN:
                continue
            for at in range(first, first + per_page):
                word = self._words[at]
                if word:
                    yield at, word

    def close(self) -> None:
        """Unmap the log and close its file, when no device uses it any more; nothing the second time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._words.release()
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_CLEAN: Final = bytes(PAGE)


def _bits(word: int) -> Iterator[int]:
    while word:
        lowest = word & -word
        yield lowest.bit_length() - 1
        word ^= lowest


class Snapshot:
    """All of a guest's memory as it was: what a dirty log is held against, byte by byte."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._was = {
            region.guest_phys_addr: memory.read(region.guest_phys_addr, region.memory_size)
            for region in memory.regions
        }

    def changed(self) -> set[int]:
        """The numbers of the pages that hold other bytes now. Only while nobody writes."""
        pages = set()
        for start, was in self._was.items():
            now = self._memory.read(start, len(was))
            first = start - start % LOG_PAGE
            for at in range(first, start + len(was), LOG_PAGE):
                low, high = max(at - start, 0), at + LOG_PAGE - start
                if was[low:high] != now[low:high]:
                    pages.add(at // LOG_PAGE)
        return pages
