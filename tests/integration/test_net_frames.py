"""Frames through a whole back end and back: every size, every layout of chains, every kind of guest."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from back_end import PATIENCE, BackEnd
from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.errors import GuestMemoryError
from pyvhost.driver.memory import MIB, GuestMemory, Span
from pyvhost.driver.net import FRAME_MAX, NetDriver
from pyvhost.driver.net_frame import NetHdr, Shape
from pyvhost.net.device import NetDevice

VERSION_1 = 1 << virtio.F_VERSION_1
EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX
INDIRECT = 1 << virtio.RING_F_INDIRECT_DESC
NOTIFY_ON_EMPTY = 1 << virtio.F_NOTIFY_ON_EMPTY
ANY_LAYOUT = 1 << virtio.F_ANY_LAYOUT
MRG_RXBUF = 1 << abi.F_MRG_RXBUF

SIZES = [
    *range(14, 70),
    *(near + off for near in (128, 256, 1500, 1514, 2048, 4096, 9014, 16384, 32768) for off in (-1, 0, 1)),
    65535,
    65536,
    FRAME_MAX - 1,
    FRAME_MAX,
]


def frame_of(size: int) -> bytes:
    """A broadcast frame whose every byte depends on its place and on the size."""
    return b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5") + random.Random(size).randbytes(size - 14)


FRAMES = [frame_of(size) for size in SIZES]
# For what is about layouts: sizes around the pieces' own, small enough for a chain of many.
FEW = [frame_of(size) for size in (14, 15, 60, 299, 300, 301, 777, 988, 1000, 1001, 1514, 2900, 9000)]


@pytest.fixture(scope="module")
def back_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackEnd]:
    with BackEnd(tmp_path_factory.mktemp("loop"), NetDevice(backend="loop")) as back_end:
        yield back_end


def echo_all(driver: NetDriver, frames: list[bytes]) -> None:
    """Send frames in batches that the receive ring can hold, and see each come back unchanged, in order."""
    left = list(frames)
    while left:
        batch: list[bytes] = []
        while left and sum(map(len, batch)) + len(left[0]) <= 100_000 and len(batch) < 30:
            batch.append(left.pop(0))
        driver.send_many(batch)
        got = driver.receive(len(batch))
        assert [len(received.frame) for received in got] == [len(frame) for frame in batch]
        assert [received.frame for received in got] == batch
        header = NetHdr(num_buffers=got[0].header.num_buffers)
        assert got[0].header == header
    driver.wait_sent()
    assert driver.poll() == []


@pytest.mark.parametrize("notify", [0, EVENT_IDX, NOTIFY_ON_EMPTY], ids=["flags", "event index", "on empty"])
@pytest.mark.parametrize(
    "guest",
    [ANY_LAYOUT, MRG_RXBUF, VERSION_1, VERSION_1 | MRG_RXBUF],
    ids=["legacy", "legacy mergeable", "modern", "modern mergeable"],
)
def test_every_size_comes_back(back_end: BackEnd, guest: int, notify: int) -> None:
    with GuestMemory(64 * MIB) as memory, back_end.connect() as frontend:
        driver = NetDriver(
            frontend,
            memory,
            features=guest | notify,
            rx_buffer=4096 if guest & MRG_RXBUF else 12 + FRAME_MAX,
            rx_depth=256 if guest & MRG_RXBUF else 40,
            timeout=PATIENCE,
        )
        with driver:
            driver.start()
            assert driver.features == guest | notify
            echo_all(driver, FRAMES)


SHAPES = {
    "one": Shape(),
    "header apart": Shape(header_apart=True),
    "pieces": Shape(piece=1000),
    "crumbs": Shape(header_apart=True, piece=300, indirect=True),
    "indirect": Shape(indirect=True),
    "indirect pieces": Shape(piece=777, indirect=True),
}


@pytest.mark.parametrize("rx", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tx", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mergeable", [0, MRG_RXBUF], ids=["big", "mergeable"])
def test_any_layout_of_chains(back_end: BackEnd, tx: Shape, rx: Shape, mergeable: int) -> None:
    with GuestMemory(64 * MIB) as memory, back_end.connect() as frontend:
        driver = NetDriver(
            frontend,
            memory,
            features=VERSION_1 | EVENT_IDX | INDIRECT | mergeable,
            ring_size=1024,
            rx_buffer=1999 if mergeable else 9012,
            rx_depth=16,
            tx_shape=tx,
            rx_shape=rx,
            timeout=PATIENCE,
        )
        with driver:
            driver.start()
            echo_all(driver, FEW)


def test_the_smallest_pieces_there_are(back_end: BackEnd) -> None:
    """One byte a descriptor, both ways, the header's bytes as well."""
    frames = [frame_of(size) for size in (14, 15, 60, 250)]
    with GuestMemory(8 * MIB) as memory, back_end.connect() as frontend:
        driver = NetDriver(frontend, memory, features=VERSION_1, ring_size=512, timeout=PATIENCE)
        with driver:
            driver.start(post=False)
            rx, tx = driver.rx[0].ring, driver.tx[0].ring
            for frame in frames:
                size = 12 + len(frame)
                sent, came = memory.allocate(size), memory.allocate(size)
                memory.write(sent, bytes(12) + frame)
                memory.write(came, b"\xee" * size)
                rx.add([], [(came + at, 1) for at in range(size)])
                driver.rx[0].publish()
                tx.add([(sent + at, 1) for at in range(size)])
                driver.tx[0].publish()
                driver.rx[0].wait_used(PATIENCE)
                used = rx.pop_used()
                assert used is not None
                assert used.len == size
                assert memory.read(came, size) == bytes(10) + b"\1\0" + frame
                driver.tx[0].wait_used(PATIENCE)
                assert tx.pop_used() is not None


