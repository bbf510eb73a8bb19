"""The table of commands: which there are, their CDBs, and what must be seen to before they are carried out.

REPORT SUPPORTED OPERATION CODES is made from it, and what a CDB may hold is judged by it: a bit outside a command's
usage data is INVALID FIELD IN CDB.

Promises: an operation code has entries with service actions, or one without. Never: holds a command's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.operation import Operation
from pyvhost.scsi.reservations import Access

if TYPE_CHECKING:
    from pyvhost.scsi.unit import LogicalUnit

Handler = Callable[[Request], Coroutine[Operation[Any], Any, None]]

#: The CONTROL byte: NACA is what is supported of it.
CONTROL = "04"


#: TEST UNIT READY, REQUEST SENSE, INQUIRY. Who doesn't know yet that this isn't SCSI-2 puts the LUN into the upper
#: bits of byte 1, as Linux does with the first INQUIRY to a target.
_BEFORE_INQUIRY = frozenset((0x00, 0x03, 0x12))


def _always(_unit: LogicalUnit) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `usage` is its CDB usage data (SPC-4, 6.35.3) without the operation code and service action."""

    name: str
    opcode: int
    service_action: int | None
    usage: bytes
    handler: Handler
    access: Access | Callable[[bytes], Access]
    #: The medium must be there.
    medium: bool
    #: It changes the medium.
    writes: bool
    #: A unit attention that waits doesn't keep it from being carried out.
    before_attention: bool
    #: Whether that unit has it.
    supported: Callable[[LogicalUnit], bool]

    @property
    def length(self) -> int:
        """Bytes of its CDB."""
        return len(self.usage)

    @property
    def usage_data(self) -> bytes:
        """The CDB usage data as REPORT SUPPORTED OPERATION CODES shows it."""
        data = bytearray(self.usage)
        data[0] = self.opcode
        if self.service_action is not None:
            data[1] = data[1] & 0xE0 | self.service_action
        return bytes(data)

    def access_of(self, cdb: bytes) -> Access:
        """What it does as far as reservations are concerned."""
        return self.access if isinstance(self.access, Access) else self.access(cdb)

    def stray(self, cdb: bytes) -> tuple[int, int] | None:
        """The first byte with a bit that has no meaning, and its leftmost such bit; None: there is none."""
        for at in range(1, len(self.usage)):
            mask = self.usage[at]
            if at == 1 and self.service_action is not None:
                mask |= 0x1F
            if at == 1 and self.opcode in _BEFORE_INQUIRY:
                mask |= 0xE0
            wrong = cdb[at] & ~mask & 0xFF
            if wrong:
                return at, wrong.bit_length() - 1
        return None


class Table:
    """Commands by operation code and service action."""

    def __init__(self) -> None:
        self._by_opcode: dict[int, dict[int | None, Command]] = {}

    def __iter__(self) -> Any:
        for opcode in sorted(self._by_opcode):
            actions = self._by_opcode[opcode]
            yield from (actions[action] for action in sorted(actions, key=lambda action: action or 0))

    def actions(self, opcode: int) -> dict[int | None, Command]:
        """The commands of an operation code, by service action (None: it has none)."""
        return self._by_opcode.get(opcode, {})

    def find(self, cdb: bytes) -> Command | None:
        """The command that a CDB means; None: there is none."""
        if not cdb:
            return None
        actions = self.actions(cdb[0])
        if None in actions:
            return actions[None]
        return actions.get(cdb[1] & 0x1F) if len(cdb) > 1 else None

    def add(self, command: Command) -> None:
        """Take a command in."""
        actions = self._by_opcode.setdefault(command.opcode, {})
        if command.service_action in actions or (
            actions and (None in actions) != (command.service_action is None)
        ):
            raise ValueError(f"{command.name}: {command.opcode:#x}/{command.service_action} is taken")
        actions[command.service_action] = command


TABLE = Table()


def command(
    name: str,
    opcode: int,
    usage: str,
    *,
    action: int | None = None,
    access: Access | Callable[[bytes], Access] = Access.READ,
    medium: bool = False,
    writes: bool = False,
    before_attention: bool = False,
    supported: Callable[[LogicalUnit], bool] = _always,
) -> Callable[[Handler], Handler]:
    """Enter a handler into the table. `usage`: hexadecimal, from byte 1 to the one before CONTROL."""
    size = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}[opcode >> 5]
    mask = bytes.fromhex(f"ff{usage}{CONTROL}")
    if len(mask) != size:
        raise ValueError(f"{name}: a CDB of {size} bytes, usage data of {len(mask)}")

    def enter(handler: Handler) -> Handler:
        TABLE.add(
            Command(name, opcode, action, mask, handler, access, medium, writes, before_attention, supported)
        )
        return handler

    return enter
