"""Where a split ring's parts lie, and its words as they lie there (virtio 1.3, 2.7).

Addresses are guest physical, lengths bytes. Promises: every word of a part is read and written by one aligned
access. Never: orders anything, or keeps state of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal, NamedTuple

from pyvhost.driver.memory import GuestMemory

ByteOrder = Literal["little", "big"]
Buffer = tuple[int, int]
"""A guest address and a length in bytes."""


class RingLayout(NamedTuple):
    """The guest addresses of a ring's three parts."""

    desc: int
    avail: int
    used: int

    @staticmethod
    def sizes(size: int) -> tuple[int, int, int]:
        """Bytes of the descriptor table, the available ring and the used ring, their event words included."""
        return 16 * size, 6 + 2 * size, 6 + 8 * size

    @classmethod
    def allocate(
        cls, memory: GuestMemory, size: int, regions: tuple[int | None, int | None, int | None] = (None,) * 3
    ) -> RingLayout:
        """Three parts wherever there is room, or each in a region of the caller's choice."""
        parts = zip(cls.sizes(size), (16, 2, 4), regions, strict=True)
        return cls(*(memory.allocate(length, align, region) for length, align, region in parts))

    @classmethod
    def legacy(cls, memory: GuestMemory, size: int, align: int = 4096) -> RingLayout:
        """The one layout of a legacy PCI device: one piece, the used ring on the next `align` boundary."""
        desc_size, avail_size, used_size = cls.sizes(size)
        used_offset = -(-(desc_size + avail_size) // align) * align
        start = memory.allocate(used_offset + used_size, align)
        return cls(start, start + desc_size, start + used_offset)


class Descriptor(NamedTuple):
    """One descriptor, as it lies in guest memory (virtio 1.3, 2.7.5)."""

    addr: int
    len: int
    flags: int
    next: int


def _same(value: int) -> int:
    return value


def _swap16(value: int) -> int:
    return (value & 0xFF) << 8 | value >> 8


def _swap32(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little"), "big")


def _swap64(value: int) -> int:
    return int.from_bytes(value.to_bytes(8, "little"), "big")


def swappers(order: ByteOrder) -> tuple[Callable[[int], int], ...]:
    return (_same, _same, _same) if order == sys.byteorder else (_swap16, _swap32, _swap64)


class DescriptorTable:
    """`count` descriptors at a guest address: a ring's own table, or an indirect one."""

    def __init__(
        self, memory: GuestMemory, address: int, count: int, byteorder: ByteOrder = "little"
    ) -> None:
        self.count = count
        self._u16, self._u32, self._u64 = swappers(byteorder)
        self._q = memory.words(address, 2 * count, "Q")
        self._i = memory.words(address, 4 * count, "I")
        self._h = memory.words(address, 8 * count, "H")

    def __getitem__(self, index: int) -> Descriptor:
        h = self._h
        return Descriptor(
            self._u64(self._q[2 * index]),
            self._u32(self._i[4 * index + 2]),
            self._u16(h[8 * index + 6]),
            self._u16(h[8 * index + 7]),
        )

    def set(self, index: int, addr: int, length: int, flags: int, following: int = 0) -> None:
        """Write one descriptor; its words are not ordered among themselves."""
        self._q[2 * index] = self._u64(addr)
        self._i[4 * index + 2] = self._u32(length)
        self._h[8 * index + 6] = self._u16(flags)
        self._h[8 * index + 7] = self._u16(following)