def alternating(memory: GuestMemory) -> Callable[[int], int]:
    """Room in another region each time, or across the border of two where that is free."""
    turn = itertools.count()
    regions = memory.regions
    borders = sum(low.end == high.guest_phys_addr for low, high in itertools.pairwise(regions))

    def allocate(size: int) -> int:
        number = next(turn)
        if number % 3 == 0 and size > 1:
            for border in range(borders):
                try:
                    return memory.allocate_across(size, border)
                except GuestMemoryError:
                    continue
        return memory.allocate(size, 1, number % len(regions))

    return allocate


SEVERAL = [
    Span(0x0, 16 * MIB),
    Span(16 * MIB, 8 * MIB),
    Span(24 * MIB, 16 * MIB, mmap_offset=0x5000, file=1),
    Span(0x1_0000_0000, 16 * MIB, mmap_offset=16 * MIB + 0x5000, file=1),
    Span(0x1_0100_0000, 16 * MIB, userspace_addr=0x1234_5678_9000),
]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mergeable", [0, MRG_RXBUF], ids=["big", "mergeable"])
def test_chains_and_buffers_that_cross_regions(back_end: BackEnd, shape: Shape, mergeable: int) -> None:
    with GuestMemory(SEVERAL) as memory, back_end.connect() as frontend:
        driver = NetDriver(
            frontend,
            memory,
            features=VERSION_1 | INDIRECT | mergeable,
            ring_size=1024,
            rx_buffer=3001 if mergeable else 9012,
            rx_depth=16,
            tx_shape=shape,
            rx_shape=shape,
            allocate=alternating(memory),
            timeout=PATIENCE,
        )
        with driver:
            driver.start()
            for _ in range(3):
                echo_all(driver, FEW)


