"""Ports with a descriptor, at whose other end sits the test: what the host may say, and what the guest hears of it.

The descriptor is a socket that keeps messages apart, as a tap or a packet socket does.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from in_process import PATIENCE, SPANS, served
from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.net_frame import NetHdr, Received, Shape
from pyvhost.net.backends.base import Backend, PortKind
from pyvhost.net.device import NetDevice
from pyvhost.observe import reader

LEGACY = 1 << virtio.F_ANY_LAYOUT
VERSION_1 = 1 << virtio.F_VERSION_1
MERGEABLE = VERSION_1 | 1 << abi.F_MRG_RXBUF
GUEST_CSUM = 1 << abi.F_GUEST_CSUM
GUEST_TSO4 = 1 << abi.F_GUEST_TSO4
FRAME = b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5") + bytes(range(256)) * 4


class Wire(Backend):
    """A socket pair that keeps messages apart, each behind `header` bytes of virtio_net_hdr whatever is asked for."""

    kind = PortKind.FD

    def __init__(self, header: int = 10) -> None:
        super().__init__("wire")
        self.header_size = header
        self.peer = self._mine = socket.socket()
        self.reopened = 0

    def open(self, queue_pairs: int, poller: object = None) -> list[int]:
        self._mine.close()
        self._mine, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._mine.setblocking(False)
        self.peer.settimeout(PATIENCE)
        for end in (self._mine, self.peer):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.fds = [self._mine.fileno()]
        return self.fds

    def close(self) -> None:
        self.fds = []
        self._mine.close()
        self.peer.close()

    def reopen(self) -> None:
        self.reopened += 1

    def say(self, frame: bytes, header: NetHdr | None = None) -> None:
        """A frame from the host."""
        self.peer.sendall((header or NetHdr()).pack(12)[: self.header_size] + frame)

    def hear(self) -> tuple[bytes, bytes]:
        """The header and frame of what the guest sent."""
        data = self.peer.recv(1 << 17)
        return data[: self.header_size], data[self.header_size :]


@contextmanager
def plugged(
    wire: Wire,
    features: int,
    *,
    size: int = 256,
    rx_buffer: int | None = None,
    shape: Shape = Shape(),  # noqa: B008 - frozen
) -> Iterator[NetDriver]:
    """A guest at the wire's end."""
    with (
        served(NetDevice(wire, name="dev")) as front,
        GuestMemory(SPANS) as memory,
        NetDriver(
            front,
            memory,
            1,
            size,
            features,
            rx_buffer=rx_buffer,
            rx_shape=shape,
            tx_shape=shape,
            timeout=PATIENCE,
        ) as driver,
    ):
        driver.start()
        yield driver


def rx_counters() -> dict[str, int]:
    (own,) = (process for process in reader.snapshot().processes if process.pid == os.getpid())
    (row,) = (row for row in own.rows if row.labels.get("device") == "dev" and row.labels["queue"] == "rx0")
    return row.values


# Headers


@pytest.mark.parametrize("own", [0, 10, 12], ids=lambda own: f"wire {own}")
@pytest.mark.parametrize("features", [LEGACY, VERSION_1, MERGEABLE], ids=["legacy", "modern", "mergeable"])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_headers_of_any_size_on_either_side(own: int, features: int, apart: bool) -> None:
    wire = Wire(own)
    with plugged(wire, features, shape=Shape(header_apart=apart, piece=700)) as driver:
        for size in (14, 60, 699, 700, 701, 1400, 1037):
            driver.send(FRAME[:14] + bytes(size - 14))
            header, frame = wire.hear()
            assert header[:10] == bytes(min(own, 10))
            assert frame == FRAME[:14] + bytes(size - 14)
            if size <= 1500:
                wire.say(FRAME[:size].ljust(size, b"z"))
                (got,) = driver.receive()
                assert got.frame == FRAME[:size].ljust(size, b"z")
                assert got.header == NetHdr(num_buffers=got.buffers if driver.header_size == 12 else 0)


