"""What a device has of its front end's memory: the table, the IOTLB over it, the dirty log of it.

Promises: tells where a vring's parts lie here, or what is missing; fills in what a ring's record has of memory.
Never: pauses anybody. The device does, around what changes here.
"""

from __future__ import annotations

import errno
import itertools
from dataclasses import dataclass, field
from typing import Any, Final

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.memory.dirty_log import DirtyLog
from pyvhost.memory.iotlb import Iotlb, NoEntryError
from pyvhost.memory.mapped import Guard, Mapped
from pyvhost.memory.regions import MemoryTable, Usable
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.vring import Vring


@dataclass
class Parts:
    """Where a vring's descriptor table, available ring and used ring lie here; what was mapped for that."""

    desc: int
    avail: int
    used: int
    stitched: list[Mapped] = field(default_factory=list)


class WaitsError(Exception):
    """A part of a vring has no entry in the IOTLB."""

    def __init__(self, iova: int, perm: int) -> None:
        super().__init__(f"{iova:#x} is needed for {perm}")
        self.iova = iova
        self.perm = perm


#: A vring's parts, in the order in which Linux asks for them: what is done there, and how it is aligned.
_PARTS: Final = (
    ("descriptor table", "desc", abi.ACCESS_RO, 1),
    ("available ring", "avail", abi.ACCESS_RO, virtio.VRING_AVAIL_ALIGN_SIZE),
    ("used ring", "used", abi.ACCESS_WO, virtio.VRING_USED_ALIGN_SIZE),
)


class GuestMemory:
    """`usable`: the front end is this very process, and this says what memory it has."""

    def __init__(self, name: str, guard: Guard, usable: Usable | None = None) -> None:
        self.name = name
        self.guard = guard
        self.usable = usable
        self.table = MemoryTable((), usable)
        self.iotlb: Iotlb | None = None
        self.log: DirtyLog | None = None
        self.log_fd = -1

    @property
    def lost(self) -> bool:
        """Whether a file of the front end's was made smaller."""
        return self.table.lost or (self.log is not None and self.log.lost)

    def parts(self, vring: Vring, table: MemoryTable | None = None, event_idx: bool = True) -> Parts:
        """Where a vring lies here (virtio 1.2, 2.7). WaitsError: not all of it is in the IOTLB.

        VhostError EFAULT: it is not in memory, or may not be used so; EINVAL: it can't be used from where it lies.
        `table`: where it would lie with this one and no IOTLB.
        """
        assert vring.desc is not None
        sizes = (16 * vring.num, 4 + 2 * event_idx + 2 * vring.num, 4 + 2 * event_idx + 8 * vring.num)
        found: list[int] = []
        stitched: list[Mapped] = []
        try:
            for (what, name, access, align), size in zip(_PARTS, sizes, strict=True):
                address = getattr(vring, name)
                try:
                    if self.iotlb is not None and table is None:
                        here = self._translated(address, size, access, stitched)
                    else:
                        here = (self.table if table is None else table).host_of_user(address, size)
                except OSError as error:
                    # EINVAL: it is there, and its pages can't be put in a row.
                    code = errno.EINVAL if error.errno == errno.EINVAL else errno.EFAULT
                    raise VhostError(
                        code, f"{self.name}: vring {vring.index}: {what}: {error.strerror}"
                    ) from None
                # What is aligned for the front end need not be so here: that is its mapping's choice.
                if here % align:
                    raise VhostError(
                        errno.EINVAL,
                        f"{self.name}: vring {vring.index}: {what}: its region's offset leaves it unaligned",
                    )
                found.append(here)
        except BaseException:
            for mapped in stitched:
                mapped.close()
            raise
        return Parts(found[0], found[1], found[2], stitched)

    def _translated(self, iova: int, size: int, access: int, stitched: list[Mapped]) -> int:
        assert self.iotlb is not None
        try:
            ranges = [(host, run) for host, run, _ in self.iotlb.ranges(iova, size, access)]
        except NoEntryError as missing:
            raise WaitsError(missing.iova, access) from None
        if all(a + run == b for (a, run), (b, _) in itertools.pairwise(ranges)):
            return ranges[0][0]
        stitched.append(Mapped.stitched(ranges, self.guard))
        return stitched[-1].address

    def translated(self, iova: int, size: int, perm: int) -> int | None:
        """Where a range of I/O virtual addresses lies here, if it is in one piece and allows `perm`."""
        if self.iotlb is None:
            return None
        try:
            ranges = [(host, run) for host, run, _ in self.iotlb.ranges(iova, size, perm)]
        except (NoEntryError, OSError):
            return None
        in_a_row = all(a + run == b for (a, run), (b, _) in itertools.pairwise(ranges))
        return ranges[0][0] if in_a_row and ranges else None

    def translate(self, wanted: bool, keeps: bool) -> bool:
        """Begins an IOTLB that is empty, or ends its use; whether anything has changed."""
        before = self.iotlb
        if wanted:
            self.iotlb = Iotlb(self.table)
        elif not keeps:
            self.iotlb = None
        return self.iotlb is not before

    def use_table(self, table: MemoryTable) -> MemoryTable:
        """Another memory table; the one before, to be closed when nobody reads it."""
        old, self.table = self.table, table
        if self.iotlb is not None:
            self.iotlb.use_table(table)
        return old

    def has(self, vring: Vring, iova: int, size: int) -> bool:
        """Whether any of a range is a part of a vring's."""
        sizes = (16 * vring.num, 6 + 2 * vring.num, 6 + 8 * vring.num)
        starts = (vring.desc or 0, vring.avail, vring.used)
        return any(
            start < iova + size and iova < start + length for start, length in zip(starts, sizes, strict=True)
        )

    def point(self, vring: Vring, record: Any, features: int) -> None:
        """Has a ring's record mean this memory and this log."""
        block = self.table.block if self.iotlb is None else self.iotlb.block
        record["regions"] = block.ctypes.data
        record["region_count"] = len(block)
        record["iotlb"] = self.iotlb is not None
        record["hit_size"] = 0
        log = self.log.address if self.log is not None and self.log.size else 0
        record["log_data"] = log if features >> abi.F_LOG_ALL & 1 else 0
        record["log_used"] = log if vring.flags >> abi.VRING_F_LOG & 1 else 0
        record["log_bytes"] = self.log.size if self.log is not None else 0
        used_at = vring.log if self.iotlb is None else vring.used
        record["log_used_at"] = used_at - (1 << 64) if used_at >> 63 else used_at
        record["log_fd"] = self.log_fd

    def check_log(self, log: DirtyLog | None, table: MemoryTable | None = None) -> None:
        """VhostError EFAULT: a log that was given as a file has no room for all of guest memory, or of `table`."""
        if log is None or not log.size:
            return
        for mapping in (self.table if table is None else table).mappings:
            last = mapping.region.guest_phys_addr + mapping.region.memory_size - 1
            if not log.covers(last) and mapping.mapped is not None:
                raise VhostError(
                    errno.EFAULT,
                    f"{self.name}: a dirty log of {log.size} bytes has no bit for {last:#x}, in {mapping.region}",
                )

    def close(self) -> MemoryTable:
        """Gives up all of it; the table that there was, to be closed when nobody reads it."""
        if self.log is not None:
            self.log.close()
        self.log = None
        self.iotlb = None
        return self.use_table(MemoryTable((), self.usable))
