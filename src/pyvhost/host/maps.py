"""This process's own address space: what of it can be read and written now (proc(5), /proc/self/maps).

Promises: an answer is true at the moment it was asked for, and no longer than that: whoever unmaps memory that
was lent to a device has to take it back first. Never: touches the memory it is asked about.
"""

from __future__ import annotations

import platform
from typing import Final

#: Where user space ends: Linux's TASK_SIZE_MAX, with four levels of page tables.
USER_TOP: Final = (1 << 47) - 4096 if platform.machine() == "x86_64" else 1 << 48


def access_ok(address: int, size: int) -> bool:
    """Whether a range lies in user space at all, mapped or not: what the kernel's access_ok() says."""
    return 0 <= size <= USER_TOP and 0 <= address <= USER_TOP - size


def usable(address: int, size: int) -> list[tuple[int, int]]:
    """The parts of a range that are mapped readable and writable, as (address, size), in order, joined."""
    if size <= 0 or address >= USER_TOP:
        return []
    return clip(writable(), address, size)


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
