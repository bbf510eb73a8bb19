"""Memory that is replaced, grows, shrinks and moves while rings run, over vhost-user and by calls."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from both_ways import (
    DRIVERS,
    EVENT_IDX,
    INDIRECT,
    MRG_RXBUF,
    VERSION_1,
    WAYS,
    Front,
    Way,
    driver_on,
    echo,
    frame,
    parted,
)
from in_process import handed_over, traffic
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import MIB, GuestMemory, Region, Span
from pyvhost.driver.net import NetDriver
from pyvhost.driver.ring_parts import RingLayout
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.net.device import NetDevice

pytestmark = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())

PATIENCE = 30.0
MODERN = VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT
ALIAS = 1 << 40


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with parted() as memory:
        yield memory


def add(front: Front, region: Region) -> None:
    """One region more, by itself."""
    if isinstance(front, VhostUserFrontend):
        front.add_mem_reg(region)
    else:
        front.device.add_mem_region(handed_over(region))


def remove(front: Front, region: Region) -> None:
    if isinstance(front, VhostUserFrontend):
        front.rem_mem_reg(region)
    else:
        front.device.remove_mem_region(handed_over(region, fd=-1))


def test_the_same_table_again_and_again(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, features=MODERN) as driver:
        driver.start()
        with traffic(driver) as seen:
            for _ in range(50):
                front.set_mem_table(memory.regions)
            first = seen()
            for _ in range(50):
                front.set_mem_table(list(reversed(memory.regions)))
            assert seen() > first


def test_regions_come_and_go_under_traffic(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """Both ways of saying so: the whole table anew, and one region at a time."""
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, features=MODERN) as driver:
        driver.start()
        with traffic(driver) as seen:
            for number in range(20):
                more = [memory.add_region(Span(ALIAS + at * MIB, MIB)) for at in range(3)]
                front.set_mem_table(memory.regions)
                seen()
                front.set_mem_table([region for region in memory.regions if region not in more])
                for region in more:
                    add(front, region)
                for region in more[number % 3 :] + more[: number % 3]:
                    remove(front, region)
                    memory.remove_region(region)
                seen()


def test_what_was_added_is_used_and_then_goes(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """Frames are sent from, and received into, memory that was not there when the rings started."""
    region = DRIVERS
    with (
        way(tmp_path, NetDevice("loop")) as front,
        NetDriver(
            front,
            memory,
            features=MODERN,
            allocate=lambda size: memory.allocate(size, 16, region),
            timeout=PATIENCE,
        ) as driver,
    ):
        driver.start(post=False)
        queue = driver.queues[0]

        def once(number: int) -> None:
            room = memory.allocate(4096, 16, region)
            queue.ring.add(writable=[(room, 4096)])
            queue.publish()
            driver.send(frame(number))
            queue.wait_used(PATIENCE)
            used = queue.ring.pop_used()
            assert used is not None
            assert memory.read(room, used.len)[12:] == frame(number)
            driver.wait_sent()
            memory.free(room)

        for number in range(10):
            once(number)
            more = memory.add_region(Span(ALIAS, MIB))
            if number % 2:
                front.set_mem_table(memory.regions)
            else:
                add(front, more)
            region = len(memory.regions) - 1
            once(number + 100)
            region = DRIVERS
            if number % 4 < 2:
                remove(front, more)
            else:
                front.set_mem_table([one for one in memory.regions if one != more])
            memory.remove_region(more)


def test_what_is_gone_is_not_touched(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """A buffer in a region that went is the guest's mistake: err, and the memory stays as it was."""
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, rx_depth=1) as driver:
        driver.start(post=False)
        more = memory.add_region(Span(ALIAS, MIB))
        front.set_mem_table(memory.regions)
        queue = driver.queues[0]
        queue.ring.add(writable=[(ALIAS, 4096)])
        front.set_mem_table([one for one in memory.regions if one != more])
        queue.publish()
        driver.send(frame(1))
        assert queue.wait_error(PATIENCE)
        assert memory.read(ALIAS, 4096) == bytes(4096)


@pytest.fixture
def twice() -> Iterator[GuestMemory]:
    """The same memory at two guest addresses, and so at two user addresses."""
    with GuestMemory([Span(0, 16 * MIB, file=0), Span(ALIAS, 16 * MIB, file=0)]) as memory:
        yield memory


