"""READ, WRITE, WRITE AND VERIFY, VERIFY, SYNCHRONIZE CACHE and PRE-FETCH of every size (SBC-3, clause 5).

Promises: FUA and SYNCHRONIZE CACHE mean stable storage. A READ into a buffer too short fills it and reports the
overflow; a WRITE from one too short writes what there is. Never: more than a megabyte of memory for one command.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvhost.scsi.commands.request import Request, load, part
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import Asc, CheckCondition, Key, Sense, invalid_cdb

#: Bytes read at once where the initiator gives no memory for them.
CHUNK = 1 << 20

_LBA4, _LBA8 = "ff" * 4, "ff" * 8
#: DPO, FUA, and FUA_NV that SBC-2 had.
_READ_FLAGS = "1a"
_VERIFY_FLAGS = "16"
_GROUP = "1f"


def _usage10(flags: str) -> str:
    return flags + _LBA4 + _GROUP + "ffff"


def _usage12(flags: str) -> str:
    return flags + _LBA4 + "ffffffff" + _GROUP


def _usage16(flags: str) -> str:
    return flags + _LBA8 + "ffffffff" + _GROUP


@command("READ(6)", 0x08, "1fffffff", medium=True)
@command("READ(10)", 0x28, _usage10(_READ_FLAGS), medium=True)
@command("READ(12)", 0xA8, _usage12(_READ_FLAGS), medium=True)
@command("READ(16)", 0x88, _usage16(_READ_FLAGS), medium=True)
async def read(request: Request) -> None:
    """Blocks into the initiator's memory."""
    unit, task = request.unit, request.task
    lba, blocks = request.extent()
    request.check_extent(lba, blocks)
    wanted = blocks * unit.block_size
    task.wanted_in = wanted
    length = min(wanted, task.in_length)
    views = part(task.data_in, 0, length)
    tail = -length % unit.block_size
    if tail:
        views.append(memoryview(bytearray(tail)))  # the rest of a block that the buffer cuts short
    if not views:
        return
    hold = await unit.hold(lba, blocks, alone=False)
    try:
        if request.command.length > 6 and request.bit(1, 3) and unit.store.wce:
            await unit.flush()  # FUA: what the medium has, so it must have it
        await unit.read(lba, views)
    finally:
        unit.ranges.release(hold)
    task.transferred_in = length


@command("WRITE(6)", 0x0A, "1fffffff", access=Access.WRITE, medium=True, writes=True)
@command("WRITE(10)", 0x2A, _usage10(_READ_FLAGS), access=Access.WRITE, medium=True, writes=True)
@command("WRITE(12)", 0xAA, _usage12(_READ_FLAGS), access=Access.WRITE, medium=True, writes=True)
@command("WRITE(16)", 0x8A, _usage16(_READ_FLAGS), access=Access.WRITE, medium=True, writes=True)
async def write(request: Request) -> None:
    """Blocks from the initiator's memory."""
    await _write(request, fua=request.command.length > 6 and request.bit(1, 3))


