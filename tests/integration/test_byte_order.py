"""Legacy guests of the other byte order: every ring word and every header field is theirs (VHOST_SET_VRING_ENDIAN).

The driver plays the guest, over vhost-user (CROSS_ENDIAN) and by calls.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from both_ways import EVENT_IDX, INDIRECT, MRG_RXBUF, VERSION_1, WAYS, Way, by_calls, echo, frame
from in_process import serving, traffic
from netns import network_namespace
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.errors import DriverError, RefusedError
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.net_frame import NetHdr, Shape
from pyvhost.driver.ring_parts import ByteOrder
from pyvhost.net.device import NetDevice
from pyvhost.vhost.errors import VhostError

pytestmark = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())

PATIENCE = 30.0
CSUM = 1 << abi.F_CSUM
GUEST_CSUM = 1 << abi.F_GUEST_CSUM
EVERYTHING = MRG_RXBUF | EVENT_IDX | INDIRECT


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(64 * MIB) as memory:
        yield memory


def big(front: Any, memory: GuestMemory, features: int, **options: Any) -> NetDriver:
    return NetDriver(front, memory, features=features, byteorder="big", timeout=PATIENCE, **options)


@pytest.mark.parametrize("indirect", [False, True], ids=["chains", "indirect tables"])
@pytest.mark.parametrize(
    "features",
    [0, EVENT_IDX, MRG_RXBUF, EVERYTHING],
    ids=["plain", "event index", "mergeable", "all of them"],
)
def test_frames_go_round(
    tmp_path: Path, way: Way, memory: GuestMemory, features: int, indirect: bool
) -> None:
    """More of them than a ring's indices count, so that all words pass through all their bytes."""
    shape = Shape(header_apart=True, piece=100, indirect=indirect)
    options: dict[str, Any] = {"tx_shape": shape, "rx_shape": shape, "rx_buffer": 1600, "ring_size": 256}
    with (
        way(tmp_path, NetDevice("loop")) as front,
        big(front, memory, features | INDIRECT, **options) as driver,
    ):
        driver.start()
        for number in range(0, 600, 8):
            echo(driver, *(frame(number + at, 60 + (number * 8 + at) % 1400) for at in range(8)))
        assert driver.queues[1].ring.used_idx == 600
        assert driver.queues[1].ring.used_flags in (0, 1)


