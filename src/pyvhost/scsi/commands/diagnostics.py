"""SEND DIAGNOSTIC, RECEIVE DIAGNOSTIC RESULTS, READ and WRITE BUFFER, READ DEFECT DATA (SPC-4 6.25, 6.42, 6.17, 6.49;
SBC-3 5.17): what a disk without a mechanism has to say to them."""

from __future__ import annotations

from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import illegal, invalid_cdb, invalid_parameter

_DATA, _DESCRIPTOR, _ECHO, _ECHO_DESCRIPTOR = 0x02, 0x03, 0x0A, 0x0B
#: No data was put into the echo buffer that could be read (COMMAND SEQUENCE ERROR).
_SEQUENCE = 0x2C00
ECHO_SIZE = 4096


@command("SEND DIAGNOSTIC", 0x1D, "f700ffff", access=Access.WRITE)
async def send_diagnostic(request: Request) -> None:
    """Self tests, which pass as soon as the store answers; of diagnostic pages, the list of them alone."""
    unit = request.unit
    code, self_test = request.cdb[1] >> 5, request.bit(1, 2)
    length = request.number(3, 2)
    if code and self_test:
        raise invalid_cdb(1, 7)
    if code in (3, 7):
        raise invalid_cdb(1, 7)
    if length:
        if code or self_test:
            raise invalid_cdb(3)
        data = request.parameters(length)
        if data[0] != 0:
            raise invalid_parameter(0)
        return
    if (self_test or code in (5, 6)) and unit.not_ready() is None and unit.blocks:
        await unit.read(0, [memoryview(bytearray(unit.block_size))])


@command("RECEIVE DIAGNOSTIC RESULTS", 0x1C, "01ffffff", access=Access.WRITE)
async def receive_diagnostic_results(request: Request) -> None:
    """Supported diagnostic pages: this one."""
    if request.bit(1, 0) and request.cdb[2]:
        raise invalid_cdb(2)
    request.reply(bytes([0x00, 0x00, 0x00, 0x01, 0x00]), request.number(3, 2))


@command("WRITE BUFFER", 0x3B, "1f" + "ff" + "ffffff" + "ffffff", access=Access.WRITE)
async def write_buffer(request: Request) -> None:
    """Into the data buffer, or the echo buffer. There is no microcode to download."""
    unit = request.unit
    mode, buffer, offset, length = request.cdb[1], request.cdb[2], request.number(3, 3), request.number(6, 3)
    if mode == _DATA:
        if buffer:
            raise invalid_cdb(2)
        if offset + length > len(unit.buffer):
            raise invalid_cdb(3 if offset > len(unit.buffer) else 6)
        unit.buffer[offset : offset + length] = request.parameters(length)
    elif mode == _ECHO:
        if length > ECHO_SIZE:
            raise invalid_cdb(6)
        unit.echo = request.parameters(length)
    else:
        raise invalid_cdb(1, 4)


@command("READ BUFFER", 0x3C, "1f" + "ff" + "ffffff" + "ffffff")
async def read_buffer(request: Request) -> None:
    """What WRITE BUFFER left, and how large the buffers are."""
    unit = request.unit
    mode, buffer, offset, length = request.cdb[1], request.cdb[2], request.number(3, 3), request.number(6, 3)
    if mode == _DESCRIPTOR:
        # OFFSET BOUNDARY 0: any byte. A buffer that isn't there has no bytes.
        size = len(unit.buffer) if buffer == 0 else 0
        request.reply(size.to_bytes(4, "big"), length)
    elif mode == _DATA:
        if buffer:
            raise invalid_cdb(2)
        if offset > len(unit.buffer):
            raise invalid_cdb(3)
        request.reply(unit.buffer[offset:], length)
    elif mode == _ECHO:
        if not unit.echo:
            raise illegal(_SEQUENCE)
        request.reply(unit.echo, length)
    elif mode == _ECHO_DESCRIPTOR:
        request.reply(ECHO_SIZE.to_bytes(4, "big"), length)
    else:
        raise invalid_cdb(1, 4)


@command("READ DEFECT DATA(10)", 0x37, "00" + "1f" + "00000000" + "ffff", medium=True)
async def read_defect_data_10(request: Request) -> None:
    """An empty list, in whatever format."""
    request.reply(bytes([0, request.cdb[2], 0, 0]), request.number(7, 2))


@command("READ DEFECT DATA(12)", 0xB7, "1f" + "ffffffff" + "ffffffff" + "00", medium=True)
async def read_defect_data_12(request: Request) -> None:
    """An empty list, in whatever format."""
    request.reply(bytes([0, request.cdb[1], 0, 0, 0, 0, 0, 0]), request.number(6, 4))
