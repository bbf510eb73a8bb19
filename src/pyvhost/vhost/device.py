"""The device model: what the seed calls a vhost device, whatever front end drives it and whatever it is.

Its methods are the seed's ioctls by name. A vring is set up (num, base, addresses, eventfds) while it is
stopped or while it runs, and runs while the transport says so (`set_vring_running`); what runs has its record
in a *place*: a worker's loop, or a chain handler in Python.

Promises: what is refused changes nothing; descriptors that are handed over are closed exactly once; memory, log
and IOTLB can be replaced while rings run, and nothing of theirs is lost.
Never: knows a transport or a device type.
"""

from __future__ import annotations

import errno
import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import ClassVar, Final

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.host import eventfd
from pyvhost.host.fds import close_all
from pyvhost.host.poller import Poller
from pyvhost.vhost import lost
from pyvhost.vhost.device_memory import DeviceMemory
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.vring import Vring

_log = logging.getLogger(__name__)

#: What every device offers: virtio 1.2, 6, and the legacy bits of the seed's time.
TRANSPORT_FEATURES: Final = sum(
    1 << bit
    for bit in (
        virtio.F_NOTIFY_ON_EMPTY,
        virtio.F_ANY_LAYOUT,
        virtio.RING_F_INDIRECT_DESC,
        virtio.RING_F_EVENT_IDX,
        virtio.F_VERSION_1,
        virtio.F_ACCESS_PLATFORM,
        abi.F_LOG_ALL,
    )
)


