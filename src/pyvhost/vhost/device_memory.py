"""The half of the device model that is about memory: the table, the dirty log, inflight memory, the IOTLB.

Its methods are the seed's ioctls by name, like those of `device.Device`, which is built on it.

Promises: what is refused changes nothing; all of it can be replaced while rings run, and nothing of theirs is
lost; descriptors and files that are handed over are closed exactly once.
Never: knows a transport or a device type.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Final

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.dataplane import guard
from pyvhost.host import eventfd
from pyvhost.host.fds import close_all
from pyvhost.memory.dirty_log import DirtyLog
from pyvhost.memory.iotlb import Iotlb
from pyvhost.memory.mapped import Guard
from pyvhost.memory.regions import Mapping, MemoryRegion, MemoryTable, Usable
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.guest_memory import GuestMemory
from pyvhost.vhost.inflight import Inflight, InflightArea
from pyvhost.vhost.misses import IotlbMiss, Misses
from pyvhost.vhost.rings import Rings
from pyvhost.vhost.vring import Place, Vring


def _protect(address: int, length: int) -> int:
    guard.install()
    return guard.protect(address, length)


_TOP: Final = 1 << 64

GUARD = Guard(_protect, guard.release, guard.lost)


class DeviceMemory(ABC):
    """A device's vrings over the memory that its front end gave. All methods belong to the control thread."""

    #: Most regions that a memory table may have: as many as any peer takes.
    max_mem_slots: int = 509
    #: For a front end that is this very process: what memory it has.
    usable_memory: Usable | None = None
    #: Whether the IOTLB stays when ACCESS_PLATFORM is given up again, as Linux has it.
    keeps_iotlb: ClassVar[bool] = False

    def __init__(self, name: str, vring_count: int, busyloop_timeout: int) -> None:
        # struct vhost_vring_state has 32 bits for it.
        if not 0 <= busyloop_timeout < 1 << 32:
            raise ValueError(
                f"{name}: busyloop_timeout {busyloop_timeout}: microseconds, 0 to {(1 << 32) - 1}"
            )
        self.name = name
        self._busyloop_timeout = busyloop_timeout
        self.vrings = [Vring(i, busyloop_timeout=busyloop_timeout) for i in range(vring_count)]
        self.acked_features = 0
        self._memory = GuestMemory(name, GUARD, self.usable_memory)
        self._misses = Misses()
        self._inflight: InflightArea | None = None
        #: How often each region of the table was added.
        self._added: dict[tuple[int, int, int], int] = {}
        self._rings = Rings(self)
        #: The files that were in any table since there is a front end.
        self._files: set[tuple[int, int]] = set()

    @abstractmethod
    def place_of(self, index: int) -> Place:
        """Where vring `index` runs, given what was negotiated."""

    def running_changed(self) -> None:  # noqa: B027 - a device type may have nothing to do
        """A vring has started or stopped."""

    # --- memory, log, inflight ----------------------------------------------------------------------------

    @property
    def lost_memory(self) -> bool:
        """Whether the front end made a memory file smaller than what it shared of it, or unmapped what it lent."""
        for vring in self._running():
            # Parts in a row are a mapping of their own, and the only one that a loop may have looked at.
            if (vring.place is not None and vring.place.record["lost"]) or any(
                mapped.lost for mapped in vring.stitched
            ):
                return True
        return self._memory.lost or (self._inflight is not None and self._inflight.lost)

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
                made.append(Mapping.make(rest.pop(0), GUARD))
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
        if len(self._memory.table) >= self.max_mem_slots:
            close_all([region.fd])
            raise VhostError(errno.E2BIG, f"{self.name}: {self.max_mem_slots} regions are all there can be")
        mapping: Mapping | None = None
        try:
            mapping = Mapping.make(region, GUARD)
            self._swap([*self._memory.table.mappings, mapping])
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
                self._swap(
                    [mapping for mapping in self._memory.table.mappings if mapping.region.where != where]
                )
            except OSError as error:
                raise self._refused(error) from error
            del self._added[where]
        else:
            self._added[where] -= 1

    def set_log_base(self, log: DirtyLog | None) -> None:
        """VHOST_SET_LOG_BASE: where the dirty log lies, now the device's. EFAULT: it is too small."""
        try:
            if self.acked_features >> abi.F_LOG_ALL & 1:
                self._memory.check_log(log)
        except OSError:
            if log is not None:
                log.close()
            raise
        old = self._memory.log
        with self._all_paused():
            self._memory.log = log
            self._rings.point()
        if old is not None:
            old.close()

    def set_log_fd(self, fd: int) -> None:
        """VHOST_SET_LOG_FD: what to signal when something was logged; -1: nothing."""
        try:
            if fd >= 0:
                self._check_fd(f"{self.name}: log", "log", fd)
        except OSError:
            close_all([fd])
            raise
        old = self._memory.log_fd
        with self._all_paused():
            self._memory.log_fd = fd
            self._rings.point()
        close_all([old])

    def make_inflight(self, num_queues: int, queue_size: int) -> Inflight:
        """New inflight memory (VHOST_USER_GET_INFLIGHT_FD). EINVAL: more queues or descriptors than there can be."""
        if not 0 < num_queues <= len(self.vrings) or not 0 < queue_size <= virtio.QUEUE_SIZE_MAX:
            raise VhostError(
                errno.EINVAL,
                f"{self.name}: inflight memory for {num_queues} queues of {queue_size}, it has {len(self.vrings)} "
                f"of at most {virtio.QUEUE_SIZE_MAX}",
            )
        return Inflight.make(num_queues, queue_size)

    def set_inflight(self, inflight: Inflight) -> None:
        """Takes inflight memory (VHOST_USER_SET_INFLIGHT_FD) for vrings that start from now on. EINVAL: too small."""
        try:
            area = InflightArea(inflight, GUARD)
        except OSError as error:
            raise self._refused(error) from error
        old, self._inflight = self._inflight, area
        if old is not None:
            with self._all_paused():
                for vring in self._running():
                    self._rings.forget_inflight(vring)
            old.close()

    # --- the IOTLB ----------------------------------------------------------------------------------------

    @property
    def has_iotlb(self) -> bool:
        """Whether addresses are I/O virtual ones now."""
        return self._memory.iotlb is not None

    @property
    def iotlb_fd(self) -> int:
        """Readable while a miss waits to be taken."""
        return self._misses.fd

    def take_iotlb_miss(self) -> IotlbMiss | None:
        """The oldest miss that the front end has not been told of. Only then does an UPDATE restart its vring."""
        return self._misses.take()

    def clear_iotlb_misses(self) -> None:
        """Forgets all misses, taken or not."""
        self._misses.forget()

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int) -> None:
        """VHOST_IOTLB_UPDATE. EFAULT: there is no IOTLB, or the entry can't be."""
        iotlb = self._iotlb()
        with self._all_paused():
            try:
                retired = iotlb.update(iova, size, uaddr, perm)
            except OSError as error:
                raise self._refused(error) from error
            self._rings.point()
            # A part that it hides, or whose entry had to go, means something else now.
            self._rings.locate_again(iova, size)
            if retired is not None:
                self._rings.locate_again(retired.iova, retired.size)
            for index in self._misses.answered(iova, size):
                self._rings.resume(self.vrings[index])

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        """VHOST_IOTLB_INVALIDATE: nobody begins to use the range any more. EFAULT: there is no IOTLB.

        What the host still writes into it is `under_way`: who tells the front end that it is done waits for that.

        As on Linux the last byte is what counts: size 0 at 0 is everything, elsewhere nothing.
        """
        iotlb = self._iotlb()
        last = (iova + size - 1) % _TOP
        if last < iova:
            return
        size = last - iova + 1
        with self._all_paused():
            lost = iotlb.invalidate(iova, size)
            self._rings.point()
            self._rings.locate_again(iova, size)
        # Neighbours in a page have entries of their own for it: theirs is none of what nobody may use any more.
        self._lose(lost, iotlb.lets_write)

    def iotlb_translate(self, iova: int, size: int, perm: int) -> int | None:
        """Where a range of I/O virtual addresses lies here, if it is in one piece and allows `perm`."""
        return self._memory.translated(iova, size, perm)

    def look_for_entries(self, index: int) -> None:
        """Has a vring that waits for the IOTLB look again, and ask for what it needs now."""
        vring = self.vrings[index]
        if vring.place is not None:
            with vring.place.paused():
                self._rings.resume(vring)

    def iotlb_miss(self, index: int, iova: int, perm: int) -> None:
        """Has the front end asked for an entry. From any thread."""
        self._misses.add(IotlbMiss(index, iova, perm))

    # --- within -------------------------------------------------------------------------------------------

    def _iotlb(self) -> Iotlb:
        if self._memory.iotlb is None:
            raise VhostError(errno.EFAULT, f"{self.name}: it has no IOTLB: ACCESS_PLATFORM is not negotiated")
        return self._memory.iotlb

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
        table = MemoryTable(mappings, self.usable_memory)
        try:
            self._rings.check(table, self.acked_features)
            if self.acked_features >> abi.F_LOG_ALL & 1:
                self._memory.check_log(self._memory.log, table)
        except OSError:
            # The caller lets go of what is new; what the old table has as well stays.
            for mapping in table.mappings:
                mapping.tables -= 1
            raise
        with self._all_paused():
            old = self._memory.use_table(table)
            for vring in self._running():
                self._rings.locate(vring, again=True)
        self._files.update(mapping.file for mapping in mappings if mapping.file is not None)
        self._after_what_is_under_way(old.close)

    def _after_what_is_under_way(self, done: Callable[[], object]) -> None:
        """Calls `done` when nobody uses memory that rings have just lost; a pause of theirs is over by now.

        A device whose chains outlive a pause waits for those that were begun before.
        """
        done()

    def _lose(  # noqa: B027 - what outlives a pause is a device type's own
        self, lost: Sequence[tuple[int, int]], kept: Callable[[int, int], bool]
    ) -> None:
        """Rings have just lost guest memory: what may still write into it is under way.

        `lost`: address and bytes of each piece; `kept(address, bytes)`: whether that may be written to all the same.
        """

    @staticmethod
    def _check_fd(what: str, name: str, fd: int) -> None:
        """A kick is an eventfd. A call or err may be a pipe or a socket as well: UML's is one of a pair."""
        try:
            mode = os.fstat(fd).st_mode
            if name not in ("call", "err") or not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                eventfd.require(fd)
            os.set_blocking(fd, False)
        except OSError as error:
            raise VhostError(error.errno or errno.EINVAL, f"{what}: {error.strerror}") from None

    def _forget_memory(self) -> None:
        """Everything as new; nothing runs any more."""
        self._after_what_is_under_way(self._memory.close().close)
        close_all([self._memory.log_fd])
        self._memory.log_fd = -1
        self._misses.forget()
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = None
        self._added.clear()
