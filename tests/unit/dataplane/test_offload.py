"""Offloads in software, held against scapy: what a receiver that asked for no offload must see.

Promises: frames are judged byte by byte against packets that scapy built, its checksums included.
"""

from __future__ import annotations

import functools
import random
import socket
import struct
from operator import truediv
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, defragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    defragment6,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import checksum as scapy_checksum

from guarded import Guarded
from pyvhost.abi.virtio_net import (
    HDR_GSO_ECN,
    HDR_GSO_NONE,
    HDR_GSO_TCPV4,
    HDR_GSO_TCPV6,
    HDR_GSO_UDP,
    HDR_GSO_UDP_L4,
)
from pyvhost.dataplane import offload

ETHER = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")
TAGS: dict[str, Packet] = {
    "untagged": ETHER,
    "tagged": ETHER / Dot1Q(vlan=7, prio=3),
    "tagged twice": ETHER / Dot1AD(vlan=100) / Dot1Q(vlan=7),
}
tags = pytest.mark.parametrize("link", TAGS.values(), ids=TAGS.keys())

IP4 = IP(src="192.0.2.1", dst="198.51.100.2", id=0xFFFE, flags="DF", tos=0x2)
IP4_OPTIONS = IP(src="192.0.2.1", dst="198.51.100.2", id=5, options=[IPOption_NOP()] * 4)
IP6 = IPv6(src="2001:db8::1", dst="2001:db8::2", tc=2, fl=0xABCDE)
IP6_EXTENDED = IP6 / IPv6ExtHdrHopByHop(options=[PadN(optdata=b"\0" * 12)]) / IPv6ExtHdrDestOpt()


