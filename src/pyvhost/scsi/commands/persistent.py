"""PERSISTENT RESERVE IN and OUT, RESERVE and RELEASE, 6 and 10 (SPC-4 6.15, 6.16; SPC-2 7.16, 7.17, 7.21, 7.22).

Promises: with APTPL, what PERSISTENT RESERVE OUT did is in the file at its status.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyvhost.scsi.commands.request import Request
from pyvhost.scsi.commands.table import command
from pyvhost.scsi.nexus import PROTOCOL_SAS, Nexus
from pyvhost.scsi.operation import Operation
from pyvhost.scsi.reservations import Access, Reservations, Type
from pyvhost.scsi.sense import Asc, CheckCondition, Key, Sense, illegal, invalid_cdb, invalid_parameter
from pyvhost.scsi.task import Outcome

#: Every type there is, as REPORT CAPABILITIES has it (SPC-4, table 219).
_TYPE_MASK = bytes([0xEA, 0x01])
_TRANSPORT_ID = 24


@command("RESERVE(6)", 0x16, "00000000", access=Access.LEGACY)
@command("RESERVE(10)", 0x56, "00" * 8, access=Access.LEGACY)
async def reserve_6(request: Request) -> None:
    """Reserve the unit for this nexus."""
    request.unit.reservations.reserve(request.task.nexus)
    request.unit.refresh()


@command("RELEASE(6)", 0x17, "00000000", access=Access.LEGACY_RELEASE)
@command("RELEASE(10)", 0x57, "00" * 8, access=Access.LEGACY_RELEASE)
async def release_6(request: Request) -> None:
    """Release it. From a nexus that doesn't hold it, GOOD and nothing else."""
    request.unit.reservations.release(request.task.nexus)
    request.unit.refresh()


_IN = "00" + "0000000000" + "ffff"


@command("PERSISTENT RESERVE IN, READ KEYS", 0x5E, _IN, action=0, access=Access.PERSISTENT)
async def read_keys(request: Request) -> None:
    """Every registered key."""
    kept = request.unit.reservations
    keys = b"".join(key.to_bytes(8, "big") for key in kept.keys.values())
    _reply(request, keys)


@command("PERSISTENT RESERVE IN, READ RESERVATION", 0x5E, _IN, action=1, access=Access.PERSISTENT)
async def read_reservation(request: Request) -> None:
    """The reservation, if there is one."""
    kept = request.unit.reservations
    data = b""
    if kept.type is not None:
        key = kept.keys.get(kept.holder, 0) if kept.holder is not None else 0
        data = key.to_bytes(8, "big") + bytes([0, 0, 0, 0, 0, kept.type, 0, 0])
    _reply(request, data)


@command("PERSISTENT RESERVE IN, REPORT CAPABILITIES", 0x5E, _IN, action=2, access=Access.PERSISTENT)
async def report_capabilities(request: Request) -> None:
    """All types; SPEC_I_PT, ALL_TG_PT, and APTPL where there is a file for it."""
    kept = request.unit.reservations
    flags = 0x0C | (0x01 if kept.path is not None else 0)  # SIP_C, ATP_C, PTPL_C
    data = bytes([0, 8, flags, 0x80 | (0x01 if kept.aptpl else 0)]) + _TYPE_MASK + bytes(2)
    request.reply(data, request.number(7, 2))


@command("PERSISTENT RESERVE IN, READ FULL STATUS", 0x5E, _IN, action=3, access=Access.PERSISTENT)
async def read_full_status(request: Request) -> None:
    """Every registration, with its port's TransportID."""
    kept = request.unit.reservations
    data = b""
    for wwn, key in kept.keys.items():
        holds = kept.holds(wwn)
        transport = Nexus("", wwn).transport_id
        data += key.to_bytes(8, "big") + bytes(4)
        data += bytes([0x01 if holds else 0, (kept.type or 0) if holds else 0]) + bytes(4)
        data += (1).to_bytes(2, "big") + len(transport).to_bytes(4, "big") + transport
    _reply(request, data)


def _reply(request: Request, data: bytes) -> None:
    generation = request.unit.reservations.generation & 0xFFFFFFFF
    request.reply(generation.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data, request.number(7, 2))


# PERSISTENT RESERVE OUT

