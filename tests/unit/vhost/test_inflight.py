"""Inflight memory: what a vring begins with when somebody else, or a former life, has left chains behind."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from in_process import PATIENCE, FrontEnd, echo, mapped_files, open_fds, refused
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.host import memfd
from pyvhost.vhost.inflight import Inflight, InflightArea, region_size

STATES = 16


class Region:
    """One queue's region, written from vhost-user's struct QueueRegionSplit with struct alone."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(region_size(size))

    def head(self, version: int, desc_num: int, last_batch_head: int, used_idx: int) -> Region:
        struct.pack_into("<QHHHH", self.content, 0, 0, version, desc_num, last_batch_head, used_idx)
        return self

    def state(self, head: int, inflight: int, counter: int = 0, following: int = 0) -> Region:
        struct.pack_into("<B5xHQ", self.content, STATES + 16 * head, inflight, following, counter)
        return self

    def marks(self) -> set[int]:
        return {
            head for head in range((len(self.content) - STATES) // 16) if self.content[STATES + 16 * head]
        }


@contextmanager
def area_of(*regions: Region, size: int = 8) -> Iterator[InflightArea]:
    content = b"".join(region.content for region in regions)
    fd = memfd.create("inflight", len(content))
    os.pwrite(fd, content, 0)
    area = InflightArea(Inflight(fd, len(content), 0, len(regions), size))
    try:
        yield area
        for at, region in enumerate(regions):
            address = area._mapped.address + at * region_size(size)
            region.content[:] = ctypes.string_at(address, region_size(size))
    finally:
        area.close()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    fds, maps = open_fds(), mapped_files()
    yield
    assert open_fds() == fds
    assert mapped_files() == maps


def test_a_region_that_nobody_has_used_goes_on_where_the_front_end_says() -> None:
    # What is in it besides is nobody's: only a version makes it a region.
    region = Region(8).head(0, 77, 7, 99).state(3, 1)
    with area_of(region) as area:
        recovered = area.recover(0, 8, 500, 1234)
        assert recovered is not None
        assert (list(recovered.heads), recovered.base) == ([], 1234)
    assert struct.unpack_from("<HHHH", region.content, 8) == (1, 8, 7, 500)


def test_what_is_taken_next_counts_as_later_than_what_was_left() -> None:
    """Else a second death in a row would have the chains of the first life come after those of the second."""
    region = (
        Region(8).head(1, 8, 8, 0).state(2, 1, counter=71).state(5, 1, counter=70).state(6, 0, counter=99)
    )
    with area_of(region) as area:
        recovered = area.recover(0, 8, 0, 0)
    assert recovered is not None
    assert (list(recovered.heads), recovered.taken) == ([5, 2], 72)


@pytest.mark.parametrize("last", [(1 << 63) - 1, (1 << 64) - 1])
def test_a_counter_that_goes_no_further_is_no_harm(last: int) -> None:
    region = Region(8).head(1, 8, 8, 0).state(2, 1, counter=last)
    with area_of(region) as area:
        recovered = area.recover(0, 8, 0, 0)
    assert recovered is not None
    assert list(recovered.heads) == [2]
    assert -(1 << 63) <= recovered.taken < 1 << 63


def test_chains_come_in_the_order_in_which_they_were_taken() -> None:
    dice = random.Random(3)
    order = dice.sample(range(8), 5)
    region = Region(8).head(1, 8, 0, 65534)
    # Counters are unsigned and may have gone a long way.
    counters = [0, 5, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    for head, counter in zip(order, counters, strict=True):
        region.state(head, 1, counter)
    with area_of(Region(8), region) as area:
        recovered = area.recover(1, 8, 65534, 7)
        assert recovered is not None
        assert list(recovered.heads) == order
        # Those were available, and it goes on behind them, whatever the front end says.
        assert recovered.base == 3
    assert region.marks() == set(order)


@pytest.mark.parametrize("died_at", range(4))
def test_a_last_batch_that_was_shown_is_done(died_at: int) -> None:
    """A batch of three, 6 to 1 to 4, was shown; then it died, having taken back so many of their marks."""
    region = Region(8).head(1, 8, 6, 65534)
    batch = [6, 1, 4]
    for place, head in enumerate(batch):
        region.state(head, int(place >= died_at), place, batch[(place + 1) % 3])
    region.state(2, 1, 9)
    with area_of(region) as area:
        recovered = area.recover(0, 8, 1, 0)
        assert recovered is not None
        assert list(recovered.heads) == [2]
        assert recovered.base == 2
    assert region.marks() == {2}
    assert struct.unpack_from("<H", region.content, 14) == (1,)


@pytest.mark.parametrize(("head", "following"), [(6, 6), (6, 99), (99, 0), (0, 0)])
def test_a_last_batch_that_is_no_list_ends(head: int, following: int) -> None:
    region = Region(8).head(1, 8, head, 0)
    for each in range(8):
        region.state(each, 1, each, following)
    with area_of(region) as area:
        recovered = area.recover(0, 8, 40000, 0)
        assert recovered is not None
        assert len(recovered.heads) >= 6
    assert region.marks() == set(recovered.heads)


def test_what_was_marked_otherwise_was_not_in_flight() -> None:
    region = Region(8).head(1, 4, 0, 0).state(1, 2, 1).state(3, 1, 2).state(5, 1, 3)
    with area_of(region) as area:
        recovered = area.recover(0, 8, 0, 0)
        assert recovered is not None
        # Of four descriptors the sixth is none.
        assert list(recovered.heads) == [3]


@pytest.mark.parametrize(
    ("version", "desc_num", "num"),
    [(2, 8, 8), (0xFFFF, 8, 8), (1, 9, 8), (1, 0xFFFF, 8), (1, 8, 16), (0, 0, 9)],
)
def test_a_region_that_can_not_be_read_is_refused(version: int, desc_num: int, num: int) -> None:
    with area_of(Region(8).head(version, desc_num, 0, 0)) as area:
        with pytest.raises(OSError, match="inflight region") as caught:
            area.recover(0, num, 0, 0)
        assert caught.value.errno == errno.EINVAL


def test_a_vring_without_a_region_has_none() -> None:
    with area_of(Region(8)) as area:
        assert area.recover(1, 8, 0, 0) is None


@pytest.mark.parametrize(
    "lie",
    [
        {"queue_size": 0},
        {"num_queues": 0},
        {"queue_size": 9},
        {"num_queues": 3},
        {"mmap_size": 0},
        {"mmap_size": 1 << 40},
        {"mmap_offset": 1 << 20},
        {"mmap_offset": (1 << 64) - 4096},
    ],
    ids=str,
)
@pytest.mark.usefixtures("nothing_left")
def test_memory_that_is_too_small_is_refused_and_closed(lie: dict[str, int]) -> None:
    made = replace(Inflight.make(2, 12), **({"queue_size": 12} | lie))
    if lie == {"queue_size": 9}:
        made = replace(made, mmap_size=2 * region_size(9) - 1)
    with pytest.raises(OSError, match=r"inflight memory|Bad file"):
        InflightArea(made)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(made.fd)


def test_a_device_refuses_a_region_that_it_can_not_read_and_goes_on_without(
    front: FrontEnd, memory: GuestMemory
) -> None:
    made = Inflight.make(2, 256)
    os.pwrite(made.fd, struct.pack("<H", 7), 8)
    with NetDriver(front, memory, timeout=PATIENCE) as driver:
        front.device.set_inflight(made)
        with refused(errno.EINVAL, r"dev: vring 0: inflight region of version 7"):
            driver.start()
        assert not any(vring.place for vring in front.device.vrings)
        front.device.set_inflight(front.device.make_inflight(2, 256))
        driver.resume()
        echo(driver)


def test_chains_of_a_former_life_are_sent_before_others(front: FrontEnd, memory: GuestMemory) -> None:
    """Three frames are available, of which the first two were taken, in the other order, and never used."""
    with NetDriver(front, memory, timeout=PATIENCE, ring_size=64) as driver:
        driver.start()
        echo(driver, 1)
        driver.wait_sent()
        driver.stop()
        frames = [bytes([number]) * 60 for number in range(3)]
        driver.send_many(frames)
        ring = driver.tx[0].ring
        heads = [ring.avail_entry(ring.used_idx + place) for place in range(3)]
        region = Region(64).head(1, 64, 0, ring.used_idx)
        region.state(heads[1], 1, 5).state(heads[0], 1, 6)
        made = Inflight.make(2, 64)
        os.pwrite(made.fd, region.content, region_size(64))
        kept = os.dup(made.fd)
        front.device.set_inflight(made)
        driver.resume()
        assert [got.frame for got in driver.receive(3)] == [frames[1], frames[0], frames[2]]
        driver.wait_sent()
        driver.stop()
        region.content[:] = os.pread(kept, region_size(64), region_size(64))
        os.close(kept)
        assert region.marks() == set()
        assert struct.unpack_from("<H", region.content, 14) == (ring.used_idx,)
