"""A vsock packet as a guest's side writes and reads it (virtio 1.3, 5.10.6): 44 bytes of header, and a payload.

Promises: any header can be made, whether it is true or not; what is read says exactly what lay there.
Never: judges a packet.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pyvhost.abi import virtio_vsock as abi

_HEADER: Final = struct.Struct("<QQIIIHHIII")

#: Bytes of a header.
HEADER: Final = _HEADER.size
#: The most that one packet carries, in bytes: Linux's VIRTIO_VSOCK_MAX_PKT_BUF_SIZE.
PAYLOAD_MAX: Final = 1 << 16

_OPS: Final = {value: name.removeprefix("OP_") for name, value in vars(abi).items() if name.startswith("OP_")}


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet. `length` is what the header says that the payload has, in bytes; None: the truth."""

    op: int
    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    payload: bytes = b""
    type: int = abi.TYPE_STREAM
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0
    length: int | None = None

    def pack(self) -> bytes:
        """The bytes on the ring."""
        return self.header() + self.payload

    def header(self) -> bytes:
        """The header's bytes."""
        return _HEADER.pack(
            self.src_cid,
            self.dst_cid,
            self.src_port,
            self.dst_port,
            len(self.payload) if self.length is None else self.length,
            self.type,
            self.op,
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Packet:
        """The packet that begins at the first of these bytes. ValueError: they are no header."""
        if len(raw) < HEADER:
            raise ValueError(f"{len(raw)} bytes, a header has {HEADER}")
        (src_cid, dst_cid, src_port, dst_port, length, type_, op, flags, buf_alloc, fwd_cnt) = _HEADER.unpack(
            raw[:HEADER]
        )
        payload = raw[HEADER:]
        told = None if length == len(payload) else length
        return cls(op, src_cid, dst_cid, src_port, dst_port, payload, type_, flags, buf_alloc, fwd_cnt, told)

    def __str__(self) -> str:
        kind = {abi.TYPE_STREAM: "stream", abi.TYPE_SEQPACKET: "seqpacket"}.get(
            self.type, f"type {self.type}"
        )
        length = len(self.payload) if self.length is None else self.length
        return (
            f"{_OPS.get(self.op, f'op {self.op}')} {self.src_cid}:{self.src_port} to "
            f"{self.dst_cid}:{self.dst_port}, {kind}, {length} bytes, flags {self.flags:#x}, "
            f"buf_alloc {self.buf_alloc}, fwd_cnt {self.fwd_cnt}"
        )
