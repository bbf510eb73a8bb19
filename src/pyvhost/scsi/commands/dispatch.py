"""From a task that may run to its command: what SPC-4 and SAM-5 have checked first, in their order.

Promises: every task that begins ends, with CHECK CONDITION if nothing better is known. Never: raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvhost.scsi.commands import (
    blocks,
    compare,
    copy,
    diagnostics,
    identify,
    medium,
    mode,
    opcodes,
    persistent,
    provisioning,
)
from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.commands.table import TABLE, Command
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import Asc, CheckCondition, Key, Sense, illegal, invalid_cdb
from pyvhost.scsi.task import Attribute, Refused, Status, Task

if TYPE_CHECKING:
    from pyvhost.scsi.unit import LogicalUnit

#: Imported for the entries that they make in the table.
FAMILIES = (blocks, compare, copy, diagnostics, identify, medium, mode, opcodes, persistent, provisioning)


def begin(unit: LogicalUnit, task: Task) -> None:
    """Carry a task out."""
    task.run(_carry_out(unit, task))


async def _carry_out(unit: LogicalUnit, task: Task) -> None:
    command = TABLE.find(task.cdb)
    if command is not None and not command.supported(unit):
        command = None
    if command is None or not command.before_attention:
        sense = unit.attentions.take(task.nexus)
        if sense is not None:
            unit.refresh()
            raise CheckCondition(sense)
    if command is None:
        raise _unknown(unit, task.cdb)
    _check(unit, task, command)
    await command.handler(Request(unit, task, command))


def _check(unit: LogicalUnit, task: Task, command: Command) -> None:
    if len(task.cdb) < command.length:
        raise invalid_cdb(len(task.cdb))
    access = command.access_of(task.cdb)
    if access is not Access.FREE and unit.reservations.conflicts(task.nexus, access):
        raise Refused(Status.RESERVATION_CONFLICT)
    if task.attribute is Attribute.ACA and unit.tasks.faulted is None:
        raise illegal(Asc.INVALID_MESSAGE_ERROR)
    stray = command.stray(task.cdb)
    if stray is not None:
        raise invalid_cdb(*stray)
    if command.medium:
        reason = unit.not_ready()
        if reason is not None:
            raise CheckCondition(reason)
    if command.writes and unit.read_only:
        software = unit.modes.software_write_protect
        asc = Asc.LOGICAL_UNIT_SOFTWARE_WRITE_PROTECTED if software else Asc.WRITE_PROTECTED
        raise CheckCondition(Sense(Key.DATA_PROTECT, asc))


def _unknown(unit: LogicalUnit, cdb: bytes) -> CheckCondition:
    actions = TABLE.actions(cdb[0]) if cdb else {}
    if None not in actions and any(command.supported(unit) for command in actions.values()):
        return invalid_cdb(1, 4)
    return illegal(Asc.INVALID_COMMAND_OPERATION_CODE)