def payload(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def cut(frame: bytes, gso_type: int, gso_size: int, ident: int = 0) -> list[bytes]:
    """All segments of a frame, each made where not one byte beside it can be touched."""
    source = Guarded.of(frame)
    count = offload.segment_count(source.address, len(frame), gso_type, gso_size)
    assert count > 0, count
    segments = []
    for index in range(count):
        size = 0
        for room in (65536 + 64, None):
            out = Guarded(size if room is None else room)
            size = offload.segment(
                source.address, len(frame), gso_type, gso_size, index, out.address, out.size, ident
            )
            assert size > 0, size
            assert out.intact()
        segments.append(out.get())
        smaller = Guarded(size - 1)
        arguments = (source.address, len(frame), gso_type, gso_size, index, smaller.address, size - 1, ident)
        assert offload.segment(*arguments) == offload.NO_ROOM
    assert source.get() == frame
    assert source.intact()
    arguments = (source.address, len(frame), gso_type, gso_size, count, out.address, out.size, ident)
    assert offload.segment(*arguments) == offload.MALFORMED
    return segments


def super_frame(packet: Packet) -> bytes:
    """As a driver hands it over: the transport checksum is not one (NEEDS_CSUM)."""
    packet = packet.copy()
    packet[TCP if TCP in packet else UDP].chksum = 0x1234
    return bytes(packet)


def expected(packet: Packet, size: int) -> list[bytes]:
    """The segments that scapy builds of the same packet."""
    packet = Ether(bytes(packet))
    transport = TCP if TCP in packet else UDP
    data = bytes(packet[transport].payload)
    pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    segments = []
    for index, piece in enumerate(pieces):
        made = packet.copy()
        made[transport].remove_payload()
        made[transport].add_payload(Raw(piece))
        if IP in made:
            made[IP].id = (packet[IP].id + index) & 0xFFFF
            del made[IP].len, made[IP].chksum
        else:
            del made[IPv6].plen
        if transport is TCP:
            made[TCP].seq = (packet[TCP].seq + index * size) % 2**32
            if index:
                made[TCP].flags &= ~0x80
            if index < len(pieces) - 1:
                made[TCP].flags &= ~0x09
        else:
            del made[UDP].len
        del made[transport].chksum
        segments.append(bytes(made))
    return segments


TCP_HEADERS = {
    "plain": TCP(sport=1000, dport=80, seq=0xFFFFFF00, ack=77, flags="A", window=501),
    "with everything": TCP(
        sport=1000, dport=80, seq=1, ack=2, flags="FPAECN", options=[("Timestamp", (3, 4)), ("NOP", None)] * 3
    ),
}


@tags
@pytest.mark.parametrize("tcp", TCP_HEADERS.values(), ids=TCP_HEADERS.keys())
@pytest.mark.parametrize(
    ("network", "gso_type"),
    [(IP4, HDR_GSO_TCPV4), (IP4_OPTIONS, HDR_GSO_TCPV4), (IP6, HDR_GSO_TCPV6), (IP6_EXTENDED, HDR_GSO_TCPV6)],
    ids=["IPv4", "IPv4 options", "IPv6", "IPv6 extension headers"],
)
@pytest.mark.parametrize(
    ("size", "data"), [(1448, 14481), (1460, 2920), (536, 537), (9000, 64000), (1448, 100), (1448, 0), (1, 7)]
)
def test_tcp(link: Packet, network: Packet, tcp: Packet, gso_type: int, size: int, data: int) -> None:
    packet = link / network / tcp / Raw(payload(data))
    for kind in (gso_type, gso_type | HDR_GSO_ECN):
        assert cut(super_frame(packet), kind, size) == expected(packet, size)


@tags
@pytest.mark.parametrize("network", [IP4, IP4_OPTIONS, IP6, IP6_EXTENDED])
@pytest.mark.parametrize(("size", "data"), [(1472, 14721), (1200, 2400), (1200, 5), (1, 3)])
def test_udp_datagrams(link: Packet, network: Packet, size: int, data: int) -> None:
    packet = link / network / UDP(sport=53, dport=4000) / Raw(payload(data))
    assert cut(super_frame(packet), HDR_GSO_UDP_L4, size) == expected(packet, size)


@tags
@pytest.mark.parametrize(("size", "data"), [(1480, 30001), (1481, 30001), (1480, 2952), (8, 20), (1480, 100)])
def test_udp_fragments_ipv4(link: Packet, size: int, data: int) -> None:
    packet = Ether(bytes(link / IP4 / UDP(sport=53, dport=4000) / Raw(payload(data))))
    fragments = [Ether(piece) for piece in cut(super_frame(packet), HDR_GSO_UDP, size)]
    assert max(len(piece[IP].payload) for piece in fragments) <= size
    for piece in fragments:
        assert piece[IP].id == packet[IP].id
        assert not piece[IP].flags.DF
        assert scapy_checksum(bytes(piece[IP])[:20]) == 0
    assert [bool(piece[IP].flags.MF) for piece in fragments] == [True] * (len(fragments) - 1) + [False]
    (whole,) = defragment(fragments)
    assert bytes(whole[UDP]) == bytes(packet[UDP])


@tags
@pytest.mark.parametrize(("size", "data"), [(1448, 30001), (1455, 2900), (8, 20), (1448, 100)])
def test_udp_fragments_ipv6(link: Packet, size: int, data: int) -> None:
    packet = Ether(bytes(link / IP6 / UDP(sport=53, dport=4000) / Raw(payload(data))))
    fragments = [Ether(piece) for piece in cut(super_frame(packet), HDR_GSO_UDP, size, ident=0x12345678)]
    for piece in fragments:
        assert piece[IPv6].plen == len(piece[IPv6].payload)
        assert piece[IPv6ExtHdrFragment].id == 0x78563412  # any number does; it is stored as it comes
    more = [piece[IPv6ExtHdrFragment].m for piece in fragments]
    assert more == [1] * (len(fragments) - 1) + [0]
    parts = [bytes(piece[IPv6ExtHdrFragment].payload) for piece in fragments]
    places = [8 * piece[IPv6ExtHdrFragment].offset for piece in fragments]
    assert places == [sum(map(len, parts[:i])) for i in range(len(parts))]
    assert b"".join(parts) == bytes(packet[UDP])
    if len(fragments) > 1:
        whole = IPv6(bytes(defragment6([piece[IPv6] for piece in fragments])))
        assert bytes(whole[UDP]) == bytes(packet[UDP])


def checksummed(packet: Packet) -> tuple[bytes, bytes, int, int]:
    """A frame as its driver hands it over, as it must become, and the header's two fields."""
    done = bytes(packet)
    kind, offset, protocol = (TCP, 16, 6) if TCP in packet else (UDP, 6, 17)
    transport = Ether(done)[kind]
    start = len(done) - len(bytes(transport))
    if IP in packet:
        pseudo = Ether(done)[IP]
        words = struct.pack("!4s4sHH", *map(_address, (pseudo.src, pseudo.dst)), protocol, len(transport))
    else:
        pseudo = Ether(done)[IPv6]
        words = struct.pack("!16s16sHH", *map(_address, (pseudo.src, pseudo.dst)), protocol, len(transport))
    partial = ~scapy_checksum(words) & 0xFFFF
    raw = bytearray(done)
    struct.pack_into("!H", raw, start + offset, partial)
    return bytes(raw), done, start, offset


def _address(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


@tags
@pytest.mark.parametrize("network", [IP4, IP4_OPTIONS, IP6])
@pytest.mark.parametrize("transport", [TCP(seq=9, flags="PA"), UDP(sport=1, dport=2)], ids=["TCP", "UDP"])
@pytest.mark.parametrize("data", [0, 1, 2, 63, 64, 65, 1000, 1447, 1448, 60001])
def test_finishing_a_checksum(link: Packet, network: Packet, transport: Packet, data: int) -> None:
    packet = link / network / transport / (Raw(payload(data)) if data else b"")
    raw, done, start, offset = checksummed(packet)
    frame = Guarded.of(raw)
    assert offload.finish_checksum(frame.address, len(raw), start, offset) == 0
    assert frame.get() == done
    assert frame.intact()


def test_a_checksum_of_zero_is_sent_as_its_other_form() -> None:
    # The sum is 0xFFFF and its complement 0, which UDP reads as "no checksum".
    frame = Guarded.of(bytes(34) + b"\xff\xff" + bytes(6))
    assert offload.finish_checksum(frame.address, 42, 34, 6) == 0
    assert frame.get()[40:42] == b"\xff\xff"


@pytest.mark.parametrize(
    ("start", "offset"),
    [(0, 41), (41, 0), (42, 0), (34, 7), (65535, 65535), (34, 65535), (65535, 6), (-1, 6), (34, -35)],
)
def test_a_checksum_field_outside_the_frame_is_refused(start: int, offset: int) -> None:
    frame = Guarded.of(bytes(42))
    assert offload.finish_checksum(frame.address, 42, start, offset) == offload.MALFORMED
    assert frame.get() == bytes(42)


def test_the_last_two_bytes_may_be_the_field() -> None:
    frame = Guarded.of(bytes(42))
    assert offload.finish_checksum(frame.address, 42, 34, 6) == 0


@pytest.mark.parametrize("length", [*range(70), 127, 128, 129, 1500, 65535])
def test_the_sum_is_scapys(length: int) -> None:
    data = payload(length)
    memory = Guarded.of(data)
    # scapy's is complemented, and in network order.
    ours = ~offload.checksum(memory.address, length, 0) & 0xFFFF
    assert ((ours & 0xFF) << 8) | (ours >> 8) == scapy_checksum(data)


def test_sums_of_parts_add_up() -> None:
    memory = Guarded.of(b"\xff" * 65536)
    whole = offload.checksum(memory.address, 65536, 0)
    first = offload.checksum(memory.address, 3000, 0)
    assert offload.checksum(memory.address + 3000, 62536, first) == whole == 0xFFFF


GOOD = ETHER / IP(src="192.0.2.1", dst="198.51.100.2") / TCP(flags="A") / Raw(payload(4000))
GOOD6 = ETHER / IP6 / TCP(flags="A") / Raw(payload(4000))
GOOD_UDP = ETHER / IP(src="192.0.2.1", dst="198.51.100.2") / UDP() / Raw(payload(4000))


def refused(frame: bytes, gso_type: int, gso_size: int) -> int:
    source = Guarded.of(frame)
    out = Guarded(65600)
    answer = offload.segment_count(source.address, len(frame), gso_type, gso_size)
    for index in (0, 1, 5000):
        made = offload.segment(
            source.address, len(frame), gso_type, gso_size, index, out.address, out.size, 0
        )
        assert made == answer
    assert out.get() == bytes(65600)
    return int(answer)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (12, b"\x08\x06"),  # ARP
        (12, b"\x86\xdd"),  # IPv6 in gso_type TCPV4
        (12, b"\x81\x00"),  # a tag that is not there
        (14, b"\x55"),  # version 5
        (14, b"\x44"),  # a header of 16 bytes
        (14, b"\x4f"),  # options where the TCP header is: another protocol's header follows
        (16, b"\xff\xff"),  # longer than the frame
        (16, b"\x00\x27"),  # shorter than its headers
        (23, b"\x11"),  # UDP
        (46, b"\x40"),  # a TCP header of 16 bytes
    ],
)
def test_malformed_tcp(offset: int, value: bytes) -> None:
    frame = bytearray(bytes(GOOD))
    frame[offset : offset + len(value)] = value
    if offset == 14 and value == b"\x4f":
        frame[14 + 60 + 12] = 0x10
    assert refused(bytes(frame), HDR_GSO_TCPV4, 1448) == offload.MALFORMED


