"""Memory tables that change under running rings: nothing is lost, and what is refused changes nothing."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest

from in_process import (
    PATIENCE,
    SPANS,
    FrontEnd,
    echo,
    handed_over,
    mapped_files,
    open_fds,
    refused,
    traffic,
)
from pyvhost.abi import virtio
from pyvhost.driver.memory import GuestMemory, Region
from pyvhost.driver.net import NetDriver
from pyvhost.memory.regions import MemoryRegion
from pyvhost.vhost.errors import VhostError

RX, TX = 0, 1
ON_EMPTY = 1 << virtio.F_NOTIFY_ON_EMPTY


def test_memory_is_replaced_under_traffic_and_nothing_is_lost(
    front: FrontEnd, driver: NetDriver, memory: GuestMemory
) -> None:
    fds, maps = open_fds(), mapped_files()
    with traffic(driver) as seen:
        for _ in range(30):
            front.set_mem_table(memory.regions)
            seen()
    assert open_fds() == fds
    assert mapped_files() == maps


def test_regions_come_and_go_under_traffic(front: FrontEnd, driver: NetDriver, memory: GuestMemory) -> None:
    fds, maps = open_fds(), mapped_files()
    spare = memory.regions[0]
    where = {"guest_phys_addr": 1 << 40, "userspace_addr": 1 << 60}
    with traffic(driver) as seen:
        for _ in range(20):
            front.device.add_mem_region(handed_over(spare, **where))
            with refused(errno.EINVAL, "overlaps"):
                front.device.add_mem_region(handed_over(spare, **where | {"userspace_addr": 1 << 61}))
            seen()
            front.device.remove_mem_region(MemoryRegion(1 << 40, spare.memory_size, 1 << 60))
    assert open_fds() == fds
    assert mapped_files() == maps


def test_rings_move_to_another_view_of_the_same_memory(
    front: FrontEnd, driver: NetDriver, memory: GuestMemory
) -> None:
    """Each file mapped twice: first what the driver says, then the same at other addresses."""
    shift = 1 << 50
    for region in memory.regions:
        front.device.add_mem_region(
            handed_over(
                region,
                guest_phys_addr=region.guest_phys_addr + shift,
                userspace_addr=region.userspace_addr + shift,
            )
        )
    with traffic(driver) as seen:
        for turn in range(20):
            for index, queue in ((RX, driver.rx[0]), (TX, driver.tx[0])):
                desc, avail, used = (
                    memory.user_address(part) + shift * (turn % 2) for part in queue.ring.layout
                )
                front.device.set_vring_addr(index, 0, desc, used, avail, 0)
            seen()


Bad = Callable[[Region], list[MemoryRegion]]
BAD_TABLES: dict[str, tuple[Bad, int]] = {
    "overlap": (lambda r: [handed_over(r), handed_over(r)], errno.EINVAL),
    "outside its file": (lambda r: [handed_over(r), handed_over(r, mmap_offset=1)], errno.EINVAL),
    "empty": (lambda r: [handed_over(r), handed_over(r, memory_size=0), handed_over(r)], errno.EINVAL),
    "wraps": (lambda r: [handed_over(r), handed_over(r, guest_phys_addr=(1 << 64) - 1)], errno.EFAULT),
    "no file": (lambda r: [handed_over(r), handed_over(r, fd=os.eventfd(0))], errno.EINVAL),
    "closed": (lambda r: [handed_over(r), handed_over(r, fd=99999)], errno.EBADF),
    "too many": (
        lambda r: [handed_over(r, guest_phys_addr=i << 32, userspace_addr=i << 32) for i in range(510)],
        errno.E2BIG,
    ),
    "none": (lambda r: [], errno.EFAULT),
    "without the rings": (lambda r: [handed_over(r, userspace_addr=0x1000)], errno.EFAULT),
    "rings off their boundaries": (
        # The same user address now lies one byte further on in the file.
        lambda r: [handed_over(r, mmap_offset=1, memory_size=r.memory_size - 1)],
        errno.EINVAL,
    ),
}


@pytest.mark.parametrize("bad", BAD_TABLES)
def test_a_table_that_is_refused_leaves_the_old_one(front: FrontEnd, memory: GuestMemory, bad: str) -> None:
    make, code = BAD_TABLES[bad]
    with NetDriver(front, memory, timeout=PATIENCE) as driver:
        driver.start()
        fds, maps = open_fds(), mapped_files()
        for _ in range(2):
            with pytest.raises(VhostError, match="dev") as caught:
                front.device.set_mem_table(make(memory.regions[0]))
            assert caught.value.errno == code
            assert open_fds() == fds
            assert mapped_files() == maps
        echo(driver)


def test_a_table_may_have_as_many_regions_as_any_peer_takes(front: FrontEnd, memory: GuestMemory) -> None:
    region = memory.regions[0]
    maps = mapped_files()
    places = [{"guest_phys_addr": i << 32, "userspace_addr": i << 32} for i in range(510)]
    front.device.set_mem_table([handed_over(region, **place) for place in places[:509]])
    assert mapped_files() == maps + 509
    fds = open_fds()
    with refused(errno.E2BIG, "509"):
        front.device.add_mem_region(handed_over(region, **places[509]))
    assert open_fds() == fds
    front.device.reset()
    assert mapped_files() == maps


def test_a_region_that_rings_lie_in_stays(front: FrontEnd, driver: NetDriver, memory: GuestMemory) -> None:
    home = next(
        region
        for region in memory.regions
        if region.guest_phys_addr <= driver.rx[0].ring.layout.desc < region.end
    )
    named = MemoryRegion(home.guest_phys_addr, home.memory_size, home.userspace_addr)
    with refused(errno.EFAULT, "vring 0"):
        front.device.remove_mem_region(named)
    echo(driver)
    driver.stop()
    front.device.remove_mem_region(named)
    with refused(errno.EINVAL, "to remove"):
        front.device.remove_mem_region(named)


def test_a_ring_whose_memory_went_while_it_was_stopped_does_not_start(
    front: FrontEnd, driver: NetDriver
) -> None:
    driver.stop()
    front.device.set_mem_table([])
    with refused(errno.EFAULT, "descriptor table"):
        front.device.set_vring_running(RX, True)
    driver.resume()
    echo(driver)


def test_memory_that_shrinks_is_lost_and_a_new_table_is_whole(front: FrontEnd, memory: GuestMemory) -> None:
    told = threading.Event()
    front.device.memory_lost = told.set
    with NetDriver(front, memory, timeout=PATIENCE) as driver, GuestMemory(SPANS) as other:
        driver.start()
        assert not front.device.lost_memory
        os.ftruncate(memory.regions[0].fd, 0)
        driver.tx[0].kick()
        poller = front.device.poller
        assert poller is not None
        guard = poller.call_later(PATIENCE, told.set)
        while not told.is_set():
            poller.run_once()
        guard.cancel()
        assert front.device.lost_memory
        front.device.reset()
        assert not front.device.lost_memory
        with NetDriver(front, other, timeout=PATIENCE) as next_one:
            next_one.start()
            echo(next_one)