_OUT_TYPE = "00" + "ff" + "0000" + "ffffffff"


class _Parameters:
    """The basic parameter list (SPC-4, table 232)."""

    def __init__(self, request: Request) -> None:
        length = request.number(5, 4)
        data = request.parameters(length)
        if length < 24:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        self.data = data
        self.key = int.from_bytes(data[0:8], "big")
        self.new = int.from_bytes(data[8:16], "big")
        self.spec_i_pt = bool(data[20] & 0x08)
        self.aptpl = bool(data[20] & 0x01)
        registers = request.cdb[1] & 0x1F in (0, 6)
        if registers and self.aptpl and request.unit.reservations.path is None:
            raise invalid_parameter(20, 0)
        if not registers:
            self.spec_i_pt = self.aptpl = False
        if not self.spec_i_pt and length != 24:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)

    def ports(self) -> list[int]:
        """The names of the ports that SPEC_I_PT lists."""
        length = int.from_bytes(self.data[24:28], "big") if len(self.data) >= 28 else -1
        if length != len(self.data) - 28 or length % _TRANSPORT_ID:
            raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
        return [_port(self.data, at) for at in range(28, len(self.data), _TRANSPORT_ID)]


def _port(data: bytes, at: int) -> int:
    """The port's name in the TransportID at byte `at`."""
    if data[at] != PROTOCOL_SAS:
        raise invalid_parameter(at)
    return int.from_bytes(data[at + 4 : at + 12], "big")


def _type(request: Request) -> Type:
    """SCOPE and TYPE."""
    if request.cdb[2] >> 4:
        raise invalid_cdb(2, 7)
    try:
        return Type(request.cdb[2] & 0x0F)
    except ValueError:
        raise invalid_cdb(2, 3) from None


@contextmanager
def _undone_if_it_fails(kept: Reservations) -> Iterator[None]:
    before = copy.copy(kept.keys), kept.generation, kept.type, kept.holder, kept.aptpl
    try:
        yield
    except Exception:
        # Not when the task is aborted: what was done by then is in the file, too.
        kept.keys, kept.generation, kept.type, kept.holder, kept.aptpl = before
        raise


async def _change(request: Request, change: Callable[[Reservations], object]) -> None:
    """Change reservations, and keep them where that is wanted; both or neither."""
    unit = request.unit
    kept = unit.reservations
    if kept.path is None:
        with _undone_if_it_fails(kept):
            change(kept)
        unit.refresh()
        return
    # One at a time: a change that can't be kept takes back its own doing, not another's. No block has that number.
    hold = await unit.hold(-1, 1, alone=True)
    try:
        with _undone_if_it_fails(kept):
            had_file = kept.aptpl
            change(kept)
            unit.refresh()
            if kept.aptpl or had_file:
                await _keep(request, kept.snapshot())
    finally:
        unit.ranges.release(hold)
        unit.refresh()


async def _keep(request: Request, content: bytes | None) -> None:
    """Have a thread write the file: it blocks."""
    path = request.unit.reservations.path
    assert path is not None
    store = request.unit.store

    def begin(done: Callable[[OSError | None], None]) -> None:
        def work() -> None:
            failure = None
            try:
                Reservations.write(path, content)
            except OSError as error:
                failure = error
            store.call_soon(lambda: done(failure))

        threading.Thread(target=work, name="pyvhost-reservations", daemon=True).start()

    if await Operation[OSError | None](begin) is not None:
        raise CheckCondition(Sense(Key.ILLEGAL_REQUEST, Asc.INSUFFICIENT_REGISTRATION_RESOURCES))


async def _register(request: Request, ignore: bool) -> None:
    parameters = _Parameters(request)
    if parameters.spec_i_pt and ignore:
        raise invalid_parameter(20, 3)
    others = parameters.ports() if parameters.spec_i_pt else None
    wwn = request.task.nexus.wwn
    await _change(
        request,
        lambda kept: kept.register(
            wwn, parameters.key, parameters.new, ignore=ignore, aptpl=parameters.aptpl, others=others
        ),
    )


@command("PERSISTENT RESERVE OUT, REGISTER", 0x5F, _OUT_TYPE, action=0, access=Access.PERSISTENT)
async def register(request: Request) -> None:
    """Register a key, change or remove it."""
    await _register(request, ignore=False)


