"""Frames between a driver and the host, through each backend that has a host at its other end.

The driver is this package's own, the rest is real: taps, raw sockets, passt, programs on Unix sockets.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from back_end import PATIENCE, BackEnd
from netns import network_namespace, way_out_of
from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import FEATURES, NetDriver
from pyvhost.driver.net_frame import NetHdr, Received
from pyvhost.host import packet, tap
from pyvhost.net.backends.user import UserBackend
from pyvhost.net.device import NetDevice
from requirements import need, need_program

Ip = Callable[[str], str]

MAC = "52:54:00:00:00:01"
LEGACY = 1 << virtio.F_ANY_LAYOUT
OFFLOADS = FEATURES | 1 << abi.F_CSUM | 1 << abi.F_GUEST_CSUM | 1 << abi.F_GUEST_TSO4 | 1 << abi.F_HOST_TSO4


@pytest.fixture
def ip() -> Iterator[Ip]:
    need(Path(tap.DEVICE).exists(), "modprobe tun")
    with network_namespace() as ip:
        yield ip


class Guest(NetDriver):
    """A driver that can wait for one frame among others: a host says things of its own."""

    def hear(self, wanted: Callable[[Packet], object]) -> tuple[Received, Packet]:
        """The next frame that is wanted. Those before it are forgotten."""
        while True:
            frames = self.receive()
            for at, received in enumerate(frames):
                parsed = Ether(received.frame)
                if wanted(parsed):
                    self._received.extendleft(reversed(frames[at + 1 :]))
                    return received, parsed


@contextmanager
def guest(back_end: BackEnd, features: int = FEATURES, pairs: int = 1, at: int = 0) -> Iterator[Guest]:
    """A guest that has started, on device `at`."""
    with (
        GuestMemory(64 * MIB) as memory,
        back_end.connect(at) as frontend,
        Guest(frontend, memory, pairs, features=features, timeout=PATIENCE) as driver,
    ):
        driver.start()
        assert driver.features & features == features
        yield driver


class Changes:
    """Waits for what a backend tells its device."""

    def __init__(self, back_end: BackEnd) -> None:
        self._back_end = back_end
        self._told = threading.Semaphore(0)
        backend = back_end.device.backend
        tell = backend.on_change
        assert tell is not None

        def heard() -> None:
            tell()
            self._told.release()

        backend.on_change = heard

    def wait(self, up: bool) -> None:
        """Until the link is as said, and the device knows."""
        while True:
            assert self._told.acquire(timeout=PATIENCE), "the device is told of no change"
            if self._back_end.ask(self._back_end.device.backend.link_up) == up:
                return


# tap


@pytest.fixture
def host_at_tap(ip: Ip, tmp_path: Path) -> Iterator[BackEnd]:
    """The host is 10.9.0.1 behind vm0; the guest is to be 10.9.0.2."""
    with BackEnd(tmp_path, NetDevice(backend="tap:vm0", queue_pairs=4)) as back_end:
        ip("addr add 10.9.0.1/24 dev vm0")
        ip(f"neigh add 10.9.0.2 lladdr {MAC} dev vm0")
        yield back_end


def to_host(ip: Ip) -> Packet:
    mac = ip("-br link show vm0").split()[2]
    return Ether(src=MAC, dst=mac) / IP(src="10.9.0.2", dst="10.9.0.1")


@pytest.mark.parametrize("features", [LEGACY, FEATURES, OFFLOADS], ids=["legacy", "modern", "offloads"])
def test_tap_and_host_talk(host_at_tap: BackEnd, ip: Ip, features: int) -> None:
    with guest(host_at_tap, features) as driver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("10.9.0.1", 1234))
        sock.settimeout(PATIENCE)
        for size in (1, 18, 1000, 1472):
            driver.send(bytes(to_host(ip) / UDP(sport=99, dport=1234) / (b"x" * size)))
            assert sock.recvfrom(2000) == (b"x" * size, ("10.9.0.2", 99))
            sock.sendto(b"y" * size, ("10.9.0.2", 99))
            received, got = driver.hear(lambda parsed: UDP in parsed)
            assert got[UDP].payload.load == b"y" * size
            needs_csum = received.header.flags & abi.HDR_F_NEEDS_CSUM
            if features == OFFLOADS:
                assert needs_csum
            else:
                assert not needs_csum
                assert checksum_is_right(received.frame)


def checksum_is_right(frame: bytes) -> bool:
    parsed = Ether(frame)
    said = parsed[UDP].chksum
    del parsed[UDP].chksum
    return bool(Ether(bytes(parsed))[UDP].chksum == said)


def test_the_host_finishes_what_the_guest_left_to_do(host_at_tap: BackEnd, ip: Ip) -> None:
    """A frame whose checksum is only begun: the host would drop it if it were taken for finished."""
    with guest(host_at_tap, OFFLOADS) as driver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("10.9.0.1", 1234))
        sock.settimeout(PATIENCE)
        # The field holds the pseudo header's sum, as a driver leaves it.
        frame = bytearray(bytes(to_host(ip) / UDP(sport=99, dport=1234) / b"unfinished"))
        pseudo = sum(struct.unpack(">4H", bytes([10, 9, 0, 2, 10, 9, 0, 1]))) + 17 + 8 + 10
        struct.pack_into(">H", frame, 40, (pseudo & 0xFFFF) + (pseudo >> 16))
        driver.send(bytes(frame), NetHdr(flags=abi.HDR_F_NEEDS_CSUM, csum_start=34, csum_offset=6))
        assert sock.recv(100) == b"unfinished"


def test_a_super_frame_comes_whole_to_a_guest_that_takes_it_and_in_pieces_to_one_that_does_not(
    host_at_tap: BackEnd, ip: Ip
) -> None:
    """The host's own TCP, answered by hand as far as it takes to make it send."""
    payload = os.urandom(20_000)
    for features in (OFFLOADS, FEATURES):
        with guest(host_at_tap, features) as driver, socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("10.9.0.1", 1234))
            listener.listen()
            listener.settimeout(PATIENCE)
            port = 1000 + (features == OFFLOADS)
            syn = TCP(
                sport=port,
                dport=1234,
                flags="S",
                seq=100,
                window=65535,
                options=[("MSS", 1460), ("WScale", 7)],
            )
            driver.send(bytes(to_host(ip) / syn))
            _, answer = driver.hear(lambda parsed: TCP in parsed and parsed[TCP].flags == "SA")
            start = answer[TCP].seq + 1
            driver.send(
                bytes(to_host(ip) / TCP(sport=port, dport=1234, flags="A", seq=101, ack=start, window=65535))
            )
            connection, _ = listener.accept()
            with connection:
                connection.sendall(payload)
                got = bytearray(len(payload))
                largest = seen = 0
                while seen < len(payload):
                    received, segment = driver.hear(lambda parsed: TCP in parsed and parsed[TCP].payload)
                    data = bytes(segment[TCP].payload)
                    at = segment[TCP].seq - start
                    got[at : at + len(data)] = data
                    seen = max(seen, at + len(data))
                    largest = max(largest, len(received.frame))
                    if features == OFFLOADS and len(data) > 1460:
                        assert received.header.gso_type == abi.HDR_GSO_TCPV4
                        assert received.header.gso_size == 1460
                    driver.send(
                        bytes(
                            to_host(ip)
                            / TCP(sport=port, dport=1234, flags="A", seq=101, ack=start + seen, window=65535)
                        )
                    )
                assert got == payload
                assert (largest > 1514) == (features == OFFLOADS)