LAYERS = {
    "TCP over IPv4": (GOOD, 16, HDR_GSO_TCPV4, 54),
    "TCP over IPv4, tagged": (ETHER / Dot1Q() / IP4_OPTIONS / TCP(), 20, HDR_GSO_TCPV4, 62),
    "TCP options": (ETHER / IP4 / TCP_HEADERS["with everything"], 16, HDR_GSO_TCPV4, 90),
    "TCP over IPv6": (GOOD6, 18, HDR_GSO_TCPV6, 74),
    "extension headers": (ETHER / Dot1AD() / Dot1Q() / IP6_EXTENDED / TCP(), 26, HDR_GSO_TCPV6, 106),
    "datagrams": (GOOD_UDP, 16, HDR_GSO_UDP_L4, 42),
    "fragments": (GOOD_UDP, 16, HDR_GSO_UDP, 42),
}


@pytest.mark.parametrize(("packet", "place", "kind", "headers"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("told", [True, False])
def test_headers_that_are_cut_short_are_not_read_beyond(
    packet: Packet, place: int, kind: int, headers: int, told: bool
) -> None:
    frame = bytearray(bytes(packet))
    if not told:
        frame[place : place + 2] = b"\0\0"  # the IP header leaves it to the frame's length
    for length in range(headers + 1):
        short = Guarded.of(bytes(frame[:length]))
        answer = offload.segment_count(short.address, length, kind, 1448)
        assert answer == (
            1 if length == headers and (not told or len(frame) == headers) else offload.MALFORMED
        )


def test_a_length_of_zero_in_the_ip_header_means_the_frame() -> None:
    # What does not fit 16 bits is 0 there (Linux's BIG TCP); the frame's own length says how long it is.
    for good, kind, place in ((GOOD, HDR_GSO_TCPV4, 16), (GOOD6, HDR_GSO_TCPV6, 18)):
        frame = bytearray(bytes(good))
        frame[place : place + 2] = b"\0\0"
        assert cut(bytes(frame), kind, 1448) == expected(good, 1448)


def test_padding_behind_the_ip_packet_is_no_payload() -> None:
    assert cut(super_frame(GOOD) + bytes(9), HDR_GSO_TCPV4, 1448) == expected(GOOD, 1448)


@pytest.mark.parametrize("size", [0, -1, 65536])
@pytest.mark.parametrize("kind", [HDR_GSO_TCPV4, HDR_GSO_TCPV4 | HDR_GSO_ECN])
def test_impossible_sizes(kind: int, size: int) -> None:
    assert refused(bytes(GOOD), kind, size) == offload.MALFORMED


def test_a_fragment_of_less_than_eight_bytes_cannot_be() -> None:
    assert refused(bytes(GOOD_UDP), HDR_GSO_UDP, 7) == offload.MALFORMED


@pytest.mark.parametrize("kind", [HDR_GSO_NONE, 2, 6, 0x7F, HDR_GSO_ECN, 0xFF, 0x21])
def test_other_kinds_are_not_cut(kind: int) -> None:
    assert refused(bytes(GOOD), kind, 1448) == offload.UNSUPPORTED


def test_one_frame_does_not_become_tens_of_thousands() -> None:
    frame = bytes(ETHER / IP4 / TCP() / Raw(bytes(offload.MAX_SEGMENTS + 1)))
    assert refused(frame, HDR_GSO_TCPV4, 1) == offload.UNSUPPORTED
    source = Guarded.of(frame)
    assert offload.segment_count(source.address, len(frame) - 1, HDR_GSO_TCPV4, 1) == offload.MALFORMED
    assert offload.segment_count(source.address, len(frame), HDR_GSO_TCPV4, 2) == 1025


def test_a_segment_longer_than_an_ip_packet_is_refused() -> None:
    frame = bytearray(bytes(ETHER / IP4 / TCP() / Raw(bytes(65000))) + bytes(1000))
    frame[16:18] = b"\0\0"
    assert refused(bytes(frame), HDR_GSO_TCPV4, 65535) == offload.MALFORMED


UNSUPPORTED: list[tuple[str, Any, int]] = [
    ("an IPv4 fragment", IP(flags="MF") / TCP(), HDR_GSO_TCPV4),
    ("a later IPv4 fragment", IP(frag=100) / TCP(), HDR_GSO_TCPV4),
    ("an IPv6 fragment", IP6 / IPv6ExtHdrFragment() / TCP(), HDR_GSO_TCPV6),
    (
        "a routing header",
        IP6 / IPv6ExtHdrRouting(addresses=["2001:db8::3"], segleft=1) / TCP(),
        HDR_GSO_TCPV6,
    ),
    ("UFO with IPv6 extension headers", IP6 / IPv6ExtHdrHopByHop() / UDP(), HDR_GSO_UDP),
    (
        "ten extension headers",
        functools.reduce(truediv, [IPv6ExtHdrDestOpt()] * 10, IP6) / TCP(),
        HDR_GSO_TCPV6,
    ),
]


@pytest.mark.parametrize(
    ("packet", "kind"), [row[1:] for row in UNSUPPORTED], ids=[row[0] for row in UNSUPPORTED]
)
def test_what_is_not_done(packet: Packet, kind: int) -> None:
    assert refused(bytes(ETHER / packet / Raw(bytes(3000))), kind, 1448) == offload.UNSUPPORTED


def test_a_used_up_routing_header_is_passed_over() -> None:
    packet = ETHER / IP6 / IPv6ExtHdrRouting(addresses=["2001:db8::3"], segleft=0) / TCP() / Raw(bytes(3000))
    assert cut(super_frame(packet), HDR_GSO_TCPV6, 1448) == expected(packet, 1448)


def test_another_protocol_behind_the_headers_is_malformed() -> None:
    assert refused(bytes(ETHER / IP4 / ICMP() / bytes(3000)), HDR_GSO_TCPV4, 1448) == offload.MALFORMED
    assert refused(bytes(ETHER / IP6 / UDP() / bytes(3000)), HDR_GSO_TCPV6, 1448) == offload.MALFORMED
