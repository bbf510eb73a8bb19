"""The dirty log: exactly the pages written, held against what memory itself says.

Every test runs over vhost-user and by calls. Rings are stopped before the log is looked at: a page may be marked a
moment after the driver has seen what lies in it.
"""

from __future__ import annotations

import itertools
import os
import select
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from both_ways import (
    EVENT_IDX,
    INDIRECT,
    MRG_RXBUF,
    RX,
    USED,
    VERSION_1,
    WAYS,
    Way,
    by_calls,
    devices_part,
    driver_on,
    echo,
    frame,
    pages,
    parted,
    used_pages,
)
from in_process import serving, traffic
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.dirty_log import LOG_PAGE, DirtyLog, Snapshot
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.net_frame import Shape
from pyvhost.host import eventfd
from pyvhost.net.device import NetDevice

pytestmark = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())

MODERN = VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with parted() as memory:
        yield memory


@pytest.fixture
def log(memory: GuestMemory) -> Iterator[DirtyLog]:
    with DirtyLog.covering(memory) as log:
        yield log


def over_page_ends(memory: GuestMemory) -> Callable[[int], int]:
    """Receive buffers of which each begins 100 bytes before a page's end."""

    def allocate(size: int) -> int:
        room = memory.allocate(LOG_PAGE + size, LOG_PAGE, RX)
        return room + LOG_PAGE - 100

    return allocate


KINDS: dict[str, dict[str, Any]] = {
    "modern": {"features": MODERN},
    "legacy": {"features": 0},
    "legacy, mergeable, big-endian": {"features": MRG_RXBUF | EVENT_IDX, "byteorder": "big"},
    "merged buffers": {"features": MODERN, "rx_buffer": 300},
    "buffers in pieces": {"features": VERSION_1, "rx_shape": Shape(True, 170), "tx_shape": Shape(True, 90)},
    "indirect": {
        "features": MODERN,
        "rx_shape": Shape(piece=500, indirect=True),
        "tx_shape": Shape(indirect=True),
    },
}


@pytest.mark.parametrize("crossing", [False, True], ids=["packed close", "over page ends"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_the_pages_that_changed_and_no_other(
    tmp_path: Path,
    way: Way,
    memory: GuestMemory,
    log: DirtyLog,
    options: dict[str, Any],
    crossing: bool,
) -> None:
    if crossing:
        options = options | {"rx_allocate": over_page_ends(memory)}
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, **options) as driver:
        driver.start()
        driver.start_log(log)
        log.take()
        before = Snapshot(memory)
        echo(driver, *(frame(number, 60 + 83 * number) for number in range(17)))
        driver.stop()
        marked = log.take()
        assert marked == devices_part(memory, before.changed())
        assert marked >= used_pages(driver, 0, 1)
        assert len(marked) > 2


def test_what_is_sent_marks_the_used_ring_alone(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog
) -> None:
    with way(tmp_path, NetDevice("null")) as front, driver_on(front, memory) as driver:
        driver.start()
        driver.start_log(log)
        log.take()
        driver.send_many(frame(number) for number in range(200))
        driver.wait_sent()
        driver.frontend.stop_ring(1)
        assert log.take() == used_pages(driver, 1)


def test_one_frame_marks_the_pages_it_lies_in(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog
) -> None:
    """Computed, not compared: 200 bytes and a header at a page's end, where the header ends a page."""
    allocate = over_page_ends(memory)
    starts = []

    def remember(size: int) -> int:
        starts.append(allocate(size))
        return starts[-1]

    options: dict[str, Any] = {"features": MODERN, "rx_allocate": remember, "rx_depth": 2}
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, **options) as driver:
        driver.start()
        driver.start_log(log)
        log.take()
        echo(driver, frame(1, 88))
        driver.stop()
        assert log.take() == pages(starts[0], 100) | used_pages(driver, 0, 1)
        assert len(pages(starts[0], 100)) == 1
        driver.resume()
        driver.start_log(log)
        echo(driver, frame(1, 89))
        driver.stop()
        assert log.take() == pages(starts[1], 101) | used_pages(driver, 0, 1)
        assert len(pages(starts[1], 101)) == 2


@pytest.mark.parametrize(("buffers", "rings"), [(True, False), (False, True), (False, False)])
def test_buffers_and_rings_are_logged_apart(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog, buffers: bool, rings: bool
) -> None:
    """F_LOG_ALL is about buffers, VHOST_VRING_F_LOG about a ring's own writes."""
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory) as driver:
        driver.start()
        driver.start_log(log, buffers=buffers, rings=rings)
        log.take()
        before = Snapshot(memory)
        echo(driver, *(frame(number) for number in range(10)))
        driver.stop()
        changed = devices_part(memory, before.changed())
        of_rings = used_pages(driver, 0, 1)
        assert changed > of_rings
        assert log.take() == (changed - of_rings if buffers else set()) | (of_rings if rings else set())


def test_one_ring_logs_and_the_other_does_not(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog
) -> None:
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory) as driver:
        driver.start()
        driver.start_log(log, buffers=False)
        front.set_ring_addr(1, driver.queues[1], log=False)
        log.take()
        echo(driver, frame(1))
        driver.stop()
        assert log.take() == used_pages(driver, 0)


