"""A guest that breaks its ring: that ring stops and err says so; its neighbours on the same worker go on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from in_process import (
    PATIENCE,
    SPANS,
    FrontEnd,
    echo,
    frame_of,
    served,
    traffic,
)
from pyvhost.abi import virtio
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.queue import Queue
from pyvhost.net.device import NetDevice
from pyvhost.vhost.worker import WorkerPlace

RX, TX = 0, 1
ON_EMPTY = 1 << virtio.F_NOTIFY_ON_EMPTY


def beside(device: NetDevice) -> Iterator[FrontEnd]:
    """Another device that the same worker serves."""
    with served(NetDevice("loop", name="neighbour")) as front:
        assert isinstance(front.device, NetDevice)
        if front.device.pairs[0].worker is device.pairs[0].worker:
            yield front
        else:
            yield from beside(device)


@pytest.fixture
def neighbour(front: FrontEnd) -> Iterator[NetDriver]:
    assert isinstance(front.device, NetDevice)
    for other in beside(front.device):
        with GuestMemory(SPANS) as memory, NetDriver(other, memory, timeout=PATIENCE) as driver:
            driver.start()
            yield driver


NEXT, WRITE, INDIRECT = (
    virtio.VRING_DESC_F_NEXT,
    virtio.VRING_DESC_F_WRITE,
    virtio.VRING_DESC_F_INDIRECT,
)


def long_table(queue: Queue) -> tuple[int, int]:
    """An indirect table of more buffers than a chain may have."""
    memory, count = queue.ring.memory, 1025
    table = memory.allocate(16 * count)
    for i in range(count):
        flags, following = (NEXT, i + 1) if i < count - 1 else (0, 0)
        words = memory.words(table + 16 * i, 2, "Q")
        words[0], words[1] = 0, 1 | flags << 32 | following << 48
    return table, 16 * count


def lie_about(queue: Queue, head: int, kind: str) -> None:
    ring = queue.ring
    desc, slot = ring.desc[head], ring.avail_idx
    match kind:
        case "too far ahead":
            ring.avail_idx = slot + ring.size + 1
        case "head":
            ring.set_avail_entry(slot, ring.size)
        case "next":
            ring.desc.set(head, desc.addr, desc.len, desc.flags | NEXT, ring.size)
        case "loop":
            ring.desc.set(head, desc.addr, desc.len, desc.flags | NEXT, head)
        case "not in guest memory":
            ring.desc.set(head, 17 * MIB - 1, desc.len, desc.flags)
        case "beyond any address":
            ring.desc.set(head, (1 << 64) - 1, 0xFFFFFFFF, desc.flags)
        case "len is 0":
            ring.desc.set(head, desc.addr, 0, desc.flags)
        case "indirect and next":
            ring.desc.set(head, desc.addr, 32, INDIRECT | NEXT, 0)
        case "no table":
            ring.desc.set(head, desc.addr, 17, INDIRECT)
        case "pieces":
            ring.desc.set(head, *long_table(queue), INDIRECT)
        case "direction":
            ring.desc.set(head, desc.addr, desc.len, desc.flags ^ WRITE)
        case "less than a header":
            ring.desc.set(head, desc.addr, 11, desc.flags)


LIES = {
    "too far ahead": "2.7.13.3",
    "head": "2.7.6",
    "next": "2.7.5.1",
    "loop": "2.7.5.2",
    "not in guest memory": "not in guest memory",
    "beyond any address": "addr 0xffffffffffffffff",
    "len is 0": "less than a header",
    "indirect and next": "2.7.5.3.1",
    "no table": "len 17 is no table",
    "pieces": "more than 1024 pieces",
    "direction": "2.7.4.2",
    "less than a header": "11 bytes are less than a header of 12",
}


@pytest.mark.parametrize("kind", LIES)
def test_a_fault_stops_its_ring_alone_until_the_next_kick(
    front: FrontEnd,
    driver: NetDriver,
    neighbour: NetDriver,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    echo(driver)
    driver.wait_sent()
    queue = driver.tx[0]
    ring, frame = queue.ring, frame_of(7)
    room = driver.memory.allocate(12 + len(frame))
    driver.memory.write(room, bytes(12) + frame)
    head = ring.add(readable=[(room, 12 + len(frame))], token=[(room, 12 + len(frame))])
    honest, slot = ring.desc[head], ring.avail_idx
    lie_about(queue, head, kind)
    if kind == "too far ahead":
        queue.kick()
    else:
        queue.publish()
        queue.kick()
    assert queue.wait_error(PATIENCE)
    assert ring.used_idx == slot, "the chain was consumed"
    assert front.device.get_vring_base(TX) == slot
    with traffic(neighbour) as seen:
        seen()
    # It is told of once, and in words, by whoever the ring belongs to.
    told = [record.message for record in caplog.records if "stopped" in record.message]
    assert len(told) == 1
    assert told[0].startswith("dev: vring 1: stopped: ")
    assert LIES[kind] in told[0]
    # Again at the next kick, without another word.
    queue.kick()
    assert queue.wait_error(PATIENCE)
    # The driver comes to its senses.
    ring.set_avail_entry(slot, head)
    ring.desc.set(head, *honest)
    if kind == "too far ahead":
        ring.avail_idx = slot
    queue.publish()
    queue.kick()
    assert driver.receive()[0].frame == frame
    driver.wait_sent()
    assert len([record for record in caplog.records if "stopped" in record.message]) == 1
    echo(driver)


def test_a_buffer_to_read_is_none_to_receive_into(front: FrontEnd, memory: GuestMemory) -> None:
    """The readable byte ends with its region: a frame that is written there would go beyond guest memory."""
    with NetDriver(front, memory, timeout=PATIENCE) as driver:
        driver.start(post=False)
        queue = driver.rx[0]
        room = memory.allocate(2048)
        queue.ring.add(readable=[(17 * MIB - 1, 1)], writable=[(room, 2048)])
        queue.publish()
        driver.send(frame_of(1))
        assert queue.wait_error(PATIENCE)
        assert queue.ring.used_idx == 0
        assert memory.read(17 * MIB - 1, 1) == b"\0"


def test_a_ring_at_fault_is_stopped_and_started_like_any_other(
    front: FrontEnd, driver: NetDriver, neighbour: NetDriver
) -> None:
    queue = driver.tx[0]
    queue.ring.offer(queue.ring.size)
    queue.publish()
    assert queue.wait_error(PATIENCE)
    front.set_mem_table(driver.memory.regions)
    front.device.set_vring_kick(TX, os.dup(queue.kick_fd))
    front.device.set_features(driver.features | ON_EMPTY)
    base = front.stop_ring(TX)
    assert base == 0
    queue.ring.reset()
    front.start_ring(TX, queue)
    echo(driver)
    echo(neighbour)


def test_a_ring_at_fault_hears_its_kick_while_its_port_is_busy(memory: GuestMemory) -> None:
    """A ring without a kick keeps the port busy for good: nothing ever rests on this worker."""
    with served(NetDevice("loop")) as front, NetDriver(front, memory, timeout=PATIENCE) as driver:
        driver.start()
        front.device.set_vring_kick(RX, -1)
        queue = driver.tx[0]
        queue.ring.set_avail_entry(0, queue.ring.size)
        queue.ring.avail_idx = 1
        assert queue.wait_error(PATIENCE)
        queue.ring.avail_idx = 0
        queue.kick()
        echo(driver)


def test_a_place_is_one_vrings() -> None:
    device = NetDevice("loop")
    with served(device):
        place = device.pairs[0].place(0)
        assert isinstance(place, WorkerPlace)
        assert device.place_of(0) is place
