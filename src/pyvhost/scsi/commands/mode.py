"""MODE SENSE, MODE SELECT and LOG SENSE (SPC-4, 6.9 to 6.13, 7.3; SBC-3, 6.4)."""

from __future__ import annotations

from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.mode_pages import ALL_PAGES, CHANGEABLE, SAVED
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import Asc, illegal, invalid_cdb, invalid_parameter

#: DEVICE-SPECIFIC PARAMETER: WP and DPOFUA (SBC-3, table 185).
_WP, _DPOFUA = 0x80, 0x10


@command("MODE SENSE(6)", 0x1A, "08ffffff")
async def mode_sense_6(request: Request) -> None:
    """Mode pages behind a header of 4 bytes."""
    pages, descriptor = _wanted(request, False)
    data = bytearray([0, 0, _device_specific(request), len(descriptor)]) + descriptor + pages
    if len(data) > 256:
        raise invalid_cdb(2)
    data[0] = len(data) - 1
    request.reply(data, request.cdb[4])


@command("MODE SENSE(10)", 0x5A, "18ffff000000ffff")
async def mode_sense_10(request: Request) -> None:
    """Mode pages behind a header of 8 bytes."""
    long_lba = request.bit(1, 4)
    pages, descriptor = _wanted(request, long_lba)
    data = bytearray(8) + descriptor + pages
    data[0:2] = (len(data) - 2).to_bytes(2, "big")
    data[3] = _device_specific(request)
    data[4] = 1 if long_lba and descriptor else 0
    data[6:8] = len(descriptor).to_bytes(2, "big")
    request.reply(data, request.number(7, 2))


def _device_specific(request: Request) -> int:
    return (_WP if request.unit.read_only else 0) | _DPOFUA


def _wanted(request: Request, long_lba: bool) -> tuple[bytes, bytes]:
    """The pages that are asked for, and the block descriptor unless it isn't wanted (DBD)."""
    unit = request.unit
    control, code, subcode = request.cdb[2] >> 6, request.cdb[2] & 0x3F, request.cdb[3]
    if code == ALL_PAGES and subcode not in (0, 0xFF):
        raise invalid_cdb(3)
    keys = unit.modes.keys(code, subcode)
    if not keys:
        raise invalid_cdb(2, 5) if not unit.modes.keys(code, 0xFF) else invalid_cdb(3)
    if control == SAVED:
        raise illegal(Asc.SAVING_PARAMETERS_NOT_SUPPORTED)
    pages = b"".join(unit.modes.value(key, control) for key in keys)
    if request.bit(1, 3):
        return pages, b""
    return pages, bytes(16 if long_lba else 8) if control == CHANGEABLE else _descriptor(request, long_lba)


def _descriptor(request: Request, long_lba: bool) -> bytes:
    blocks, size = request.unit.blocks, request.unit.block_size
    if long_lba:
        return blocks.to_bytes(8, "big") + bytes(4) + size.to_bytes(4, "big")
    return min(blocks, 0xFFFFFFFF).to_bytes(4, "big") + b"\x00" + size.to_bytes(3, "big")


@command("MODE SELECT(6)", 0x15, "110000ff", access=Access.WRITE)
async def mode_select_6(request: Request) -> None:
    """Set mode pages."""
    length = request.cdb[4]
    data = _list(request, length, 4)
    if data is not None:
        _select(request, data, 4, data[3], False)


@command("MODE SELECT(10)", 0x55, "110000000000ffff", access=Access.WRITE)
async def mode_select_10(request: Request) -> None:
    """Set mode pages."""
    length = request.number(7, 2)
    data = _list(request, length, 8)
    if data is not None:
        _select(request, data, 8, int.from_bytes(data[6:8], "big"), bool(data[4] & 1))


