"""UNMAP, WRITE SAME, GET LBA STATUS, FORMAT UNIT, READ CAPACITY (SBC-3, 4.7 and clause 5).

Promises: unmapped blocks read as zeroes (LBPRZ 1). Long work is done in pieces, and an abort is heeded between
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvhost.scsi.commands.request import Request, load
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import Asc, illegal, invalid_cdb, invalid_parameter
from pyvhost.scsi.stores.base import Extent, ExtentState

if TYPE_CHECKING:
    from pyvhost.scsi.unit import LogicalUnit

#: MAXIMUM UNMAP LBA COUNT: no limit, and of block descriptors.
MAX_UNMAP = 0xFFFFFFFF
MAX_UNMAP_DESCRIPTORS = 256
#: MAXIMUM WRITE SAME LENGTH, in blocks: what WRITE SAME(10) can say, in whole pieces of 4096 bytes.
MAX_WRITE_SAME = 0xFFF8
#: What one operation of the store is given at once, in bytes: when unmapping, and when writing.
_STEP = 1 << 30
_FILL = 1 << 20
#: Most extents that one GET LBA STATUS asks its store for.
_MAX_DESCRIPTORS = 1024


def unmaps(unit: LogicalUnit) -> bool:
    """Whether the unit is thin: logical block provisioning management is enabled (LBPME)."""
    return unit.store.can_unmap


@command("READ CAPACITY(10)", 0x25, "00" + "ffffffff" + "0000" + "01", access=Access.STATUS, medium=True)
async def read_capacity_10(request: Request) -> None:
    """The last block's address, as far as 32 bits can tell, and the block's size."""
    last = min(request.unit.blocks - 1, 0xFFFFFFFF)
    if not request.bit(8, 0) and request.number(2, 4):
        raise invalid_cdb(2)
    request.reply(max(last, 0).to_bytes(4, "big") + request.unit.block_size.to_bytes(4, "big"))


@command("READ CAPACITY(16)", 0x9E, "00" + "ff" * 12 + "01", action=0x10, access=Access.STATUS, medium=True)
async def read_capacity_16(request: Request) -> None:
    """As READ CAPACITY(10), with physical blocks and provisioning."""
    unit = request.unit
    if not request.bit(14, 0) and request.number(2, 8):
        raise invalid_cdb(2)
    data = bytearray(32)
    data[0:8] = max(unit.blocks - 1, 0).to_bytes(8, "big")
    data[8:12] = unit.block_size.to_bytes(4, "big")
    data[13] = (unit.physical_block_size // unit.block_size).bit_length() - 1
    if unmaps(unit):
        data[14] = 0xC0  # LBPME, LBPRZ
    request.reply(data, request.number(10, 4))


@command(
    "UNMAP",
    0x42,
    "00" + "00000000" + "1f" + "ffff",
    access=Access.WRITE,
    medium=True,
    writes=True,
    supported=unmaps,
)
async def unmap(request: Request) -> None:
    """Give blocks back, those of every descriptor in the list."""
    unit = request.unit
    length = request.number(7, 2)
    if length == 0:
        return
    data = request.parameters(length)
    if length < 8:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    size = min(int.from_bytes(data[2:4], "big"), length - 8) // 16
    if size > MAX_UNMAP_DESCRIPTORS:
        raise invalid_parameter(2)
    ranges = []
    for at in range(8, 8 + 16 * size, 16):
        lba, blocks = int.from_bytes(data[at : at + 8], "big"), int.from_bytes(data[at + 8 : at + 12], "big")
        request.check_extent(lba, blocks)
        if blocks:
            ranges.append((lba, blocks))
    for lba, blocks in ranges:
        hold = await unit.hold(lba, blocks, alone=False)
        try:
            await _discard(unit, lba, blocks)
        finally:
            unit.ranges.release(hold)


async def _discard(unit: LogicalUnit, lba: int, blocks: int) -> None:
    step = _STEP // unit.block_size
    while blocks:
        now = min(step, blocks)
        await unit.discard(lba, now)
        lba, blocks = lba + now, blocks - now


@command(
    "WRITE SAME(10)", 0x41, "18" + "ffffffff" + "1f" + "ffff", access=Access.WRITE, medium=True, writes=True
)
@command(
    "WRITE SAME(16)", 0x93, "19" + "ff" * 8 + "ffffffff" + "1f", access=Access.WRITE, medium=True, writes=True
)
async def write_same(request: Request) -> None:
    """One block's data into many, or zeroes (NDOB); with UNMAP, by unmapping where the data is zeroes."""
    unit = request.unit
    no_data = request.command.length == 16 and request.bit(1, 0)
    unmapping = request.bit(1, 3)
    if request.bit(1, 4):
        raise invalid_cdb(1, 4)  # ANCHOR: ANC_SUP is 0
    if unmapping and not unmaps(unit):
        raise invalid_cdb(1, 3)
    lba, blocks = request.extent()
    request.check_extent(lba, blocks)
    if not 0 < blocks <= MAX_WRITE_SAME:
        raise invalid_cdb(10 if request.command.length == 16 else 7)  # WSNZ is 1
    pattern = bytes(unit.block_size) if no_data else bytes(load(request.want_exactly(unit.block_size)))
    hold = await unit.hold(lba, blocks, alone=False)
    try:
        if pattern.count(0) == len(pattern):
            await _zero(unit, lba, blocks, unmapping)
        else:
            await _fill(unit, lba, blocks, pattern)
    finally:
        unit.ranges.release(hold)