@command("PERSISTENT RESERVE OUT, RESERVE", 0x5F, _OUT_TYPE, action=1, access=Access.PERSISTENT)
async def reserve(request: Request) -> None:
    """Reserve."""
    kind, parameters = _type(request), _Parameters(request)
    await _change(request, lambda kept: kept.take(request.task.nexus.wwn, parameters.key, kind))


@command("PERSISTENT RESERVE OUT, RELEASE", 0x5F, _OUT_TYPE, action=2, access=Access.PERSISTENT)
async def release(request: Request) -> None:
    """Release."""
    kind, parameters = _type(request), _Parameters(request)
    await _change(request, lambda kept: kept.give_up(request.task.nexus.wwn, parameters.key, kind))


@command("PERSISTENT RESERVE OUT, CLEAR", 0x5F, _OUT_TYPE, action=3, access=Access.PERSISTENT)
async def clear(request: Request) -> None:
    """Release, and remove every registration."""
    parameters = _Parameters(request)
    await _change(request, lambda kept: kept.clear(request.task.nexus.wwn, parameters.key))


async def _preempt(request: Request) -> list[int]:
    kind, parameters = _type(request), _Parameters(request)
    removed: list[int] = []
    await _change(
        request,
        lambda kept: removed.extend(
            kept.preempt(request.task.nexus.wwn, parameters.key, parameters.new, kind)
        ),
    )
    return removed


@command("PERSISTENT RESERVE OUT, PREEMPT", 0x5F, _OUT_TYPE, action=4, access=Access.PERSISTENT)
async def preempt(request: Request) -> None:
    """Take the reservation, or registrations, away from others."""
    await _preempt(request)


@command("PERSISTENT RESERVE OUT, PREEMPT AND ABORT", 0x5F, _OUT_TYPE, action=5, access=Access.PERSISTENT)
async def preempt_and_abort(request: Request) -> None:
    """As PREEMPT, and abort the tasks of whom it was taken from."""
    unit, task = request.unit, request.task
    removed = await _preempt(request)
    tasks = [other for other in unit.tasks if other.nexus.wwn in removed and other is not task]
    if unit.tasks.faulted is not None and unit.tasks.faulted.wwn in removed:
        unit.tasks.clear_aca()
    # Nor does anybody of them keep the medium in any longer (SPC-4, 5.13.11.2.6).
    unit.preventing -= {nexus for nexus in unit.preventing if nexus.wwn in removed}

    def begin(done: Callable[[None], None]) -> None:
        # One hop later: there may be nothing to abort, and an operation never ends within its beginning.
        unit.tasks.abort(
            tasks, lambda: unit.store.call_soon(lambda: done(None)), Outcome.ABORTED, by=task.nexus
        )

    await Operation[None](begin)


@command(
    "PERSISTENT RESERVE OUT, REGISTER AND IGNORE EXISTING KEY",
    0x5F,
    _OUT_TYPE,
    action=6,
    access=Access.PERSISTENT,
)
async def register_and_ignore_existing_key(request: Request) -> None:
    """Register a key whatever was registered."""
    await _register(request, ignore=True)


@command("PERSISTENT RESERVE OUT, REGISTER AND MOVE", 0x5F, _OUT_TYPE, action=7, access=Access.PERSISTENT)
async def register_and_move(request: Request) -> None:
    """Register another port, and hand the reservation over to it (SPC-4, 6.16.4)."""
    length = request.number(5, 4)
    data = request.parameters(length)
    if length < 24 + _TRANSPORT_ID or int.from_bytes(data[20:24], "big") != length - 24:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if length != 24 + _TRANSPORT_ID:
        raise illegal(Asc.PARAMETER_LIST_LENGTH_ERROR)
    key, new = int.from_bytes(data[0:8], "big"), int.from_bytes(data[8:16], "big")
    unregister, aptpl = bool(data[17] & 0x02), bool(data[17] & 0x01)
    if int.from_bytes(data[18:20], "big") != 1:
        raise invalid_parameter(18)
    if aptpl and request.unit.reservations.path is None:
        raise invalid_parameter(17, 0)
    other = _port(data, 24)
    wwn = request.task.nexus.wwn
    await _change(request, lambda kept: kept.move(wwn, key, new, other, unregister=unregister, aptpl=aptpl))
