"""A device as the kernel's are, with nothing behind its rings: memory, log and IOTLB that are this process's own.

Every answer that Linux's device was asked for is compared in tests/kernel; here is what recordings can't show: what
the data plane is told of.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest

from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.dataplane import blocks
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.kernel_device import KernelDevice
from pyvhost.vhost.vring import Vring

PAGE = 4096
PLATFORM = 1 << virtio.F_ACCESS_PLATFORM
LOG_ALL = 1 << abi.F_LOG_ALL
KERNEL = 0xFFFF888000000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


class Shelf:
    """A place whose record nobody reads."""

    on_wait: Callable[[], None] | None = None

    def __init__(self) -> None:
        self._ring = np.zeros(1, blocks.RING)
        self.looks = 0

    @property
    def record(self) -> Any:
        return self._ring[0]

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, vring: Vring) -> None: ...
    def end(self, vring: Vring) -> None: ...
    def poll_for(self, vring: Vring) -> None: ...

    def look(self) -> None:
        self.looks += 1


class Device(KernelDevice):
    kind = "test"
    virtio_id = 0

    def __init__(self) -> None:
        super().__init__("test", 2)
        self.shelves = [Shelf(), Shelf()]

    @property
    def features(self) -> int:
        return 0x33D008000

    def place_of(self, index: int) -> Shelf:
        return self.shelves[index]

    def new_worker(self) -> int:
        raise NotImplementedError

    def free_worker(self, worker: int) -> None:
        raise NotImplementedError

    def attach_vring_worker(self, index: int, worker: int) -> None:
        raise NotImplementedError

    def get_vring_worker(self, index: int) -> int:
        raise NotImplementedError

    # --- what a test looks at ---------------------------------------------------------------------------

    def rows(self, index: int = 0) -> list[tuple[int, int, int, int]]:
        """What the ring's record means by guest addresses: guest address, bytes, host address, access."""
        record = self.shelves[index].record
        words = (ctypes.c_uint64 * (5 * int(record["region_count"]))).from_address(int(record["regions"]))
        return [(words[at], words[at + 1], words[at + 2], words[at + 4]) for at in range(0, len(words), 5)]

    def located(self, index: int = 0) -> bool:
        return bool(self.shelves[index].record["located"])


