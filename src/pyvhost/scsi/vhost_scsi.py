"""`/dev/vhost-scsi` without the kernel's: disks of an endpoint that was registered in this process.

VHOST_SCSI_SET_ENDPOINT starts all rings at once: control, event, and 128 for requests. One that was never set up
starts as soon as it is.

Promises: the checks of the endpoint's ioctls, their order and errors, are the kernel's; an endpoint that is given up
is as it was, but for what the guest did to its disks. Never: makes a disk.
"""

from __future__ import annotations

import errno
import logging
from functools import partial
from typing import ClassVar, Final

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.abi import virtio_scsi as scsi
from pyvhost.host import eventfd
from pyvhost.host.control_thread import ControlThread
from pyvhost.scsi import endpoints
from pyvhost.scsi.control_seat import ControlSeat
from pyvhost.scsi.device import CONTROL, EVENT, MAX_REQUEST_QUEUES, ScsiDevice
from pyvhost.scsi.endpoints import Endpoint
from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.plane import DiskWorker, Plane
from pyvhost.scsi.queue import RequestQueue
from pyvhost.scsi.requests import HEADER_BYTES, PROTECTED_HEADER_BYTES, Address
from pyvhost.scsi.target import Target
from pyvhost.scsi.unit import LogicalUnit
from pyvhost.vhost import ioctls
from pyvhost.vhost.device import TRANSPORT_FEATURES
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.kernel_device import KernelDevice
from pyvhost.vhost.opening import register

_log = logging.getLogger(__name__)

PATH: Final = "/dev/vhost-scsi"


