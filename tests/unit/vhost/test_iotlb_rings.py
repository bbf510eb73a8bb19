"""Rings whose parts and buffers the IOTLB has, or has no more: what their records say, and who is asked again."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from in_process import PATIENCE, FrontEnd, echo
from pyvhost.abi import virtio
from pyvhost.abi.vhost import ACCESS_RW
from pyvhost.driver.iommu import Iommu, Miss
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.vhost.errors import VhostError
from pyvhost.vhost.worker import WorkerPlace

RX, TX = 0, 1
PAGE = 4096


def record(front: FrontEnd, index: int = TX) -> Any:
    """What the loop has of a ring, running or not."""
    return front.device.place_of(index).record


@contextmanager
def waiting(front: FrontEnd, memory: GuestMemory) -> Iterator[tuple[NetDriver, Iommu, list[bool]]]:
    """A driver whose front end answers no miss unless a test does, or empties the list."""
    iommu = Iommu(memory, decide=lambda miss: not holding)
    holding: list[bool] = []
    with NetDriver(front, memory, timeout=PATIENCE, iommu=iommu) as driver:
        driver.start()
        echo(driver)
        holding.append(True)
        yield driver, iommu, holding
        holding.clear()


def missed(front: FrontEnd) -> Miss:
    """The next miss, which the loop may yet be about to find."""
    fd = front.device.iotlb_fd
    os.set_blocking(fd, True)
    os.eventfd_write(fd, os.eventfd_read(fd))
    os.set_blocking(fd, False)
    miss = front.take_miss()
    assert miss is not None
    return miss


def test_one_whose_miss_was_never_said_asks_anew(front: FrontEnd, memory: GuestMemory) -> None:
    """Whoever dropped it has it look again: without a kick, and for what it needs by then."""
    with waiting(front, memory) as (driver, iommu, holding):
        kicks = driver.queues[TX].kicks
        driver.send(b"x" * 60)
        miss = missed(front)
        for _ in range(3):
            front.device.iotlb_invalidate(miss.iova & -PAGE, PAGE)
            assert front.take_miss() is None
            front.device.look_for_entries(TX)
            assert missed(front) == miss
        assert driver.queues[TX].kicks <= kicks + 1
        holding.clear()
        assert iommu.answer(miss)
        driver.wait_sent()


def test_what_does_not_run_has_nothing_to_look_for(front: FrontEnd) -> None:
    front.device.look_for_entries(TX)
    assert front.take_miss() is None


def test_size_0_at_0_is_everything_and_elsewhere_nothing(front: FrontEnd, memory: GuestMemory) -> None:
    with waiting(front, memory):
        uaddr = memory.user_address(memory.regions[0].guest_phys_addr)
        front.device.iotlb_update(PAGE, PAGE, uaddr, ACCESS_RW)
        front.device.iotlb_invalidate(PAGE + 1, 0)
        assert front.device.iotlb_translate(PAGE, PAGE, ACCESS_RW) is not None
        front.device.iotlb_invalidate(0, 0)
        assert front.device.iotlb_translate(PAGE, 1, ACCESS_RW) is None
        assert not record(front)["located"]


def test_one_that_waits_looks_nothing_up_in_memory_that_is_gone(front: FrontEnd, memory: GuestMemory) -> None:
    """Chains that it has taken are looked up while it waits, in what its record says."""
    with waiting(front, memory):
        assert record(front)["region_count"] > 0
        front.device.set_mem_table([])
        assert not record(front)["located"]
        assert record(front)["region_count"] == 0
        front.set_mem_table(memory.regions)
        assert record(front)["region_count"] > 0


def test_one_that_has_stopped_knows_of_no_memory(front: FrontEnd, driver: NetDriver) -> None:
    found = record(front)
    assert found["located"]
    assert found["region_count"]
    driver.stop()
    for field in ("running", "located", "regions", "region_count", "hit_size", "log_data", "log_used"):
        assert found[field] == 0, field


def test_parts_in_a_row_that_lose_their_file_are_lost_memory(front: FrontEnd, memory: GuestMemory) -> None:
    """They are mapped once more: here the loop meets the end of the file, and nowhere else."""
    told = threading.Event()
    front.device.memory_lost = told.set
    poller = front.device.poller
    assert poller is not None
    front.negotiate(1 << virtio.F_ACCESS_PLATFORM | 1 << virtio.F_VERSION_1)
    front.set_mem_table(memory.regions)
    base = memory.user_address(memory.regions[0].guest_phys_addr)
    # 8 pages of descriptors in a row; available ring and used ring in every other page, 2 and 5 of them.
    for page, at in enumerate((*range(8), *range(20, 24, 2), *range(30, 40, 2))):
        front.iotlb_update(page * PAGE, PAGE, base + at * PAGE, ACCESS_RW)
    front.device.set_vring_num(TX, 2048)
    front.device.set_vring_addr(TX, 0, 0, 10 * PAGE, 8 * PAGE, 0)
    front.device.set_vring_running(TX, True)
    assert record(front)["located"]
    assert len(front.device.vrings[TX].stitched) == 2
    assert not front.device.lost_memory
    # There is no kick, so that the ring is looked at all the time.
    os.ftruncate(memory.regions[0].fd, 0)
    guard = poller.call_later(PATIENCE, told.set)
    while not told.is_set():
        poller.run_once()
    guard.cancel()
    assert front.device.lost_memory
    assert not front.device._memory.lost
    front.device.reset()
    assert not front.device.lost_memory


def test_an_address_changes_while_nobody_looks(
    front: FrontEnd, driver: NetDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker looks a vring's parts up itself when it waits for them."""
    vring = front.device.vrings[TX]
    seen: list[int | None] = []

    @contextmanager
    def paused(place: WorkerPlace) -> Iterator[None]:
        seen.append(vring.desc)
        with place.worker.paused():
            yield
        seen.append(vring.desc)

    before = vring.desc
    monkeypatch.setattr(WorkerPlace, "paused", paused)
    room = driver.memory.allocate(16 * driver.queues[TX].ring.size, 16, 0)
    other = driver.memory.user_address(room)
    front.device.set_vring_addr(TX, 0, other, vring.used, vring.avail, 0)
    assert seen == [before, other]
    with pytest.raises(VhostError):
        front.device.set_vring_addr(TX, 0, 1 << 60, vring.used, vring.avail, 0)
    assert seen == [before, other, other]
    assert vring.desc == other