class Memory:
    """64 pages, of which a test may take some away."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.base: int = _libc.mmap(None, 66 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) + PAGE
        self.take_away(-1)
        self.take_away(64)

    def take_away(self, page: int, count: int = 1) -> None:
        # Something stays there, so that nobody else's memory comes to lie in the hole.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        _libc.mmap(self.base + page * PAGE, count * PAGE, 0, flags, -1, 0)

    def give_back(self, page: int, count: int = 1) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        _libc.mmap(self.base + page * PAGE, count * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)

    def at(self, page: int) -> int:
        return self.base + page * PAGE

    def close(self) -> None:
        _libc.munmap(self.base - PAGE, 66 * PAGE)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    device.set_owner()
    yield device
    device.close()


def refused(code: int) -> pytest.RaisesExc[VhostError]:
    return pytest.raises(VhostError, check=lambda error: error.errno == code)


def whole(memory: Memory, guest: int = 0) -> MemoryRegion:
    return MemoryRegion(guest, 64 * PAGE, memory.base)


def bind(device: Device, memory: Memory, index: int = 0) -> None:
    device.set_vring_num(index, 16)
    device.set_vring_addr(index, 0, memory.at(0), memory.at(2), memory.at(1), 0)
    device.check_access(index)
    device.prepare(index)
    device.bind(index, look=True)


def test_regions_that_overlap_are_looked_up_as_on_linux(device: Device, memory: Memory) -> None:
    one, two = memory.at(8), memory.at(32)
    device.set_mem_table(
        [
            MemoryRegion(0x3000, 0x2000, two),
            MemoryRegion(0x1000, 0x3000, one),
            MemoryRegion(0x1000, 0x1000, two),
            whole(memory, 0x100000),
        ]
    )
    bind(device, memory)
    assert device.rows()[:2] == [(0x1000, 0x3000, one, 3), (0x4000, 0x1000, two + 0x1000, 3)]


def test_what_is_not_mapped_is_not_told(device: Device, memory: Memory) -> None:
    memory.take_away(10, 2)
    device.set_mem_table([whole(memory, 0x100000), MemoryRegion(0, PAGE, 0x1000)])
    bind(device, memory)
    parts = [(0x100000, 10 * PAGE, memory.base, 3), (0x100000 + 12 * PAGE, 52 * PAGE, memory.at(12), 3)]
    assert device.rows() == parts
    memory.give_back(10, 2)
    device.set_mem_table([whole(memory, 0x100000)])
    assert device.rows() == [(0x100000, 64 * PAGE, memory.base, 3)]


@pytest.mark.parametrize("address", [KERNEL, (1 << 64) - PAGE, (1 << 47) - 2 * PAGE])
def test_a_table_beyond_user_space_binds_no_ring(device: Device, memory: Memory, address: int) -> None:
    device.set_mem_table([whole(memory), MemoryRegion(1 << 32, 4 * PAGE, address)])
    with refused(errno.EFAULT):
        bind(device, memory)
    device.set_mem_table([whole(memory)])
    bind(device, memory)
    with refused(errno.EFAULT):
        device.set_mem_table([whole(memory), MemoryRegion(1 << 32, 4 * PAGE, address)])
    assert device.rows() == [(0, 64 * PAGE, memory.base, 3)], "what is refused changes nothing"


def test_a_ring_is_found_again_when_its_memory_is(device: Device, memory: Memory) -> None:
    device.set_mem_table([whole(memory)])
    memory.take_away(1)
    bind(device, memory)
    assert device.is_bound(0)
    assert not device.located()
    with refused(errno.EBUSY):
        device.require_stopped(0, "num")
    memory.give_back(1)
    device.set_vring_addr(0, 0, memory.at(0), memory.at(2), memory.at(1), 0)
    assert device.located()


def test_a_used_ring_that_is_not_there_is_refused(device: Device, memory: Memory) -> None:
    device.set_mem_table([whole(memory)])
    memory.take_away(2)
    with pytest.raises(OSError, check=lambda error: error.errno == errno.EFAULT):
        bind(device, memory)
    assert not device.is_bound(0)


# --- the log --------------------------------------------------------------------------------------------------


def log_of(device: Device, index: int = 0) -> tuple[int, int]:
    record = device.shelves[index].record
    return int(record["log_data"]), int(record["log_bytes"])


def test_the_log_is_as_large_as_the_memory_or_as_what_is_mapped_of_it(device: Device, memory: Memory) -> None:
    device.set_mem_table([MemoryRegion(0, 64 * PAGE, memory.base), MemoryRegion(1 << 32, PAGE, memory.base)])
    bind(device, memory)
    device.set_log_address(memory.at(40))
    device.set_features(LOG_ALL)
    assert log_of(device) == (memory.at(40), 24 * PAGE), "up to the end of what is mapped"
    device.set_mem_table([whole(memory)])
    assert log_of(device) == (memory.at(40), 8), "64 pages are 64 bits"
    device.set_log_address(memory.at(40) + 3)
    assert log_of(device) == (memory.at(40) + 3, 8)


@pytest.mark.parametrize("address", [0, 8])
def test_a_log_that_is_not_there_logs_nothing(device: Device, memory: Memory, address: int) -> None:
    device.set_mem_table([whole(memory)])
    bind(device, memory)
    device.set_features(LOG_ALL)
    device.set_log_address(address)
    assert log_of(device)[0] == 0
    assert device.located()


def test_a_log_beyond_user_space_is_refused_where_it_would_be_used(device: Device, memory: Memory) -> None:
    device.set_mem_table([whole(memory)])
    device.set_log_address(KERNEL)
    bind(device, memory)
    with refused(errno.EFAULT):
        device.set_features(LOG_ALL)
    device.set_log_address(0)
    device.set_features(LOG_ALL)
    for address in (KERNEL, (1 << 64) - 1, (1 << 47) - PAGE - 7):
        with refused(errno.EFAULT):
            device.set_log_address(address)
    with refused(errno.EFAULT):
        device.set_mem_table([whole(memory, 1 << 63)])


# --- the IOTLB ------------------------------------------------------------------------------------------------


@pytest.fixture
def behind_iotlb(device: Device, memory: Memory) -> Device:
    """Ring 0 at I/O virtual pages 0x100 to 0x102, whose used ring is known."""
    device.set_features(PLATFORM)
    device.set_mem_table([whole(memory)])
    device.set_vring_num(0, 16)
    device.set_vring_addr(0, 0, 0x100000, 0x102000, 0x101000, 0)
    device.iotlb_update(0x102000, PAGE, memory.at(2), abi.ACCESS_RW)
    device.check_access(0)
    device.prepare(0)
    return device


def misses(device: Device) -> list[tuple[int, int]]:
    found = []
    while (miss := device.take_iotlb_miss()) is not None:
        found.append((miss.iova, miss.perm))
    return found


def test_binding_asks_for_what_it_has_to_write(device: Device, memory: Memory) -> None:
    device.set_features(PLATFORM)
    device.set_mem_table([])
    device.set_vring_addr(0, 0, 0x100000, 0x102000, 0x101000, 0)
    with refused(errno.EFAULT):
        device.prepare(0)
    assert misses(device) == [(0x102000, abi.ACCESS_RO)]


@pytest.mark.parametrize("look", [True, False])
def test_the_rest_is_asked_for_when_somebody_looks(behind_iotlb: Device, look: bool) -> None:
    behind_iotlb.bind(0, look=look)
    assert misses(behind_iotlb) == ([(0x100000, abi.ACCESS_RO)] if look else [])


def test_what_has_been_asked_for_is_not_asked_for_again(behind_iotlb: Device, memory: Memory) -> None:
    behind_iotlb.bind(0, look=True)
    behind_iotlb.iotlb_invalidate(0x102000, PAGE)
    behind_iotlb.set_mem_table([whole(memory)])
    assert misses(behind_iotlb) == [(0x100000, abi.ACCESS_RO)]


def test_an_entry_that_allows_too_little_is_no_miss_and_no_error(
    behind_iotlb: Device, memory: Memory
) -> None:
    err = os.eventfd(0, os.EFD_NONBLOCK)
    behind_iotlb.set_vring_err(0, os.dup(err))
    behind_iotlb.bind(0, look=True)
    misses(behind_iotlb)
    for perm in (0, abi.ACCESS_WO):
        behind_iotlb.iotlb_update(0x100000, PAGE, memory.at(0), perm)
        assert not behind_iotlb.located()
        assert misses(behind_iotlb) == []
        behind_iotlb.iotlb_invalidate(0x100000, PAGE)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(err)
    os.close(err)


def test_parts_that_can_not_be_put_in_a_row_are_told_of_once(
    behind_iotlb: Device, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """Private memory has no second mapping (decision 16): nobody would know why the ring waits."""
    behind_iotlb.set_vring_num(0, 512)
    behind_iotlb.set_vring_addr(0, 0, 0x100000, 0x104000, 0x102000, 0)
    for page, at in ((0x100, 0), (0x101, 5), (0x102, 7), (0x104, 9), (0x105, 10)):
        behind_iotlb.iotlb_update(page * PAGE, PAGE, memory.at(at), abi.ACCESS_RW)
    behind_iotlb.bind(0, look=True)
    for _ in range(3):
        # Each kick looks again.
        on_wait = behind_iotlb.shelves[0].on_wait
        assert on_wait is not None
        on_wait()
    assert not behind_iotlb.located()
    assert misses(behind_iotlb) == []
    (record,) = caplog.records
    assert "vring 0: descriptor table" in record.message
    assert "the vring waits" in record.message
    behind_iotlb.iotlb_invalidate(0x101000, PAGE)
    behind_iotlb.iotlb_update(0x101000, PAGE, memory.at(1), abi.ACCESS_RW)
    assert behind_iotlb.shelves[0].on_wait is not None
    behind_iotlb.shelves[0].on_wait()
    assert behind_iotlb.located()


def test_entries_for_what_is_not_mapped_allow_nothing(behind_iotlb: Device, memory: Memory) -> None:
    memory.take_away(9)
    behind_iotlb.bind(0, look=True)
    misses(behind_iotlb)
    behind_iotlb.iotlb_update(0x100000, 2 * PAGE, memory.at(0), abi.ACCESS_RO)
    assert behind_iotlb.located()
    behind_iotlb.iotlb_update(0x200000, 3 * PAGE, memory.at(8), abi.ACCESS_RW)
    assert [(row[0], row[1], row[3]) for row in behind_iotlb.rows() if row[0] >= 0x200000] == [
        (0x200000, PAGE, 3),
        (0x201000, PAGE, 0),
        (0x202000, PAGE, 3),
    ]


def test_giving_the_feature_up_leaves_the_iotlb(behind_iotlb: Device) -> None:
    behind_iotlb.set_features(0)
    assert behind_iotlb.has_iotlb
    assert behind_iotlb.iotlb_translate(0x102000, 8, abi.ACCESS_RW) is not None
    behind_iotlb.set_features(PLATFORM)
    assert behind_iotlb.iotlb_translate(0x102000, 8, abi.ACCESS_RW) is None, "acknowledged again, it is empty"
    behind_iotlb.reset_owner()
    assert not behind_iotlb.has_iotlb


# --- as new -----------------------------------------------------------------------------------------------------


def test_reset_owner_forgets_all_but_that_there_is_a_table(device: Device, memory: Memory) -> None:
    device.set_mem_table([whole(memory)])
    device.set_log_address(memory.at(40))
    device.set_backend_features(1 << abi.BACKEND_F_IOTLB_MSG_V2)
    bind(device, memory)
    device.reset_owner()
    assert not device.is_bound(0)
    assert device.acked_backend_features == 0
    with refused(errno.EPERM):
        device.require_owner()
    device.set_owner()
    device.check_access(0)


def test_another_process_is_not_the_owner(device: Device) -> None:
    device.caller = lambda: os.getpid() + 1
    for ask in (device.require_owner, device.reset_owner):
        with refused(errno.EPERM):
            ask()
    with refused(errno.EBUSY):
        device.set_owner()


def test_each_ring_has_the_log_for_itself(device: Device, memory: Memory) -> None:
    """As recorded from Linux: a base that a bound ring refuses is the other's all the same."""
    device.set_mem_table([whole(memory)])
    bind(device, memory, 1)
    device.set_features(LOG_ALL)
    device.set_log_address(memory.at(40))
    with refused(errno.EFAULT):
        device.set_log_address(KERNEL)
    assert log_of(device, 1)[0] == memory.at(40)
    with refused(errno.EFAULT):
        device.check_access(0)
    device.check_access(1)
