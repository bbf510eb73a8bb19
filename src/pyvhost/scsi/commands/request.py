"""A command that is being carried out: its CDB, its data, and what every handler needs of both.

Promises: moves exactly what the command asks for, as far as the initiator's buffers reach, and notes what it would
have moved (the residual comes from that). Never: copies data that can be handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyvhost.scsi.sense import Asc, illegal, out_of_range
from pyvhost.scsi.task import Task

if TYPE_CHECKING:
    from pyvhost.scsi.commands.table import Command
    from pyvhost.scsi.target import Target
    from pyvhost.scsi.unit import LogicalUnit

#: Most bytes of a parameter list that any command takes.
MAX_PARAMETERS = 1 << 20


def part(views: Sequence[memoryview], begin: int, length: int) -> list[memoryview]:
    """The views of `length` bytes from byte `begin` on."""
    found = []
    for view in views:
        if length <= 0:
            break
        size = len(view)
        if begin < size:
            piece = view[begin : begin + length]
            found.append(piece)
            length -= len(piece)
            begin = 0
        else:
            begin -= size
    return found


def store(views: Sequence[memoryview], data: bytes | bytearray | memoryview, begin: int = 0) -> int:
    """Copy `data` into the views, from byte `begin` on; how many bytes had room."""
    at = 0
    for view in part(views, begin, len(data)):
        view[:] = data[at : at + len(view)]
        at += len(view)
    return at


def load(views: Sequence[memoryview], begin: int = 0, length: int | None = None) -> bytearray:
    """A copy of bytes in the views."""
    data = bytearray()
    for view in part(views, begin, sum(map(len, views)) if length is None else length):
        data += view
    return data


class Request:
    """One command."""

    __slots__ = ("cdb", "command", "task", "unit")

    def __init__(self, unit: LogicalUnit, task: Task, command: Command) -> None:
        self.unit = unit
        self.task = task
        self.command = command
        #: As long as the command's CDB is.
        self.cdb = task.cdb[: command.length]

    @property
    def target(self) -> Target | None:
        """The target the unit belongs to."""
        return self.unit.target

    def number(self, at: int, size: int) -> int:
        """A big-endian number in the CDB."""
        return int.from_bytes(self.cdb[at : at + size], "big")

    def bit(self, byte: int, bit: int) -> bool:
        """A bit of the CDB."""
        return bool(self.cdb[byte] >> bit & 1)

    def reply(self, data: bytes | bytearray, allocation: int | None = None) -> None:
        """Hand parameter data in, at most `allocation` bytes of it (SPC-4, 4.2.5.6)."""
        if allocation is not None:
            data = data[:allocation]
        self.task.wanted_in = len(data)
        self.task.transferred_in = store(self.task.data_in, data)

    def parameters(self, length: int) -> bytes:
        """The parameter list, of the length that the CDB says. PARAMETER LIST LENGTH ERROR: there is no such list."""
        self.task.wanted_out = length
        if length > self.task.out_length or length > MAX_PARAMETERS:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        self.task.transferred_out = length
        return bytes(load(self.task.data_out, 0, length))

    # Blocks

    def extent(self) -> tuple[int, int]:
        """LOGICAL BLOCK ADDRESS and the number of blocks, as READ and WRITE of each size of CDB have them."""
        size = self.command.length
        if size == 6:
            return self.number(1, 3) & 0x1FFFFF, self.cdb[4] or 256
        if size == 10:
            return self.number(2, 4), self.number(7, 2)
        if size == 12:
            return self.number(2, 4), self.number(6, 4)
        return self.number(2, 8), self.number(10, 4)

    def check_extent(self, lba: int, blocks: int) -> None:
        """LOGICAL BLOCK ADDRESS OUT OF RANGE unless the unit has all of these blocks."""
        if lba + blocks > self.unit.blocks:
            raise out_of_range(max(lba, self.unit.blocks))

    def want_out(self, length: int) -> list[memoryview]:
        """The first `length` bytes that the initiator sends; they must be there (nothing is moved otherwise)."""
        self.task.wanted_out = length
        if length > self.task.out_length:
            raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
        self.task.transferred_out = length
        return part(self.task.data_out, 0, length)

    def want_exactly(self, length: int) -> list[memoryview]:
        """As `want_out`, for a command that isn't to be guessed at: more than `length` is refused too."""
        if self.task.out_length > length:
            self.task.wanted_out = length
            raise illegal(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
        return self.want_out(length)