class Device(DeviceMemory):
    """A vhost device of `vring_count` vrings. All methods belong to the control thread."""

    kind: ClassVar[str]
    virtio_id: ClassVar[int]

    def __init__(self, name: str, vring_count: int, busyloop_timeout: int = 0) -> None:
        super().__init__(name, vring_count, busyloop_timeout)
        self.owned = False
        #: The session's: called when the configuration space changes.
        self.config_changed: Callable[[], None] | None = None
        #: The control thread's loop, for what is handled in Python.
        self.poller: Poller | None = None
        #: The session's: called when the front end has taken its memory away (`lost_memory`).
        self.memory_lost: Callable[[], None] | None = None
        #: The session's: called on the control thread when `under_way` may tell of less.
        self.progress: Callable[[], None] | None = None

    def attach(self, poller: Poller) -> None:
        """Whoever serves the device says on which loop, once, before anything else."""
        if self.poller is not None:
            raise RuntimeError(f"{self.name} is served already")
        self.poller = poller
        lost.watch(poller, self)

    def close(self) -> None:
        """Gives up all that the device has of the host; nobody serves it any more."""
        self.reset()
        self._misses.close()

    # --- what a device type says --------------------------------------------------------------------------

    @property
    @abstractmethod
    def features(self) -> int:
        """Offered, without what belongs to a transport."""

    @property
    def queue_num(self) -> int:
        """What VHOST_USER_GET_QUEUE_NUM answers."""
        return len(self.vrings)

    def features_changed(self) -> None:
        """`acked_features` is new."""

    def get_config(self, offset: int, size: int) -> bytes:
        """Bytes of the configuration space: fewer than `size` where it ends."""
        return b""

    def set_config(self, offset: int, data: bytes, flags: int) -> None:
        """The driver writes to the configuration space."""
        raise VhostError(errno.EOPNOTSUPP, f"{self.name}: its configuration space can't be written")

    def send_rarp(self, mac: bytes) -> None:
        """The guest with this address has moved here: tell the network (VHOST_USER_SEND_RARP)."""
        raise VhostError(errno.EOPNOTSUPP, f"{self.name}: a {self.kind} device sends no RARP")

    def set_mtu(self, mtu: int) -> None:
        """The guest's MTU (VHOST_USER_NET_SET_MTU), in bytes."""
        raise VhostError(errno.EOPNOTSUPP, f"{self.name}: a {self.kind} device has no MTU")

    # --- the seed's interface -----------------------------------------------------------------------------

    @property
    def vring_count(self) -> int:
        """How many vrings there are."""
        return len(self.vrings)

    def set_owner(self) -> None:
        """VHOST_SET_OWNER. EBUSY: it has one."""
        if self.owned:
            raise VhostError(errno.EBUSY, f"{self.name}: it has an owner")
        self.owned = True

    def reset_owner(self) -> None:
        """VHOST_RESET_OWNER: everything as new."""
        self.reset()

    def reset(self) -> None:
        """Stops all vrings and forgets all that a front end has said."""
        for vring in self.vrings:
            self._rings.stop(vring)
            for name in ("kick", "call", "err"):
                self._replace_fd(vring, name, -1)
            self.vrings[vring.index] = Vring(vring.index, busyloop_timeout=self._busyloop_timeout)
        self._forget_memory()
        self.owned = False
        if self.acked_features:
            self.acked_features = 0
            self.features_changed()

    def set_features(self, bits: int) -> None:
        """VHOST_SET_FEATURES. EOPNOTSUPP: not all are offered; EFAULT: a ring or the log is not in memory then."""
        unknown = bits & ~self.features
        if unknown:
            raise VhostError(errno.EOPNOTSUPP, f"{self.name}: features {unknown:#x} are not offered")
        if bits >> abi.F_LOG_ALL & 1:
            self._memory.check_log(self._memory.log)
        translated = bits >> virtio.F_ACCESS_PLATFORM & 1
        if bits == self.acked_features and not translated:
            return
        self._rings.check(self._memory.table, bits)
        with self._all_paused():
            self.acked_features = bits
            moved = self._memory.translate(bool(translated), self.keeps_iotlb)
            self.features_changed()
            for vring in self._running():
                if self._rings.negotiated(vring) or moved:
                    self._rings.locate(vring)

    def set_vring_num(self, index: int, num: int) -> None:
        """VHOST_SET_VRING_NUM. EBUSY: it runs; EINVAL: not a power of two of at most 32768."""
        vring = self._vring(index)
        if vring.place is not None:
            raise VhostError(errno.EBUSY, f"{self.name}: vring {index}: num can't change while it runs")
        if not 0 < num <= virtio.QUEUE_SIZE_MAX or num & (num - 1):
            raise VhostError(
                errno.EINVAL,
                f"{self.name}: vring {index}: num {num} is no power of two up to {virtio.QUEUE_SIZE_MAX}",
            )
        vring.num = num

    def set_vring_base(self, index: int, num: int) -> None:
        """VHOST_SET_VRING_BASE. EBUSY: it runs; EINVAL: above 65535."""
        vring = self._vring(index)
        if vring.place is not None:
            raise VhostError(errno.EBUSY, f"{self.name}: vring {index}: base can't change while it runs")
        if not 0 <= num <= 0xFFFF:
            raise VhostError(errno.EINVAL, f"{self.name}: vring {index}: base {num} is above 65535")
        vring.base = num

    def get_vring_base(self, index: int) -> int:
        """VHOST_GET_VRING_BASE: the next available index that will be looked at."""
        vring = self._vring(index)
        return vring.base if vring.place is None else int(vring.place.record["last_avail"])

    def set_vring_addr(
        self,
        index: int,
        flags: int,
        desc_user_addr: int,
        used_user_addr: int,
        avail_user_addr: int,
        log_guest_addr: int,
    ) -> None:
        """VHOST_SET_VRING_ADDR. EOPNOTSUPP: unknown flags; EINVAL: misaligned; EFAULT: not memory, and it runs."""
        vring = self._vring(index)
        if flags & ~(1 << abi.VRING_F_LOG):
            raise VhostError(errno.EOPNOTSUPP, f"{self.name}: vring {index}: flags {flags:#x} are not known")
        for what, address, align in (
            ("avail", avail_user_addr, virtio.VRING_AVAIL_ALIGN_SIZE),
            ("used", used_user_addr, virtio.VRING_USED_ALIGN_SIZE),
        ):
            if address % align:
                raise VhostError(
                    errno.EINVAL,
                    f"{self.name}: vring {index}: {what} address {address:#x} is not {align}-byte aligned",
                )
        old = (vring.flags, vring.desc, vring.used, vring.avail, vring.log)
        # Who serves it looks its parts up itself, when it waits for the IOTLB.
        with vring.place.paused() if vring.place is not None else nullcontext():
            vring.flags, vring.desc, vring.used = flags, desc_user_addr, used_user_addr
            vring.avail, vring.log = avail_user_addr, log_guest_addr
            try:
                if vring.place is not None:
                    self._rings.locate(vring)
                elif vring.wanted:
                    self._rings.start(vring)
            except OSError as error:
                vring.flags, vring.desc, vring.used, vring.avail, vring.log = old
                raise self._refused(error) from error

    def set_vring_kick(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_KICK: the eventfd that the driver signals, now the device's; -1: none, poll instead."""
        self._set_fd(index, "kick", fd)

    def set_vring_call(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_CALL: what to signal when buffers were used; -1: nothing."""
        self._set_fd(index, "call", fd)

    def set_vring_err(self, index: int, fd: int) -> None:
        """VHOST_SET_VRING_ERR: what to signal when the guest broke the ring; -1: nothing."""
        self._set_fd(index, "err", fd)

    def set_vring_running(self, index: int, running: bool) -> None:
        """Serve a vring, or let it rest. EINVAL: it has no size; EFAULT: its addresses are not memory."""
        vring = self._vring(index)
        if running:
            if vring.place is None and vring.desc is not None:
                self._rings.start(vring)
            vring.wanted = True
        else:
            vring.wanted = False
            self._rings.stop(vring)

    def give_up_vring(self, index: int) -> None:
        """Nobody waits for what a vring has in flight: it is about to be stopped, and inflight memory has the rest.

        By itself nothing: only a device whose chains outlive a pause has anything in flight.
        """

    def under_way(self, rings: Sequence[int], *, former: Collection[tuple[int, int]] = ()) -> str:
        """What the host has yet to end before these vrings can be stopped, in words; "": nothing, they can be.

        They begin nothing more meanwhile. What may write into memory that an IOTLB has lost is always told of, and
        so is what front ends before this one have begun, if they had one of the files `former` (device and inode)
        in their memory. By itself nothing: see `give_up_vring`.
        """
        return ""

    def set_vring_endian(self, index: int, num: int) -> None:
        """VHOST_SET_VRING_ENDIAN: a legacy guest's byte order. EBUSY: it runs; EINVAL: neither of the two."""
        vring = self._vring(index)
        if vring.place is not None:
            raise VhostError(errno.EBUSY, f"{self.name}: vring {index}: endian can't change while it runs")
        if num not in (abi.VRING_LITTLE_ENDIAN, abi.VRING_BIG_ENDIAN):
            raise VhostError(errno.EINVAL, f"{self.name}: vring {index}: endian {num} is neither 0 nor 1")
        vring.endian = num

    def get_vring_endian(self, index: int) -> int:
        """VHOST_GET_VRING_ENDIAN."""
        return self._vring(index).endian

    def set_vring_busyloop_timeout(self, index: int, timeout: int) -> None:
        """VHOST_SET_VRING_BUSYLOOP_TIMEOUT: microseconds that a vring is polled before it rests."""
        vring = self._vring(index)
        vring.busyloop_timeout = timeout
        if vring.place is not None:
            with vring.place.paused():
                vring.place.poll_for(vring)

    def get_vring_busyloop_timeout(self, index: int) -> int:
        """VHOST_GET_VRING_BUSYLOOP_TIMEOUT."""
        return self._vring(index).busyloop_timeout

    # --- within -------------------------------------------------------------------------------------------

    def _vring(self, index: int) -> Vring:
        if not 0 <= index < len(self.vrings):
            raise VhostError(
                errno.ENOBUFS, f"{self.name}: there is no vring {index}, only {len(self.vrings)}"
            )
        return self.vrings[index]

    def _set_fd(self, index: int, name: str, fd: int) -> None:
        try:
            vring = self._vring(index)
            if fd >= 0:
                self._check_fd(f"{self.name}: vring {index}: {name}", name, fd)
        except OSError:
            close_all([fd])
            raise
        place = vring.place
        if place is None:
            self._replace_fd(vring, name, fd)
            return
        with place.paused():
            if name == "kick":
                place.end(vring)
                self._replace_fd(vring, name, fd)
                place.begin(vring)
            else:
                first = name == "call" and vring.call < 0
                self._replace_fd(vring, name, fd)
                place.record[f"{name}_fd"] = fd
                if first and fd >= 0:
                    # What was used before nobody was called for.
                    eventfd.signal(fd)

    @staticmethod
    def _replace_fd(vring: Vring, name: str, fd: int) -> None:
        close_all([getattr(vring, name)])
        setattr(vring, name, fd)
