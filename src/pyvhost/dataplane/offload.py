"""Offloads in software, for a receiver that did not negotiate them: checksums finished, super-frames cut.

A frame is contiguous, from its Ethernet header on (no virtio_net_hdr), with up to two VLAN tags. The fields
of its virtio_net_hdr come as plain numbers (virtio 1.2, 5.1.6.2). `hdr_len`, `csum_start` and `csum_offset`
of a super-frame are not used: its headers are parsed, and every checksum is made afresh.

Promises: all of it is hostile. Each header word that bounds something is read once; nothing is read outside
the frame nor written outside `out`; every loop is bounded by the frame's length or by a small constant; what
is not understood is an error code (negative), so that the caller drops the frame and counts it.
Never: cuts tunnels, IPv4 or IPv6 that is a fragment already, IPv6 behind a routing header that is not used
up, authentication headers, or a UFO frame with IPv6 extension headers (`UNSUPPORTED`). Little-endian hosts
only, as the rest of the data plane.
"""

from __future__ import annotations

from typing import Final

from pyvhost.abi.virtio_net import (
    HDR_GSO_ECN,
    HDR_GSO_TCPV4,
    HDR_GSO_TCPV6,
    HDR_GSO_UDP,
    HDR_GSO_UDP_L4,
)
from pyvhost.dataplane._words import BLOCK, sum_block
from pyvhost.dataplane.access import copy, load8, load16, load64, store8, store16, store32
from pyvhost.dataplane.policy import inline, kernel

#: The header says what cannot be: lengths beyond the frame, a protocol that is not the one of gso_type.
MALFORMED: Final = -1
#: Nothing wrong with it, but not done here.
UNSUPPORTED: Final = -2
#: `out` is too small for the segment.
NO_ROOM: Final = -3

#: The most segments that one frame may be cut into: 64 KiB by the smallest segment that TCP stacks accept
#: make 1366, and a guest is not to turn one frame into tens of thousands.
MAX_SEGMENTS: Final = 2048

_ETH_IP, _ETH_IP6, _ETH_8021Q, _ETH_8021AD = 0x0800, 0x86DD, 0x8100, 0x88A8
_TCP, _UDP = 6, 17
_HOP_OPTIONS, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION_OPTIONS = 0, 43, 44, 51, 60
_EXTENSION_HEADERS = 8  # RFC 8200 wants each at most once, one of them twice
_FIN_PSH, _CWR = 0x09, 0x80
_MORE_FRAGMENTS, _OFFSET_BITS = 0x2000, 0x1FFF


@inline
def _swap(value: int) -> int:
    return ((value & 0xFF) << 8) | (value >> 8)


@inline
def _be16(address: int) -> int:
    return _swap(load16(address))


@inline
def _fold(total: int) -> int:
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@kernel
def checksum(address: int, length: int, initial: int) -> int:
    """The Internet checksum's sum (RFC 1071) of `length` bytes, folded to 16 bits and not complemented.

    In the order of the words in memory: what is stored needs no swapping. `initial`: the folded sum of what
    comes before, of an even number of bytes. An odd last byte is followed by a zero.
    """
    total = initial
    while length >= BLOCK:
        total += sum_block(address)
        address += BLOCK
        length -= BLOCK
    while length >= 8:
        word = load64(address)
        total += (word & 0xFFFFFFFF) + ((word >> 32) & 0xFFFFFFFF)
        address += 8
        length -= 8
    while length >= 2:
        total += load16(address)
        address += 2
        length -= 2
    if length == 1:
        total += load8(address)
    return _fold(total)


@inline
def _complement(total: int) -> int:
    """A checksum field's value; never 0, which UDP means "none" by and the others read as the same."""
    value = ~total & 0xFFFF
    return value if value else 0xFFFF


@kernel
def finish_checksum(frame: int, length: int, csum_start: int, csum_offset: int) -> int:
    """Does what VIRTIO_NET_HDR_F_NEEDS_CSUM asks for, in place; 0, or `MALFORMED`.

    The field at `csum_start` + `csum_offset` holds the pseudo-header's sum; it becomes the complement of the
    sum from `csum_start` to the frame's end (virtio 1.2, 5.1.6.2.1).
    """
    if csum_start < 0 or csum_offset < 0 or csum_start + csum_offset + 2 > length:
        return MALFORMED
    total = checksum(frame + csum_start, length - csum_start, 0)
    store16(frame + csum_start + csum_offset, _complement(total))
    return 0