async def _zero(unit: LogicalUnit, lba: int, blocks: int, unmapping: bool) -> None:
    step = _STEP // unit.block_size
    while blocks:
        now = min(step, blocks)
        await unit.zero(lba, now, unmapping)
        lba, blocks = lba + now, blocks - now


async def _fill(unit: LogicalUnit, lba: int, blocks: int, pattern: bytes) -> None:
    step = max(1, min(blocks, _FILL // unit.block_size))
    data = memoryview(pattern * step)
    while blocks:
        now = min(step, blocks)
        await unit.write(lba, [data[: now * unit.block_size]])
        lba, blocks = lba + now, blocks - now


@command("GET LBA STATUS", 0x9E, "00" + "ff" * 12 + "00", action=0x12, medium=True, supported=unmaps)
async def get_lba_status(request: Request) -> None:
    """Which blocks are mapped, from one address on, as many descriptors as there is room for."""
    unit = request.unit
    lba, allocation = request.number(2, 8), request.number(10, 4)
    if lba >= unit.blocks:
        request.check_extent(lba, 1)
    room = min(max(1, (allocation - 8) // 16), _MAX_DESCRIPTORS)
    found: list[list[int]] = []  # first block, how many, provisioning status
    at = lba
    while at < unit.blocks:
        extents = await unit.extents(at, unit.blocks - at)
        reached = _add_extents(unit, found, at, extents)
        if reached <= at or len(found) > room:
            break
        at = reached
    if not found:
        found.append([lba, min(unit.blocks - lba, 0xFFFFFFFF), ExtentState.MAPPED])
    data = bytearray(8)
    for first, blocks, state in found[:room]:
        data += (
            first.to_bytes(8, "big") + min(blocks, 0xFFFFFFFF).to_bytes(4, "big") + bytes([state, 0, 0, 0])
        )
    data[0:4] = (len(data) - 4).to_bytes(4, "big")
    request.reply(data, allocation)


def _add_extents(unit: LogicalUnit, found: list[list[int]], at: int, extents: list[Extent]) -> int:
    """Append extents, in bytes, to what was found, in blocks from `at` on; the block up to which that tells.

    A block of which the store holds a part is mapped, and so is one that it tells nothing of.
    """
    size = unit.block_size
    for offset, length, state in extents:
        begin, end = offset, offset + length
        if state == ExtentState.MAPPED:
            first, last = begin // size, -(-end // size)
        else:
            first, last = -(-begin // size), end // size
        first, last = max(first, at), min(last, unit.blocks)
        if last <= first:
            continue
        if first > at:
            _add(found, at, first - at, ExtentState.MAPPED)
        _add(found, first, last - first, state)
        at = last
    return at


def _add(found: list[list[int]], first: int, blocks: int, state: int) -> None:
    if found and found[-1][2] == state and found[-1][0] + found[-1][1] == first:
        found[-1][1] += blocks
    else:
        found.append([first, blocks, state])


@command("FORMAT UNIT", 0x04, "38000000", access=Access.WRITE, medium=True, writes=True)
async def format_unit(request: Request) -> None:
    """Every block reads as zeroes. Of the parameter list, its header alone is taken: no defects, no pattern."""
    unit = request.unit
    flags = 0
    if request.bit(1, 4):  # FMTDATA
        long_list = request.bit(1, 5)
        header = request.parameters(8 if long_list else 4)
        flags = header[1]
        if header[0] & 0x07:
            raise invalid_parameter(0, 2)  # PROTECTION FIELD USAGE
        if flags & 0x08:
            raise invalid_parameter(1, 3)  # IP: there is no initialization pattern but zeroes
        if any(header[4:8] if long_list else header[2:4]):
            raise invalid_parameter(4 if long_list else 2)  # a defect list
    elif request.bit(1, 5):
        raise invalid_cdb(1, 5)
    if flags & 0x02:  # IMMED
        unit.formatting = 0
        unit.refresh()
        unit.spawn(_format(unit, True), "FORMAT UNIT")
    else:
        await _format(unit, False)


async def _format(unit: LogicalUnit, told: bool) -> None:
    try:
        step = _STEP // unit.block_size
        for lba in range(0, unit.blocks, step):
            if told:
                unit.formatting = lba * 65536 // unit.blocks
            await unit.zero(lba, min(step, unit.blocks - lba), unmaps(unit))
    finally:
        if told:
            unit.formatting = None
            unit.refresh()
