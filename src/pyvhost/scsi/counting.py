"""What of a command that was Python's is counted in its logical unit's row.

Promises: reads and writes count as the compiled loop's do; a command that the initiator got wrong is no error of the
unit's. Never: writes to a row.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane import blocks
from pyvhost.scsi.plane import Counted
from pyvhost.scsi.sense import Key
from pyvhost.scsi.task import Outcome, Status, Task

#: READ of 6, 10, 12 and 16 bytes.
_READS: Final = {0x08, 0x28, 0xA8, 0x88}
#: WRITE, WRITE AND VERIFY, ORWRITE, COMPARE AND WRITE, WRITE ATOMIC.
_WRITES: Final = {0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E, 0x8B, 0x89, 0x9C}
#: Sense keys that say that the unit has failed, and not the initiator.
_FAILURES: Final = {
    Key.NOT_READY,
    Key.MEDIUM_ERROR,
    Key.HARDWARE_ERROR,
    Key.DATA_PROTECT,
    Key.ABORTED_COMMAND,
}


def counted(task: Task, row: int, nanoseconds: int) -> Counted | None:
    """What is to be added to the row at address `row`; None: nothing."""
    if task.outcome is not Outcome.STATUS or task.status is Status.RESERVATION_CONFLICT:
        return None
    failed = task.status is Status.CHECK_CONDITION
    if failed and task.key not in _FAILURES:
        return None
    opcode = task.cdb[0]
    if opcode in _READS:
        return Counted(row, failed, blocks.C_READS, task.transferred_in, nanoseconds)
    if opcode in _WRITES:
        return Counted(row, failed, blocks.C_WRITES, task.transferred_out, nanoseconds)
    return Counted(row, failed, blocks.C_OTHERS, 0, nanoseconds)