def test_flows_spread_over_the_pairs_that_a_guest_uses(host_at_tap: BackEnd, ip: Ip) -> None:
    features = FEATURES | 1 << abi.F_CTRL_VQ
    with guest(host_at_tap, features, pairs=4) as driver:
        assert driver.control is not None
        for pairs in (4, 1):
            driver.control.set_queue_pairs(pairs)
            seen: dict[int, set[int]] = {}
            for number in range(64):
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    sock.bind(("10.9.0.1", 2000 + number))
                    sock.sendto(b"question", ("10.9.0.2", 99))
            ports: set[int] = set()
            while len(ports) < 64:
                received, got = driver.hear(lambda parsed: UDP in parsed and parsed[UDP].dport == 99)
                ports.add(got[UDP].sport)
                seen.setdefault(received.pair, set()).add(got[UDP].sport)
            assert max(seen) < pairs
            assert (len(seen) > 1) == (pairs > 1)
            # Sending is possible on any pair.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(("10.9.0.1", 1234))
                sock.settimeout(PATIENCE)
                for pair in range(pairs):
                    driver.send(bytes(to_host(ip) / UDP(sport=pair, dport=1234) / b"from a pair"), pair=pair)
                assert {sock.recvfrom(100)[1][1] for _ in range(pairs)} == set(range(pairs))


