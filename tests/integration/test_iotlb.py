"""The IOTLB: what a device asks for and in which order, what it does while it waits, and that it uses nothing else.

Every test runs over vhost-user and by calls; the driver is the IOMMU (`driver.iommu`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from both_ways import (
    EVENT_IDX,
    INDIRECT,
    MRG_RXBUF,
    POISON,
    RX,
    USED,
    VERSION_1,
    WAYS,
    Front,
    Way,
    driver_on,
    echo,
    frame,
    parted,
)
from pyvhost.abi import virtio_net as abi
from pyvhost.abi.vhost import ACCESS_RO, ACCESS_RW, ACCESS_WO
from pyvhost.driver.dirty_log import LOG_PAGE
from pyvhost.driver.iommu import Iommu, Miss
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net_frame import Shape
from pyvhost.driver.queue import wait
from pyvhost.net.device import NetDevice

pytestmark = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())

MODERN = VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT
PATIENCE = 30.0


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with parted() as memory:
        yield memory


def next_misses(iommu: Iommu, count: int = 1) -> list[Miss]:
    """Waits for so many more misses at least; none is answered but as `decide` has it. Returns those that came."""
    before = iommu.missed

    def come() -> bool:
        iommu.service()
        return iommu.missed - before >= count

    wait(come, [], PATIENCE, "miss", services=[iommu])
    return list(iommu.misses)[before - iommu.missed :]


def nothing_is_missed(front: Front, iommu: Iommu) -> bool:
    """Whether no miss comes, once the device has dealt with everything said to it."""
    settle(front)
    return iommu.service() == 0


def settle(front: Front) -> None:
    """The device's worker has been stopped once and goes on: what it had in hand is done with."""
    front.set_log_fd(-1)