def test_ring_writes_are_logged_where_the_front_end_says(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog
) -> None:
    """`log_guest_addr` need not be where the ring lies."""
    elsewhere = 5 * LOG_PAGE
    with way(tmp_path, NetDevice("null")) as front, driver_on(front, memory, features=VERSION_1) as driver:
        driver.start(post=False)
        driver.start_log(log, buffers=False, rings=False)
        at = driver.queues[1].ring.addresses
        if hasattr(front, "device"):
            front.device.set_vring_addr(1, 1, at.desc, at.used, at.avail, elsewhere + 8)
        else:
            front.set_vring_addr(1, at.desc, at.used, at.avail, flags=1, log_guest_addr=elsewhere + 8)
        log.take()
        driver.send(frame(1))
        driver.wait_sent()
        driver.stop()
        assert log.take() == {5}


def test_a_log_that_ended_is_left_alone(tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog) -> None:
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory) as driver:
        driver.start()
        for number in range(5):
            driver.start_log(log)
            echo(driver, frame(number))
            driver.stop_log()
            assert log.take() >= used_pages(driver, 0, 1)
            echo(driver, frame(number + 10))
            driver.stop()
            assert log.pages() == set()
            driver.resume()


def test_a_log_takes_the_place_of_another(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog
) -> None:
    with (
        way(tmp_path, NetDevice("loop")) as front,
        driver_on(front, memory) as driver,
        DirtyLog.covering(memory) as other,
    ):
        driver.start()
        driver.start_log(log)
        echo(driver, frame(1))
        front.set_log(other)
        assert log.take() >= used_pages(driver, 0, 1)
        echo(driver, frame(2))
        driver.stop()
        assert log.pages() == set()
        assert other.pages() >= used_pages(driver, 0, 1)


def test_bits_that_are_set_stay_set(tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog) -> None:
    """The device ORs: it never clears a neighbour's bit, nor writes a byte where nothing is to be marked."""
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory) as driver:
        driver.start()
        log.fill(0x11)
        was = log.pages()
        before = Snapshot(memory)
        driver.start_log(log)
        echo(driver, *(frame(number) for number in range(20)))
        driver.stop()
        assert log.pages() == was | devices_part(memory, before.changed())


def test_the_log_is_announced(tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog) -> None:
    fd = eventfd.create()
    try:
        with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory) as driver:
            driver.start()
            front.set_log_fd(fd)
            echo(driver, frame(1))
            driver.stop()
            assert eventfd.drain(fd) == 0, "nothing is logged, nothing is said"
            driver.resume()
            driver.start_log(log)
            echo(driver, frame(2))
            assert select.select([fd], [], [], 30)[0]
            front.set_log_fd(-1)
            eventfd.drain(fd)
            echo(driver, frame(3))
            driver.stop()
            assert eventfd.drain(fd) == 0
    finally:
        os.close(fd)


def test_the_control_queue_is_logged_too(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog
) -> None:
    """A ring that Python handles: its answer's byte, and its used ring."""
    features = MODERN | 1 << abi.F_CTRL_VQ | 1 << abi.F_MQ
    device = NetDevice("loop", queue_pairs=2)
    with way(tmp_path, device) as front, driver_on(front, memory, features=features) as driver:
        driver.start()
        driver.start_log(log)
        assert driver.control is not None
        log.take()
        # By calls the test is the control thread; over a socket there is one.
        with serving(device) if way is by_calls else nullcontext():
            driver.control.set_queue_pairs(1)
        ring = driver.control.queue.ring
        answer = ring.desc[2].addr
        driver.stop()
        of_ring = ring.layout.used // LOG_PAGE
        assert log.take() - used_pages(driver, 0, 1) == {answer // LOG_PAGE, of_ring}


def migrated(driver: NetDriver, memory: GuestMemory, log: DirtyLog, rounds: int) -> dict[int, bytes]:
    """The device's parts of memory, copied while it writes there, as a migration does; the last round is stopped."""

    def read(page: int) -> bytes:
        return memory.read(page * LOG_PAGE, LOG_PAGE)

    driver.start_log(log)
    regions = [memory.regions[at] for at in (RX, USED)]
    everything = itertools.chain.from_iterable(
        pages(region.guest_phys_addr, region.memory_size) for region in regions
    )
    copy = {page: read(page) for page in everything}
    for _ in range(rounds):
        copy |= {page: read(page) for page in devices_part(memory, log.take())}
    return copy


@pytest.mark.parametrize("kind", ["modern", "merged buffers", "indirect"])
def test_memory_copied_under_traffic_is_whole(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog, kind: str
) -> None:
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, **KINDS[kind]) as driver:
        driver.start()
        with traffic(driver) as seen:
            for _ in range(3):
                seen()
                copy = migrated(driver, memory, log, 20)
                # A cancelled migration, but for the last.
                driver.stop_log()
                log.take()
            copy = migrated(driver, memory, log, 20)
            seen()
        driver.stop()
        for page in devices_part(memory, log.take()):
            copy[page] = memory.read(page * LOG_PAGE, LOG_PAGE)
        wrong = [page for page, was in copy.items() if was != memory.read(page * LOG_PAGE, LOG_PAGE)]
        assert wrong == []


@pytest.mark.parametrize("kind", ["modern", "merged buffers", "buffers in pieces", "indirect"])
def test_behind_an_iommu_guest_addresses_are_logged(
    tmp_path: Path, way: Way, memory: GuestMemory, log: DirtyLog, kind: str
) -> None:
    options = KINDS[kind] | {"iommu": Iommu(memory)}
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, **options) as driver:
        driver.start()
        driver.start_log(log)
        log.take()
        before = Snapshot(memory)
        echo(driver, *(frame(number, 60 + 83 * number) for number in range(17)))
        driver.stop()
        assert log.take() == devices_part(memory, before.changed())
