"""The table of logical units that the compiled loop looks a request's address up in.

Promises: entries change while the loop runs, one word at a time; the table never moves.
Never: knows a command.
"""

from __future__ import annotations

import ctypes

from pyvhost.dataplane import scsi_blocks as layout
from pyvhost.dataplane.plain import load64, store64
from pyvhost.scsi.requests import Address
from pyvhost.vhost.worker import Int64s


def _key(address: Address) -> int:
    return layout.UNIT_VALID | address.target << 16 | address.lun


#: Entries: four for each unit that there may be, and memory only for those that are used.
CAPACITY = 1 << 16


class UnitTable:
    """Units by address, at most a quarter full, so that a search ends soon."""

    def __init__(self) -> None:
        # Of ctypes, which takes it from the system page by page.
        self._memory = (ctypes.c_int64 * (CAPACITY * layout.UNIT_BYTES // 8))()
        self.address = ctypes.addressof(self._memory)
        self.mask = CAPACITY - 1

    def add(self, address: Address, row: Int64s) -> int:
        """An entry for a unit, which the loop leaves to Python until it is told otherwise; its address."""
        entry = self._free(_key(address))
        for word in range(0, layout.UNIT_BYTES, 8):
            store64(entry + word, 0)
        store64(entry + layout.UNIT_FD, -1)
        store64(entry + layout.UNIT_ROW, int(row.ctypes.data))
        store64(entry + layout.UNIT_KEY, _key(address))
        return entry

    def remove(self, address: Address) -> None:
        """Takes a unit out; what the loop has of it under way goes on."""
        entry = self.find(address)
        if entry:
            store64(entry + layout.UNIT_FAST, 0)
            store64(entry + layout.UNIT_KEY, layout.UNIT_GONE)

    def find(self, address: Address) -> int:
        """A unit's entry; 0: there is none."""
        key = _key(address)
        for at in self._places(key):
            entry = self.address + at * layout.UNIT_BYTES
            if load64(entry + layout.UNIT_KEY) == key:
                return entry
        return 0

    def _places(self, key: int) -> list[int]:
        first = (key & 0xFFFFFF) * 0x9E3779B1 >> 8
        return [(first + i) & self.mask for i in range(layout.UNIT_PROBES)]

    def _free(self, key: int) -> int:
        for at in self._places(key):
            entry = self.address + at * layout.UNIT_BYTES
            found = load64(entry + layout.UNIT_KEY)
            if not found & layout.UNIT_VALID and load64(entry + layout.UNIT_IN_FLIGHT) == 0:
                return entry
        raise RuntimeError(f"no place among {CAPACITY} for unit {key:#x}")