@inline
def _transport6(frame: int, at: int, length: int, protocol: int) -> tuple[int, int]:
    """Where the transport header after the IPv6 header that ends at `at` starts, and its protocol.

    The first is negative on error.
    """
    for _ in range(_EXTENSION_HEADERS + 1):
        if protocol in (_FRAGMENT, _AUTHENTICATION):
            return UNSUPPORTED, protocol
        if protocol not in (_HOP_OPTIONS, _ROUTING, _DESTINATION_OPTIONS):
            return at, protocol
        if at + 8 > length:
            return MALFORMED, protocol
        if protocol == _ROUTING and load8(frame + at + 3) != 0:
            return UNSUPPORTED, protocol  # the pseudo-header's destination is in there
        protocol = load8(frame + at)
        at += 8 * (load8(frame + at + 1) + 1)
    return UNSUPPORTED, protocol


@inline
def _parse(
    frame: int, length: int, gso_type: int, gso_size: int
) -> tuple[int, bool, int, int, int, int, int]:
    """Judges a super-frame's headers, once.

    Error or 0, whether it is IPv6, then offsets from the frame's start: network header, transport header,
    payload and end; and the size of a piece. The payload of UFO starts with the UDP header.
    """
    failed = (MALFORMED, False, 0, 0, 0, 0, 0)
    unsupported = (UNSUPPORTED, False, 0, 0, 0, 0, 0)
    kind = gso_type & ~HDR_GSO_ECN
    if kind not in (HDR_GSO_TCPV4, HDR_GSO_TCPV6, HDR_GSO_UDP_L4, HDR_GSO_UDP):
        return unsupported
    if gso_size <= 0 or gso_size > 0xFFFF or length < 14:
        return failed
    network = 14
    ethertype = _be16(frame + 12)
    for _ in range(2):
        if ethertype in (_ETH_8021Q, _ETH_8021AD):
            network += 4
            if network > length:
                return failed
            ethertype = _be16(frame + network - 2)

    ip6 = ethertype == _ETH_IP6
    if ethertype == _ETH_IP:
        if kind == HDR_GSO_TCPV6 or network + 20 > length:
            return failed
        first = load8(frame + network)
        header = (first & 0x0F) * 4
        if first >> 4 != 4 or header < 20:
            return failed
        if _be16(frame + network + 6) & (_MORE_FRAGMENTS | _OFFSET_BITS):
            return unsupported
        protocol = load8(frame + network + 9)
        transport = network + header
        said = _be16(frame + network + 2)
        end = network + said if said else length  # 0: more than 16 bits hold
    elif ip6:
        if kind == HDR_GSO_TCPV4 or network + 40 > length:
            return failed
        if load8(frame + network) >> 4 != 6:
            return failed
        said = _be16(frame + network + 4)
        end = network + 40 + said if said else length
        transport, protocol = _transport6(frame, network + 40, length, load8(frame + network + 6))
        if transport < 0:
            return transport, False, 0, 0, 0, 0, 0
        if kind == HDR_GSO_UDP and transport != network + 40:
            return unsupported
    else:
        return failed
    if end > length:
        return failed

    if kind in (HDR_GSO_TCPV4, HDR_GSO_TCPV6):
        if protocol != _TCP or transport + 20 > end:
            return failed
        header = (load8(frame + transport + 12) >> 4) * 4
        if header < 20:
            return failed
        payload = transport + header
    else:
        if protocol != _UDP or transport + 8 > end:
            return failed
        payload = transport + 8
        if kind == HDR_GSO_UDP:
            payload = transport
            gso_size &= ~7  # the offset of a fragment counts in 8 bytes
            if gso_size == 0 or end - (payload if ip6 else network) > 0xFFFF:
                return failed
    # The longest segment has to fit the length fields of its own IP header.
    if payload > end or payload - network + min(gso_size, end - payload) > 0xFFFF:
        return failed
    if (end - payload + gso_size - 1) // gso_size > MAX_SEGMENTS:
        return unsupported
    return 0, ip6, network, transport, payload, end, gso_size


