"""A device that records what a transport calls, and recorded conversations to replay at it.

`InertDevice` is the real device model with rings that nobody serves.
`RecordingDevice` keeps the contract of `vhost_user.device.Device` on descriptors: they are its own from the
call on, also when it raises, and `reset` closes them all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyvhost.abi import vhost, virtio
from pyvhost.dataplane import blocks
from pyvhost.host.fds import close_all
from pyvhost.host.poller import Poller
from pyvhost.memory.dirty_log import DirtyLog
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.device import Device
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.inflight import Inflight
from pyvhost.vhost.misses import IotlbMiss
from pyvhost.vhost.vring import Place, Vring

DATA = Path(__file__).parent / "unit" / "vhost_user" / "data"

VERSION_1 = 1 << 32
FEATURES = VERSION_1 | 1 << 28 | 1 << 29 | 1 << 22 | 1 << 16 | 1 << 15 | 1 << 5 | 1 << 3
#: What testpmd acknowledges beyond that (IN_ORDER), to replay it.
IN_ORDER = 1 << 35


class RecordingDevice:
    """Says yes to everything, or what `refusals` has for a method's name."""

    virtio_id = 1
    queue_num = 4
    vring_count = 8
    max_mem_slots = 509

    def __init__(self, name: str = "net0", features: int = FEATURES) -> None:
        self.name = name
        self.features = features
        self.config_changed: Callable[[], None] | None = None
        self.memory_lost: Callable[[], None] | None = None
        self.progress: Callable[[], None] | None = None
        self.lost_memory = False
        self.poller: Poller | None = None
        self.config = bytes(range(64))
        self.calls: list[tuple[Any, ...]] = []
        self.refusals: dict[str, OSError] = {}
        self.running: dict[int, bool] = {}
        self.bases: dict[int, int] = {}
        self.resets = 0
        self.log: DirtyLog | None = None
        self.misses: deque[IotlbMiss] = deque()
        #: An eventfd if somebody is to poll for misses.
        self.iotlb_fd = -1
        self._fds: list[int] = []

    def _record(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self.refusals:
            raise self.refusals[name]

    def refuse(self, name: str, number: int = errno.EINVAL, text: str = "no") -> None:
        """From now on the method called `name` refuses."""
        self.refusals[name] = VhostError(number, text)

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of a method."""
        return [call[1:] for call in self.calls if call[0] == name]

    def attach(self, poller: Poller, /) -> None:
        assert self.poller is None
        self.poller = poller

    def set_owner(self) -> None:
        self._record("set_owner")

    def reset(self) -> None:
        self._record("reset")
        self.resets += 1
        self.running.clear()
        if self.log is not None:
            self.log.close()
            self.log = None
        close_all(self._fds)
        self._fds.clear()

    def set_features(self, bits: int, /) -> None:
        self._record("set_features", bits)
        if bits & ~self.features:
            raise VhostError(errno.EOPNOTSUPP, f"features {bits & ~self.features:#x} were not offered")

    def set_mem_table(self, regions: list[MemoryRegion], /) -> None:
        self._fds += [region.fd for region in regions]
        self._record("set_mem_table", *regions)

    def add_mem_region(self, region: MemoryRegion, /) -> None:
        self._fds.append(region.fd)
        self._record("add_mem_region", region)

    def remove_mem_region(self, region: MemoryRegion, /) -> None:
        assert region.fd == -1
        self._record("remove_mem_region", region)

    def set_vring_num(self, index: int, num: int, /) -> None:
        self._record("set_vring_num", index, num)

    def set_vring_base(self, index: int, num: int, /) -> None:
        self._record("set_vring_base", index, num)
        self.bases[index] = num

    def get_vring_base(self, index: int, /) -> int:
        assert not self.running.get(index), "a base is read of a ring that runs"
        self._record("get_vring_base", index)
        return self.bases.get(index, 0)

    def set_vring_addr(self, index: int, flags: int, desc: int, used: int, avail: int, log: int, /) -> None:
        self._record("set_vring_addr", index, flags, desc, used, avail, log)

    def _take(self, name: str, index: int, fd: int) -> None:
        if fd >= 0:
            self._fds.append(fd)
        self._record(name, index, fd)

    def set_vring_kick(self, index: int, fd: int, /) -> None:
        self._take("set_vring_kick", index, fd)

    def set_vring_call(self, index: int, fd: int, /) -> None:
        self._take("set_vring_call", index, fd)

    def set_vring_err(self, index: int, fd: int, /) -> None:
        self._take("set_vring_err", index, fd)

    def give_up_vring(self, index: int, /) -> None: ...

    def under_way(self, rings: Sequence[int], /, *, former: Collection[tuple[int, int]] = ()) -> str:
        return ""

    def set_vring_running(self, index: int, running: bool, /) -> None:
        self._record("set_vring_running", index, running)
        assert self.running.get(index, False) != running, "told what it was told already"
        self.running[index] = running

    def set_vring_endian(self, index: int, num: int, /) -> None:
        self._record("set_vring_endian", index, num)

    def set_log_base(self, log: DirtyLog | None, /) -> None:
        if self.log is not None:
            self.log.close()
        self.log = log
        self._record("set_log_base", log)

    def set_log_fd(self, fd: int, /) -> None:
        if fd >= 0:
            self._fds.append(fd)
        self._record("set_log_fd", fd)

    def iotlb_update(self, iova: int, size: int, uaddr: int, perm: int, /) -> None:
        self._record("iotlb_update", iova, size, uaddr, perm)

    def iotlb_invalidate(self, iova: int, size: int, /) -> None:
        self._record("iotlb_invalidate", iova, size)

    def look_for_entries(self, index: int, /) -> None:
        self._record("look_for_entries", index)

    def miss(self, index: int, iova: int, perm: int) -> None:
        """A vring misses an address."""
        self.misses.append(IotlbMiss(index, iova, perm))
        if self.iotlb_fd >= 0:
            os.eventfd_write(self.iotlb_fd, 1)

    def take_iotlb_miss(self) -> IotlbMiss | None:
        if not self.misses:
            return None
        miss = self.misses.popleft()
        if self.iotlb_fd >= 0 and not self.misses:
            os.eventfd_read(self.iotlb_fd)
        return miss

    def make_inflight(self, num_queues: int, queue_size: int, /) -> Inflight:
        self._record("make_inflight", num_queues, queue_size)
        return Inflight(spare_fd(), 4096, 0, num_queues, queue_size)

    def set_inflight(self, region: Inflight, /) -> None:
        self._fds.append(region.fd)
        self._record("set_inflight", region)

    def get_config(self, offset: int, size: int, /) -> bytes:
        self._record("get_config", offset, size)
        return self.config[offset : offset + size]

    def set_config(self, offset: int, data: bytes, flags: int, /) -> None:
        self._record("set_config", offset, data, flags)

    def send_rarp(self, mac: bytes, /) -> None:
        self._record("send_rarp", mac)

    def set_mtu(self, mtu: int, /) -> None:
        self._record("set_mtu", mtu)


class InertPlace:
    """Where a vring "runs" without anybody reading it."""

    def __init__(self) -> None:
        self.record: Any = np.zeros(1, blocks.RING)[0]
        self.on_wait: Callable[[], None] | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        yield

    def begin(self, vring: Vring) -> None: ...
    def end(self, vring: Vring) -> None: ...
    def look(self) -> None: ...
    def poll_for(self, vring: Vring) -> None: ...


class InertDevice(Device):
    """The real device model, with real memory, and rings that nobody serves."""

    kind = "inert"
    virtio_id = 1

    def __init__(self) -> None:
        super().__init__("inert0", 8)
        self.places = [InertPlace() for _ in range(8)]

    @property
    def features(self) -> int:
        return FEATURES | 1 << vhost.F_LOG_ALL | 1 << virtio.F_ACCESS_PLATFORM

    def place_of(self, index: int) -> Place:
        return self.places[index]


@dataclass(frozen=True)
class Recorded:
    """One message of a recorded conversation."""

    front: bool
    backend_channel: bool
    data: bytes
    fds: int

    @property
    def request(self) -> int:
        return int.from_bytes(self.data[:4], "little")


def conversations() -> list[str]:
    """The names of all recorded conversations."""
    return sorted(path.stem for path in DATA.glob("*.json"))


def conversation(name: str) -> list[Recorded]:
    """What two real programs said to each other."""
    return [
        Recorded(m["from"] == "front", m["channel"] == "backend", bytes.fromhex(m["hex"]), int(m["fds"]))
        for m in json.loads((DATA / f"{name}.json").read_text())["messages"]
    ]


def spare_fd() -> int:
    """A descriptor to give away."""
    return os.eventfd(0, os.EFD_CLOEXEC)


def is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def open_fds() -> set[str]:
    """The numbers of all descriptors that are open now."""
    return {fd for fd in os.listdir("/proc/self/fd") if is_open(int(fd))}


@contextmanager
def no_fd_leaks() -> Iterator[None]:
    """What is open at the end was open at the beginning."""
    before = open_fds()
    yield
    leaked = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in open_fds() - before}
    assert not leaked, f"descriptors leaked: {leaked}"