def test_a_tap_that_goes_and_comes_back_under_a_running_guest(host_at_tap: BackEnd, ip: Ip) -> None:
    changes = Changes(host_at_tap)
    with guest(host_at_tap) as driver:
        assert driver.status() & abi.S_LINK_UP
        ip("link set vm0 down")
        changes.wait(False)
        assert not driver.status() & abi.S_LINK_UP
        ip("link del vm0")
        ip("tuntap add vm0 mode tap multi_queue")
        ip("addr add 10.9.0.1/24 dev vm0")
        ip("link set vm0 up")
        ip(f"neigh add 10.9.0.2 lladdr {MAC} dev vm0")
        changes.wait(True)
        assert driver.status() & abi.S_LINK_UP
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("10.9.0.1", 1234))
            sock.settimeout(PATIENCE)
            driver.send(bytes(to_host(ip) / UDP(sport=99, dport=1234) / b"again"))
            assert sock.recv(100) == b"again"
            sock.sendto(b"answer", ("10.9.0.2", 99))
            driver.hear(lambda parsed: Raw in parsed and parsed[Raw].load == b"answer")


# packet


@pytest.mark.parametrize("features", [LEGACY, FEATURES], ids=["legacy", "modern"])
def test_packet_shares_an_interface(ip: Ip, tmp_path: Path, features: int) -> None:
    ip("link add name left type veth peer name right")
    for name in ("left", "right"):
        ip(f"link set {name} addrgenmode none arp off up")
    (far,) = packet.open_packet("left")
    with (
        BackEnd(tmp_path, NetDevice(backend="packet:right")) as back_end,
        guest(back_end, features) as driver,
    ):
        for size in (60, 1000, 1514):
            frame = bytes(Ether(src=MAC, dst="02:00:00:00:00:02", type=0x88B5)) + os.urandom(size - 14)
            driver.send(frame)
            assert select.select([far], [], [], PATIENCE)[0]
            assert os.read(far, 2000)[10:] == frame
            os.write(far, bytes(10) + frame)
            received, _ = driver.hear(lambda parsed: parsed.type == 0x88B5)
            assert received.frame == frame
    os.close(far)


# stream


def framed(frame: bytes) -> bytes:
    return struct.pack(">I", len(frame)) + frame