def _list(request: Request, length: int, header: int) -> bytes | None:
    if request.bit(1, 0):
        raise invalid_cdb(1, 0)  # SP: nothing is saved
    if not request.bit(1, 4) and length:
        raise invalid_cdb(1, 4)  # PF 0: pages of a vendor's own
    if length == 0:
        return None
    data = request.parameters(length)
    if length < header:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    return data


def _select(request: Request, data: bytes, header: int, descriptor: int, long_lba: bool) -> None:
    unit = request.unit
    at = header + descriptor
    if len(data) < at:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if descriptor:
        _check_descriptor(request, data[header:at], header, long_lba)
    values = {}
    while at < len(data):
        code = data[at] & 0x3F
        long_page = data[at] & 0x40
        head = 4 if long_page else 2
        if at + head > len(data):
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        subcode = data[at + 1] if long_page else 0
        size = head + (int.from_bytes(data[at + 2 : at + 4], "big") if long_page else data[at + 1])
        key = (code, subcode)
        if data[at] & 0x80:
            raise invalid_parameter(at, 7)  # PS is reserved here
        if code == ALL_PAGES or key not in unit.modes.keys(code, subcode) or (long_page and not subcode):
            raise invalid_parameter(at, 5)
        if size != unit.modes.length(key):
            raise invalid_parameter(at + head - 1)
        if at + size > len(data):
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        value = data[at : at + size]
        mistake = unit.modes.mistake(key, value)
        if mistake is not None:
            raise invalid_parameter(at + mistake[0], mistake[1])
        values[key] = value
        at += size
    had_cache = unit.modes.wce
    if unit.modes.set(values):
        unit.changed(Asc.MODE_PARAMETERS_CHANGED, but=request.task.nexus)
    if had_cache and not unit.modes.wce:
        # What was written before is as safe as what comes now: WCE 0 promises it for all.
        unit.spawn(unit.flush(), "flush before write through")


def _check_descriptor(request: Request, descriptor: bytes, at: int, long_lba: bool) -> None:
    """A block descriptor may only say what is so: blocks 0 or all, and the block's size."""
    if len(descriptor) != (16 if long_lba else 8):
        raise invalid_parameter(at - 1)
    if long_lba:
        blocks, size = int.from_bytes(descriptor[0:8], "big"), int.from_bytes(descriptor[12:16], "big")
    else:
        blocks, size = int.from_bytes(descriptor[0:4], "big"), int.from_bytes(descriptor[5:8], "big")
    most = request.unit.blocks if long_lba else min(request.unit.blocks, 0xFFFFFFFF)
    if blocks not in (0, most, 0xFFFFFFFF):
        raise invalid_parameter(at)
    if size != request.unit.block_size:
        raise invalid_parameter(at + (12 if long_lba else 5))


#: Log pages: which there are, and the informational exceptions (nothing to report).
_LOG_PAGES = {0x00: bytes([0x00, 0x2F]), 0x2F: bytes([0x00, 0x00, 0x03, 0x04, 0x00, 0x00, 0x00, 0x00])}


@command("LOG SENSE", 0x4D, "01ffff00ffffffff", access=Access.STATUS)
async def log_sense(request: Request) -> None:
    """Log pages; there is little to log that the host's own counters don't say better."""
    if request.bit(1, 0):
        raise invalid_cdb(1, 0)  # SP
    code, subcode = request.cdb[2] & 0x3F, request.cdb[3]
    content = _LOG_PAGES.get(code)
    if content is None:
        raise invalid_cdb(2, 5)
    if subcode == 0xFF and code == 0:
        content = bytes([0x00, 0x00, 0x00, 0xFF, 0x2F, 0x00])
    elif subcode:
        raise invalid_cdb(3)
    if request.number(5, 2):
        raise invalid_cdb(5)  # PARAMETER POINTER: no parameter has a code above 0
    head = bytes([code | (0x40 if subcode else 0), subcode]) + len(content).to_bytes(2, "big")
    request.reply(head + content, request.number(7, 2))
