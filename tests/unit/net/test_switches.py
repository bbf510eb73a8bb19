"""A switch between guests of one process: who hears what, with which offloads, and what is forgotten."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from in_process import PATIENCE, SPANS, FrontEnd, served
from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.net_frame import NetHdr
from pyvhost.net import switches
from pyvhost.net.backends.base import Backend, PortKind
from pyvhost.net.backends.switch import SwitchBackend
from pyvhost.net.device import NetDevice, rarp
from pyvhost.observe import reader

VERSION_1 = 1 << virtio.F_VERSION_1
MERGEABLE = VERSION_1 | 1 << abi.F_MRG_RXBUF
CTRL_VQ = 1 << abi.F_CTRL_VQ
LEGACY = 1 << virtio.F_ANY_LAYOUT
CSUM = 1 << abi.F_CSUM | 1 << abi.F_GUEST_CSUM
TSO4 = 1 << abi.F_HOST_TSO4 | 1 << abi.F_GUEST_TSO4
TSO6 = 1 << abi.F_HOST_TSO6 | 1 << abi.F_GUEST_TSO6
ECN = 1 << abi.F_HOST_ECN | 1 << abi.F_GUEST_ECN
UFO = 1 << abi.F_HOST_UFO | 1 << abi.F_GUEST_UFO
ALL = CSUM | TSO4 | TSO6 | ECN | UFO

A, B, C = (bytes.fromhex(f"02000000000{number}") for number in "abc")
EVERYBODY = b"\xff" * 6
_names = itertools.count()


def frame(source: bytes, target: bytes, body: bytes = b"?") -> bytes:
    return target + source + b"\x88\xb5" + body.ljust(50, b"\0")


class Lan:
    """Guests on one switch, and a way to know that all that was sent has come."""

    def __init__(self, stack: ExitStack, name: str) -> None:
        self._stack = stack
        self.name = name
        self.fronts: list[FrontEnd] = []

    def join(self, features: int = MERGEABLE, pairs: int = 1, **options: int) -> NetDriver:
        """One more guest."""
        name = f"{self.name} guest {len(self.fronts)}"
        front = self._stack.enter_context(
            served(NetDevice(f"switch:{self.name}", queue_pairs=pairs, name=name))
        )
        self.fronts.append(front)
        return self.guest(front, features, pairs, **options)

    def guest(self, front: FrontEnd, features: int, pairs: int = 1, **options: int) -> NetDriver:
        memory = self._stack.enter_context(GuestMemory(SPANS))
        driver = NetDriver(front, memory, pairs, 64, features, timeout=PATIENCE, **options)  # type: ignore[arg-type]
        self._stack.enter_context(driver)
        driver.start()
        return driver

    def counters(self, guest: int, queue: str = "rx0") -> dict[str, int]:
        (own,) = (process for process in reader.snapshot().processes if process.pid == os.getpid())
        (row,) = (
            row
            for row in own.rows
            if row.labels.get("device") == f"{self.name} guest {guest}" and row.labels["queue"] == queue
        )
        return row.values


@contextmanager
def new_lan() -> Iterator[Lan]:
    with ExitStack() as stack:
        yield Lan(stack, f"lan{next(_names)}")


@pytest.fixture
def lan() -> Iterator[Lan]:
    with new_lan() as lan:
        yield lan


_marks = itertools.count(1)


def heard(sender: NetDriver, *listeners: NetDriver) -> list[list[bytes]]:
    """What each has heard by now: up to a frame to everybody that the sender ends with."""
    mark = frame(b"\x02" + bytes(5), EVERYBODY, b"mark %d" % next(_marks))
    sender.send(mark)
    answer = []
    for listener in listeners:
        frames: list[bytes] = []
        while mark not in frames:
            frames += [got.frame for got in listener.receive()]
        frames.remove(mark)
        answer.append(frames)
    return answer


# Who hears what


def test_what_is_not_known_goes_to_all_and_what_is_to_one(lan: Lan) -> None:
    a, b, c = lan.join(), lan.join(), lan.join()
    question, answer = frame(A, B), frame(B, A)
    a.send(question)
    assert heard(a, b, c) == [[question], [question]], "B is not known: flooded"
    b.send(answer)
    assert heard(b, a, c) == [[answer], []], "A was learnt"
    a.send(question)
    assert heard(a, b, c) == [[question], []], "B was learnt"
    for group in (EVERYBODY, bytes.fromhex("333300000001"), bytes.fromhex("01005e000001")):
        a.send(frame(A, group))
        assert heard(a, b, c) == [[frame(A, group)], [frame(A, group)]]


def test_nobody_hears_himself(lan: Lan) -> None:
    a, b = lan.join(), lan.join()
    a.send_many([frame(A, EVERYBODY), frame(A, A), frame(B, A)])
    assert heard(a, b) == [[frame(A, EVERYBODY)]]
    b.send(frame(B, EVERYBODY))
    assert heard(b, a) == [[frame(B, EVERYBODY)]], "nothing of its own before"


def test_a_batch_for_many_is_told_apart(lan: Lan) -> None:
    a, b, c = lan.join(), lan.join(), lan.join()
    b.send(frame(B, A))
    c.send(frame(C, A))
    heard(b, a, c)
    heard(c, a, b)
    batch = [frame(A, (B, C, EVERYBODY)[i % 3], bytes([i])) for i in range(30)]
    a.send_many(batch)
    assert heard(a, b, c) == [
        [each for each in batch if each[:6] in (B, EVERYBODY)],
        [each for each in batch if each[:6] in (C, EVERYBODY)],
    ]


def test_an_address_that_moves_is_learnt_again_and_a_groups_never(lan: Lan) -> None:
    a, b, c = lan.join(), lan.join(), lan.join()
    for at, other in ((b, c), (c, b), (b, c)):
        at.send(frame(B, EVERYBODY))
        heard(at, a, other)
        a.send(frame(A, B))
        got = dict(zip((b, c), heard(a, b, c), strict=True))
        assert (got[at], got[other]) == ([frame(A, B)], [])
    b.send(frame(b"\x03" + B[1:], EVERYBODY))
    heard(b, a, c)
    a.send(frame(A, b"\x03" + B[1:]))
    assert heard(a, b, c) == [[frame(A, b"\x03" + B[1:])]] * 2


def test_a_guest_that_leaves_is_forgotten(lan: Lan) -> None:
    a, b, c = lan.join(), lan.join(), lan.join()
    b.send(frame(B, EVERYBODY))
    heard(b, a, c)
    lan.fronts[1].device.reset()
    a.send(frame(A, B))
    assert heard(a, c) == [[frame(A, B)]], "it may come back elsewhere: flooded"
    again = lan.guest(lan.fronts[1], MERGEABLE)
    a.send(frame(A, B))
    assert heard(a, again, c) == [[frame(A, B)], [frame(A, B)]]


def test_a_member_that_leaves_makes_room_for_another(lan: Lan) -> None:
    a, b = lan.join(), lan.join()
    with served(NetDevice(f"switch:{lan.name}")) as front:
        device = front.device
        assert isinstance(device, NetDevice)
        member = device.member
        guest = lan.guest(front, MERGEABLE)
        guest.send(frame(C, EVERYBODY))
        heard(guest, a, b)
    assert device.switch is None
    a.send(frame(A, C))
    assert heard(a, b) == [[frame(A, C)]]
    lan.join()
    last = lan.fronts[-1].device
    assert isinstance(last, NetDevice)
    assert last.member == member


def test_a_guest_that_moved_here_is_announced(lan: Lan) -> None:
    a, b, c = lan.join(), lan.join(), lan.join()
    lan.fronts[1].device.send_rarp(B)
    a.send(frame(A, B))
    assert heard(a, b, c) == [[frame(A, B)], []]


def test_switches_are_told_apart_by_name(lan: Lan) -> None:
    a, b = lan.join(), lan.join()
    with new_lan() as other:
        c, d = other.join(), other.join()
        a.send(frame(A, EVERYBODY))
        c.send(frame(C, EVERYBODY))
        assert heard(a, b) == [[frame(A, EVERYBODY)]]
        assert heard(c, d) == [[frame(C, EVERYBODY)]]


def test_a_switch_has_room_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches, "MAX_MEMBERS", 2)
    with new_lan() as lan:
        a, b = lan.join(), lan.join()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="2 members of a switch"):
                lan.join()
        a.send(frame(A, EVERYBODY))
        assert heard(a, b) == [[frame(A, EVERYBODY)]]
        with pytest.raises(RuntimeError, match="2 members"), served(NetDevice(f"switch:{lan.name}")):
            pass


def test_pairs_are_kept_apart_as_far_as_the_other_has_them(lan: Lan) -> None:
    a, b, c = lan.join(pairs=3), lan.join(pairs=2), lan.join()
    for pair in range(3):
        a.send(frame(A, EVERYBODY, bytes([pair])), pair=pair)
        (got,) = b.receive()
        assert got.pair == pair % 2
        assert c.receive()[0].pair == 0


def test_a_guest_that_does_not_listen_costs_the_others_nothing(lan: Lan) -> None:
    a, b, c = lan.join(), lan.join(rx_depth=2), lan.join()
    batch = [frame(A, EVERYBODY, bytes([i])) for i in range(40)]
    a.send_many(batch)
    a.wait_sent()
    got = c.receive(40)
    assert [each.frame for each in got] == batch
    assert [each.frame for each in b.receive(2)] == batch[:2]
    counters = lan.counters(1)
    assert (counters["no_buffer"], counters["drops"], counters["packets"]) == (38, 38, 2)
    a.send(batch[0])
    assert b.receive()[0].frame == batch[0]


def test_a_ring_at_fault_is_a_member_still(lan: Lan) -> None:
    """It stands still until its next kick. Whatever else changes on the switch meanwhile, it is served again then."""
    a, b, c = lan.join(), lan.join(), lan.join()
    queue = b.rx[0]
    while queue.ring.outstanding:
        a.send(frame(A, EVERYBODY))
        c.receive()
        queue.ring.pop_used()
    queue.ring.offer(queue.ring.size)
    slot = queue.ring.avail_idx
    queue.publish()
    a.send(frame(A, EVERYBODY))
    assert queue.wait_error(PATIENCE)
    # The transmit ring stops and starts: who is reachable is worked out anew.
    base = lan.fronts[1].stop_ring(1)
    lan.fronts[1].start_ring(1, b.tx[0], base)
    room = b.memory.allocate(4096)
    head = queue.ring.add(writable=[(room, 4096)])
    queue.ring.set_avail_entry(slot, head)
    queue.ring.avail_idx = slot + 1
    queue.kick()
    c.receive()
    deadline = time.monotonic() + PATIENCE
    while not queue.ring.used_pending():
        assert time.monotonic() < deadline, "nobody sends to it any more"
        a.send(frame(A, EVERYBODY))
        c.receive()
    assert queue.ring.pop_used() is not None


# Offloads


def unfinished(packet: Ether, field: int) -> tuple[bytes, int]:
    """The packet with only the pseudo header's sum where its checksum is to be, and where that begins."""
    whole = bytearray(bytes(packet))
    ip6 = IPv6 in packet
    at = 14 + (40 if ip6 else 20)
    length = len(whole) - at
    number = packet[IPv6].nh if ip6 else packet[IP].proto
    pseudo = whole[at - (32 if ip6 else 8) : at] + length.to_bytes(4, "big") + number.to_bytes(4, "big")
    total = sum(int.from_bytes(pseudo[i : i + 2], "big") for i in range(0, len(pseudo), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    whole[at + field : at + field + 2] = total.to_bytes(2, "big")
    return bytes(whole), at


def is_right(data: bytes) -> bool:
    """Whether every checksum is what somebody else makes it."""
    packet = Ether(data)
    for layer in (IP, TCP, UDP):
        if layer in packet and packet.getlayer(IP) is not None and (layer is IP or not packet[IP].flags.MF):
            del packet[layer].chksum
    return bytes(packet) == data


ETHER = Ether(src="02:00:00:00:00:0a", dst="ff:ff:ff:ff:ff:ff")
IP4, IP6 = IP(src="10.0.0.1", dst="10.0.0.2"), IPv6(src="fd00::1", dst="fd00::2")


def test_a_checksum_is_finished_for_those_who_did_not_negotiate_it(lan: Lan) -> None:
    a, with_it, without, legacy = (
        lan.join(each) for each in (MERGEABLE | CSUM, MERGEABLE | CSUM, MERGEABLE, LEGACY)
    )
    for packet, field in (
        (ETHER / IP4 / UDP(sport=1, dport=2) / b"some words", 6),
        (ETHER / IP4 / TCP(sport=1, dport=2) / b"some more words!!", 16),
    ):
        data, at = unfinished(packet, field)
        a.send(data, NetHdr(flags=abi.HDR_F_NEEDS_CSUM, csum_start=at, csum_offset=field))
        (got,) = with_it.receive()
        assert got.frame == data
        assert (got.header.flags, got.header.csum_start, got.header.csum_offset) == (1, at, field)
        for guest in (without, legacy):
            (got,) = guest.receive()
            assert got.frame == bytes(packet)
            assert got.header.flags == 0


@pytest.mark.parametrize(
    ("ip", "gso", "feature"),
    [(IP4, abi.HDR_GSO_TCPV4, TSO4), (IP6, abi.HDR_GSO_TCPV6, TSO6)],
    ids=["TSO4", "TSO6"],
)
@pytest.mark.parametrize("ecn", [False, True], ids=["", "ECN"])
def test_a_super_frame_is_cut_for_those_who_did_not_negotiate_it(
    lan: Lan, ip: IP | IPv6, gso: int, feature: int, ecn: bool
) -> None:
    sender = lan.join(MERGEABLE | ALL)
    whole = lan.join(MERGEABLE | CSUM | feature | ECN)
    cut = [
        lan.join(MERGEABLE),
        lan.join(MERGEABLE | CSUM),
        lan.join(LEGACY),
        lan.join(MERGEABLE | CSUM | (ALL & ~feature)),
    ]
    if ecn:
        cut.append(lan.join(MERGEABLE | CSUM | feature))
    payload = os.urandom(10_000)
    packet = ETHER / ip / TCP(sport=1, dport=2, seq=7, flags="PAC" if ecn else "PA") / payload
    data, at = unfinished(packet, 16)
    header = NetHdr(abi.HDR_F_NEEDS_CSUM, gso | (abi.HDR_GSO_ECN if ecn else 0), at + 20, 1000, at, 16)
    sender.send(data, header)
    (got,) = whole.receive()
    assert got.frame == data
    assert (got.header.gso_type, got.header.gso_size) == (header.gso_type, 1000)
    for guest in cut:
        parts = guest.receive(10)
        assert all(is_right(part.frame) for part in parts)
        assert {(part.header.flags, part.header.gso_type, part.header.gso_size) for part in parts} == {
            (0, 0, 0)
        }
        packets = [Ether(part.frame) for part in parts]
        assert [each[TCP].seq for each in packets] == [7 + 1000 * i for i in range(10)]
        assert b"".join(bytes(each[TCP].payload) for each in packets) == payload
        assert ["C" in each[TCP].flags for each in packets] == [ecn] + [False] * 9
        assert guest.poll() == []


def test_a_large_datagram_is_cut_into_fragments(lan: Lan) -> None:
    sender, cut = lan.join(MERGEABLE | ALL), lan.join(MERGEABLE)
    payload = os.urandom(5000)
    packet = ETHER / IP4 / UDP(sport=1, dport=2) / payload
    data, at = unfinished(packet, 6)
    sender.send(data, NetHdr(abi.HDR_F_NEEDS_CSUM, abi.HDR_GSO_UDP, at + 8, 1480, at, 6))
    packets = [Ether(got.frame) for got in cut.receive(4)]
    assert [each[IP].frag for each in packets] == [0, 185, 370, 555]
    assert b"".join(bytes(each[IP].payload) for each in packets) == bytes(packet[UDP])


@pytest.mark.parametrize(
    "header",
    [
        NetHdr(0x80 | abi.HDR_F_DATA_VALID, 0, 9, 9, 9, 9),
        NetHdr(0, abi.HDR_GSO_TCPV4, 54, 1000, 34, 16),
        NetHdr(abi.HDR_F_DATA_VALID, 99, 54, 1000, 34, 16),
        NetHdr(0x7E, 2, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
    ],
    ids=str,
)
def test_nobody_hears_what_another_guests_header_should_not_say(lan: Lan, header: NetHdr) -> None:
    a, b, c = lan.join(MERGEABLE | ALL), lan.join(MERGEABLE | ALL), lan.join(LEGACY)
    a.send(frame(A, EVERYBODY), header)
    for guest in (b, c):
        (got,) = guest.receive()
        assert got.frame == frame(A, EVERYBODY)
        assert (got.header.flags, got.header.gso_type, got.header.gso_size) == (0, 0, 0)


def test_what_can_not_be_finished_is_dropped_for_those_who_need_it_so(lan: Lan) -> None:
    a, b, c = lan.join(MERGEABLE | ALL), lan.join(MERGEABLE | ALL), lan.join(MERGEABLE)
    lies = [
        NetHdr(abi.HDR_F_NEEDS_CSUM, 0, 0, 0, 0xFFFF, 0xFFFF),
        NetHdr(abi.HDR_F_NEEDS_CSUM, abi.HDR_GSO_TCPV4, 0, 0, 0, 0),
        NetHdr(abi.HDR_F_NEEDS_CSUM, abi.HDR_GSO_TCPV6, 54, 1000, 34, 16),
    ]
    for lie in lies:
        a.send(frame(A, EVERYBODY), lie)
    everything, nothing = heard(a, b, c)
    assert everything == [frame(A, EVERYBODY)] * 3
    assert nothing == []
    assert lan.counters(2)["drops"] == 3


# The uplink


class Wire(Backend):
    """An uplink whose other end is the test."""

    kind = PortKind.FD

    def __init__(self) -> None:
        super().__init__("test-wire")
        self.header_size = 10

    def open(self, queue_pairs: int, poller: object = None) -> list[int]:
        self.mine, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.mine.setblocking(False)
        self.peer.settimeout(PATIENCE)
        self.fds = [self.mine.fileno()]
        return self.fds

    def close(self) -> None:
        self.fds = []
        self.mine.close()
        self.peer.close()


def test_an_uplink_is_a_member_like_any_other(lan: Lan) -> None:
    wire = Wire()
    backend = SwitchBackend(f"switch:{lan.name}", lan.name, wire)
    with served(NetDevice(backend)) as front:
        guest = lan.guest(front, MERGEABLE)
        other = lan.join(LEGACY | CTRL_VQ)
        guest.send(frame(A, EVERYBODY))
        assert wire.peer.recv(2000) == bytes(10) + frame(A, EVERYBODY)
        assert other.receive()[0].frame == frame(A, EVERYBODY)
        wire.peer.sendall(bytes(10) + frame(C, A))
        assert guest.receive()[0].frame == frame(C, A)
        guest.send(frame(A, C))
        assert wire.peer.recv(2000) == bytes(10) + frame(A, C)
        assert heard(guest, other) == [[]]
        wire.peer.recv(2000)
        # Shorter than a frame is none, and stops nothing.
        for short in (b"x", bytes(10), bytes(23)):
            wire.peer.sendall(short)
        wire.peer.sendall(bytes(10) + frame(C, EVERYBODY))
        assert guest.receive()[0].frame == frame(C, EVERYBODY)
        assert other.receive()[0].frame == frame(C, EVERYBODY)
        # What a guest asks the host to do goes out as it is; what comes is made plain for whom it is not.
        data, at = unfinished(ETHER / IP4 / UDP(sport=1, dport=2) / b"words", 6)
        header = NetHdr(abi.HDR_F_NEEDS_CSUM, csum_start=at, csum_offset=6)
        other.send(data, header)
        assert wire.peer.recv(2000) == header.pack(10) + data
        assert is_right(guest.receive()[0].frame)
        wire.peer.sendall(header.pack(10) + data)
        assert is_right(other.receive()[0].frame)
        assert is_right(guest.receive()[0].frame)
        front.device.send_rarp(A)
        assert wire.peer.recv(2000) == bytes(10) + rarp(A)


def test_an_uplink_that_has_gone_costs_the_guests_nothing(lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
    wire = Wire()
    with served(NetDevice(SwitchBackend(f"switch:{lan.name}", lan.name, wire))) as front:
        guest, other = lan.guest(front, MERGEABLE), lan.join()
        former = wire.fds
        wire.fds = [-1]
        wire.changed()
        for _ in range(3):
            guest.send(frame(A, EVERYBODY))
            assert other.receive()[0].frame == frame(A, EVERYBODY)
        front.device.send_rarp(A)
        assert "test-wire" not in caplog.text
        wire.fds = former
        wire.changed()
        guest.send(frame(A, EVERYBODY))
        assert wire.peer.recv(2000) == bytes(10) + frame(A, EVERYBODY)
