"""Memory that comes region by region (CONFIGURE_MEM_SLOTS), as QEMU with several queue pairs sends it."""

from __future__ import annotations

import errno
import os

import pytest

from pyvhost.host import memfd
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.errors import VhostError
from recording_device import InertDevice

SIZE = 0x10000


def region(guest: int, fd: int = -1) -> MemoryRegion:
    """A region at a guest address, at the front end's address of the same distance."""
    return MemoryRegion(guest, SIZE, 0x7F0000000000 + guest, 0, fd)


def shared(guest: int) -> MemoryRegion:
    """The same with a file, whose descriptor is the device's from then on."""
    return region(guest, memfd.create("slots", SIZE))


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


def test_a_region_that_is_added_twice_stays_until_it_was_removed_twice() -> None:
    device = InertDevice()
    device.add_mem_region(shared(0))
    before = descriptors()
    device.add_mem_region(shared(0))
    assert descriptors() == before

    device.remove_mem_region(region(0))
    with pytest.raises(VhostError, match="overlaps"):
        device.add_mem_region(shared(SIZE // 2))
    device.remove_mem_region(region(0))
    device.add_mem_region(shared(SIZE // 2))
    device.reset()


def test_a_region_that_nobody_added_can_not_be_removed() -> None:
    device = InertDevice()
    device.add_mem_region(shared(0))
    with pytest.raises(VhostError, match="to remove") as refused:
        device.remove_mem_region(region(SIZE))
    assert refused.value.errno == errno.EINVAL
    device.reset()


def test_a_new_table_forgets_how_often_its_regions_were_added() -> None:
    device = InertDevice()
    device.add_mem_region(shared(0))
    device.add_mem_region(shared(0))
    device.set_mem_table([shared(0)])
    device.remove_mem_region(region(0))
    device.add_mem_region(shared(SIZE // 2))
    device.reset()


def test_a_front_end_that_comes_again_begins_without_regions() -> None:
    device = InertDevice()
    device.add_mem_region(shared(0))
    device.reset()
    with pytest.raises(VhostError):
        device.remove_mem_region(region(0))