async def _write(request: Request, fua: bool, verify: bool = False, check: bool = False) -> None:
    """Write what there is of the data, and read it again if `verify` says so."""
    unit, task = request.unit, request.task
    lba, blocks = request.extent()
    request.check_extent(lba, blocks)
    size = unit.block_size
    task.wanted_out = blocks * size
    length = min(task.wanted_out, task.out_length)
    views = part(task.data_out, 0, length)
    blocks = -(-length // size)
    tail = length % size
    hold = await unit.hold(lba, blocks, alone=bool(tail))
    try:
        if tail:
            # The buffer cuts a block short: the rest of that block stays as it was.
            rest = memoryview(bytearray(size))
            await unit.read(lba + blocks - 1, [rest])
            views.append(rest[tail:])
        await unit.write(lba, views, fua)
        if verify:
            await _verify(request, lba, blocks, views if check else None)
    finally:
        unit.ranges.release(hold)
    task.transferred_out = length


@command("WRITE AND VERIFY(10)", 0x2E, _usage10(_VERIFY_FLAGS), access=Access.WRITE, medium=True, writes=True)
@command("WRITE AND VERIFY(12)", 0xAE, _usage12(_VERIFY_FLAGS), access=Access.WRITE, medium=True, writes=True)
@command("WRITE AND VERIFY(16)", 0x8E, _usage16(_VERIFY_FLAGS), access=Access.WRITE, medium=True, writes=True)
async def write_and_verify(request: Request) -> None:
    """Write to stable storage, read it again, and compare if BYTCHK asks for that."""
    check = request.cdb[1] >> 1 & 3
    if check > 1:
        raise invalid_cdb(1, 2)
    await _write(request, fua=True, verify=True, check=bool(check))


@command("VERIFY(10)", 0x2F, _usage10(_VERIFY_FLAGS), medium=True)
@command("VERIFY(12)", 0xAF, _usage12(_VERIFY_FLAGS), medium=True)
@command("VERIFY(16)", 0x8F, _usage16(_VERIFY_FLAGS), medium=True)
async def verify(request: Request) -> None:
    """Read blocks, and compare them with the data that came: all of it (BYTCHK 01b), or one block (11b)."""
    unit = request.unit
    check = request.cdb[1] >> 1 & 3
    if check == 2:
        raise invalid_cdb(1, 2)
    lba, blocks = request.extent()
    request.check_extent(lba, blocks)
    views = None
    if check == 1:
        views = request.want_out(blocks * unit.block_size)
    elif check == 3:
        views = request.want_out(unit.block_size if blocks else 0)
    hold = await unit.hold(lba, blocks, alone=False)
    try:
        await _verify(request, lba, blocks, views, same=check == 3)
    finally:
        unit.ranges.release(hold)


async def _verify(
    request: Request, lba: int, blocks: int, views: Sequence[memoryview] | None, same: bool = False
) -> None:
    size = request.unit.block_size
    step = max(1, CHUNK // size)
    scratch = memoryview(bytearray(min(blocks, step) * size))
    done = 0
    while done < blocks:
        now = min(step, blocks - done)
        found = scratch[: now * size]
        await request.unit.read(lba + done, [found])
        if views is not None:
            expected = load(views) * now if same else load(views, done * size, now * size)
            at = first_difference(found, expected)
            if at is not None:
                raise miscompare(done * size + at)
        done += now


def first_difference(one: memoryview, other: bytes | bytearray) -> int | None:
    """Where two stretches of the same length first differ; None: nowhere."""
    if bytes(one) == other:
        return None
    low, high = 0, len(other)
    while high - low > 1:
        middle = (low + high) // 2
        if bytes(one[low:middle]) != other[low:middle]:
            high = middle
        else:
            low = middle
    return low


def miscompare(offset: int) -> CheckCondition:
    """MISCOMPARE; INFORMATION is the offset of the first byte that differs (SBC-3, 5.2 and 5.29)."""
    return CheckCondition(Sense(Key.MISCOMPARE, Asc.MISCOMPARE_DURING_VERIFY_OPERATION, information=offset))


@command("SYNCHRONIZE CACHE(10)", 0x35, _usage10("06"), access=Access.WRITE, medium=True)
@command("SYNCHRONIZE CACHE(16)", 0x91, _usage16("06"), access=Access.WRITE, medium=True)
async def synchronize_cache(request: Request) -> None:
    """Everything that was written, whatever range is named, is on stable storage at the status, or soon (IMMED)."""
    request.check_extent(*request.extent())
    if request.bit(1, 1):
        request.unit.spawn(request.unit.flush(), "SYNCHRONIZE CACHE with IMMED")
    else:
        await request.unit.flush()


@command("PRE-FETCH(10)", 0x34, _usage10("02"), medium=True)
@command("PRE-FETCH(16)", 0x90, _usage16("02"), medium=True)
async def prefetch(request: Request) -> None:
    """GOOD, which says that not all of the blocks found room in the cache: there is none that reads would use."""
    request.check_extent(*request.extent())
