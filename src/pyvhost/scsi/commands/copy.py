"""EXTENDED COPY(LID1) and RECEIVE COPY RESULTS: copies between the logical units of one target (SPC-4, 6.4, 6.18).

What it does: segments of type 02h (block to block), copy targets by identification descriptor (E4h) with a NAA
designator of one of the target's units. The command ends when the copy has; of the last few, RECEIVE COPY RESULTS
tells how they went.

Promises: a list with a mistake copies nothing. Never: more than a megabyte in memory.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import (
    Asc,
    CheckCondition,
    Field,
    Key,
    Sense,
    illegal,
    invalid_cdb,
    invalid_parameter,
    out_of_range,
)

if TYPE_CHECKING:
    from pyvhost.scsi.unit import LogicalUnit

MAX_TARGETS = 16
MAX_SEGMENTS = 64
#: Bytes of all descriptors of one list.
MAX_DESCRIPTORS = MAX_TARGETS * 32 + MAX_SEGMENTS * 28
#: Most blocks of one segment: what its field can say.
MAX_SEGMENT_BLOCKS = 0xFFFF
#: DATA SEGMENT GRANULARITY: 512 bytes.
GRANULARITY = 9
_CHUNK = 1 << 20
_REMEMBERED = 16
#: Seconds that a result is kept for somebody to ask: SPC-4 lets a copy manager forget when it likes.
KEPT = 1.0

IDENTIFICATION, BLOCK_TO_BLOCK = 0xE4, 0x02
_TARGET_SIZE, _SEGMENT_SIZE = 32, 28
_IN_PROGRESS, _COMPLETED, _FAILED = 0x00, 0x01, 0x02


#: A copy that came to no good end (SPC-4, 5.16.7.4).
_ABORTED = Sense(Key.COPY_ABORTED, Asc.NO_ADDITIONAL_SENSE_INFORMATION)


@dataclass(slots=True)
class Result:
    """What became of a copy."""

    status: int
    segments: int
    blocks: int
    sense: bytes = b""
    #: When it was over, by the monotonic clock.
    ended: float = math.inf


@dataclass(slots=True)
class _Segment:
    source: LogicalUnit
    source_lba: int
    destination: LogicalUnit
    destination_lba: int
    blocks: int


@command("EXTENDED COPY(LID1)", 0x83, "00" + "00" * 8 + "ffffffff" + "00", action=0x00, access=Access.WRITE)
async def extended_copy(request: Request) -> None:
    """Copy blocks as the parameter list says."""
    length = request.number(10, 4)
    if length == 0:
        return
    data = request.parameters(length)
    if length < 16:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    identifier = data[0]
    # LIST ID USAGE 00b: somebody will ask how it went; 10b and 11b: nobody will.
    keeps = data[1] >> 3 & 3 == 0
    targets_length = int.from_bytes(data[2:4], "big")
    segments_length = int.from_bytes(data[8:12], "big")
    inline = int.from_bytes(data[12:16], "big")
    if targets_length + segments_length > MAX_DESCRIPTORS or inline:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if 16 + targets_length + segments_length > length:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if not segments_length:
        return
    if targets_length > MAX_TARGETS * _TARGET_SIZE:
        raise illegal(Asc.TOO_MANY_TARGET_DESCRIPTORS)
    if segments_length > MAX_SEGMENTS * _SEGMENT_SIZE:
        raise illegal(Asc.TOO_MANY_SEGMENT_DESCRIPTORS)
    known = request.unit.copies.get((request.task.nexus, identifier))
    if keeps and known is not None and known.status == _IN_PROGRESS:
        raise illegal(Asc.OPERATION_IN_PROGRESS)
    units = _targets(request, data, 16, targets_length)
    segments = _segments(data, 16 + targets_length, segments_length, units)
    result = Result(_IN_PROGRESS, 0, 0)
    if keeps:
        _remember(request, identifier, result)
    try:
        for segment in segments:
            await _copy(request, segment, result)
            result.segments += 1
        result.status = _COMPLETED
    except CheckCondition as failure:
        result.sense = request.unit.encode(failure.sense)
        # What went wrong is in FAILED SEGMENT DETAILS.
        raise CheckCondition(_ABORTED) from None
    finally:
        if result.status == _IN_PROGRESS:
            result.status = _FAILED
        result.ended = time.monotonic()


def _remember(request: Request, identifier: int, result: Result) -> None:
    kept = request.unit.copies
    kept.pop((request.task.nexus, identifier), None)
    kept[request.task.nexus, identifier] = result
    # One that runs is not forgotten: its identifier is taken.
    over = [key for key, copy in kept.items() if copy.status != _IN_PROGRESS]
    for key in over[: max(0, len(kept) - _REMEMBERED)]:
        del kept[key]


def _targets(request: Request, data: bytes, at: int, length: int) -> list[LogicalUnit]:
    end = at + length
    found = []
    while at < end:
        if data[at] != IDENTIFICATION:
            raise illegal(Asc.UNSUPPORTED_TARGET_DESCRIPTOR_TYPE_CODE, Field(at, in_cdb=False))
        if at + _TARGET_SIZE > end:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        found.append(_target(request, data, at))
        at += _TARGET_SIZE
    return found


def _target(request: Request, data: bytes, at: int) -> LogicalUnit:
    """The unit that an identification descriptor means (SPC-4, 6.4.4.4)."""
    # LU ID TYPE is ignored (SPC-4, 6.4.4.1): a designation descriptor it is.
    if data[at + 1] & 0x1F:
        raise illegal(Asc.UNSUPPORTED_TARGET_DESCRIPTOR_TYPE_CODE, Field(at + 1, 4, in_cdb=False))
    code, kind, size = data[at + 4] & 0x0F, data[at + 5] & 0x3F, data[at + 7]
    value = data[at + 8 : at + 8 + min(size, 20)]
    target = request.target
    for unit in [request.unit] if target is None else target.units:
        if kind == 3 and code == 1 and value == unit.name.to_bytes(8, "big"):
            break
        vendor_id = f"{unit.vendor:8.8}{unit.product:16.16}{unit.serial}".encode("ascii", "replace")
        if kind == 1 and size and value == vendor_id[:20] and size == min(len(vendor_id), 20):
            break
    else:
        raise CheckCondition(Sense(Key.COPY_ABORTED, Asc.COPY_TARGET_DEVICE_NOT_REACHABLE))
    block_size = int.from_bytes(data[at + 29 : at + 32], "big")
    if block_size not in (0, unit.block_size):
        raise invalid_parameter(at + 29)
    return unit


def _segments(data: bytes, at: int, length: int, units: list[LogicalUnit]) -> list[_Segment]:
    end = at + length
    found = []
    while at < end:
        if data[at] != BLOCK_TO_BLOCK:
            raise illegal(Asc.UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE_CODE, Field(at, in_cdb=False))
        if at + _SEGMENT_SIZE > end:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        if int.from_bytes(data[at + 2 : at + 4], "big") != _SEGMENT_SIZE - 4:
            raise invalid_parameter(at + 2)
        source, destination = (int.from_bytes(data[at + n : at + n + 2], "big") for n in (4, 6))
        if max(source, destination) >= len(units):
            raise CheckCondition(_ABORTED)
        if units[source].block_size != units[destination].block_size:
            raise CheckCondition(Sense(Key.COPY_ABORTED, Asc.COPY_SEGMENT_GRANULARITY_VIOLATION))
        found.append(
            _Segment(
                units[source],
                int.from_bytes(data[at + 12 : at + 20], "big"),
                units[destination],
                int.from_bytes(data[at + 20 : at + 28], "big"),
                int.from_bytes(data[at + 10 : at + 12], "big"),
            )
        )
        at += _SEGMENT_SIZE
    return found


async def _copy(request: Request, segment: _Segment, result: Result) -> None:
    source, destination = segment.source, segment.destination
    _check(request, source, segment.source_lba, segment.blocks, Access.READ)
    _check(request, destination, segment.destination_lba, segment.blocks, Access.WRITE)
    size = source.block_size
    step = max(1, _CHUNK // size)
    buffer = memoryview(bytearray(min(step, segment.blocks) * size))
    done = 0
    while done < segment.blocks:
        now = min(step, segment.blocks - done)
        part = [buffer[: now * size]]
        hold = await source.hold(segment.source_lba + done, now, alone=False)
        try:
            await source.read(segment.source_lba + done, part)
        finally:
            source.ranges.release(hold)
        hold = await destination.hold(segment.destination_lba + done, now, alone=False)
        try:
            await destination.write(segment.destination_lba + done, part)
        finally:
            destination.ranges.release(hold)
        done += now
        result.blocks += now


def _check(request: Request, unit: LogicalUnit, lba: int, blocks: int, access: Access) -> None:
    reason = unit.not_ready()
    if reason is not None or unit.reservations.conflicts(request.task.nexus, access):
        raise CheckCondition(Sense(Key.COPY_ABORTED, Asc.COPY_TARGET_DEVICE_NOT_REACHABLE))
    if lba + blocks > unit.blocks:
        raise out_of_range(max(lba, unit.blocks))
    if access is Access.WRITE and unit.read_only:
        raise CheckCondition(Sense(Key.DATA_PROTECT, Asc.WRITE_PROTECTED))


def _recall(request: Request) -> Result:
    result = request.unit.copies.get((request.task.nexus, request.cdb[2]))
    if result is None or time.monotonic() > result.ended + KEPT:
        raise invalid_cdb(2)
    return result


_RESULTS = "ff" + "00" * 7 + "ffffffff" + "00"


@command("RECEIVE COPY RESULTS, COPY STATUS", 0x84, "00" + _RESULTS, action=0x00, access=Access.STATUS)
async def copy_status(request: Request) -> None:
    """How a copy goes, by its list identifier; how it went is told once."""
    result = _recall(request)
    if result.status != _IN_PROGRESS:
        del request.unit.copies[request.task.nexus, request.cdb[2]]
    data = bytearray(12)
    data[0:4] = (8).to_bytes(4, "big")
    data[4] = result.status
    data[5:7] = result.segments.to_bytes(2, "big")
    data[7] = 0x01  # TRANSFER COUNT in kibibytes
    data[8:12] = min(result.blocks * request.unit.block_size >> 10, 0xFFFFFFFF).to_bytes(4, "big")
    request.reply(data, request.number(10, 4))


@command(
    "RECEIVE COPY RESULTS, OPERATING PARAMETERS", 0x84, "00" + _RESULTS, action=0x03, access=Access.STATUS
)
async def operating_parameters(request: Request) -> None:
    """What EXTENDED COPY can do (SPC-4, 6.18.4)."""
    data = bytearray(44)
    data[4] = 0x01  # SNLID: a list needs no identifier
    data[8:10] = MAX_TARGETS.to_bytes(2, "big")
    data[10:12] = MAX_SEGMENTS.to_bytes(2, "big")
    data[12:16] = MAX_DESCRIPTORS.to_bytes(4, "big")
    data[16:20] = (MAX_SEGMENT_BLOCKS * request.unit.block_size).to_bytes(4, "big")
    data[34:36] = (1).to_bytes(2, "big")  # TOTAL CONCURRENT COPIES
    data[36] = 1  # MAXIMUM CONCURRENT COPIES
    data[37] = GRANULARITY
    data += bytes([BLOCK_TO_BLOCK, IDENTIFICATION])
    data[43] = 2
    data[0:4] = (len(data) - 4).to_bytes(4, "big")
    request.reply(data, request.number(10, 4))


@command(
    "RECEIVE COPY RESULTS, FAILED SEGMENT DETAILS", 0x84, "00" + _RESULTS, action=0x04, access=Access.STATUS
)
async def failed_segment_details(request: Request) -> None:
    """What a copy that failed had to say; nothing for one that didn't."""
    result = _recall(request)
    if result.status == _IN_PROGRESS:
        raise invalid_cdb(2)
    if not result.sense:
        request.reply(bytes(4), request.number(10, 4))
        return
    data = bytearray(60)
    data[56] = 0x02  # CHECK CONDITION
    data[58:60] = len(result.sense).to_bytes(2, "big")
    data += result.sense
    data[0:4] = (len(data) - 4).to_bytes(4, "big")
    request.reply(data, request.number(10, 4))