def read_exactly(sock: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        part = sock.recv(size - len(got))
        assert part, "the other end has gone"
        got += part
    return got


def read_framed(sock: socket.socket) -> bytes:
    return read_exactly(sock, struct.unpack(">I", read_exactly(sock, 4))[0])


def test_stream_peers_come_and_go_under_a_running_guest(tmp_path: Path) -> None:
    path = tmp_path / "peer"
    with BackEnd(tmp_path, NetDevice(backend=f"stream:{path}")) as back_end:
        changes = Changes(back_end)
        with guest(back_end) as driver:
            assert not driver.status() & abi.S_LINK_UP
            driver.send(os.urandom(60))
            driver.wait_sent()  # nobody is there: it is lost, not kept
            for _ in range(3):
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.settimeout(PATIENCE)
                    peer.connect(str(path))
                    changes.wait(True)
                    assert driver.status() & abi.S_LINK_UP
                    for size in (14, 60, 1514, 4000, 65000):
                        frame = os.urandom(size)
                        driver.send(frame)
                        assert read_framed(peer) == frame
                    # Several in a piece, one in pieces.
                    frames = [os.urandom(size) for size in (60, 61, 1000)]
                    peer.sendall(b"".join(map(framed, frames)))
                    got = driver.receive(3)
                    assert [received.frame for received in got] == frames
                    for byte in framed(frames[0]):
                        peer.sendall(bytes([byte]))
                    assert [received.frame for received in driver.receive()] == frames[:1]
                changes.wait(False)
                assert not driver.status() & abi.S_LINK_UP


def test_a_peer_that_is_slow_loses_no_frame_and_no_byte(tmp_path: Path) -> None:
    """More is sent than the socket takes: the guest's ring waits."""
    path = tmp_path / "peer"
    with BackEnd(tmp_path, NetDevice(backend=f"stream:{path}")) as back_end:
        changes = Changes(back_end)
        with guest(back_end) as driver, socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(PATIENCE)
            peer.connect(str(path))
            changes.wait(True)
            frames = [os.urandom(1000 + 37 * i % 9000) for i in range(200)]
            driver.send_many(frames)
            assert [read_framed(peer) for _ in frames] == frames


def test_a_peer_that_talks_nonsense_is_hung_up_on(tmp_path: Path) -> None:
    path = tmp_path / "peer"
    with BackEnd(tmp_path, NetDevice(backend=f"stream:{path}")) as back_end:
        changes = Changes(back_end)
        with guest(back_end) as driver:
            for nonsense in (b"\xff" * 4, struct.pack(">I", 70_000)):
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.settimeout(PATIENCE)
                    peer.connect(str(path))
                    changes.wait(True)
                    peer.sendall(nonsense)
                    assert peer.recv(1) == b""
                    changes.wait(False)
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
                changes.wait(True)
                peer.sendall(framed(bytes(60)))
                assert driver.receive()[0].frame == bytes(60)


# user


@pytest.fixture
def way_out(ip: Ip) -> None:
    need_program("passt")
    way_out_of(ip)


@pytest.mark.usefixtures("way_out")
def test_user_reaches_the_host_and_outlives_its_passt(tmp_path: Path) -> None:
    with BackEnd(tmp_path, NetDevice(backend="user")) as back_end:
        changes = Changes(back_end)
        backend = back_end.device.backend
        assert isinstance(backend, UserBackend)
        with guest(back_end) as driver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            assert driver.mtu() == 65520
            sock.bind(("127.0.0.1", 0))
            sock.settimeout(PATIENCE)
            for _ in range(2):
                driver.send(
                    bytes(
                        Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff")
                        / ARP(hwsrc=MAC, psrc="10.9.0.2", pdst="10.9.0.1")
                    )
                )
                _, answer = driver.hear(lambda parsed: ARP in parsed and parsed[ARP].op == 2)
                gateway = answer[ARP].hwsrc
                # The gateway's address is the host's loopback. The port is the guest's on the host, too.
                question = UDP(sport=9999, dport=sock.getsockname()[1]) / b"question"
                driver.send(
                    bytes(Ether(src=MAC, dst=gateway) / IP(src="10.9.0.2", dst="10.9.0.1") / question)
                )
                data, address = sock.recvfrom(100)
                assert data == b"question"
                sock.sendto(b"answer", address)
                _, got = driver.hear(lambda parsed: UDP in parsed and parsed[UDP].dport == 9999)
                assert got[UDP].payload.load == b"answer"

                pid = back_end.ask(lambda: backend.passt_pid)
                os.kill(pid, signal.SIGKILL)
                changes.wait(False)
                assert not driver.status() & abi.S_LINK_UP
                changes.wait(True)


# switch


def test_two_guests_and_the_host_on_one_switch(ip: Ip, tmp_path: Path) -> None:
    devices = [NetDevice(backend="switch:lan,uplink=tap:vm0"), NetDevice(backend="switch:lan")]
    with BackEnd(tmp_path, *devices) as back_end, ExitStack() as stack:
        ip("addr add 10.9.0.1/24 dev vm0")
        drivers = [stack.enter_context(guest(back_end, at=at)) for at in range(2)]
        macs = ["52:54:00:00:00:01", "52:54:00:00:00:02"]
        # Each says who it is, to everybody.
        for driver, mac, other in zip(drivers, macs, reversed(drivers), strict=True):
            driver.send(bytes(Ether(src=mac, dst="ff:ff:ff:ff:ff:ff", type=0x88B5) / (b"hello" * 10)))
            _, heard = other.hear(lambda parsed: parsed.type == 0x88B5)
            assert heard.src == mac
        for at, (driver, mac) in enumerate(zip(drivers, macs, strict=True)):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(("10.9.0.1", 1234))
                sock.settimeout(PATIENCE)
                ip(f"neigh replace 10.9.0.{2 + at} lladdr {mac} dev vm0")
                host = ip("-br link show vm0").split()[2]
                address = f"10.9.0.{2 + at}"
                driver.send(
                    bytes(
                        Ether(src=mac, dst=host)
                        / IP(src=address, dst="10.9.0.1")
                        / UDP(sport=99, dport=1234)
                        / b"up"
                    )
                )
                assert sock.recvfrom(100) == (b"up", (address, 99))
                sock.sendto(b"down", (address, 99))
                _, got = driver.hear(lambda parsed: Raw in parsed and parsed[Raw].load == b"down")
                assert got.dst == mac
        # What is for the other guest alone does not reach the host, nor the sender.
        frame = bytes(Ether(src=macs[0], dst=macs[1], type=0x88B5) / (b"private" * 10))
        drivers[0].send(frame)
        drivers[1].hear(lambda parsed: bytes(parsed) == frame)
