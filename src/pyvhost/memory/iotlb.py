"""The IOTLB: which I/O virtual addresses mean what, as the front end said (struct vhost_iotlb_msg).

Promises: `ENTRIES` entries, of which the oldest retires for a new one; what the memory table does not have is
never in the rows that kernels read; entries that overlap are looked up as on Linux, the one that begins first.
Never: asks for an entry. Whoever missed it does.
"""

from __future__ import annotations

import bisect
import errno
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from pyvhost.abi.vhost import ACCESS_WO
from pyvhost.memory.regions import NO_GUEST, MemoryTable, Row, rows_block

#: As Linux's vhost (max_iotlb_entries).
ENTRIES: Final = 2048
_TOP: Final = 1 << 64


@dataclass(eq=False)
class Entry:
    """`size` bytes at `iova` are the front end's `uaddr`; `perm`: ACCESS_*; the rows that kernels read of it."""

    iova: int
    size: int
    uaddr: int
    perm: int
    rows: list[Row] = field(default_factory=list)

    def touches(self, iova: int, size: int) -> bool:
        """Whether it has any of a range."""
        return self.iova < iova + size and iova < self.iova + self.size


class NoEntryError(Exception):
    """There is no entry for `iova`."""

    def __init__(self, iova: int) -> None:
        super().__init__(f"the IOTLB has no entry for {iova:#x}")
        self.iova = iova


class Iotlb:
    """The entries over a memory table. It is only changed while no kernel reads it."""

    def __init__(self, table: MemoryTable) -> None:
        self._table = table
        #: From the oldest to the newest, and by address.
        self._entries: dict[int, Entry] = {}
        self._sorted: list[Entry] = []
        self._disjoint = True
        self._rows: list[Row] = []
        self._memory: npt.NDArray[np.int64] = np.zeros((64, 5), np.int64)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def block(self) -> npt.NDArray[np.int64]:
        """The rows that kernels read (`blocks.REGION_*`); after a change they may lie elsewhere."""
        return self._memory[: len(self._rows)]

    def use_table(self, table: MemoryTable) -> None:
        """Another memory table: the same entries, where they are now."""
        self._table = table
        for entry in self._sorted:
            try:
                entry.rows = self._rows_of(entry)
            except OSError:
                # The memory has gone; the entry means something again when it is back.
                entry.rows = []
        self._rebuild()

    def update(self, iova: int, size: int, uaddr: int, perm: int) -> Entry | None:
        """A new entry; the one that retired for it. OSError EFAULT: it wraps, or is not all in the memory table."""
        if size <= 0 or iova + size > _TOP or uaddr + size > _TOP or not 0 <= perm <= 3:
            raise OSError(
                errno.EFAULT, f"IOTLB entry {iova:#x}+{size:#x} to {uaddr:#x}, perm {perm}: it can't be"
            )
        entry = Entry(iova, size, uaddr, perm)
        entry.rows = self._rows_of(entry)
        retired = next(iter(self._entries.values())) if len(self._entries) >= ENTRIES else None
        if retired is not None:
            self._drop([retired])
        alone = not self._touching(iova, size)
        self._entries[id(entry)] = entry
        bisect.insort(self._sorted, entry, key=lambda e: e.iova)
        if alone and self._disjoint:
            at = bisect.bisect_left(self._rows, (iova,))
            self._splice(at, at, entry.rows)
        else:
            self._rebuild()
        return retired

    def invalidate(self, iova: int, size: int) -> list[tuple[int, int]]:
        """Forgets each entry that has any of the range; the guest memory, address and bytes, that these let write."""
        entries = self._touching(iova, size)
        self._drop(entries)
        rows = (row for entry in entries for row in entry.rows)
        return [(guest, length) for _, length, host, guest, access in rows if host and access & ACCESS_WO]

    def lets_write(self, guest: int, size: int) -> bool:
        """Whether some entry allows to write all of a piece of guest memory."""
        return any(
            start <= guest and guest + size <= start + length and access & ACCESS_WO
            for _, length, host, start, access in self._rows
            if host
        )

    def ranges(self, iova: int, size: int, access: int) -> Iterator[tuple[int, int, int]]:
        """Host address, bytes and guest address of each piece of a range.

        NoEntryError: a piece has no entry; OSError EFAULT: its entry allows less than `access`.
        """
        while size > 0:
            at = bisect.bisect_left(self._rows, (iova + 1,)) - 1
            start, length, host, guest, allowed = self._rows[at] if at >= 0 else (0, 0, 0, 0, 0)
            if not start <= iova < start + length:
                raise NoEntryError(iova)
            if allowed & access != access:
                raise OSError(errno.EFAULT, f"the IOTLB allows {allowed} of {iova:#x}, {access} is needed")
            offset = iova - start
            run = min(length - offset, size)
            yield host + offset, run, guest + offset
            iova += run
            size -= run

    # --- within -------------------------------------------------------------------------------------------

    def _rows_of(self, entry: Entry) -> list[Row]:
        rows: list[Row] = []
        done = 0
        for offset, run, host, guest in self._table.pieces_of_user(entry.uaddr, entry.size):
            if done < offset:
                rows.append((entry.iova + done, offset - done, 0, NO_GUEST, 0))
            rows.append((entry.iova + offset, run, host, guest, entry.perm))
            done = offset + run
        if done < entry.size:
            # An entry is no miss: what is not there may not be touched.
            rows.append((entry.iova + done, entry.size - done, 0, NO_GUEST, 0))
        return rows

    def _touching(self, iova: int, size: int) -> list[Entry]:
        if not self._disjoint:
            return [entry for entry in self._sorted if entry.touches(iova, size)]
        at = bisect.bisect_right(self._sorted, iova, key=lambda e: e.iova)
        behind = itertools.takewhile(lambda e: e.iova < iova + size, self._sorted[at:])
        return [entry for entry in (*self._sorted[max(at - 1, 0) : at], *behind) if entry.touches(iova, size)]

    def _drop(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            del self._entries[id(entry)]
            self._sorted.remove(entry)
            if self._disjoint:
                at = bisect.bisect_left(self._rows, (entry.iova,))
                self._splice(at, at + len(entry.rows), [])
        if entries and not self._disjoint:
            self._rebuild()

    def _splice(self, first: int, end: int, rows: list[Row]) -> None:
        """Puts `rows` in place of rows `first` to `end`."""
        behind = self._memory[end : len(self._rows)].copy()
        self._rows[first:end] = rows
        if len(self._rows) > len(self._memory):
            larger = np.zeros((2 * len(self._rows), 5), np.int64)
            larger[:first] = self._memory[:first]
            self._memory = larger
        at = first + len(rows)
        self._memory[first:at] = rows_block(rows)
        self._memory[at : at + len(behind)] = behind

    def _rebuild(self) -> None:
        """All rows anew; of entries that overlap, the one that begins first has what both have."""
        self._disjoint = all(a.iova + a.size <= b.iova for a, b in itertools.pairwise(self._sorted))
        rows: list[Row] = []
        end = 0
        for entry in self._sorted:
            for start, length, host, guest, perm in entry.rows:
                cut = max(end - start, 0)
                if cut < length:
                    rows.append((start + cut, length - cut, host + cut, guest + cut, perm))
            end = max(end, entry.iova + entry.size)
        self._rows = []
        self._splice(0, 0, rows)
