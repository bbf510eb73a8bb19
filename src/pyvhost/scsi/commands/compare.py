"""Commands that nothing may come between: COMPARE AND WRITE, ORWRITE, WRITE ATOMIC (SBC-3 5.2, 5.14; SBC-4 5.48).

Promises: while one of them works on a range, no other command reads or writes there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvhost.scsi.commands.blocks import first_difference, miscompare
from pyvhost.scsi.commands.request import Request, load, part
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import invalid_cdb

if TYPE_CHECKING:
    from pyvhost.scsi.unit import LogicalUnit

#: MAXIMUM COMPARE AND WRITE LENGTH, in blocks: all that the CDB can say.
MAX_COMPARE = 255
#: Most bytes of one ORWRITE: they are held in memory.
MAX_ORWRITE = 32 << 20


def atomic_blocks(unit: LogicalUnit) -> int:
    """MAXIMUM ATOMIC TRANSFER LENGTH; 0: WRITE ATOMIC isn't supported."""
    return min(unit.store.atomic_max // unit.block_size, 0xFFFF)


@command(
    "COMPARE AND WRITE",
    0x89,
    "1a" + "ff" * 8 + "000000ff" + "1f",
    access=Access.WRITE,
    medium=True,
    writes=True,
)
async def compare_and_write(request: Request) -> None:
    """Write the second half of the data where the first half is found, and nothing elsewhere."""
    unit = request.unit
    lba, blocks = request.number(2, 8), request.cdb[13]
    if blocks > MAX_COMPARE:
        raise invalid_cdb(13)
    request.check_extent(lba, blocks)
    length = blocks * unit.block_size
    if request.task.out_length > 2 * length:
        raise invalid_cdb(13)
    data = request.want_out(2 * length)
    if not blocks:
        return
    hold = await unit.hold(lba, blocks, alone=True)
    try:
        found = memoryview(bytearray(length))
        await unit.read(lba, [found])
        at = first_difference(found, load(data, 0, length))
        if at is not None:
            raise miscompare(at)
        await unit.write(lba, part(data, length, length), fua=request.bit(1, 3))
    finally:
        unit.ranges.release(hold)


@command(
    "ORWRITE(16)", 0x8B, "1a" + "ff" * 8 + "ffffffff" + "1f", access=Access.WRITE, medium=True, writes=True
)
async def orwrite(request: Request) -> None:
    """Set the bits that the data has set."""
    unit = request.unit
    lba, blocks = request.extent()
    request.check_extent(lba, blocks)
    length = blocks * unit.block_size
    if length > MAX_ORWRITE:
        raise invalid_cdb(10)
    data = request.want_out(length)
    if not blocks:
        return
    hold = await unit.hold(lba, blocks, alone=True)
    try:
        found = memoryview(bytearray(length))
        await unit.read(lba, [found])
        both = int.from_bytes(found, "little") | int.from_bytes(load(data), "little")
        await unit.write(lba, [memoryview(both.to_bytes(length, "little"))], fua=request.bit(1, 3))
    finally:
        unit.ranges.release(hold)


def _has_atomic(unit: LogicalUnit) -> bool:
    return atomic_blocks(unit) > 0


@command(
    "WRITE ATOMIC(16)",
    0x9C,
    "1a" + "ff" * 8 + "ffff" + "ffff" + "1f",
    access=Access.WRITE,
    medium=True,
    writes=True,
    supported=_has_atomic,
)
async def write_atomic(request: Request) -> None:
    """Write all of the blocks or, whatever happens, none."""
    unit = request.unit
    lba, boundary, blocks = request.number(2, 8), request.number(10, 2), request.number(12, 2)
    if boundary:
        raise invalid_cdb(10)  # MAXIMUM ATOMIC BOUNDARY SIZE is 0
    request.check_extent(lba, blocks)
    if blocks > atomic_blocks(unit):
        raise invalid_cdb(12)
    views = request.want_exactly(blocks * unit.block_size)
    hold = await unit.hold(lba, blocks, alone=True)
    try:
        await unit.write(lba, views, fua=request.bit(1, 3))
    finally:
        unit.ranges.release(hold)