def test_indices_wrap(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """A ring that begins near 65535, as one does that was taken over from another back end."""
    with way(tmp_path, NetDevice("loop")) as front, big(front, memory, EVERYTHING) as driver:
        driver.start(post=False)
        driver.stop()
        for queue in driver.queues.values():
            queue.ring.reset(65530)
        driver.resume()
        driver.post()
        for number in range(20):
            echo(driver, frame(number))
        assert driver.queues[1].ring.used_idx == (65530 + 20) % 65536


def test_a_frame_in_many_buffers(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """`num_buffers` is the guest's too."""
    with (
        way(tmp_path, NetDevice("loop")) as front,
        big(front, memory, MRG_RXBUF, rx_buffer=150) as driver,
    ):
        driver.start()
        driver.send(frame(1, 1400))
        (got,) = driver.receive()
        assert got.frame == frame(1, 1400)
        assert got.header.num_buffers == got.buffers == 10


def udp(payload: bytes) -> bytes:
    """A datagram whose checksum is still to be made: only the pseudo-header's is in it."""
    source, target = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    length = 8 + len(payload)
    pseudo = ones_complement(source + target + struct.pack(">HH", 17, length))
    head = struct.pack(">HHHH", 1000, 2000, length, pseudo)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0) + source + target
    ip = ip[:10] + struct.pack(">H", 0xFFFF ^ ones_complement(ip)) + ip[12:]
    return b"\xff" * 6 + bytes.fromhex("0200000000aa 0800") + ip + head + payload


def ones_complement(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


PARTIAL = NetHdr(flags=abi.HDR_F_NEEDS_CSUM, csum_start=34, csum_offset=6)


def test_a_header_goes_through_as_it_is_meant(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """A receiver that takes partial checksums gets the fields, in its order of bytes."""
    with way(tmp_path, NetDevice("loop")) as front, big(front, memory, CSUM | GUEST_CSUM) as driver:
        driver.start()
        assert driver.features == CSUM | GUEST_CSUM
        driver.send(udp(b"some words"), PARTIAL)
        (got,) = driver.receive()
        assert got.frame == udp(b"some words")
        assert (got.header.flags, got.header.csum_start, got.header.csum_offset) == (1, 34, 6)


def test_a_header_is_understood(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """For one that does not, the checksum is made: where the fields say, or it would be wrong."""
    with way(tmp_path, NetDevice("loop")) as front, big(front, memory, CSUM) as driver:
        driver.start()
        driver.send(udp(b"some words"), PARTIAL)
        (got,) = driver.receive()
        assert got.header.flags & abi.HDR_F_NEEDS_CSUM == 0
        sent = udp(b"some words")
        assert got.frame[:40] == sent[:40]
        datagram = got.frame[34:]
        pseudo = got.frame[26:34] + struct.pack(">HH", 17, len(datagram))
        assert ones_complement(pseudo + datagram) == 0xFFFF


def test_a_guest_of_each_kind_after_the_other(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """One device, one connection: a boot loader of one byte order, then a kernel of the other."""
    orders: list[ByteOrder] = ["big", "little", "big"]
    with way(tmp_path, NetDevice("loop")) as front:
        for byteorder in orders:
            with NetDriver(
                front, memory, features=MRG_RXBUF, byteorder=byteorder, timeout=PATIENCE
            ) as driver:
                driver.start()
                echo(driver, frame(1), frame(2))
                driver.stop()


def test_rings_stop_and_go_on(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    with way(tmp_path, NetDevice("loop")) as front, big(front, memory, EVERYTHING) as driver:
        driver.start()
        for number in range(5):
            echo(driver, frame(number))
            driver.resume(bases=driver.stop())
        assert driver.queues[0].ring.used_idx == 5


def test_in_another_thread(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    with way(tmp_path, NetDevice("loop")) as front, big(front, memory, EVERYTHING) as driver:
        driver.start()
        with traffic(driver) as seen:
            for _ in range(20):
                seen()


def test_it_can_not_change_while_the_ring_runs(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    with way(tmp_path, NetDevice("loop")) as front, big(front, memory, 0) as driver:
        driver.start()
        change = front.device.set_vring_endian if hasattr(front, "device") else front.set_vring_endian
        with pytest.raises((VhostError, RefusedError)):
            change(0, 0)
        echo(driver, frame(1))


def test_a_modern_guest_is_little_endian_whatever_was_said(
    tmp_path: Path, way: Way, memory: GuestMemory
) -> None:
    with (
        way(tmp_path, NetDevice("loop")) as front,
        NetDriver(front, memory, features=VERSION_1 | MRG_RXBUF, timeout=PATIENCE) as driver,
    ):
        driver.start()
        bases = driver.stop()
        change = front.device.set_vring_endian if hasattr(front, "device") else front.set_vring_endian
        for index in range(2):
            change(index, 1)
        driver.resume(bases=bases)
        echo(driver, frame(1))


def test_what_is_no_byte_order(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    with way(tmp_path, NetDevice("loop")) as front:
        front.negotiate(0)
        change = front.device.set_vring_endian if hasattr(front, "device") else front.set_vring_endian
        with pytest.raises((VhostError, RefusedError)):
            change(0, 2)
    with (
        way(tmp_path, NetDevice("loop")) as front,
        big(front, memory, VERSION_1) as driver,
        pytest.raises(DriverError, match="VERSION_1"),
    ):
        driver.start()


def test_nothing_comes_back_from_null(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    with way(tmp_path, NetDevice("null")) as front, big(front, memory, EVERYTHING) as driver:
        driver.start()
        driver.send_many(frame(number) for number in range(1000))
        driver.wait_sent()
        assert driver.poll() == []


def test_the_control_queue_is_of_that_order_too(tmp_path: Path, way: Way, memory: GuestMemory) -> None:
    """A ring that Python handles; the number of queue pairs is a word of two bytes."""
    device = NetDevice("loop", queue_pairs=2)
    features = 1 << abi.F_CTRL_VQ | 1 << abi.F_MQ
    with way(tmp_path, device) as front, big(front, memory, features, queue_pairs=2) as driver:
        # Two pairs by agreement: the configuration space is the front end's to put into a guest's byte order.
        driver.max_queue_pairs = lambda: 2  # type: ignore[method-assign]
        driver.start()
        assert driver.control is not None
        with serving(device) if way is by_calls else nullcontext():
            driver.control.set_queue_pairs(2)
            with pytest.raises(RefusedError):
                driver.control.set_queue_pairs(0x200)
        for pair in range(2):
            driver.send(frame(pair), pair=pair)
            assert [(got.pair, got.frame) for got in driver.receive()] == [(pair, frame(pair))]


@pytest.mark.parametrize("features", [0, EVERYTHING], ids=["plain", "mergeable"])
def test_a_tap_both_ways(tmp_path: Path, way: Way, memory: GuestMemory, features: int) -> None:
    """The host's side of the tap is a packet socket: what goes through it is the host's own network stack."""
    with network_namespace() as ip:
        ip("tuntap add mode tap name t0 vnet_hdr")
        with open("/proc/sys/net/ipv6/conf/t0/disable_ipv6", "w") as switch:
            switch.write("1")
        with (
            way(tmp_path, NetDevice("tap:t0")) as front,
            big(front, memory, features | CSUM) as driver,
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as host,
        ):
            ip("link set t0 up")
            host.bind(("t0", 0x88B5))
            host.settimeout(PATIENCE)
            driver.start()
            for number in range(50):
                sent = frame(number, 60 + 20 * number)
                driver.send(sent)
                assert host.recv(65536) == sent
                host.send(frame(1000 + number, 60 + 19 * number))
                assert [got.frame for got in driver.receive()] == [frame(1000 + number, 60 + 19 * number)]