def test_a_longer_header_on_the_wire_stays_inside_the_guests() -> None:
    """The wire's has 12 bytes, the guest's a piece of its own of 10: the other 2 are not the guest's to give."""
    wire = Wire(12)
    with plugged(wire, LEGACY, shape=Shape(header_apart=True)) as driver:
        rooms = [driver.rx[0].ring.desc[index] for index in range(256)]
        headers = [room for room in rooms if room.len == 10]
        assert len(headers) == 128
        for room in headers:
            driver.memory.write(room.addr + 10, b"\xa5" * 2)
        for number in range(10):
            wire.say(FRAME[: 100 + number])
            assert driver.receive()[0].frame == FRAME[: 100 + number]
        assert {driver.memory.read(room.addr + 10, 2) for room in headers} == {b"\xa5" * 2}


@pytest.mark.parametrize("features", [VERSION_1, MERGEABLE], ids=["modern", "mergeable"])
def test_what_only_guest_csum_lets_a_guest_hear_of(features: int) -> None:
    """5.1.6.4.1: without it, the device sets flags to zero."""
    wire = Wire()
    with plugged(wire, features) as driver:
        wire.say(FRAME, NetHdr(flags=abi.HDR_F_DATA_VALID))
        assert driver.receive()[0].header.flags == 0
    with plugged(wire, features | GUEST_CSUM) as driver:
        wire.say(FRAME, NetHdr(flags=abi.HDR_F_DATA_VALID))
        assert driver.receive()[0].header.flags == abi.HDR_F_DATA_VALID


# Offloads that the guest did not negotiate


