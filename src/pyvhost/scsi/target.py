"""A SCSI target device: logical units by number, the nexuses that reach them, and task management (SAM-5, 4.6, 7).

Promises: every task that is submitted ends, at whatever LUN; every task management function's `done` is called once,
when the tasks that it concerns have really stopped. Never: knows a transport.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from pyvhost.scsi.commands import identify
from pyvhost.scsi.commands.request import store
from pyvhost.scsi.nexus import Nexus, world_wide_name
from pyvhost.scsi.sense import NO_SENSE, Asc, CheckCondition, Sense, illegal, invalid_cdb
from pyvhost.scsi.task import Task
from pyvhost.scsi.task_set import Done
from pyvhost.scsi.unit import LogicalUnit

#: The REPORT LUNS well known logical unit (SPC-4, 8.2), as its number stands in the first two bytes of a LUN.
REPORT_LUNS_WLUN = 0xC101
#: Most logical units, by flat space addressing.
MAX_LUNS = 1 << 14


class Response(enum.Enum):
    """Service responses of task management functions (SAM-5, 7.1)."""

    FUNCTION_COMPLETE = "complete"
    FUNCTION_SUCCEEDED = "succeeded"
    FUNCTION_REJECTED = "rejected"
    INCORRECT_LOGICAL_UNIT_NUMBER = "incorrect LUN"


Answer = Callable[[Response], object]


class Target:
    """A target with one port. `wwn`: the port's world wide name; None: one made from `name`."""

    def __init__(self, name: str = "target", wwn: int | None = None) -> None:
        self.name = name
        self.wwn = world_wide_name(name) if wwn is None else wwn
        self._units: dict[int, LogicalUnit] = {}
        self._nexuses: dict[Nexus, None] = {}
        #: Called when a logical unit has come or gone, with its number.
        self.on_luns_changed: Callable[[int], object] | None = None

    @property
    def numbers(self) -> list[int]:
        """The numbers of its logical units, in order."""
        return sorted(self._units)

    @property
    def units(self) -> list[LogicalUnit]:
        """Its logical units, in the order of their numbers."""
        return [self._units[lun] for lun in self.numbers]

    def unit(self, lun: int) -> LogicalUnit | None:
        """The logical unit of that number."""
        return self._units.get(lun)

    def add(self, lun: int, unit: LogicalUnit) -> None:
        """Add a unit, which is open; initiators hear of it. ValueError: no such number, or it is taken."""
        if not 0 <= lun < MAX_LUNS:
            raise ValueError(f"LUN {lun}: they go from 0 to {MAX_LUNS - 1}")
        if lun in self._units:
            raise ValueError(f"LUN {lun} of target {self.name} is taken by {self._units[lun].store.spec}")
        unit.target, unit.lun = self, lun
        self._luns_changed(lun)
        self._units[lun] = unit
        for nexus in self._nexuses:
            unit.attach(nexus)

    def remove(self, lun: int, done: Done = lambda: None) -> LogicalUnit:
        """Take a unit away and close it: `done` when its tasks have stopped. KeyError: there is no such unit."""
        unit = self._units.pop(lun)
        self._luns_changed(lun)
        unit.close(done)
        return unit

    def close(self, done: Done = lambda: None) -> None:
        """Close every unit, then `done`."""
        joined = _Join(done)
        for lun in self.numbers:
            self._units.pop(lun).close(joined.one())
        joined.seal()

    def _luns_changed(self, lun: int) -> None:
        for unit in self._units.values():
            unit.attentions.establish_all(Asc.REPORTED_LUNS_DATA_HAS_CHANGED)
            unit.refresh()
        if self.on_luns_changed is not None:
            self.on_luns_changed(lun)

    # Nexuses

    def attach(self, nexus: Nexus) -> None:
        """A nexus begins to exist."""
        self._nexuses[nexus] = None
        for unit in self.units:
            unit.attach(nexus)

    def detach(self, nexus: Nexus, done: Done = lambda: None) -> None:
        """A nexus is no more; `done` when its tasks have stopped."""
        self._nexuses.pop(nexus, None)
        joined = _Join(done)
        for unit in self.units:
            unit.detach(nexus, joined.one())
        joined.seal()

    # Commands

    def submit(self, task: Task, lun: int) -> None:
        """Carry a task out at a logical unit; `task.on_done` says when it has ended."""
        unit = self._units.get(lun)
        if unit is not None:
            unit.submit(task)
        else:
            task.run(self._without_unit(task, lun == REPORT_LUNS_WLUN))

    async def _without_unit(self, task: Task, well_known: bool) -> None:
        """The few commands that there are at an incorrect logical unit, and at the well known one (SPC-4, 8.2)."""
        cdb = task.cdb.ljust(16, b"\x00")
        if cdb[0] == 0x12:
            data, allocation = self._inquiry(cdb, well_known)
        elif cdb[0] == 0xA0:
            allocation = int.from_bytes(cdb[6:10], "big")
            data = identify.lun_list(self.numbers, allocation, cdb[2])
            identify.forget_change(self.units, task.nexus)
        elif cdb[0] == 0x03:
            sense: Sense = NO_SENSE if well_known else identify.LOGICAL_UNIT_NOT_SUPPORTED
            data, allocation = sense.encode(bool(cdb[1] & 1)), cdb[4]
        elif cdb[0] == 0x00 and well_known:
            return
        elif well_known:
            raise illegal(Asc.INVALID_COMMAND_OPERATION_CODE)
        else:
            raise CheckCondition(identify.LOGICAL_UNIT_NOT_SUPPORTED)
        data = data[:allocation]
        task.wanted_in = len(data)
        task.transferred_in = store(task.data_in, data)

    def _inquiry(self, cdb: bytes, well_known: bool) -> tuple[bytes, int]:
        page, allocation = identify.inquiry_page(cdb)
        device = identify.WELL_KNOWN if well_known else identify.NOTHING_THERE
        if page is None:
            return identify.standard_inquiry(device, "PYVHOST", "TARGET"), allocation
        if page == 0x00:
            return identify.vital_page(
                device, page, bytes([0x00, 0x83] if well_known else [0x00])
            ), allocation
        if page == 0x83 and well_known:
            port = identify.designator(3, 1, self.wwn.to_bytes(8, "big"), 0x10)
            return identify.vital_page(device, page, port), allocation
        raise invalid_cdb(2)

    # Task management. `done` may be called at once.

    def abort_task(self, nexus: Nexus, lun: int, tag: int, done: Answer) -> None:
        """ABORT TASK (SAM-5, 7.2). FUNCTION COMPLETE too if there is no such task: it has ended then."""
        self._at(lun, done, lambda unit, end: unit.tasks.abort(unit.tasks.find(nexus, tag), end))

    def abort_task_set(self, nexus: Nexus, lun: int, done: Answer) -> None:
        """ABORT TASK SET (7.3): all tasks of that nexus."""
        self._at(lun, done, lambda unit, end: unit.tasks.abort(unit.tasks.of(nexus), end))

    def clear_task_set(self, nexus: Nexus, lun: int, done: Answer) -> None:
        """CLEAR TASK SET (7.5): all tasks of all nexuses."""
        self._at(lun, done, lambda unit, end: unit.tasks.abort(unit.tasks.of(None), end, by=nexus))

    def clear_aca(self, nexus: Nexus, lun: int, done: Answer) -> None:
        """CLEAR ACA (7.4), from the faulted nexus; from another it does nothing."""

        def clear(unit: LogicalUnit, end: Done) -> None:
            if unit.tasks.faulted is nexus:
                unit.tasks.clear_aca()
            end()

        self._at(lun, done, clear)

    def lun_reset(self, lun: int, done: Answer) -> None:
        """LOGICAL UNIT RESET (7.7)."""
        self._at(lun, done, lambda unit, end: unit.reset(end))

    def nexus_reset(self, nexus: Nexus, done: Answer) -> None:
        """I_T NEXUS RESET (7.6), at every logical unit."""
        joined = _Join(lambda: done(Response.FUNCTION_COMPLETE))
        for unit in self.units:
            unit.nexus_lost(nexus, joined.one())
        joined.seal()

    def query_task(self, nexus: Nexus, lun: int, tag: int, done: Answer) -> None:
        """QUERY TASK (7.9): FUNCTION SUCCEEDED if the task is there."""
        self._query(lun, done, lambda unit: bool(unit.tasks.find(nexus, tag)))

    def query_task_set(self, nexus: Nexus, lun: int, done: Answer) -> None:
        """QUERY TASK SET (7.10): FUNCTION SUCCEEDED if that nexus has any task there."""
        self._query(lun, done, lambda unit: bool(unit.tasks.of(nexus)))

    def _query(self, lun: int, done: Answer, present: Callable[[LogicalUnit], bool]) -> None:
        unit = self._units.get(lun)
        if unit is None:
            done(Response.INCORRECT_LOGICAL_UNIT_NUMBER)
        else:
            done(Response.FUNCTION_SUCCEEDED if present(unit) else Response.FUNCTION_COMPLETE)

    def _at(self, lun: int, done: Answer, act: Callable[[LogicalUnit, Done], None]) -> None:
        unit = self._units.get(lun)
        if unit is None:
            # The well known logical unit's tasks end before they can be managed.
            known = lun == REPORT_LUNS_WLUN
            done(Response.FUNCTION_COMPLETE if known else Response.INCORRECT_LOGICAL_UNIT_NUMBER)
        else:
            act(unit, lambda: done(Response.FUNCTION_COMPLETE))

    def __repr__(self) -> str:
        return f"<Target {self.name} {self.wwn:016x} LUNs {self.numbers}>"


class _Join:
    """Calls something when several things have ended, none of them included."""

    def __init__(self, done: Done) -> None:
        self._done = done
        self._left = 1

    def one(self) -> Done:
        self._left += 1
        return self.seal

    def seal(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._done()
