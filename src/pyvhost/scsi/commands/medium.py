"""TEST UNIT READY, START STOP UNIT, PREVENT ALLOW MEDIUM REMOVAL (SPC-4 6.47; SBC-3 5.12, 5.24)."""

from __future__ import annotations

from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.reservations import Access
from pyvhost.scsi.sense import Asc, CheckCondition, illegal, invalid_cdb


@command("TEST UNIT READY", 0x00, "00000000", access=Access.STATUS)
async def test_unit_ready(request: Request) -> None:
    """Whether the medium can be reached."""
    reason = request.unit.not_ready()
    if reason is not None:
        raise CheckCondition(reason)


def _start_stop_access(cdb: bytes) -> Access:
    starts = cdb[4] & 1 and not cdb[4] >> 4
    return Access.STATUS if starts else Access.WRITE


@command("START STOP UNIT", 0x1B, "01000ff7", access=_start_stop_access)
async def start_stop_unit(request: Request) -> None:
    """Load or eject a removable medium. Nothing spins here: other starts and stops only empty the cache."""
    unit = request.unit
    condition = request.cdb[4] >> 4
    start, load_eject, no_flush = request.bit(4, 0), request.bit(4, 1), request.bit(4, 2)
    if load_eject and not condition:
        if not unit.removable:
            raise invalid_cdb(4, 1)
        if unit.preventing:
            raise illegal(Asc.MEDIUM_REMOVAL_PREVENTED)
    if not start and not no_flush and unit.not_ready() is None:
        await unit.flush()
    if load_eject and not condition and unit.loaded is not start:
        unit.loaded = start
        if start:
            # Whoever sent this knows; the others are to look at the medium again.
            unit.changed(Asc.NOT_READY_TO_READY_CHANGE, but=request.task.nexus)
        unit.refresh()


def _prevent_access(cdb: bytes) -> Access:
    return Access.WRITE if cdb[4] & 3 else Access.STATUS


@command("PREVENT ALLOW MEDIUM REMOVAL", 0x1E, "00000003", access=_prevent_access)
async def prevent_allow_medium_removal(request: Request) -> None:
    """Keep the medium in, for as long as this nexus says so."""
    prevent = request.cdb[4] & 3
    if prevent > 1:
        raise invalid_cdb(4, 1)
    if prevent:
        request.unit.preventing.add(request.task.nexus)
    else:
        request.unit.preventing.discard(request.task.nexus)