def unfinished(packet: Ether, at: int, field: int) -> tuple[bytes, NetHdr]:
    """The packet with only the pseudo header's sum where its checksum is to be, and what its header says of that."""
    whole = bytearray(bytes(packet))
    length = len(whole) - at
    if IPv6 in packet:
        pseudo = whole[at - 32 : at] + length.to_bytes(4, "big") + bytes([0, 0, 0, packet[IPv6].nh])
    else:
        pseudo = whole[at - 8 : at] + bytes([0, packet[IP].proto]) + length.to_bytes(2, "big")
    total = sum(int.from_bytes(pseudo[i : i + 2], "big") for i in range(0, len(pseudo), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    whole[at + field : at + field + 2] = total.to_bytes(2, "big")
    return bytes(whole), NetHdr(flags=abi.HDR_F_NEEDS_CSUM, csum_start=at, csum_offset=field)


def checked(got: Received) -> Ether:
    """The packet that came, of which every checksum is right, as somebody else computes it."""
    assert (got.header.flags, got.header.gso_type, got.header.gso_size) == (0, 0, 0)
    packet = Ether(got.frame)
    again = Ether(got.frame)
    for layer in (IP, TCP, UDP):
        if layer in again:
            del again[layer].chksum
    assert bytes(again) == got.frame
    return packet


ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
IP4 = IP(src="10.0.0.1", dst="10.0.0.2")
IP6 = IPv6(src="fd00::1", dst="fd00::2")


@pytest.mark.parametrize("features", [LEGACY, VERSION_1, MERGEABLE], ids=["legacy", "modern", "mergeable"])
@pytest.mark.parametrize("ip", [IP4, IP6], ids=["IPv4", "IPv6"])
def test_a_checksum_is_finished_for_a_guest_that_does_not_do_it(features: int, ip: IP | IPv6) -> None:
    wire = Wire()
    with plugged(wire, features) as driver:
        for extra in (b"", b"odd"):
            for packet, field in (
                (ETHER / ip / UDP(sport=1, dport=2) / (b"payload" + extra), 6),
                (ETHER / ip / TCP(sport=1, dport=2, seq=3) / (b"payload" + extra), 16),
            ):
                frame, header = unfinished(packet, 14 + len(ip), field)
                wire.say(frame, header)
                assert bytes(checked(driver.receive()[0])) == bytes(packet)
    with plugged(wire, features | GUEST_CSUM) as driver:
        wire.say(frame, header)
        (got,) = driver.receive()
        assert got.frame == frame
        assert (got.header.flags, got.header.csum_start) == (abi.HDR_F_NEEDS_CSUM, header.csum_start)


@pytest.mark.parametrize("features", [LEGACY, VERSION_1, MERGEABLE, MERGEABLE | GUEST_CSUM])
@pytest.mark.parametrize("vlan", [False, True], ids=["plain", "VLAN"])
@pytest.mark.parametrize("ip", [IP4, IP6], ids=["IPv4", "IPv6"])
def test_a_super_frame_is_cut_for_a_guest_that_takes_none(features: int, vlan: bool, ip: IP | IPv6) -> None:
    wire = Wire()
    payload = os.urandom(20_000)
    link = ETHER / Dot1Q(vlan=5) if vlan else ETHER
    frame, header = unfinished(
        link / ip / TCP(sport=1, dport=2, seq=1000, flags="PA") / payload, len(link) + len(ip), 16
    )
    header = NetHdr(
        header.flags,
        abi.HDR_GSO_TCPV4 if ip is IP4 else abi.HDR_GSO_TCPV6,
        len(link) + len(ip) + 20,
        1400,
        header.csum_start,
        16,
    )
    with plugged(wire, features) as driver:
        wire.say(frame, header)
        packets = [checked(got) for got in driver.receive(15)]
        assert [len(packet[TCP].payload) for packet in packets] == [1400] * 14 + [400]
        assert [packet[TCP].seq for packet in packets] == [1000 + 1400 * i for i in range(15)]
        assert b"".join(bytes(packet[TCP].payload) for packet in packets) == payload
        # All of them came in this order; and the next one finds everything as it was.
        wire.say(FRAME)
        assert driver.receive()[0].frame == FRAME


def test_a_super_frame_comes_whole_to_a_guest_that_takes_it() -> None:
    wire = Wire()
    frame, header = unfinished(ETHER / IP4 / TCP() / bytes(9000), 34, 16)
    header = NetHdr(header.flags, abi.HDR_GSO_TCPV4, 54, 1460, 34, 16)
    for features in (MERGEABLE | GUEST_CSUM | GUEST_TSO4, VERSION_1 | GUEST_CSUM | GUEST_TSO4):
        with plugged(wire, features, size=16) as driver:
            wire.say(frame, header)
            (got,) = driver.receive()
            assert got.frame == frame
            assert got.header == NetHdr(header.flags, abi.HDR_GSO_TCPV4, 54, 1460, 34, 16, got.buffers)


def test_a_super_frame_that_makes_no_sense_is_dropped() -> None:
    wire = Wire()
    with plugged(wire, MERGEABLE) as driver:
        for header in (
            NetHdr(abi.HDR_F_NEEDS_CSUM, abi.HDR_GSO_TCPV4, 54, 1460, 34, 16),
            NetHdr(abi.HDR_F_NEEDS_CSUM, abi.HDR_GSO_TCPV6, 54, 0, 34, 16),
            NetHdr(abi.HDR_F_NEEDS_CSUM, abi.HDR_GSO_UDP, 0, 0xFFFF),
            NetHdr(abi.HDR_F_NEEDS_CSUM, 77, 0, 1),
            NetHdr(abi.HDR_F_NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF),
            NetHdr(abi.HDR_F_NEEDS_CSUM, 0, 0, 0, len(FRAME) - 1, 0),
        ):
            wire.say(FRAME, header)
        wire.say(FRAME)
        assert [got.frame for got in driver.receive()] == [FRAME]
        assert rx_counters()["drops"] == 6


# Frames and buffers of every size


@pytest.mark.parametrize("features", [VERSION_1, MERGEABLE], ids=["modern", "mergeable"])
def test_frames_of_every_size_come_in_after_each_other(features: int) -> None:
    """What is expected of the next one follows the last ones, up and down."""
    wire = Wire()
    sizes = [60, 65549, 60, 65549, 65549, 1514, 9000, 14, 1, 300, 40_000]
    with plugged(wire, features, rx_buffer=None if features == MERGEABLE else 65_600, size=32) as driver:
        for size in sizes:
            frame = os.urandom(size)
            wire.say(frame)
            assert driver.receive()[0].frame == frame


@pytest.mark.parametrize("buffer", [12, 13, 100, 4096])
def test_mergeable_buffers_of_any_size(buffer: int) -> None:
    wire = Wire()
    with plugged(wire, MERGEABLE, rx_buffer=buffer, size=1024) as driver:
        for size in (14, 60, 88, 89, 500, 1500):
            frame = os.urandom(size)
            wire.say(frame)
            (got,) = driver.receive()
            assert got.frame == frame
            assert got.buffers == -(-(size + 12) // buffer)


def test_a_frame_that_no_batch_of_buffers_can_hold_is_dropped_and_not_waited_for() -> None:
    """352 buffers are walked for one frame at most: with 100 bytes each they hold 35 KB."""
    wire = Wire()
    with plugged(wire, MERGEABLE, rx_buffer=100, size=1024) as driver:
        wire.say(bytes(60_000))
        wire.say(FRAME)
        assert driver.receive()[0].frame == FRAME
        assert rx_counters()["oversize"] == 1


def test_a_frame_longer_than_any_is_dropped() -> None:
    wire = Wire()
    with plugged(wire, MERGEABLE) as driver:
        wire.say(bytes(70_000))
        wire.say(FRAME)
        assert driver.receive()[0].frame == FRAME
        assert rx_counters()["oversize"] == 1


def test_frames_wait_for_buffers_and_keep_their_order() -> None:
    wire = Wire()
    with plugged(wire, MERGEABLE, rx_buffer=2048, size=4) as driver:
        frames = [bytes([number]) * (1000 + 3000 * (number % 3)) for number in range(60)]
        for frame in frames:
            wire.say(frame)
        assert [got.frame for got in driver.receive(60)] == frames


# Sending


def test_what_the_host_can_not_take_now_stays_in_the_ring() -> None:
    wire = Wire()
    with plugged(wire, VERSION_1) as driver:
        frames = [bytes([number]) * 60_000 for number in range(100)]
        # More than the socket holds: the rest has to wait until the test has listened.
        driver.timeout = 0.05
        driver.send_many(frames[:60])
        with pytest.raises(TimeoutError):
            driver.wait_sent()
        assert [wire.hear()[1] for _ in range(60)] == frames[:60]
        driver.timeout = PATIENCE
        driver.wait_sent()


def test_a_frame_that_the_host_refuses_is_lost_and_the_next_one_goes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Too long for the socket: told once, counted each time."""
    wire = Wire()
    with plugged(wire, VERSION_1) as driver:
        for descriptor in wire.fds:
            with socket.socket(fileno=os.dup(descriptor)) as mine:
                mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        for _ in range(3):
            driver.send(bytes(60_000))
        driver.send(FRAME)
        assert wire.hear()[1] == FRAME
        driver.wait_sent()
    assert caplog.text.count("EMSGSIZE") == 1


def test_an_end_that_is_gone_is_told_of_and_another_one_taken(caplog: pytest.LogCaptureFixture) -> None:
    wire = Wire()
    with plugged(wire, VERSION_1) as driver:
        device = driver.frontend
        wire.peer.close()
        driver.send(FRAME)
        driver.wait_sent()
        poller = device.device.poller  # type: ignore[attr-defined]
        while not wire.reopened:
            poller.run_once(PATIENCE)
        assert "EPIPE" in caplog.text
        former = wire._mine
        wire._mine = socket.socket()
        wire.open(1)
        wire.changed()
        former.close()
        driver.send(FRAME)
        assert wire.hear()[1] == FRAME
        wire.say(FRAME)
        assert driver.receive()[0].frame == FRAME


def test_the_same_descriptor_again_loses_nothing_that_is_on_its_way() -> None:
    """A link that goes down and up: the backend tells of it, with the descriptors that it had."""
    wire = Wire()
    with plugged(wire, MERGEABLE, rx_buffer=2048, size=2) as driver:
        # The first one fits in the two buffers there are; what comes next is held until the guest gives them back.
        frames = [bytes([number]) * (3500 if number == 0 else 1000) for number in range(10)]
        for frame in frames:
            wire.say(frame)
            wire.changed()
        got: list[bytes] = []
        while len(got) < 10:
            got += [received.frame for received in driver.receive()]
            wire.changed()
        assert got == frames
