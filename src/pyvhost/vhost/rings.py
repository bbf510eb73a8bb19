"""A device's running vrings: how they start and stop, and what of theirs is in their place's record.

A ring that is in its place is *located* while its parts are in memory. With an IOTLB, or with memory that the
front end may unmap, they may not be: the ring waits then, and asks again at each kick and each answer.

Promises: a record is only written while its place is paused; a ring that begins takes over the used index that
the guest has, one that is located anew goes on where it was.
Never: decides when a ring runs.
"""

from __future__ import annotations

import errno
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.dataplane import blocks
from pyvhost.dataplane.dirty_log import log_used
from pyvhost.dataplane.plain import load16, load64, store16, store64
from pyvhost.host import eventfd, user_memory
from pyvhost.memory.regions import MemoryTable
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.guest_memory import WaitsError
from pyvhost.vhost.vring import Vring

if TYPE_CHECKING:
    from pyvhost.vhost.device_memory import DeviceMemory

_log = logging.getLogger(__name__)

_NATIVE_LITTLE: Final = sys.byteorder == "little"


class Rings:
    """The running vrings of `device`."""

    def __init__(self, device: DeviceMemory) -> None:
        self._device = device
        self._memory = device._memory
        #: Heads of a former life, kept as long as a record has their address: by vring.
        self._replays: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
        #: Used rings of vrings that wait, for what ends meanwhile: by vring.
        self._aside: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
        #: Vrings of which the log says why their parts can't be used where they are.
        self._told: set[int] = set()

    def start(self, vring: Vring) -> None:
        """Puts a vring in its place. VhostError EINVAL: it has no size; EFAULT: it is not in memory; EBUSY."""
        device = self._device
        if vring.num == 0:
            raise VhostError(
                errno.EINVAL, f"{device.name}: vring {vring.index} has no size: SET_VRING_NUM is missing"
            )
        place = device.place_of(vring.index)
        if any(other.place is place for other in device.vrings):
            raise VhostError(
                errno.EBUSY,
                f"{device.name}: vring {vring.index}: another one runs in its place since before MQ",
            )
        with place.paused():
            record = place.record
            vring.place = place
            vring.begun = False
            record["num"] = vring.num
            record["running"] = record["located"] = record["lost"] = record["waits_since"] = 0
            record["call_fd"], record["err_fd"] = vring.call, vring.err
            record["fault"] = record["fault_told"] = record["replay_left"] = record["inflight"] = 0
            try:
                self.negotiated(vring)
                self.locate(vring)
                place.on_wait = lambda: self.waits(vring)
                place.begin(vring)
                record["own"] = self._memory.usable is not None
            except BaseException:
                record["running"] = 0
                vring.place = None
                place.on_wait = None
                vring.let_go()
                raise
        _log.debug("%s: vring %d runs, num %d, base %d", device.name, vring.index, vring.num, vring.base)
        device.running_changed()

    def stop(self, vring: Vring) -> None:
        """Takes a vring out of its place, if it is in one."""
        place = vring.place
        if place is None:
            return
        with place.paused():
            vring.place = None
            place.end(vring)
            place.on_wait = None
            record = place.record
            record["running"] = record["own"] = record["located"] = 0
            if vring.begun:
                vring.base = int(record["last_avail"])
            # What goes now is nobody's to look up any more.
            for field in (
                "regions",
                "region_count",
                "hit_size",
                "log_data",
                "log_used",
                "inflight",
                "replay_left",
            ):
                record[field] = 0
            record["log_fd"] = -1
        vring.let_go()
        self._replays.pop(vring.index, None)
        self._aside.pop(vring.index, None)
        self._told.discard(vring.index)
        self._device._misses.forget(vring.index)
        _log.debug("%s: vring %d rests, base %d", self._device.name, vring.index, vring.base)
        self._device.running_changed()

    def locate(self, vring: Vring, *, again: bool = False) -> None:
        """Finds a vring's parts, or has it wait for them. While paused. VhostError EFAULT: they can't be.

        `again`: what it means has changed, and nobody has kicked: one that waits has asked already.
        """
        assert vring.place is not None
        record = vring.place.record
        if record["lost"]:
            return
        asked = again and not record["located"]
        try:
            parts = self._memory.parts(vring, event_idx=bool(record["event_idx"]))
        except WaitsError as missing:
            self._park(vring)
            if not asked:
                self._device.iotlb_miss(vring.index, missing.iova, missing.perm)
            return
        except VhostError as error:
            if not self._may_wait:
                raise
            self._park(vring)
            # An IOTLB that allows too little is the front end's to mend: as on Linux the driver hears nothing.
            if self._memory.iotlb is None:
                if not asked:
                    self._tell(vring, error)
            elif error.errno == errno.EINVAL and vring.index not in self._told:
                # It is all there, and no use (decision 16): nobody would know why the vring waits.
                self._told.add(vring.index)
                _log.error("%s; the vring waits", error.strerror)
            return
        self._told.discard(vring.index)
        stitched, vring.stitched = vring.stitched, parts.stitched
        record["desc"], record["avail"], record["used"] = parts.desc, parts.avail, parts.used
        self._bring_back(vring)
        for mapped in stitched:
            mapped.close()
        self._memory.point(vring, record, self._device.acked_features)
        if not vring.begun:
            try:
                self._begin(vring)
            except VhostError as error:
                if not self._may_wait:
                    raise
                self._park(vring)
                self._tell(vring, error)
                return
        if not record["located"] or not record["fault"]:
            record["fault"] = 0
            record["running"] = 1
        if not record["located"]:
            record["located"] = 1
            # What ended while it waited, or was made available, nobody has been told of.
            vring.place.look()

    def locate_again(self, iova: int, size: int) -> None:
        """Finds the parts of the vrings that have any of a range anew. While all are paused."""
        for vring in self._running():
            assert vring.place is not None
            if vring.place.record["located"] and self._memory.has(vring, iova, size):
                self.locate(vring, again=True)

    def check(self, table: MemoryTable, features: int) -> None:
        """VhostError EFAULT: a running vring would not be in memory with this table and these features."""
        if self._memory.usable is None and not features >> virtio.F_ACCESS_PLATFORM & 1:
            event_idx = bool(features >> virtio.RING_F_EVENT_IDX & 1)
            for vring in self._running():
                self._memory.parts(vring, table, event_idx)

    def negotiated(self, vring: Vring) -> bool:
        """Takes over features; whether its parts are of another size now. While paused."""
        assert vring.place is not None
        record = vring.place.record
        features = self._device.acked_features
        before = int(record["event_idx"])
        record["event_idx"] = features >> virtio.RING_F_EVENT_IDX & 1
        record["notify_on_empty"] = features >> virtio.F_NOTIFY_ON_EMPTY & 1
        little = features >> virtio.F_VERSION_1 & 1 or vring.endian == abi.VRING_LITTLE_ENDIAN
        record["swap"] = bool(little) != _NATIVE_LITTLE
        self._memory.point(vring, record, features)
        return int(record["event_idx"]) != before

    def point(self) -> None:
        """Takes over memory, log or IOTLB for all. While all are paused."""
        for vring in self._running():
            assert vring.place is not None
            self._memory.point(vring, vring.place.record, self._device.acked_features)

    def resume(self, vring: Vring) -> None:
        """Goes on with a vring that has waited. While paused."""
        if vring.place is None:
            return
        record = vring.place.record
        if not record["located"]:
            self.locate(vring)
        elif record["fault"] == blocks.IOTLB_MISS:
            record["fault"] = 0
            record["running"] = 1
        vring.place.look()

    def waits(self, vring: Vring) -> None:
        """A vring found that it has to wait. On the thread that reads its record, outside the loop."""
        if vring.place is None:
            return
        record = vring.place.record
        if record["located"]:
            perm = int(record["fault_b"])
            self._device.iotlb_miss(vring.index, int(record["fault_a"]) & 0xFFFFFFFFFFFFFFFF, perm)
        else:
            self.locate(vring)
            if record["located"]:
                vring.place.look()

    def forget_inflight(self, vring: Vring) -> None:
        """Leaves inflight memory that goes. While paused."""
        assert vring.place is not None
        record = vring.place.record
        record["inflight"] = record["replay_left"] = 0

    # --- within -------------------------------------------------------------------------------------------

    @property
    def _may_wait(self) -> bool:
        """Whether a vring whose parts are not in memory is none of the front end's mistakes."""
        return self._memory.iotlb is not None or self._memory.usable is not None

    @staticmethod
    def _tell(vring: Vring, error: VhostError) -> None:
        _log.error("%s", error.strerror)
        if vring.err >= 0:
            eventfd.signal(vring.err)

    def _running(self) -> list[Vring]:
        return [vring for vring in self._device.vrings if vring.place is not None]

    def _park(self, vring: Vring) -> None:
        assert vring.place is not None
        record = vring.place.record
        if vring.index not in self._aside:
            # A device that works out of order may still have chains to use. Where the ring was it may not write.
            self._aside[vring.index] = np.zeros(vring.num + 1, np.int64)
            record["used"] = self._aside[vring.index].ctypes.data
        # What it has taken may yet be looked up, and in nothing that is gone.
        self._memory.point(vring, record, self._device.acked_features)
        record["located"] = record["running"] = 0
        record["fault"] = blocks.IOTLB_MISS
        if not record["waits_since"]:
            record["waits_since"] = time.monotonic_ns()
        record["fault_told"] = 1

    def _bring_back(self, vring: Vring) -> None:
        """Puts into the used ring, which is there again, what was used while it was not."""
        assert vring.place is not None
        record = vring.place.record
        aside = self._aside.pop(vring.index, None)
        if aside is None or not vring.begun:
            return
        published = int(record["published"])
        for i in range(min((int(record["used_idx"]) - published) & 0xFFFF, vring.num)):
            at = 4 + 8 * ((published + i) & (vring.num - 1))
            store64(int(record["used"]) + at, load64(int(aside.ctypes.data) + at))

    def _begin(self, vring: Vring) -> None:
        """As the kernel does when a ring is bound: the used index is the guest's, its flags are ours."""
        assert vring.place is not None
        record = vring.place.record
        raw = self._load16(int(record["used"]) + 2)
        used = int.from_bytes(raw.to_bytes(2, "little"), "big") if record["swap"] else raw
        record["used_idx"] = record["published"] = record["signalled"] = used
        record["signalled_valid"] = 0
        if (area := self._device._inflight) is not None:
            try:
                recovered = area.recover(vring.index, vring.num, used, vring.base)
            except OSError as error:
                raise VhostError(
                    errno.EINVAL, f"{self._device.name}: vring {vring.index}: {error.strerror}"
                ) from None
            if recovered is not None:
                vring.base = recovered.base
                heads = np.array([*recovered.heads, 0], np.int64)
                self._replays[vring.index] = heads
                record["inflight"] = recovered.address
                record["taken"] = recovered.taken
                record["replay"] = heads.ctypes.data
                record["replay_left"] = len(heads) - 1
        record["last_avail"] = record["seen_avail"] = vring.base
        self._store16(int(record["used"]), 0)
        if record["log_used"]:
            log_used(record, 0, 2)
        record["notify"] = 1
        vring.begun = True

    def _load16(self, address: int) -> int:
        if self._memory.usable is None:
            return load16(address)
        # Its owner may unmap it while this thread looks at it: the kernel is asked to.
        with self._named():
            return int.from_bytes(user_memory.read(address, 2), sys.byteorder)

    def _store16(self, address: int, value: int) -> None:
        if self._memory.usable is None:
            store16(address, value)
            return
        with self._named():
            user_memory.write(address, value.to_bytes(2, sys.byteorder))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise VhostError(errno.EFAULT, f"{self._device.name}: used ring: {error.strerror}") from None
