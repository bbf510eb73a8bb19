"""The device model: what the seed calls a vhost device, whatever front end drives it and whatever it is.

Its methods are the seed's ioctls by name. A vring is set up (num, base, addresses, eventfds) while it is
stopped or while it runs, and runs while the transport says so (`set_vring_running`); what runs has its record
in a *place*: a worker's loop, or a chain handler in Python.

Promises: what is refused changes nothing; descriptors that are handed over are closed exactly once; memory can
be replaced while rings run, and nothing of theirs is lost.
Never: knows a transport or a device type.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Final

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.dataplane import guard
from pyvhost.dataplane.plain import load16, store16
from pyvhost.host import eventfd
from pyvhost.host.fds import close_all
from pyvhost.host.poller import Poller
from pyvhost.memory.regions import Guard, Mapping, MemoryRegion, MemoryTable
from pyvhost.vhost import lost
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.vring import Place, Vring

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
    )
)


def _protect(address: int, length: int) -> int:
    guard.install()
    return guard.protect(address, length)


_guard = Guard(_protect, guard.release, guard.lost)


class Device(ABC):
    """A vhost device of `vring_count` vrings. All methods belong to the control thread."""

    kind: ClassVar[str]
    virtio_id: ClassVar[int]
    #: Most regions that a memory table may have: as many as any peer takes.
    max_mem_slots: int = 509

    def __init__(self, name: str, vring_count: int) -> None:
        self.name = name
        self.vrings = [Vring(i) for i in range(vring_count)]
        self.acked_features = 0
        self.owned = False
        #: The session's: called when the configuration space changes.
        self.config_changed: Callable[[], None] | None = None
        #: The control thread's loop, for what is handled in Python.
        self.poller: Poller | None = None
        #: The session's: called when the front end has taken its memory away (`lost_memory`).
        self.memory_lost: Callable[[], None] | None = None
        self._table = MemoryTable()
        #: How often each region of the table was added.
        self._added: dict[tuple[int, int, int], int] = {}

    def attach(self, poller: Poller) -> None:
        """Whoever serves the device says on which loop, once, before anything else."""
        if self.poller is not None:
            raise RuntimeError(f"{self.name} is served already")
        self.poller = poller
        lost.watch(poller, self)

    def close(self) -> None:
        """Gives up all that the device has of the host; nobody serves it any more."""
        self.reset()

    # --- what a device type says --------------------------------------------------------------------------

    @property
    @abstractmethod
    def features(self) -> int:
        """Offered, without what belongs to a transport."""

    @property
    def queue_num(self) -> int:
        """What VHOST_USER_GET_QUEUE_NUM answers."""
        return len(self.vrings)

    @abstractmethod
    def place_of(self, index: int) -> Place:
        """Where vring `index` runs, given what was negotiated."""

    def features_changed(self) -> None:  # noqa: B027 - a device type may have nothing to do
        """`acked_features` is new."""

    def running_changed(self) -> None:  # noqa: B027
        """A vring has started or stopped."""

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
            self._stop(vring)
            for name in ("kick", "call", "err"):
                self._replace_fd(vring, name, -1)
            self.vrings[vring.index] = Vring(vring.index)
        self._table.close()
        self._table = MemoryTable()
        self._added.clear()
        self.owned = False
        if self.acked_features:
            self.acked_features = 0
            self.features_changed()

    def set_features(self, bits: int) -> None:
        """VHOST_SET_FEATURES. EOPNOTSUPP: not all of them are offered."""
        unknown = bits & ~self.features
        if unknown:
            raise VhostError(errno.EOPNOTSUPP, f"{self.name}: features {unknown:#x} are not offered")
        if bits == self.acked_features:
            return
        self.acked_features = bits
        with self._all_paused():
            self.features_changed()
            for vring in self._running():
                self._negotiated(vring)

    @property
    def lost_memory(self) -> bool:
        """Whether the front end made a memory file smaller than what it shared of it."""
        return self._table.lost

    def set_mem_table(self, regions: Sequence[MemoryRegion]) -> None:
        """VHOST_SET_MEM_TABLE. E2BIG: more than `max_mem_slots`; EINVAL, EFAULT: a region that can't be."""
        made: list[Mapping] = []
        rest = list(regions)
        try:
            if len(regions) > self.max_mem_slots:
                raise VhostError(
                    errno.E2BIG, f"{self.name}: {len(regions)} regions, {self.max_mem_slots} at most"
                )
            while rest:
                made.append(Mapping.make(rest.pop(0), _guard))
            self._swap(made)
            self._added = {mapping.region.where: 1 for mapping in made}
        except OSError as error:
            for mapping in made:
                mapping.drop()
            raise self._refused(error) from error
        finally:
            close_all(region.fd for region in rest)

    def add_mem_region(self, region: MemoryRegion) -> None:
        """One region more (VHOST_USER_ADD_MEM_REG). E2BIG, EINVAL, EFAULT as `set_mem_table`.

        The same region again is the same region, and goes when it was removed as often: QEMU 7.2 adds and
        removes each once a queue pair.
        """
        if region.where in self._added:
            self._added[region.where] += 1
            close_all([region.fd])
            return
        if len(self._table) >= self.max_mem_slots:
            close_all([region.fd])
            raise VhostError(errno.E2BIG, f"{self.name}: {self.max_mem_slots} regions are all there can be")
        mapping: Mapping | None = None
        try:
            mapping = Mapping.make(region, _guard)
            self._swap([*self._table.mappings, mapping])
        except OSError as error:
            if mapping is not None and mapping.tables == 0:
                mapping.drop()
            raise self._refused(error) from error
        self._added[region.where] = 1

    def remove_mem_region(self, region: MemoryRegion) -> None:
        """One region less, named by its addresses and size (VHOST_USER_REM_MEM_REG). EINVAL: there is none such."""
        where = region.where
        if where not in self._added:
            raise VhostError(
                errno.EINVAL, f"{self.name}: no {region} at {region.userspace_addr:#x} to remove"
            )
        if self._added[where] == 1:
            try:
                self._swap([mapping for mapping in self._table.mappings if mapping.region.where != where])
            except OSError as error:
                raise self._refused(error) from error
            del self._added[where]
        else:
            self._added[where] -= 1

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
        vring.flags, vring.desc, vring.used = flags, desc_user_addr, used_user_addr
        vring.avail, vring.log = avail_user_addr, log_guest_addr
        try:
            if vring.place is not None:
                parts = self._translate(vring, self._table)
                with vring.place.paused():
                    self._locate(vring.place.record, parts, self._table)
            elif vring.wanted:
                self._start(vring)
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
                self._start(vring)
            vring.wanted = True
        else:
            vring.wanted = False
            self._stop(vring)

    # --- within -------------------------------------------------------------------------------------------

    def _vring(self, index: int) -> Vring:
        if not 0 <= index < len(self.vrings):
            raise VhostError(
                errno.ENOBUFS, f"{self.name}: there is no vring {index}, only {len(self.vrings)}"
            )
        return self.vrings[index]

    def _running(self) -> list[Vring]:
        return [vring for vring in self.vrings if vring.place is not None]

    @contextmanager
    def _all_paused(self) -> Iterator[None]:
        with ExitStack() as stack:
            for vring in self._running():
                assert vring.place is not None
                stack.enter_context(vring.place.paused())
            yield

    def _refused(self, error: OSError) -> VhostError:
        if isinstance(error, VhostError):
            return error
        return VhostError(error.errno or errno.EINVAL, f"{self.name}: {error.strerror}")

    def _swap(self, mappings: Sequence[Mapping]) -> None:
        """Replaces the memory table; running rings go on in the new one."""
        table = MemoryTable(mappings)
        try:
            moved = [(vring, self._translate(vring, table)) for vring in self._running()]
        except OSError:
            # The caller lets go of what is new; what the old table has as well stays.
            for mapping in table.mappings:
                mapping.tables -= 1
            raise
        old = self._table
        with self._all_paused():
            for vring, parts in moved:
                assert vring.place is not None
                self._locate(vring.place.record, parts, table)
            self._table = table
        old.close()

    def _translate(self, vring: Vring, table: MemoryTable) -> tuple[int, int, int]:
        """Where a vring's three parts lie here (virtio 1.2, 2.7)."""
        assert vring.desc is not None
        parts = (
            ("descriptor table", vring.desc, 16 * vring.num),
            ("available ring", vring.avail, 6 + 2 * vring.num),
            ("used ring", vring.used, 6 + 8 * vring.num),
        )
        found = []
        for what, address, size in parts:
            try:
                found.append(table.host_of_user(address, size))
            except OSError as error:
                raise VhostError(
                    errno.EFAULT, f"{self.name}: vring {vring.index}: {what}: {error.strerror}"
                ) from None
        # What is aligned for the front end need not be so here: that is its mapping's choice.
        if found[1] % virtio.VRING_AVAIL_ALIGN_SIZE or found[2] % virtio.VRING_USED_ALIGN_SIZE:
            raise VhostError(
                errno.EINVAL,
                f"{self.name}: vring {vring.index}: its region's offset in the file leaves its rings unaligned",
            )
        return found[0], found[1], found[2]

    @staticmethod
    def _locate(record: Any, parts: tuple[int, int, int], table: MemoryTable) -> None:
        record["desc"], record["avail"], record["used"] = parts
        record["regions"] = table.block.ctypes.data
        record["region_count"] = len(table)
        record["hit_size"] = 0

    def _negotiated(self, vring: Vring) -> None:
        assert vring.place is not None
        record = vring.place.record
        record["event_idx"] = self.acked_features >> virtio.RING_F_EVENT_IDX & 1
        record["notify_on_empty"] = self.acked_features >> virtio.F_NOTIFY_ON_EMPTY & 1

    def _start(self, vring: Vring) -> None:
        if vring.num == 0:
            raise VhostError(
                errno.EINVAL, f"{self.name}: vring {vring.index} has no size: SET_VRING_NUM is missing"
            )
        parts = self._translate(vring, self._table)
        place = self.place_of(vring.index)
        if any(other.place is place for other in self.vrings):
            raise VhostError(
                errno.EBUSY,
                f"{self.name}: vring {vring.index}: another one runs in its place since before MQ",
            )
        with place.paused():
            record = place.record
            record["num"] = vring.num
            self._locate(record, parts, self._table)
            vring.place = place
            self._negotiated(vring)
            record["last_avail"] = record["seen_avail"] = vring.base
            # As the kernel does when a ring is bound: the used index is the guest's, its flags are ours.
            used = load16(parts[2] + 2)
            record["used_idx"] = record["published"] = record["signalled"] = used
            record["signalled_valid"] = 0
            store16(parts[2], 0)
            record["notify"] = 1
            record["call_fd"], record["err_fd"] = vring.call, vring.err
            record["fault"] = record["fault_told"] = 0
            record["running"] = 1
            try:
                place.begin(vring)
            except BaseException:
                record["running"] = 0
                vring.place = None
                raise
        _log.debug("%s: vring %d runs, num %d, base %d", self.name, vring.index, vring.num, vring.base)
        self.running_changed()

    def _stop(self, vring: Vring) -> None:
        place = vring.place
        if place is None:
            return
        with place.paused():
            place.end(vring)
            place.record["running"] = 0
            vring.base = int(place.record["last_avail"])
            vring.place = None
        _log.debug("%s: vring %d rests, base %d", self.name, vring.index, vring.base)
        self.running_changed()

    def _set_fd(self, index: int, name: str, fd: int) -> None:
        try:
            vring = self._vring(index)
            if fd >= 0:
                self._check_fd(vring, name, fd)
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

    def _check_fd(self, vring: Vring, name: str, fd: int) -> None:
        """A kick is an eventfd. A call or err may be a pipe or a socket as well: UML's is one of a pair."""
        try:
            mode = os.fstat(fd).st_mode
            if name == "kick" or not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                eventfd.require(fd)
            os.set_blocking(fd, False)
        except OSError as error:
            raise VhostError(
                error.errno or errno.EINVAL, f"{self.name}: vring {vring.index}: {name}: {error.strerror}"
            ) from None

    @staticmethod
    def _replace_fd(vring: Vring, name: str, fd: int) -> None:
        close_all([getattr(vring, name)])
        setattr(vring, name, fd)
