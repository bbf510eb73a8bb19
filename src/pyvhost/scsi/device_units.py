"""The half of the SCSI host device that is about its logical units: which there are, and what others know of them.

The compiled loop knows a unit by an entry of a table, the counters by a row, the guest by its address, and by the
events that say that it has come, changed or gone.

Promises: the loop begins nothing of a unit that Python has something to say to; a unit that is taken out is closed
when nothing of it is under way.
Never: takes a request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyvhost.abi import virtio_scsi as abi
from pyvhost.dataplane import scsi_blocks as layout
from pyvhost.dataplane.plain import load64, store64
from pyvhost.scsi import disks
from pyvhost.scsi.disks import Served
from pyvhost.scsi.events import EventQueue
from pyvhost.scsi.lun import MAX_LUN, MAX_TARGET
from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.plane import DiskWorker, Plane
from pyvhost.scsi.requests import REPORT_LUNS_WLUN, Address
from pyvhost.scsi.sense import Asc
from pyvhost.scsi.stores.base import Store
from pyvhost.scsi.target import Target
from pyvhost.scsi.unit import LogicalUnit
from pyvhost.scsi.units import UnitTable
from pyvhost.vhost.device import Device
from pyvhost.vhost.worker import Int64s


@dataclass
class Unit:
    """A unit of a device: its entry in the loop's table, its row, and who waits until the loop has nothing of it."""

    address: Address
    unit: LogicalUnit
    entry: int
    row: Int64s
    drained: list[Callable[[], object]]