class VhostScsi(ScsiDevice, KernelDevice):
    """An open `/dev/vhost-scsi`."""

    has_messages: ClassVar[bool] = False
    unknown: ClassVar[frozenset[int]] = frozenset(
        {
            abi.GET_BACKEND_FEATURES,
            abi.SET_BACKEND_FEATURES,
            abi.GET_FEATURES_ARRAY,
            abi.SET_FEATURES_ARRAY,
            abi.NEW_WORKER,
            abi.FREE_WORKER,
            abi.ATTACH_VRING_WORKER,
            abi.GET_VRING_WORKER,
        }
    )

    def __init__(self, name: str = PATH) -> None:
        super().__init__(request_queues=MAX_REQUEST_QUEUES, name=name)
        self.control = ControlThread.get()
        self._endpoint: Endpoint | None = None
        self._seat = -1
        self.control.call(self._begin)

    def _begin(self) -> None:
        assert self.control is not None
        self._seat = ControlSeat.get().take(self._lost)
        try:
            self.attach(self.control.poller)
        except BaseException:
            ControlSeat.get().give_back(self._seat)
            raise

    # --- what vhost.Device asks ---------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """VHOST_SCSI_FEATURES of the seed's time."""
        own = 1 << scsi.F_HOTPLUG | 1 << scsi.F_T10_PI
        return TRANSPORT_FEATURES & ~(1 << virtio.F_ACCESS_PLATFORM) | own

    def features_changed(self) -> None:
        """Has the queues know how long a request's header is."""
        for queue in self._queues:
            queue.header = self._header

    def close(self) -> None:
        """Gives up the endpoint, rings and descriptors."""
        self._leave_endpoint()
        super().close()
        if self._seat >= 0:
            seat, self._seat = self._seat, -1
            ControlSeat.get().give_back(seat)

    # --- the seed's ioctls that are scsi's own --------------------------------------------------------------

    def set_endpoint(self, wwpn: str) -> None:
        """VHOST_SCSI_SET_ENDPOINT: takes the targets of that name, and serves all rings.

        In this order: EFAULT no memory table, or a ring that leaves user space; EEXIST it has an endpoint; ENODEV
        there is none of that name, with a disk, that no other device has.
        """
        self._check_all()
        if self._endpoint is not None:
            raise VhostError(errno.EEXIST, f"{self.name}: it has the endpoint {self._endpoint.wwpn}")
        endpoint = endpoints.find(wwpn)
        if endpoint is None or endpoint.holder is not None or not endpoint.targets:
            why = "is registered" if endpoint is None or not endpoint.targets else "is free"
            raise VhostError(errno.ENODEV, f"{self.name}: no endpoint {wwpn!r} {why}")
        self._endpoint, endpoint.holder = endpoint, self
        for number, target in endpoint.targets.items():
            self._take_target(number, target)
        for address, unit in endpoint.units.items():
            self._fast_changed(self._adopt(address, unit))
        self.bind_all()

    def clear_endpoint(self, wwpn: str) -> None:
        """VHOST_SCSI_CLEAR_ENDPOINT: serves no ring any more, when what was begun has ended.

        In this order: EFAULT as `set_endpoint`; nothing, if it has none; EINVAL it has another.
        """
        self._check_all()
        if self._endpoint is not None and self._endpoint.wwpn != wwpn:
            raise VhostError(
                errno.EINVAL, f"{self.name}: it has the endpoint {self._endpoint.wwpn}, not {wwpn!r}"
            )
        self._leave_endpoint()

    @property
    def events_missed(self) -> bool:
        """VHOST_SCSI_GET_EVENTS_MISSED: whether there was an event that the driver had no buffer for."""
        return self._events is not None and self._events.missed

    def set_events_missed(self, missed: bool) -> None:
        """VHOST_SCSI_SET_EVENTS_MISSED."""
        if self._events is not None:
            self._events.missed = missed

    # --- what the endpoint tells ----------------------------------------------------------------------------

    def unit_came(self, address: Address, unit: LogicalUnit, target: Target) -> None:
        """A disk more."""
        if address.target not in self._targets:
            self._take_target(address.target, target)
        known = self._adopt(address, unit)
        target.add(address.lun, unit)
        self._fast_changed(known)
        self._tell(scsi.T_TRANSPORT_RESET, address, scsi.EVT_RESET_RESCAN)

    def unit_goes(self, address: Address) -> None:
        """A disk less."""
        self.remove_lun(address.target, address.lun)

    # --- within -------------------------------------------------------------------------------------------

    @property
    def protected(self) -> bool:
        """Whether requests have fields for protection information."""
        return bool(self.acked_features >> scsi.F_T10_PI & 1)

    @property
    def _header(self) -> int:
        return PROTECTED_HEADER_BYTES if self.protected else HEADER_BYTES

    def _make_queue(self, index: int) -> RequestQueue:
        queue = super()._make_queue(index)
        queue.header = self._header
        return queue

    def _check_all(self) -> None:
        for vring in self.vrings:
            self.check_access(vring.index)

    def _take_target(self, number: int, target: Target) -> None:
        self._targets[number] = target
        target.attach(self._nexus)

    def _leave_endpoint(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is None:
            return
        for vring in self.vrings:
            self.unbind(vring.index)
        endpoint.holder = None
        left = [self._give_up(address) for address in list(self._units)]
        for known in left:
            known.unit.drain = None
        for target in self._targets.values():
            target.detach(self._nexus)
        self._targets.clear()
        self._nexus = Nexus(self.name)
        for known in left:
            self._drain(known, partial(self._release, known.row))

    def _look_again(self) -> None:
        super()._look_again()
        if self._seat >= 0:
            # What the control thread may touch is what any ring was lent.
            record = ControlSeat.get().rings[self._seat]
            self._memory.point(self.vrings[CONTROL], record, self.acked_features)
            record["own"] = record["located"] = int(bool(self._bound))

    def running_changed(self) -> None:
        """A ring has started or stopped."""
        super().running_changed()
        if self._seat >= 0 and not any(vring.place is not None for vring in self.vrings):
            ControlSeat.get().rings[self._seat]["own"] = 0

    def _lost(self, page: int) -> None:
        """The control thread has met a hole in what was lent: its rings stop until they are bound anew."""
        _log.error(
            "%s: stopped: memory that was lent to it has been unmapped, at %#x; it rests until it is bound anew",
            self.name,
            page,
        )
        for index in (CONTROL, EVENT):
            vring = self.vrings[index]
            if vring.place is None:
                continue
            record = vring.place.record
            record["running"] = record["fault"] = record["own"] = 0
            record["lost"] = 1
            if vring.err >= 0:
                eventfd.signal(vring.err)

    def _take_worker(self) -> DiskWorker:
        return Plane.get().in_process.take()


def _target(device: VhostScsi, argument: ioctls.Argument) -> str:
    target = ioctls.unpack(argument, abi.ScsiTarget)
    if target.reserved:
        raise VhostError(errno.EOPNOTSUPP, f"{device.name}: endpoint: reserved is {target.reserved}, not 0")
    return bytes(target.vhost_wwpn).decode(errors="surrogateescape")


def _set_endpoint(device: VhostScsi, argument: ioctls.Argument) -> None:
    device.set_endpoint(_target(device, argument))


def _clear_endpoint(device: VhostScsi, argument: ioctls.Argument) -> None:
    device.clear_endpoint(_target(device, argument))


def _get_abi_version(device: VhostScsi, argument: ioctls.Argument) -> None:
    ioctls.put(argument, abi.SCSI_ABI_VERSION, 4)


def _set_events_missed(device: VhostScsi, argument: ioctls.Argument) -> None:
    device.set_events_missed(bool(ioctls.number(argument, 4)))


def _get_events_missed(device: VhostScsi, argument: ioctls.Argument) -> None:
    ioctls.put(argument, int(device.events_missed), 4)


VhostScsi.ioctls = {
    abi.SCSI_SET_ENDPOINT: _set_endpoint,
    abi.SCSI_CLEAR_ENDPOINT: _clear_endpoint,
    abi.SCSI_GET_ABI_VERSION: _get_abi_version,
    abi.SCSI_SET_EVENTS_MISSED: _set_events_missed,
    abi.SCSI_GET_EVENTS_MISSED: _get_events_missed,
}
register(PATH, VhostScsi)
