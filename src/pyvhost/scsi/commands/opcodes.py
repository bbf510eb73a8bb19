"""REPORT SUPPORTED OPERATION CODES and REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4, 6.35 and 6.36)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.commands.table import TABLE, Command, command
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import invalid_cdb

if TYPE_CHECKING:
    from pyvhost.scsi.unit import LogicalUnit

_ALL, _OPCODE, _ACTION, _EITHER = range(4)
#: A command timeouts descriptor without a word on times.
_TIMEOUTS = (10).to_bytes(2, "big") + bytes(10)


@command(
    "REPORT SUPPORTED OPERATION CODES",
    0xA3,
    "00" + "87" + "ff" + "ffff" + "ffffffff" + "00",
    action=0x0C,
    access=Access.STATUS,
)
async def report_supported_operation_codes(request: Request) -> None:
    """Every command, or what the CDB of one may hold."""
    with_timeouts = request.bit(2, 7)
    option = request.cdb[2] & 7
    opcode, action = request.cdb[3], request.number(4, 2)
    allocation = request.number(6, 4)
    if option == _ALL:
        request.reply(_list(request.unit, with_timeouts), allocation)
        return
    if option > _EITHER:
        raise invalid_cdb(2, 2)
    actions = {a: c for a, c in TABLE.actions(opcode).items() if c.supported(request.unit)}
    has_actions = bool(actions) and None not in actions
    if option == _OPCODE and has_actions:
        raise invalid_cdb(2, 2)
    if option == _ACTION and actions and not has_actions:
        raise invalid_cdb(2, 2)
    found = actions.get(action if has_actions else None)
    if option == _EITHER and not has_actions and action:
        found = None
    request.reply(_one(found, with_timeouts), allocation)


def _list(unit: LogicalUnit, with_timeouts: bool) -> bytes:
    data = bytearray()
    for entry in TABLE:
        if not entry.supported(unit):
            continue
        action = entry.service_action
        data += bytes([entry.opcode, 0]) + (action or 0).to_bytes(2, "big")
        flags = (0x02 if with_timeouts else 0) | (0x01 if action is not None else 0)
        data += bytes([0, flags]) + entry.length.to_bytes(2, "big")
        if with_timeouts:
            data += _TIMEOUTS
    return len(data).to_bytes(4, "big") + bytes(data)


def _one(entry: Command | None, with_timeouts: bool) -> bytes:
    if entry is None:
        return bytes([0, 0x01, 0, 0])  # SUPPORT 001b: it isn't supported
    usage = entry.usage_data
    flags = 0x03 | (0x80 if with_timeouts else 0)
    return bytes([0, flags]) + len(usage).to_bytes(2, "big") + usage + (_TIMEOUTS if with_timeouts else b"")


@command(
    "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
    0xA3,
    "00" + "80" + "000000" + "ffffffff" + "00",
    action=0x0D,
    access=Access.STATUS,
)
async def report_supported_task_management_functions(request: Request) -> None:
    """All of them: ABORT TASK (SET), CLEAR ACA, CLEAR TASK SET, LOGICAL UNIT and I_T NEXUS RESET, the queries."""
    # ATS, ATSS, CACAS, CTSS, LURS, QTS; then QAES 0, QTSS, ITNRS.
    data = bytes([0xFC, 0x03, 0, 0])
    if request.bit(2, 7):  # REPD
        data = data[:3] + bytes([12]) + bytes(12)
    request.reply(data, request.number(6, 4))