class DeviceUnits(Device):
    """What `device.ScsiDevice` is built on."""

    def __init__(self, name: str, vring_count: int, *, busyloop_timeout: int = 0) -> None:
        super().__init__(name, vring_count, busyloop_timeout=busyloop_timeout)
        self._targets: dict[int, Target] = {}
        self._units: dict[Address, Unit] = {}
        self._table = UnitTable()
        self._worker: DiskWorker | None = None
        self._nexus = Nexus(self.name)
        self._rows: list[Int64s] = []
        self._events: EventQueue | None = None
        #: Units, gone ones as well, for which somebody waits until the loop has nothing of them.
        self._draining: list[Unit] = []

    @property
    def nexus(self) -> Nexus:
        """The guest, as an initiator."""
        return self._nexus

    def target_of(self, address: Address) -> Target | None:
        """The target that is addressed; the well known unit is the first one's if there is none of its own."""
        found = self._targets.get(address.target)
        if found is None and address == Address(0, REPORT_LUNS_WLUN) and self._targets:
            return self._targets[min(self._targets)]
        return found

    def entry(self, address: Address) -> int:
        """A unit's entry in the loop's table; 0: there is none."""
        known = self._units.get(address)
        return known.entry if known is not None else 0

    @property
    def luns(self) -> list[Served]:
        """What there is."""
        return [Served(at.target, at.lun, known.unit.store) for at, known in self._units.items()]

    def unit(self, target: int, lun: int) -> LogicalUnit:
        """A unit. KeyError: there is none."""
        return self._units[Address(target, lun)].unit

    def add_lun(self, target: int, lun: int, store: Store | str, *, serial: str | None = None) -> None:
        """A disk more, which the guest is told of. ValueError: no such place, or it is taken; OSError: no store."""
        assert self.poller is not None
        if not 0 <= target <= MAX_TARGET or not 0 <= lun <= MAX_LUN:
            raise ValueError(f"LUN {target}:{lun}: targets go from 0 to {MAX_TARGET}, LUNs to {MAX_LUN}")
        address = Address(target, lun)
        if address in self._units:
            raise ValueError(f"LUN {target}:{lun} is taken by {self._units[address].unit.store.spec}")
        unit = disks.make_unit(store, self.name, address, serial)
        kept = unit.reservations.path
        if kept is not None and any(known.unit.reservations.path == kept for known in self._units.values()):
            raise ValueError(f"LUN {target}:{lun}: {kept} has another unit's reservations")
        unit.open(self.poller)
        there = self._targets.get(target)
        if there is None:
            there = self._targets[target] = Target(f"{self.name} {target}")
            there.attach(self._nexus)
        known = self._adopt(address, unit)
        there.add(lun, unit)
        self._fast_changed(known)
        self._tell(abi.T_TRANSPORT_RESET, address, abi.EVT_RESET_RESCAN)

    def _adopt(self, address: Address, unit: LogicalUnit) -> Unit:
        """Has the loop and the counters know a unit that is open."""
        row = self._row(f"{address.target}:{address.lun}", unit.store.spec)
        known = self._units[address] = Unit(address, unit, self._table.add(address, row), row, [])
        unit.drain = lambda done: self._drain(known, done)
        unit.on_fast_changed = lambda _unit: self._fast_changed(known)
        unit.on_event = lambda _unit, asc: self._unit_changed(known, asc)
        return known

    def remove_lun(self, target: int, lun: int) -> None:
        """A disk less, of which the guest hears. ValueError: there is none."""
        address = Address(target, lun)
        if address not in self._units:
            raise ValueError(f"there is no LUN {target}:{lun}")
        known = self._give_up(address)

        def gone() -> None:
            self._release(known.row)

        self._targets[target].remove(lun, gone)
        self._tell(abi.T_TRANSPORT_RESET, address, abi.EVT_RESET_REMOVED)

    def _give_up(self, address: Address) -> Unit:
        """Has the loop begin nothing more of a unit; its row is kept."""
        known = self._units.pop(address)
        # Its entry may be another's soon.
        known.unit.on_fast_changed = known.unit.on_event = None
        self._table.remove(address)
        return known

    def resize_lun(self, target: int, lun: int, size: int | None = None) -> None:
        """Looks for a disk's new size, or gives it one, in bytes. ValueError: no such LUN; VhostError EOPNOTSUPP."""
        known = self._units.get(Address(target, lun))
        if known is None:
            raise ValueError(f"there is no LUN {target}:{lun}")
        disks.resize(known.unit.store, size, f"{self.name}: LUN {target}:{lun}")

    # --- the compiled loop --------------------------------------------------------------------------------

    def _fast_changed(self, known: Unit) -> None:
        unit, entry = known.unit, known.entry
        store64(entry + layout.UNIT_FAST, 0)
        fast = int(unit.fast(self._nexus)) if unit.store.fd >= 0 and self._has_uring else 0
        if not fast:
            return
        needs = {
            layout.UNIT_FD: unit.store.fd,
            layout.UNIT_SHIFT: unit.block_size.bit_length() - 1,
            layout.UNIT_BLOCKS: unit.blocks,
            layout.UNIT_DSYNC: int(unit.write_through),
        }
        if any(load64(entry + word) != value for word, value in needs.items()):
            # Nobody is in the middle of a command, with some of the words of before.
            assert self._worker is not None
            with self._worker.paused():
                for word, value in needs.items():
                    store64(entry + word, value)
        store64(entry + layout.UNIT_FAST, fast)

    @property
    def _has_uring(self) -> bool:
        return self._worker is not None and self._worker.has_uring

    def _drain(self, known: Unit, done: Callable[[], object]) -> None:
        assert self._worker is not None
        with self._worker.paused():
            if load64(known.entry + layout.UNIT_IN_FLIGHT):
                store64(known.entry + layout.UNIT_WATCHED, 1)
                known.drained.append(done)
                if known not in self._draining:
                    self._draining.append(known)
                return
        done()

    def loop_drained(self) -> None:
        """The last operation of a watched unit has ended."""
        draining, self._draining = self._draining, []
        for known in draining:
            if load64(known.entry + layout.UNIT_IN_FLIGHT):
                self._draining.append(known)
                continue
            waiting, known.drained = known.drained, []
            for done in waiting:
                done()

    # --- events -------------------------------------------------------------------------------------------

    def _unit_changed(self, known: Unit, asc: Asc) -> None:
        self._fast_changed(known)
        code = int(asc)
        self._tell(abi.T_PARAM_CHANGE, known.address, code >> 8 | (code & 0xFF) << 8)

    def _tell(self, event: int, address: Address, reason: int) -> None:
        wanted = abi.F_CHANGE if event == abi.T_PARAM_CHANGE else abi.F_HOTPLUG
        if self._events is not None and self.acked_features >> wanted & 1:
            self._events.tell(event, address.encode(), reason)

    # --- counters -----------------------------------------------------------------------------------------

    def _row(self, queue: str, backend: str = "-") -> Int64s:
        row = Plane.get().row(self.name, "scsi", queue, backend)
        self._rows.append(row)
        return row

    def _release(self, row: Int64s) -> None:
        self._rows = [other for other in self._rows if other is not row]
        Plane.get().counters.release(row)
