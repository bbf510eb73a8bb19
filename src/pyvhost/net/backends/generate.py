"""`generate[:SIZE]`: the guest receives frames as fast as it takes them.

The frame is UDP over IPv4, its checksums right, between the benchmark addresses of RFC 2544 (198.18.0.0/15), to
the discard port; what the guest sends is swallowed.

Promises: the frame has exactly the size asked for, without the four bytes of a checksum that a wire has.
Never: makes a frame while the device runs: the loop copies the one.
"""

from __future__ import annotations

import struct
from typing import ClassVar

from pyvhost.net.backends.base import Backend, PortKind
from pyvhost.net.backends.spec import Spec, integer, mac_address

BROADCAST = b"\xff" * 6
#: Locally administered: no one's card has it.
SOURCE = bytes.fromhex("020000000001")

#: Ethernet, IPv4 and UDP headers; and what the length field of IPv4 allows, behind an Ethernet header.
SIZE_LEAST = 14 + 20 + 8
SIZE_MOST = 14 + 65535
SIZE = 64

_FROM = bytes([198, 18, 0, 1])
_TO = bytes([198, 18, 0, 2])
_PORT_DISCARD = 9


class GenerateBackend(Backend):
    """A source of one frame, `count` times or without end."""

    kind = PortKind.GENERATE
    usage: ClassVar[str] = "generate[:SIZE][,count=N][,mac=ADDRESS]"
    summary: ClassVar[str] = "make frames of SIZE bytes (64), as fast as the guest takes them"

    def __init__(self, spec: str, size: int = SIZE, count: int = -1, destination: bytes = BROADCAST) -> None:
        super().__init__(spec)
        self.template = udp_frame(size, destination)
        self.count = count

    @classmethod
    def from_spec(cls, spec: Spec) -> GenerateBackend:
        size = spec.optional("size", integer(SIZE_LEAST, SIZE_MOST)) or SIZE
        count = spec.value("count", integer(0, 2**62))
        destination = spec.value("mac", mac_address)
        return cls(spec.text, size, -1 if count is None else count, destination or BROADCAST)


def udp_frame(size: int, destination: bytes = BROADCAST, source: bytes = SOURCE) -> bytes:
    """An Ethernet frame of `size` bytes: UDP over IPv4, its payload counting up from 0. ValueError: no such size."""
    if not SIZE_LEAST <= size <= SIZE_MOST:
        raise ValueError(f"a frame has {SIZE_LEAST} to {SIZE_MOST} bytes, not {size}")
    payload = bytes(i & 0xFF for i in range(size - SIZE_LEAST))
    udp = struct.pack(">HHHH", _PORT_DISCARD, _PORT_DISCARD, 8 + len(payload), 0) + payload
    pseudo = _FROM + _TO + struct.pack(">HH", 17, len(udp))
    # RFC 768: a checksum that comes out as 0 is sent as all ones; 0 says that there is none.
    udp = udp[:6] + struct.pack(">H", _checksum(pseudo + udp) or 0xFFFF) + udp[8:]
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, 17, 0, _FROM, _TO)
    ip = ip[:10] + struct.pack(">H", _checksum(ip)) + ip[12:]
    return destination + source + b"\x08\x00" + ip + udp


def _checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
