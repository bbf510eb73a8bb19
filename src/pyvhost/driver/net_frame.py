"""What lies before a frame, and how a frame is laid into a chain: what a net driver decides by itself.

Source: virtio 1.3, 5.1.6. Promises: nothing here touches guest memory. Never: judges a header's contents.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pyvhost.abi import virtio_net as abi
from pyvhost.driver.ring_parts import ByteOrder

_SHORT = {"little": struct.Struct("<BBHHHH"), "big": struct.Struct(">BBHHHH")}
_LONG = {"little": struct.Struct("<BBHHHHH"), "big": struct.Struct(">BBHHHHH")}


@dataclass(frozen=True, slots=True)
class NetHdr:
    """The header before each frame (virtio 1.3, 5.1.6). `num_buffers` is not in a legacy one of 10 bytes."""

    flags: int = 0
    gso_type: int = abi.HDR_GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self, size: int, byteorder: ByteOrder = "little") -> bytes:
        """`size` bytes, 10 or 12; the byte order is a legacy guest's own."""
        words = (self.hdr_len, self.gso_size, self.csum_start, self.csum_offset)
        if size == 10:
            return _SHORT[byteorder].pack(self.flags, self.gso_type, *words)
        return _LONG[byteorder].pack(self.flags, self.gso_type, *words, self.num_buffers)

    @classmethod
    def unpack(cls, data: bytes, byteorder: ByteOrder = "little") -> NetHdr:
        """From 10 bytes (`num_buffers` is then 0) or 12."""
        return cls(*(_SHORT if len(data) == 10 else _LONG)[byteorder].unpack(data))


@dataclass(frozen=True, slots=True)
class Shape:
    """How a frame and its header are cut into descriptors.

    `header_apart` gives the header one of its own, as legacy devices without ANY_LAYOUT want it. `piece` is
    the most bytes of the frame in one descriptor, 0 for all in one; without `header_apart` the header comes
    on top of the first piece. `indirect` puts the chain into a table of its own.
    """

    header_apart: bool = False
    piece: int = 0
    indirect: bool = False

    def cut(self, header: int, frame: int) -> list[int]:
        """The lengths of the descriptors for a header and a frame of so many bytes."""
        step = self.piece or max(frame, 1)
        pieces = [min(step, frame - at) for at in range(0, frame, step)]
        if self.header_apart or not pieces:
            return [header, *pieces]
        return [header + pieces[0], *pieces[1:]]


@dataclass(frozen=True, slots=True)
class Received:
    """A frame that the device brought: on which queue pair, in how many buffers."""

    frame: bytes
    header: NetHdr
    pair: int = 0
    buffers: int = 1