def test_an_indirect_table_that_crosses_regions(back_end: BackEnd) -> None:
    with GuestMemory([Span(0, MIB), Span(MIB, MIB)]) as memory, back_end.connect() as frontend:
        driver = NetDriver(frontend, memory, features=VERSION_1 | INDIRECT, rx_depth=4, timeout=PATIENCE)
        with driver:
            driver.start()
            ring = driver.tx[0].ring
            frame = frame_of(600)
            data = memory.allocate(612)
            memory.write(data, bytes(12) + frame)
            # The border lies inside the 26th descriptor.
            table = memory.allocate_across(51 * 16)
            entries = [(data + 12 * at, 12, 1, at + 1) for at in range(50)] + [(data + 600, 12, 0, 0)]
            raw = b"".join(
                addr.to_bytes(8, "little")
                + length.to_bytes(4, "little")
                + flags.to_bytes(2, "little")
                + following.to_bytes(2, "little")
                for addr, length, flags, following in entries
            )
            memory.write(table, raw)
            head = ring.add([(table, len(raw))])
            ring.desc.set(head, table, len(raw), virtio.VRING_DESC_F_INDIRECT)
            driver.tx[0].publish()
            assert driver.receive()[0].frame == frame


@pytest.mark.parametrize("regions", [1, 8, 9, 40, 509])
def test_memory_in_many_regions(back_end: BackEnd, regions: int) -> None:
    size = max(8 * MIB // regions, 64 << 10) & ~0xFFF
    spans = [Span(at * 2 * size, size) for at in range(regions)]
    with GuestMemory(spans) as memory, back_end.connect() as frontend:
        driver = NetDriver(
            frontend,
            memory,
            features=VERSION_1,
            ring_size=128,
            rx_depth=8,
            rx_buffer=3000,
            allocate=alternating(memory),
            timeout=PATIENCE,
        )
        with driver:
            driver.start()
            # The rings lie in the first region, the frames by turns in all of them.
            for _ in range(max(1, regions // 4)):
                echo_all(driver, [frame_of(size) for size in (14, 60, 1514, 2900)])


@pytest.mark.parametrize("size", [1, 2, 4, 32768])
def test_rings_of_any_size(back_end: BackEnd, size: int) -> None:
    with GuestMemory(128 * MIB) as memory, back_end.connect() as frontend:
        driver = NetDriver(
            frontend, memory, features=VERSION_1 | EVENT_IDX, ring_size=size, rx_depth=64, timeout=PATIENCE
        )
        with driver:
            driver.start()
            for frame in [frame_of(size) for size in (14, 60, 1000, 1514)]:
                driver.send(frame)
                assert [got.frame for got in driver.receive()] == [frame]
                driver.wait_sent()


def test_indices_wrap(back_end: BackEnd) -> None:
    """Rings that begin just below the wrap of their indices, as after a restore, and go on past it."""
    with GuestMemory(16 * MIB) as memory, back_end.connect() as frontend:
        driver = NetDriver(frontend, memory, ring_size=8, features=VERSION_1 | EVENT_IDX, timeout=PATIENCE)
        with driver:
            driver.start(post=False)
            bases = driver.stop()
            for queue in (*driver.rx, *driver.tx):
                queue.ring.reset(65530)
            driver.post()
            driver.resume(bases=dict.fromkeys(bases, 65530))
            for number in range(50):
                driver.send(frame_of(60 + number))
                assert driver.receive()[0].frame == frame_of(60 + number)
            driver.wait_sent()
            assert set(driver.stop().values()) == {(65530 + 50) & 0xFFFF, 65530 + 50 - 65536}


def test_eight_queue_pairs(tmp_path: Path) -> None:
    with (
        BackEnd(tmp_path, NetDevice(backend="loop", queue_pairs=8)) as back_end,
        GuestMemory(64 * MIB) as memory,
        back_end.connect() as frontend,
    ):
        driver = NetDriver(
            frontend, memory, queue_pairs=8, ring_size=64, features=VERSION_1 | MRG_RXBUF, timeout=PATIENCE
        )
        with driver:
            driver.start()
            assert frontend.get_queue_num() == 8
            for turn in range(20):
                frames = [[frame_of(100 + 10 * pair + n + turn) for n in range(10)] for pair in range(8)]
                for pair in range(8):
                    driver.send_many(frames[pair], pair=pair)
                got = driver.receive(80)
                for pair in range(8):
                    assert [received.frame for received in got if received.pair == pair] == frames[pair]
