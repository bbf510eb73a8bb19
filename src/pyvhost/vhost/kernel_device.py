"""A device as Linux's own vhost devices are: addresses are this process's, and every check is the kernel's.

It is the one device model with what `/dev/vhost-*` adds to it: an owner, a table that may be absent, addresses that
are looked at when a ring is bound and not before, rings that are bound to something and yet can't be served.

Promises: what the kernel accepts is accepted and what it refuses is refused, with its errno; memory that is not
mapped readable and writable when it is handed over is in no block that the data plane sees.
Never: reads an ioctl's argument (`ioctls` does), or knows a device type.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.dataplane import guard
from pyvhost.host import maps, user_memory
from pyvhost.host.control_thread import ControlThread
from pyvhost.memory.dirty_log import DirtyLog
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.device import Device
from pyvhost.vhost.errors import VhostError

#: Regions of a memory table: the kernel's max_mem_regions, as it comes.
MAX_REGIONS: Final = 64
_TOP: Final = 1 << 64
_LOG_ALL: Final = 1 << abi.F_LOG_ALL


class KernelDevice(Device):
    """A device with `vring_count` rings, as an open `/dev/vhost-*` is one."""

    #: What a device type has of its own: request numbers, and what to do with the argument. No owner is asked for.
    ioctls: ClassVar[Mapping[int, Callable[[Any, Any], None]]] = {}
    #: Of the ioctls that all types have: those that this one has not.
    unknown: ClassVar[frozenset[int]] = frozenset()
    #: Whether IOTLB messages are read from it and written to it.
    has_messages: ClassVar[bool] = True
    #: The thread that its methods belong to; None: any, one at a time.
    control: ControlThread | None = None
    max_mem_slots = MAX_REGIONS
    keeps_iotlb = True
    #: What GET_BACKEND_FEATURES answers.
    backend_features: ClassVar[int] = 1 << abi.BACKEND_F_IOTLB_MSG_V2

    def __init__(self, name: str, vring_count: int, busyloop_timeout: int = 0) -> None:
        self.usable_memory = maps.usable
        super().__init__(name, vring_count, busyloop_timeout)
        #: Who calls: the number of a process. A transport that serves other processes says which one.
        self.caller: Callable[[], int] = os.getpid
        #: FORK_OWNER_*: whose children the kernel's workers are. Ours are threads of this process either way.
        self.fork_from_owner = abi.FORK_OWNER_TASK
        #: BACKEND_F_* that were acknowledged.
        self.acked_backend_features = 0
        self._owner = 0
        #: The table as it was handed over; None: there never was one, and no ring can be bound.
        self._regions: list[MemoryRegion] | None = None
        self._log_bases: list[int] = []
        #: Rings that the device type has bound to what it serves them with.
        self._bound: set[int] = set()
        self._as_new()

    # --- who may ask --------------------------------------------------------------------------------------

    def set_owner(self) -> None:
        """VHOST_SET_OWNER. EBUSY: it has one."""
        super().set_owner()
        self._owner = self.caller()

    def require_owner(self) -> None:
        """EPERM: it has no owner, or another process is it."""
        if not self.owned or self._owner != self.caller():
            raise VhostError(errno.EPERM, f"{self.name}: process {self.caller()} is not its owner")

    def require_no_owner(self) -> None:
        """EBUSY: it has an owner."""
        if self.owned:
            raise VhostError(errno.EBUSY, f"{self.name}: it has an owner already")

    def require_vring(self, index: int) -> None:
        """ENOBUFS: it has no such ring."""
        self._vring(index)

    def require_stopped(self, index: int, what: str) -> None:
        """EBUSY: the ring is bound, so that `what` can't change."""
        if index in self._bound:
            raise VhostError(
                errno.EBUSY, f"{self.name}: vring {index}: {what} can't change while it is bound"
            )

    def require_fork(self) -> None:
        """EFAULT: its workers are not this process's children (VHOST_SET_FORK_FROM_OWNER 0)."""
        if self.fork_from_owner == abi.FORK_OWNER_KTHREAD:
            raise VhostError(errno.EFAULT, f"{self.name}: workers of the kernel's own can't be made or freed")

    def set_fork_from_owner(self, value: int) -> None:
        """VHOST_SET_FORK_FROM_OWNER. EINVAL: neither 0 nor 1."""
        if value not in (abi.FORK_OWNER_KTHREAD, abi.FORK_OWNER_TASK):
            raise VhostError(errno.EINVAL, f"{self.name}: fork from owner: {value}, expected 0 or 1")
        self.fork_from_owner = value

    def reset_owner(self) -> None:
        """VHOST_RESET_OWNER: everything as new, but that there is a memory table now: an empty one."""
        self.require_owner()
        self.reset()
        self._regions = []

    def reset(self) -> None:
        """Stops all rings and forgets everything."""
        self._bound.clear()
        super().reset()
        self._as_new()

    def _as_new(self) -> None:
        self._regions = None
        self._log_bases = [0] * len(self.vrings)
        self.acked_backend_features = 0
        self.fork_from_owner = abi.FORK_OWNER_TASK
        for vring in self.vrings:
            # The kernel's rings have a size from the start.
            vring.num, vring.desc = 1, 0

    # --- features -----------------------------------------------------------------------------------------

    def set_features(self, bits: int) -> None:
        """VHOST_SET_FEATURES. EOPNOTSUPP: not all are offered; EFAULT: they ask for a log where none can be."""
        unknown = bits & ~self.features
        if unknown:
            raise VhostError(errno.EOPNOTSUPP, f"{self.name}: features {unknown:#x} are not offered")
        if bits & _LOG_ALL:
            for index in self._bound:
                if not self._table_ok(self._log_bases[index], logging=True):
                    raise self._bad_log(self._log_bases[index])
        super().set_features(bits)

    def set_backend_features(self, bits: int) -> None:
        """VHOST_SET_BACKEND_FEATURES. EOPNOTSUPP: not all are offered."""
        unknown = bits & ~self.backend_features
        if unknown:
            raise VhostError(errno.EOPNOTSUPP, f"{self.name}: back-end features {unknown:#x} are not offered")
        self.acked_backend_features = bits

    # --- memory and log -----------------------------------------------------------------------------------

    def set_mem_table(self, regions: Sequence[MemoryRegion]) -> None:
        """VHOST_SET_MEM_TABLE. E2BIG: too many; EFAULT: a region wraps, or a bound ring can't live with one."""
        if len(regions) > self.max_mem_slots:
            raise VhostError(
                errno.E2BIG, f"{self.name}: {len(regions)} regions, {self.max_mem_slots} at most"
            )
        whole = [part for region in regions for part in self._whole(region)]
        former, self._regions = self._regions, whole
        if not all(self._table_ok(self._log_bases[i], logging=self._logs_all) for i in self._bound):
            self._regions = former
            raise VhostError(errno.EFAULT, f"{self.name}: the table or its log is not all in user space")
        self._look_again()

    def set_log_address(self, address: int) -> None:
        """VHOST_SET_LOG_BASE with a pointer. EFAULT: a bound ring would log where user space has ended."""
        refused = [index for index in self._bound if not self._log_ok(index, address)]
        # Each ring has it for itself: one that can't take it keeps others from nothing.
        self._log_bases = [
            base if index in refused else address for index, base in enumerate(self._log_bases)
        ]
        self._use_log()
        if refused:
            raise self._bad_log(address)

    @property
    def _logs_all(self) -> bool:
        return bool(self.acked_features & _LOG_ALL)

    def _whole(self, region: MemoryRegion) -> list[MemoryRegion]:
        """A region as the kernel keeps it: its last byte is what counts, and the whole space is two halves."""
        first, size, address = region.guest_phys_addr, region.memory_size, region.userspace_addr
        last = (first + size - 1) % _TOP
        if last < first:
            raise VhostError(errno.EFAULT, f"{self.name}: {region} wraps, or has no byte")
        if first == 0 and last == _TOP - 1:
            half = _TOP // 2
            return [MemoryRegion(0, half, address), MemoryRegion(half, half, (address + half) % _TOP)]
        return [region]

    def _table_ok(self, log_base: int, *, logging: bool) -> bool:
        """Whether all of the table is in user space, and the log of it as well."""
        if self._regions is None:
            return False
        return all(
            maps.access_ok(region.userspace_addr, region.memory_size)
            and (not logging or _log_access_ok(log_base, region.guest_phys_addr, region.memory_size))
            for region in self._regions
        )

    def _log_ok(self, index: int, log_base: int) -> bool:
        if not self._table_ok(log_base, logging=self._logs_all):
            return False
        vring = self.vrings[index]
        return self._used_log_ok(index, vring.flags, vring.log, log_base)

    def _used_log_ok(self, index: int, flags: int, address: int, log_base: int) -> bool:
        if self.has_iotlb or not flags & 1 << abi.VRING_F_LOG:
            return True
        return _log_access_ok(log_base, address, self._sizes(index)[2])

    def _look_again(self) -> None:
        """Has the data plane see what there is of table and log now."""
        super().set_mem_table(self._clipped())
        self._use_log()

    def _clipped(self) -> list[MemoryRegion]:
        """The table without what lies beyond user space, which nothing can be mapped at."""
        clipped = []
        for region in self._regions or ():
            size = min(region.memory_size, maps.USER_TOP - region.userspace_addr)
            if size > 0:
                clipped.append(MemoryRegion(region.guest_phys_addr, size, region.userspace_addr))
        return clipped

    def _use_log(self) -> None:
        tops = [region.guest_phys_addr + region.memory_size for region in self._regions or ()]
        tops += [vring.log + self._sizes(vring.index)[2] for vring in self.vrings if vring.flags]
        # What is written is written to one log: the first bound ring's.
        base = self._log_bases[min(self._bound, default=0)]
        self.set_log_base(DirtyLog.at(base, maps.usable, max(tops, default=0)))

    def _bad_log(self, address: int) -> VhostError:
        return VhostError(errno.EFAULT, f"{self.name}: a log at {address:#x} would leave user space")

    # --- rings --------------------------------------------------------------------------------------------

    def set_vring_addr(
        self,
        index: int,
        flags: int,
        desc_user_addr: int,
        used_user_addr: int,
        avail_user_addr: int,
        log_guest_addr: int,
    ) -> None:
        """VHOST_SET_VRING_ADDR. EOPNOTSUPP: unknown flags; EINVAL: misaligned, or bound and not in user space."""
        self._check_addr(index, flags, used_user_addr, avail_user_addr, log_guest_addr)
        if index in self._bound:
            parts = zip((desc_user_addr, avail_user_addr, used_user_addr), self._sizes(index), strict=True)
            if not self.has_iotlb and not all(maps.access_ok(at, size) for at, size in parts):
                raise VhostError(errno.EINVAL, f"{self.name}: vring {index}: a part is not in user space")
            if not self._used_log_ok(index, flags, log_guest_addr, self._log_bases[index]):
                raise VhostError(errno.EINVAL, f"{self.name}: vring {index}: its log is not in user space")
        super().set_vring_addr(index, flags, desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr)
        if flags:
            self._use_log()

    def _check_addr(self, index: int, flags: int, used: int, avail: int, log: int) -> None:
        if flags & ~(1 << abi.VRING_F_LOG):
            raise VhostError(errno.EOPNOTSUPP, f"{self.name}: vring {index}: flags {flags:#x} are not known")
        for what, address, align in (
            ("avail", avail, virtio.VRING_AVAIL_ALIGN_SIZE),
            ("used", used, virtio.VRING_USED_ALIGN_SIZE),
            ("log", log, virtio.VRING_USED_ALIGN_SIZE),
        ):
            if address % align:
                raise VhostError(
                    errno.EINVAL,
                    f"{self.name}: vring {index}: {what} {address:#x} is not {align}-byte aligned",
                )

    def _sizes(self, index: int) -> tuple[int, int, int]:
        """Bytes of a ring's descriptors, available and used part (virtio 1.2, 2.7)."""
        num = self.vrings[index].num
        event = 2 if self.acked_features >> virtio.RING_F_EVENT_IDX & 1 else 0
        return 16 * num, 4 + 2 * num + event, 4 + 8 * num + event

    def _parts(self, index: int) -> list[tuple[int, int]]:
        vring = self.vrings[index]
        return list(zip((vring.desc or 0, vring.avail, vring.used), self._sizes(index), strict=True))

    # --- what a device type calls -------------------------------------------------------------------------

    def is_bound(self, index: int) -> bool:
        """Whether the ring has been bound to what its device serves it with."""
        return index in self._bound

    def check_access(self, index: int) -> None:
        """What is looked at before a ring is bound or unbound. EFAULT: no table, or addresses not in user space."""
        if not self._log_ok(index, self._log_bases[index]):
            raise VhostError(
                errno.EFAULT,
                f"{self.name}: vring {index}: no memory table, or it or the log leaves user space",
            )
        if not self.has_iotlb and not all(maps.access_ok(at, size) for at, size in self._parts(index)):
            raise VhostError(errno.EFAULT, f"{self.name}: vring {index}: a part is not in user space")

    def prepare(self, index: int) -> None:
        """What binding begins with. EFAULT: the used ring can't be written and read; nothing else is looked at."""
        if self.has_iotlb:
            self._require_used(index)
            return
        used = self.vrings[index].used
        # As the kernel: from now on it is ours to ask for kicks.
        user_memory.write(used, bytes(2))
        user_memory.read(used, 4)

    def bind_all(self) -> None:
        """Serves all rings, with no look at what is there of them; one that was never set up as soon as it is."""
        guard.install(lent=True)
        self._bound.update(range(len(self.vrings)))
        self._look_again()
        for vring in self.vrings:
            if vring.desc or vring.avail or vring.used:
                self.set_vring_running(vring.index, True)
            else:
                vring.wanted = True

    def bind(self, index: int, *, look: bool) -> None:
        """Serves a ring that is prepared; `look`: at once, and not at its next kick."""
        guard.install(lent=True)
        self._bound.add(index)
        self._look_again()
        self.set_vring_running(index, True)
        place = self.vrings[index].place
        assert place is not None
        if look:
            with place.paused():
                place.look()
        else:
            # What it lacks it asks for at its kick.
            self._misses.forget(index)

    def unbind(self, index: int) -> None:
        """Serves a ring no more."""
        self._bound.discard(index)
        self.set_vring_running(index, False)

    def _require_used(self, index: int) -> None:
        """EFAULT: the IOTLB does not have the used ring. The front end is asked for it, as any reader would."""
        used = self.vrings[index].used
        if self.iotlb_translate(used, 4, abi.ACCESS_WO) is None:
            self.iotlb_miss(index, used, abi.ACCESS_RO)
            raise VhostError(
                errno.EFAULT, f"{self.name}: vring {index}: the IOTLB has no {used:#x}, its used ring"
            )

    # --- the IOTLB ----------------------------------------------------------------------------------------

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int) -> None:
        """VHOST_IOTLB_UPDATE. EFAULT: there is no IOTLB, a range wraps, or it is not in user space."""
        if not self.has_iotlb:
            raise VhostError(errno.EFAULT, f"{self.name}: it has no IOTLB")
        if iova + size > _TOP or uaddr + size > _TOP:
            raise VhostError(errno.EFAULT, f"{self.name}: IOTLB: {iova:#x} or {uaddr:#x} + {size:#x} wraps")
        if perm & abi.ACCESS_RW and not maps.access_ok(uaddr, size):
            raise VhostError(errno.EFAULT, f"{self.name}: IOTLB: {uaddr:#x}+{size:#x} is not in user space")
        super().iotlb_update(iova, size, uaddr, perm & abi.ACCESS_RW)

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        """VHOST_IOTLB_INVALIDATE. EFAULT: there is no IOTLB. Size 0 at 0 is everything, elsewhere nothing."""
        if not self.has_iotlb:
            raise VhostError(errno.EFAULT, f"{self.name}: it has no IOTLB")
        super().iotlb_invalidate(iova, size)

    # --- workers: of a device type that has no more than one -------------------------------------------------

    def new_worker(self) -> int:
        """VHOST_NEW_WORKER: another thread; its number. ENOMEM: there are enough; ENOTTY: one serves all rings."""
        raise self._no_workers()

    def free_worker(self, worker: int) -> None:
        """VHOST_FREE_WORKER. ENODEV: there is none such; EBUSY: rings are attached to it; ENOTTY."""
        raise self._no_workers()

    def attach_vring_worker(self, index: int, worker: int) -> None:
        """VHOST_ATTACH_VRING_WORKER: that thread serves the ring. ENODEV: there is none such; ENOTTY."""
        raise self._no_workers()

    def get_vring_worker(self, index: int) -> int:
        """VHOST_GET_VRING_WORKER: the number of the thread that serves the ring. ENOTTY."""
        raise self._no_workers()

    def _no_workers(self) -> VhostError:
        return VhostError(errno.ENOTTY, f"{self.name}: its workers are not to be chosen")


def _log_access_ok(base: int, address: int, size: int) -> bool:
    """Whether the log's bytes for a guest range are in user space."""
    at = base + address // abi.PAGE_SIZE // 8
    span = abi.PAGE_SIZE * 8
    return at < _TOP and maps.access_ok(at, (size + span - 1) % _TOP // abi.PAGE_SIZE // 8)