@kernel
def segment_count(frame: int, length: int, gso_type: int, gso_size: int) -> int:
    """How many segments `segment` makes of the frame: 1 to `MAX_SEGMENTS`; `MALFORMED` or `UNSUPPORTED`."""
    error, _, _, _, payload, end, size = _parse(frame, length, gso_type, gso_size)
    if error:
        return error
    return max(1, (end - payload + size - 1) // size)


@inline
def _pseudo(header: int, ip6: bool, protocol: int, length: int) -> int:
    """The pseudo-header's sum, of the IP header at `header` (RFC 9293, 3.1; RFC 8200, 8.1)."""
    if ip6:
        return checksum(header + 8, 32, _fold(_swap(protocol) + _swap(length)))
    return checksum(header + 12, 8, _fold(_swap(protocol) + _swap(length)))


@inline
def _finish_ip4(header: int, bytes_of_header: int, length: int, identification: int, fragment: int) -> None:
    store16(header + 2, _swap(length))
    store16(header + 4, _swap(identification & 0xFFFF))
    store16(header + 6, _swap(fragment))
    store16(header + 10, 0)
    store16(header + 10, ~checksum(header, bytes_of_header, 0) & 0xFFFF)


@kernel
def segment(
    frame: int, length: int, gso_type: int, gso_size: int, index: int, out: int, size: int, ident: int
) -> int:
    """Makes segment `index` of a super-frame at `out`, where there are `size` bytes; its length, or an error.

    TCPv4, TCPv6: sequence numbers and IPv4 identifications go up, FIN and PSH are only in the last segment,
    CWR only in the first (RFC 3168, 6.1.2), with VIRTIO_NET_HDR_GSO_ECN or without. UDP_L4: datagrams. UDP
    (UFO): fragments of one datagram, for which `ident` is the identification (32 bits) where it is IPv6.
    Checksums are complete. Errors: `MALFORMED` (also an index that is too large), `UNSUPPORTED`, `NO_ROOM`.
    """
    error, ip6, network, transport, payload, end, piece = _parse(frame, length, gso_type, gso_size)
    if error:
        return error
    first = payload + index * piece
    if index < 0 or index >= MAX_SEGMENTS or (first >= end and index > 0):
        return MALFORMED
    run = min(piece, end - first)
    last = first + run >= end
    kind = gso_type & ~HDR_GSO_ECN
    if kind == HDR_GSO_UDP:
        return _fragment(frame, network, transport, end, first, run, ip6, last, out, size, ident)
    total = payload + run
    if total > size:
        return NO_ROOM
    copy(out, frame, payload)
    copy(out + payload, frame + first, run)

    header = out + network
    if ip6:
        store16(header + 4, _swap(total - network - 40))
    else:
        unfragmented = _be16(header + 6) & ~(_MORE_FRAGMENTS | _OFFSET_BITS)
        _finish_ip4(header, transport - network, total - network, _be16(header + 4) + index, unfragmented)

    inner = out + transport
    if kind == HDR_GSO_UDP_L4:
        protocol = _UDP
        field = 6
        store16(inner + 4, _swap(total - transport))
    else:
        protocol = _TCP
        field = 16
        sequence = (_be16(inner + 4) << 16) + _be16(inner + 6) + index * piece
        store16(inner + 4, _swap((sequence >> 16) & 0xFFFF))
        store16(inner + 6, _swap(sequence & 0xFFFF))
        flags = load8(inner + 13)
        if not last:
            flags &= ~_FIN_PSH
        if index > 0:
            flags &= ~_CWR
        store8(inner + 13, flags)
    store16(inner + field, 0)
    summed = checksum(inner, total - transport, _pseudo(header, ip6, protocol, total - transport))
    store16(inner + field, _complement(summed))
    return total


@kernel
def _fragment(
    frame: int,
    network: int,
    transport: int,
    end: int,
    first: int,
    run: int,
    ip6: bool,
    last: bool,
    out: int,
    size: int,
    ident: int,
) -> int:
    """One IP fragment: the bytes `first` to `first` + `run` of the datagram from `transport` to `end`."""
    extra = 8 if ip6 else 0
    total = transport + extra + run
    if total > size:
        return NO_ROOM
    copy(out, frame, transport)
    copy(out + transport + extra, frame + first, run)
    header = out + network
    if first == transport:
        # The datagram's checksum is over all of its fragments, of which this is the one with the field; the
        # field is left out of the sum, and what the guest's UDP header says of the length is put right.
        datagram = out + transport + extra
        store16(datagram + 4, _swap(end - transport))
        store16(datagram + 6, 0)
        summed = checksum(datagram, 8, _pseudo(header, ip6, _UDP, end - transport))
        summed = checksum(frame + transport + 8, end - transport - 8, summed)
        store16(datagram + 6, _complement(summed))
    place = first - transport
    if ip6:
        store16(header + 4, _swap(total - network - 40))
        store8(header + 6, _FRAGMENT)
        after = out + transport
        store8(after, _UDP)
        store8(after + 1, 0)
        store16(after + 2, _swap(place | (0 if last else 1)))
        store32(after + 4, ident)
    else:
        more = 0 if last else _MORE_FRAGMENTS
        _finish_ip4(header, transport - network, total - network, _be16(header + 4), (place >> 3) | more)
    return total