def test_rings_move_under_traffic(tmp_path: Path, way: Way, twice: GuestMemory) -> None:
    """To other addresses of the same memory, as a front end does that maps it anew."""
    options = {"allocate": lambda size: twice.allocate(size, 16, 0), "timeout": PATIENCE}
    with (
        way(tmp_path, NetDevice("loop")) as front,
        NetDriver(front, twice, features=MODERN, **options) as driver,  # type: ignore[arg-type]
    ):
        driver.start()
        with traffic(driver) as seen:
            for number in range(100):
                index = number % 3 % 2
                layout = driver.queues[index].ring.layout
                driver.move_ring(index, RingLayout(*(part ^ ALIAS for part in layout)), copy=False)
                if number % 10 == 0:
                    seen()


def test_all_user_addresses_change(tmp_path: Path, way: Way, twice: GuestMemory) -> None:
    """The front end maps guest memory elsewhere: a table with both, rings to the new addresses, a table without the
    old ones, and each time the old mapping is really gone.
    """
    old, new = twice.regions
    there = Region(old.guest_phys_addr, old.memory_size, new.userspace_addr, old.mmap_offset, new.fd)
    with (
        way(tmp_path, NetDevice("loop")) as front,
        NetDriver(
            front, twice, features=MODERN, allocate=lambda size: twice.allocate(size, 16, 0), timeout=PATIENCE
        ) as driver,
    ):
        driver.start()
        echo(driver, frame(1))
        for index, queue in driver.queues.items():
            driver.move_ring(index, RingLayout(*(part ^ ALIAS for part in queue.ring.layout)), copy=False)
        echo(driver, frame(2))
        front.set_mem_table([there])
        echo(driver, *(frame(number) for number in range(20)))


def test_rings_move_while_stopped_and_their_old_place_goes(
    tmp_path: Path, way: Way, memory: GuestMemory
) -> None:
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, features=MODERN) as driver:
        driver.start()
        homes = {index: queue.ring.layout for index, queue in driver.queues.items()}
        for number in range(5):
            echo(driver, frame(number))
            bases = driver.stop()
            more = memory.add_region(Span(ALIAS, MIB))
            at = len(memory.regions) - 1
            for index, queue in driver.queues.items():
                away = RingLayout.allocate(memory, queue.ring.size, (at, at, at))
                assert queue.ring.move(away, lambda: None) == homes[index]
            driver.resume(bases=bases)
            echo(driver, frame(number + 10), frame(number + 20))
            bases = driver.stop()
            for index, queue in driver.queues.items():
                queue.ring.move(homes[index], lambda: None)
            memory.remove_region(more)
            driver.resume(bases=bases)


def test_a_table_without_a_rings_memory_is_refused_or_stops_it(
    tmp_path: Path, way: Way, memory: GuestMemory
) -> None:
    """Whatever becomes of the ring, the old table or the next serves again."""
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, features=MODERN) as driver:
        driver.start()
        echo(driver, frame(1))
        with pytest.raises(Exception, match=r"SET_MEM_TABLE|vring|ring"):
            front.set_mem_table(memory.regions[1:])
        if isinstance(front, VhostUserFrontend):
            front.sync()
        echo(driver, frame(2))


def test_memory_moves_behind_an_iommu(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """With F_ACCESS_PLATFORM the table only says what user addresses mean."""
    iommu = Iommu(memory)
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, iommu=iommu) as driver:
        driver.start()
        for number in range(30):
            driver.send(frame(number))
            front.set_mem_table(memory.regions)
            more = memory.add_region(Span(ALIAS, MIB))
            front.set_mem_table(memory.regions)
            assert [got.frame for got in driver.receive()] == [frame(number)]
            front.set_mem_table([one for one in memory.regions if one != more])
            memory.remove_region(more)
        assert iommu.faults == []


def test_nothing_of_what_went_stays_open(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """Descriptors and mappings go with their regions."""
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory) as driver:
        driver.start()
        echo(driver, frame(1))

        def count() -> tuple[int, int]:
            if isinstance(front, VhostUserFrontend):
                front.sync()
            return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("/memfd:")

        front.set_mem_table(memory.regions)
        before = count()
        for _ in range(20):
            front.set_mem_table(memory.regions)
        assert count() == before