KINDS: dict[str, dict[str, Any]] = {
    "modern": {"features": MODERN},
    "merged buffers": {"features": MODERN, "rx_buffer": 300},
    "in pieces": {"features": VERSION_1, "rx_shape": Shape(True, 170), "tx_shape": Shape(True, 90)},
    "indirect": {
        "features": MODERN,
        "rx_shape": Shape(piece=500, indirect=True),
        "tx_shape": Shape(piece=400, indirect=True),
    },
    "legacy": {"features": 0},
    "big-endian": {"features": MRG_RXBUF | EVENT_IDX | INDIRECT, "byteorder": "big"},
}
TABLES: dict[str, Callable[[GuestMemory], Iommu]] = {
    "whole mappings": Iommu,
    "page by page": lambda memory: Iommu(memory, by_page=True),
    "byte by byte": lambda memory: Iommu(memory, page=1),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_frames_under_constant_map_and_unmap(
    tmp_path: Path,
    way: Way,
    memory: GuestMemory,
    options: dict[str, Any],
    table: Callable[[GuestMemory], Iommu],
) -> None:
    """IOVAs are used again at once: an old translation would send, or overwrite, what is another's."""
    iommu = table(memory)
    with (
        way(tmp_path, NetDevice("loop")) as front,
        driver_on(front, memory, iommu=iommu, **options) as driver,
    ):
        driver.start()
        for number in range(0, 80, 8):
            echo(driver, *(frame(number + at, 60 + 173 * at) for at in range(8)))
        assert iommu.faults == []
        assert iommu.missed > 80


def test_only_what_is_mapped_is_written(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """Each byte that changed lies in a receive buffer that was mapped, or in a used ring."""
    iommu = Iommu(memory, page=1)
    given: list[tuple[int, int]] = []
    real_map = iommu.map

    def map_and_note(address: int, length: int, perm: int) -> int:
        if perm & ACCESS_WO:
            given.append((address, length))
        return real_map(address, length, perm)

    iommu.map = map_and_note  # type: ignore[method-assign]
    options: dict[str, Any] = {"features": MODERN, "rx_buffer": 300, "rx_depth": 20}
    with (
        way(tmp_path, NetDevice("loop")) as front,
        driver_on(front, memory, iommu=iommu, **options) as driver,
    ):
        driver.start()
        echo(driver, *(frame(number, 60 + 83 * number) for number in range(17)))
        driver.stop()
        assert iommu.faults == []
    for region in (memory.regions[RX], memory.regions[USED]):
        now = bytearray(memory.read(region.guest_phys_addr, region.memory_size))
        untouched = POISON if region == memory.regions[RX] else 0
        for address, length in given:
            at = address - region.guest_phys_addr
            if 0 <= at < len(now):
                now[at : at + length] = bytes([untouched]) * length
        assert now == bytes([untouched]) * len(now)


def test_misses_come_in_the_kernels_order(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """Descriptor table (to read), available ring (to read), used ring (to write), and then the buffers; each answer,
    and nothing else, brings the next.
    """
    iommu = Iommu(memory, prefill=False, by_page=True, decide=lambda miss: False)
    options: dict[str, Any] = {"features": VERSION_1, "tx_shape": Shape(header_apart=True, piece=100)}
    with (
        way(tmp_path, NetDevice("null")) as front,
        driver_on(front, memory, iommu=iommu, **options) as driver,
    ):
        driver.start(post=False)
        queue = driver.queues[1]
        at = queue.ring.addresses
        # The receive ring may ask for its own parts; it is not what this is about.
        receiving = set(driver.queues[0].ring.addresses)
        driver.send(frame(1, 200))
        buffers = [queue.ring.desc[number].addr for number in range(3)]
        kicks = queue.kicks
        expected = [
            Miss(at.desc, ACCESS_RO),
            Miss(at.avail, ACCESS_RO),
            Miss(at.used, ACCESS_WO),
            *(Miss(buffer, ACCESS_RO) for buffer in buffers),
        ]
        came: list[Miss] = []
        while len(came) < len(expected):
            # A kick has it ask again for what it waits for, as Linux does.
            new = {miss for miss in next_misses(iommu) if miss.iova not in receiving} - set(came)
            assert len(new) <= 1
            for miss in new:
                came.append(miss)
                assert queue.ring.used_pending() == 0
                assert iommu.answer(miss)
        assert came == expected
        driver.wait_sent()
        assert queue.kicks == kicks
        assert iommu.faults == []


def test_a_ring_waits_for_its_answer_and_the_other_does_not(
    tmp_path: Path, way: Way, memory: GuestMemory
) -> None:
    """A buffer that nobody answers for stays in the available ring; the answer alone has it sent."""
    hold = False
    iommu = Iommu(memory, decide=lambda miss: not hold)
    features = MODERN | 1 << abi.F_MQ
    device = NetDevice("loop", queue_pairs=2)
    with (
        way(tmp_path, device) as front,
        driver_on(front, memory, queue_pairs=2, iommu=iommu, features=features) as driver,
    ):
        driver.start()
        echo(driver, frame(1))
        hold = True
        driver.send(frame(2), pair=0)
        miss, *_ = next_misses(iommu)
        assert miss.perm == ACCESS_RO
        hold = False
        # Another pair, and more behind what waits.
        driver.send(frame(3), pair=0)
        driver.send(frame(4), pair=1)
        assert [(got.pair, got.frame) for got in driver.receive()] == [(1, frame(4))]
        assert driver.poll() == []
        assert iommu.answer(miss)
        assert [got.frame for got in driver.receive(2)] == [frame(2), frame(3)]


def test_a_stalled_ring_can_be_stopped(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """Nothing is consumed, and taken up again it goes on there."""
    hold = False
    iommu = Iommu(memory, decide=lambda miss: not hold)
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, iommu=iommu) as driver:
        driver.start()
        echo(driver, frame(1))
        hold = True
        driver.send(frame(2))
        next_misses(iommu)
        bases = driver.stop()
        assert bases[1] == 1
        hold = False
        driver.resume(bases=bases)
        assert [got.frame for got in driver.receive()] == [frame(2)]
        echo(driver, frame(3))


def test_an_answer_to_something_else_restarts_nothing(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    hold = False
    iommu = Iommu(memory, decide=lambda miss: not hold)
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, iommu=iommu) as driver:
        driver.start()
        echo(driver, frame(1))
        hold = True
        driver.send(frame(2))
        miss, *_ = next_misses(iommu)
        elsewhere = iommu.map(0, 1, ACCESS_RO)
        assert iommu.answer(Miss(elsewhere, ACCESS_RO))
        assert nothing_is_missed(front, iommu)
        assert driver.poll() == []
        hold = False
        assert iommu.answer(miss)
        assert [got.frame for got in driver.receive()] == [frame(2)]


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_what_is_invalidated_is_asked_for_again(
    tmp_path: Path, way: Way, memory: GuestMemory, part: str
) -> None:
    iommu = Iommu(memory)
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, iommu=iommu) as driver:
        driver.start()
        for number in range(40):
            index = number % 2
            iova = getattr(driver.queues[index].ring.addresses, part)
            mapping = iommu.lookup(iova)
            assert mapping is not None
            front.iotlb_invalidate(mapping.start, mapping.size)
            echo(driver, frame(number))
            assert any(mapping.start <= miss.iova < mapping.end for miss in iommu.misses)
            iommu.misses.clear()
        assert iommu.faults == []


def test_everything_is_invalidated_again_and_again(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """As a guest does that flushes its whole IOMMU, while frames are under way."""
    iommu = Iommu(memory)
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, iommu=iommu) as driver:
        driver.start()
        first = min(mapping.start for mapping in rows(iommu))
        for number in range(50):
            driver.send_many([frame(number * 4 + at) for at in range(4)])
            front.iotlb_invalidate(first, 1 << 40)
            assert [got.frame for got in driver.receive(4)] == [frame(number * 4 + at) for at in range(4)]
        assert iommu.faults == []


def rows(iommu: Iommu) -> list[Any]:
    return list(iommu._table.values())


def test_memory_that_may_only_be_read_is_not_written(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """The front end answers a receive buffer's miss with too little: no further miss, err, and not a byte."""
    iommu = Iommu(memory, decide=lambda miss: not hold)
    hold = False
    with (
        way(tmp_path, NetDevice("loop")) as front,
        driver_on(front, memory, iommu=iommu, rx_depth=1) as driver,
    ):
        driver.start(post=False)
        hold = True
        driver.post()
        buffer = driver.queues[0].ring.desc[0].addr
        driver.send(frame(1))
        held: set[int] = set()
        while buffer not in held:
            for miss in next_misses(iommu):
                held.add(miss.iova)
                found = iommu.translate(miss)
                assert found is not None
                front.iotlb_update(found.iova, found.size, found.uaddr, ACCESS_RO)
        assert driver.queues[0].wait_error(PATIENCE)
        assert nothing_is_missed(front, iommu)
        start = memory.regions[RX].guest_phys_addr
        assert memory.read(start, 8 * LOG_PAGE) == bytes([POISON]) * 8 * LOG_PAGE


def test_memory_that_may_only_be_written_is_not_read(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    hold = False
    iommu = Iommu(memory, decide=lambda miss: not hold)
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, iommu=iommu) as driver:
        driver.start()
        echo(driver, frame(1))
        hold = True
        driver.send(frame(2))
        miss, *_ = next_misses(iommu)
        found = iommu.translate(miss)
        assert found is not None
        front.iotlb_update(found.iova, found.size, found.uaddr, ACCESS_WO)
        assert driver.queues[1].wait_error(PATIENCE)
        assert nothing_is_missed(front, iommu)
        assert driver.poll() == []
        # Allowed at last, it is the next kick that has it looked at again.
        hold = False
        front.iotlb_invalidate(found.iova, found.size)
        assert iommu.answer(miss)
        driver.queues[1].take_errors()
        driver.queues[1].kick()
        assert [got.frame for got in driver.receive()] == [frame(2)]


OTHER = 0x2000_0000_0000


def fill(front: Front, memory: GuestMemory, count: int, first: int = 0) -> None:
    """Tells the device of so many pages that nobody uses."""
    uaddr = memory.user_address(0)
    for number in range(first, first + count):
        front.iotlb_update(OTHER + 2 * number * LOG_PAGE, LOG_PAGE, uaddr, ACCESS_RW)


def test_the_table_is_bounded_and_the_oldest_go_first(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """2048 entries: after as many others what was told before is asked for again; after fewer it is still known."""
    iommu = Iommu(memory, strict=False)
    with (
        way(tmp_path, NetDevice("loop")) as front,
        driver_on(front, memory, iommu=iommu, rx_depth=4) as driver,
    ):
        driver.start()
        for number in range(8):
            echo(driver, frame(number))
        iommu.misses.clear()
        fill(front, memory, 1900)
        echo(driver, frame(8))
        assert list(iommu.misses) == []
        fill(front, memory, 2048, 1900)
        echo(driver, frame(9))
        sent = driver.queues[1].ring.desc[0].addr
        assert sent in {miss.iova for miss in iommu.misses}
        assert iommu.faults == []


def test_a_rings_parts_grow_old_like_anything_else(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    iommu = Iommu(memory, strict=False)
    with (
        way(tmp_path, NetDevice("loop")) as front,
        driver_on(front, memory, iommu=iommu, rx_depth=4) as driver,
    ):
        driver.start()
        echo(driver, frame(1))
        iommu.misses.clear()
        fill(front, memory, 2048)
        echo(driver, frame(2))
        parts = {part for queue in driver.queues.values() for part in queue.ring.addresses}
        assert parts <= {miss.iova for miss in iommu.misses}
        assert iommu.faults == []


def test_without_the_feature_addresses_are_the_memory_tables(
    tmp_path: Path, way: Way, memory: GuestMemory
) -> None:
    """And a message about an IOTLB is refused."""
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory) as driver:
        driver.start()
        with pytest.raises(Exception, match=r"IOTLB|no IOTLB"):
            front.iotlb_update(0, 4096, memory.user_address(0), ACCESS_RW)
        echo(driver, frame(1))
        assert front.take_miss() is None


def test_what_stays_mapped_is_asked_for_once(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    iommu = Iommu(memory, strict=False)
    with way(tmp_path, NetDevice("loop")) as front, driver_on(front, memory, iommu=iommu) as driver:
        driver.start()
        frames = [frame(number) for number in range(128)]
        echo(driver, *frames)
        before = iommu.missed
        assert before > 0
        echo(driver, *frames)
        assert iommu.missed == before
