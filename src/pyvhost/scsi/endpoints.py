"""Targets that a `/dev/vhost-scsi` of this process may be given, by world wide port name.

    from pyvhost.scsi import endpoints
    endpoint = endpoints.register("naa.600140554cf3a18e", ["disk.img", "1:0=memory:64M"])

What configfs is to the kernel's device, this is to `pyvhost.open("/dev/vhost-scsi")`: VHOST_SCSI_SET_ENDPOINT finds a
name here. A target's number is the tag of its portal group (tpgt).

Promises: any thread may call anything; units live as long as their endpoint, whoever has it; one device at a time has
an endpoint, and its guest hears of disks that come, go and change. Never: shared with another process.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from typing import Final, Protocol

from pyvhost.host.control_thread import ControlThread
from pyvhost.scsi import disks
from pyvhost.scsi.disks import Served
from pyvhost.scsi.lun import MAX_LUN, MAX_TARGET, Lun, place
from pyvhost.scsi.requests import Address
from pyvhost.scsi.stores.base import Store
from pyvhost.scsi.target import Target
from pyvhost.scsi.unit import LogicalUnit

#: Bytes of a name, with the zero behind it (struct vhost_scsi_target).
MAX_NAME: Final = 223

_NAA: Final = re.compile(r"naa\.([0-9a-fA-F]{16})")


class Holder(Protocol):
    """The device that an endpoint is set on. On the control thread."""

    def unit_came(self, address: Address, unit: LogicalUnit, target: Target) -> None:
        """A unit more, which its target is about to have."""

    def unit_goes(self, address: Address) -> None:
        """A unit less."""


class Endpoint:
    """Targets under one name. Made by `register`."""

    def __init__(self, wwpn: str) -> None:
        self.wwpn = wwpn
        #: Who has it; these three are the control thread's.
        self.holder: Holder | None = None
        self.targets: dict[int, Target] = {}
        self.units: dict[Address, LogicalUnit] = {}
        self._control = ControlThread.get()
        self._closed = False

    @property
    def luns(self) -> list[Served]:
        """What there is."""
        units = self._control.call(lambda: dict(self.units))
        return [Served(at.target, at.lun, unit.store) for at, unit in units.items()]

    @property
    def in_use(self) -> bool:
        """Whether a device has it."""
        return self._control.call(lambda: self.holder is not None)

    def add_lun(self, target: int, lun: int, store: Store | str, *, serial: str | None = None) -> None:
        """A disk more. ValueError: no such place, or it is taken; OSError: no store."""
        self._control.call(lambda: self._add(target, lun, store, serial))

    def remove_lun(self, target: int, lun: int) -> None:
        """A disk less. ValueError: there is none."""
        self._control.call(lambda: self._remove(target, lun))

    def resize_lun(self, target: int, lun: int, size: int | None = None) -> None:
        """Looks for a disk's new size, or gives it one, in bytes. ValueError: no such LUN; VhostError EOPNOTSUPP."""
        self._control.call(lambda: disks.resize(self._unit(target, lun).store, size, f"{target}:{lun}"))

    def unregister(self) -> None:
        """Closes all of it. OSError EBUSY: a device has it. Nothing happens the second time."""
        self._control.call(self._end)

    # --- on the control thread ----------------------------------------------------------------------------

    def _add(self, number: int, lun: int, store: Store | str, serial: str | None) -> None:
        if self._closed:
            raise OSError(errno.ENODEV, "it is registered no more", self.wwpn)
        if not 0 <= number <= MAX_TARGET or not 0 <= lun <= MAX_LUN:
            raise ValueError(f"LUN {number}:{lun}: targets go from 0 to {MAX_TARGET}, LUNs to {MAX_LUN}")
        address = Address(number, lun)
        if address in self.units:
            raise ValueError(f"LUN {number}:{lun} is taken by {self.units[address].store.spec}")
        unit = disks.make_unit(store, self.wwpn, address, serial)
        unit.open(self._control.poller)
        target = self.targets.get(number)
        if target is None:
            found = _NAA.fullmatch(self.wwpn)
            name = f"{self.wwpn},t,{number:#x}"
            target = self.targets[number] = Target(name, int(found[1], 16) if found else None)
        self.units[address] = unit
        if self.holder is not None:
            self.holder.unit_came(address, unit, target)
        else:
            target.add(lun, unit)

    def _remove(self, target: int, lun: int) -> None:
        self._unit(target, lun)
        address = Address(target, lun)
        del self.units[address]
        if self.holder is not None:
            self.holder.unit_goes(address)
        else:
            self.targets[target].remove(lun)

    def _unit(self, target: int, lun: int) -> LogicalUnit:
        unit = self.units.get(Address(target, lun))
        if unit is None:
            raise ValueError(f"there is no LUN {target}:{lun}")
        return unit

    def _end(self) -> None:
        if self._closed:
            return
        if self.holder is not None:
            raise OSError(errno.EBUSY, "a device has it", self.wwpn)
        for address in list(self.units):
            self._remove(address.target, address.lun)
        self._closed = True
        _endpoints.pop(self.wwpn, None)


#: All there are. On the control thread.
_endpoints: Final[dict[str, Endpoint]] = {}


def register(wwpn: str, luns: Iterable[str | Lun] = ()) -> Endpoint:
    """Makes an endpoint of that name, with these disks: `[TARGET:LUN=]SPEC` each, as `pyvhost.ScsiDevice` has them.

    ValueError: a name that is empty or longer than 223 bytes, or a LUN that can't be; OSError EEXIST: the name is
    registered; of a store as it comes.
    """
    if not wwpn or "\0" in wwpn or len(wwpn.encode()) > MAX_NAME:
        raise ValueError(f"{wwpn!r} is no name of an endpoint: 1 to {MAX_NAME} bytes, none of them zero")
    placed = place(luns)

    def make() -> Endpoint:
        if wwpn in _endpoints:
            raise FileExistsError(errno.EEXIST, "it is registered", wwpn)
        endpoint = Endpoint(wwpn)
        try:
            for target, lun, spec in placed:
                endpoint._add(target, lun, spec, None)
        except BaseException:
            endpoint._end()
            raise
        _endpoints[wwpn] = endpoint
        return endpoint

    return ControlThread.get().call(make)


def registered() -> list[str]:
    """The names that there are."""
    return ControlThread.get().call(lambda: sorted(_endpoints))


def find(wwpn: str) -> Endpoint | None:
    """An endpoint by its name. On the control thread."""
    return _endpoints.get(wwpn)
