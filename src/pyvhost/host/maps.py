"""This process's own address space: what of it can be read and written now (proc(5), /proc/self/maps).

Promises: an answer is true at the moment it was asked for, and no longer than that: whoever unmaps memory that
was lent to a device has to take it back first; since Linux 6.11 a small range costs microseconds, before it the
reading of the whole list. Never: touches the memory it is asked about.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import struct
from contextlib import suppress
from typing import Final

#: Where user space ends: Linux's TASK_SIZE_MAX, with four levels of page tables.
USER_TOP: Final = (1 << 47) - 4096 if platform.machine() == "x86_64" else 1 << 48

# linux/fs.h: PROCMAP_QUERY, _IOWR(0x66, 17, struct procmap_query), and the flags of what is asked for: what is
# readable and writable, at the address or the next behind it.
_QUERY_BYTES: Final = 104
_QUERY: Final = 3 << 30 | _QUERY_BYTES << 16 | 0x66 << 8 | 17
_READABLE_WRITABLE_OR_NEXT: Final = 0x13


def access_ok(address: int, size: int) -> bool:
    """Whether a range lies in user space at all, mapped or not: what the kernel's access_ok() says."""
    return 0 <= size <= USER_TOP and 0 <= address <= USER_TOP - size


def usable(address: int, size: int) -> list[tuple[int, int]]:
    """The parts of a range that are mapped readable and writable, as (address, size), in order, joined."""
    if size <= 0 or address >= USER_TOP:
        return []
    try:
        return _asked_for(address, min(address + size, USER_TOP))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        # An older kernel gives the whole list or nothing.
        return clip(writable(), address, size)


def _asked_for(start: int, end: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    # Opened each time: a forked child's copy would still tell of its parent.
    fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(FileNotFoundError):
            while start < end:
                query = bytearray(_QUERY_BYTES)
                struct.pack_into("=QQQ", query, 0, _QUERY_BYTES, _READABLE_WRITABLE_OR_NEXT, start)
                # FileNotFoundError: nothing comes behind.
                fcntl.ioctl(fd, _QUERY, query)
                first, last = struct.unpack_from("=QQ", query, 24)
                first, last = max(first, start), min(last, end)
                if first >= end:
                    break
                if found and sum(found[-1]) == first:
                    found[-1] = (found[-1][0], last - found[-1][0])
                else:
                    found.append((first, last - first))
                start = last
    finally:
        os.close(fd)
    return found


def writable() -> list[tuple[int, int]]:
    """All that is mapped readable and writable, as (start, end), in order; neighbours are one. OSError: no /proc."""
    ranges: list[tuple[int, int]] = []
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            where, rights, _ = line.split(None, 2)
            if not rights.startswith(b"rw"):
                continue
            low, high = (int(part, 16) for part in where.split(b"-"))
            if ranges and ranges[-1][1] == low:
                ranges[-1] = (ranges[-1][0], high)
            else:
                ranges.append((low, high))
    return ranges


def clip(ranges: list[tuple[int, int]], address: int, size: int) -> list[tuple[int, int]]:
    """What of [address, address + size) lies in `ranges`, each (start, end), as (address, size)."""
    found = []
    for low, high in ranges:
        start, end = max(low, address), min(high, address + size)
        if start < end:
            found.append((start, end - start))
    return found
