"""What passes between a SCSI driver and its device: logical unit numbers, requests, responses, events, as bytes.

Source: virtio 1.3, 5.6.6. Lengths are bytes. Promises: nothing here touches guest memory. Never: judges a CDB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver.errors import DeviceError
from pyvhost.driver.ring_parts import Buffer, ByteOrder

REPORT_LUNS: Final = bytes((0xC1, 0x01, 0, 0, 0, 0, 0, 0))
"""The REPORT LUNS well-known logical unit, as `lun` of a command (5.6.6.1)."""

#: What a response is filled with before the device has it: no response code, no status.
UNTOUCHED: Final = 0xA5

FLAT_MAX: Final = 0x3FFF
PERIPHERAL_MAX: Final = 0xFF

_STRUCTS: Final = {"little": "<", "big": ">"}


def address(target: int, lun: int | bytes = 0, *, peripheral: bool = False) -> bytes:
    """The 8 bytes that name a logical unit: flat space addressing, or peripheral device addressing.

    A `lun` of 8 bytes is taken as it is, whatever it says. ValueError: a number that the form can't hold.
    """
    if isinstance(lun, bytes):
        if len(lun) != 8:
            raise ValueError(f"the address of a logical unit has 8 bytes, not {len(lun)}")
        return lun
    most = PERIPHERAL_MAX if peripheral else FLAT_MAX
    if not 0 <= target <= 255 or not 0 <= lun <= most:
        raise ValueError(f"target {target} and LUN {lun}: they go up to 255 and {most}")
    return bytes((1, target)) + (lun if peripheral else 0x4000 | lun).to_bytes(2, "big") + bytes(4)


def number(lun: bytes) -> tuple[int, int]:
    """Target and LUN that 8 bytes name, in either form. DeviceError: they name none."""
    method, low = lun[2] >> 6, int.from_bytes(lun[2:4], "big")
    if len(lun) != 8 or lun[0] != 1 or method > 1 or any(lun[4:]) or (method == 0 and low > PERIPHERAL_MAX):
        raise DeviceError(f"{lun.hex()} is the address of no logical unit behind a target")
    return lun[1], low & FLAT_MAX


@dataclass(frozen=True, slots=True)
class Layout:
    """How a request's or a response's header, and the data behind it, are cut into descriptors.

    `header_apart` gives the header descriptors of its own; without it the first piece of data follows the
    header's last byte. `piece` and `header_piece` are the most bytes of either in one descriptor, 0 for all in
    one. `indirect` puts the chain into a table of its own.
    """

    header_apart: bool = True
    piece: int = 0
    header_piece: int = 0
    indirect: bool = False

    def cut(self, header: int, data: int) -> list[int]:
        """The lengths of the descriptors for a header and data of so many bytes."""
        heads, pieces = _cut(header, self.header_piece), _cut(data, self.piece)
        if not self.header_apart and heads and pieces:
            return [*heads[:-1], heads[-1] + pieces[0], *pieces[1:]]
        return heads + pieces


def _cut(length: int, piece: int) -> list[int]:
    step = piece or max(length, 1)
    return [min(step, length - at) for at in range(0, length, step)]


@dataclass(frozen=True, slots=True)
class Response:
    """What came of a command. `residual` is of both directions; `written` is what the ring said."""

    response: int
    status: int
    sense: bytes
    residual: int
    data: bytes
    status_qualifier: int = 0
    pi: bytes = b""
    written: int = 0

    @property
    def good(self) -> bool:
        """Whether it was done, and is GOOD."""
        return self.response == abi.S_OK and self.status == 0

    @property
    def sense_key(self) -> int | None:
        """Of sense data in either format (SPC-4, 4.5); None: there are none."""
        if len(self.sense) < 3:
            return None
        return self.sense[2 if self.sense[0] & 0x7F in (0x70, 0x71) else 1] & 0x0F

    @property
    def asc(self) -> int | None:
        """Additional sense code and its qualifier, as one number of 16 bits; None: there are none."""
        at = 12 if self.sense and self.sense[0] & 0x7F in (0x70, 0x71) else 2
        return int.from_bytes(self.sense[at : at + 2], "big") if len(self.sense) >= at + 2 else None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the device told on the event queue. `missed`: there was more than it had buffers for."""

    event: int
    lun: bytes
    reason: int
    missed: bool = False

    @classmethod
    def unpack(cls, data: bytes, byteorder: ByteOrder = "little") -> Event:
        """DeviceError: fewer bytes than an event has."""
        if len(data) < 16:
            raise DeviceError(f"an event of {len(data)} bytes: it has 16")
        what, lun, reason = struct.unpack_from(_STRUCTS[byteorder] + "I8sI", data)
        return cls(what & ~abi.T_EVENTS_MISSED, lun, reason, bool(what & abi.T_EVENTS_MISSED))


@dataclass(slots=True, eq=False)
class Pending:
    """A chain in the device's hands. `raw` is all that its writable part holds, once it is `done`."""

    name: str
    tag: int = 0
    lun: bytes = bytes(8)
    readable: list[Buffer] = field(default_factory=list)
    writable: list[Buffer] = field(default_factory=list)
    done: bool = False
    raw: bytes = b""
    written: int = 0
    #: Whether it is a command; of one, how many bytes of protection information and data it has room for, and
    #: takes along.
    command: bool = False
    pi_in: int = 0
    data_in: int = 0
    data_out: int = 0
    response: Response | None = None


class Format:
    """How requests and responses look for one driver: sizes, byte order, T10_PI."""

    def __init__(
        self,
        byteorder: ByteOrder = "little",
        *,
        cdb_size: int = abi.CDB_DEFAULT_SIZE,
        sense_size: int = abi.SENSE_DEFAULT_SIZE,
        pi: bool = False,
    ) -> None:
        self.byteorder: ByteOrder = byteorder
        self.cdb_size = cdb_size
        self.sense_size = sense_size
        self.pi = pi
        order = _STRUCTS[byteorder]
        self._head = struct.Struct(order + "8sQBBB")
        self._pi = struct.Struct(order + "II")
        self._response = struct.Struct(order + "IIHBB")
        self._tmf = struct.Struct(order + "II8sQ")
        self._query = struct.Struct(order + "I8sI")
        self._query_answer = struct.Struct(order + "IB")

    @property
    def response_size(self) -> int:
        """Bytes of its response, before what it brings."""
        return self._response.size + self.sense_size

    def command(
        self,
        lun: bytes,
        tag: int,
        cdb: bytes,
        *,
        attribute: int = abi.S_SIMPLE,
        priority: int = 0,
        crn: int = 0,
        pi_out: int = 0,
        pi_in: int = 0,
    ) -> bytes:
        """struct virtio_scsi_req_cmd, its device-readable head. ValueError: the CDB is longer than cdb_size."""
        if len(cdb) > self.cdb_size:
            raise ValueError(f"a CDB of {len(cdb)} bytes, where cdb_size is {self.cdb_size}")
        if (pi_out or pi_in) and not self.pi:
            raise ValueError("protection information goes along with T10_PI negotiated, and only then")
        counts = self._pi.pack(pi_out, pi_in) if self.pi else b""
        return self._head.pack(lun, tag, attribute, priority, crn) + counts + cdb.ljust(self.cdb_size, b"\0")

    def tmf(self, subtype: int, lun: bytes, tag: int) -> bytes:
        """struct virtio_scsi_ctrl_tmf, its device-readable part."""
        return self._tmf.pack(abi.T_TMF, subtype, lun, tag)

    def query(self, kind: int, lun: bytes, events: int) -> bytes:
        """struct virtio_scsi_ctrl_an, its device-readable part."""
        return self._query.pack(kind, lun, events)

    def query_answer(self, raw: bytes) -> tuple[int, int]:
        """event_actual and response of a struct virtio_scsi_ctrl_an."""
        actual, response = self._query_answer.unpack(raw)
        return int(actual), int(response)

    def response(self, pending: Pending) -> Response:
        """A command's response. DeviceError: the device wrote none, or one that can't be."""
        name, raw = pending.name, pending.raw
        sense_length, residual, qualifier, status, code = self._response.unpack_from(raw)
        if code == UNTOUCHED:
            raise DeviceError(f"{name}: used, and its response was not written")
        if code != abi.S_OK:
            # Only the response code counts then (5.6.6.1.1 lets the device leave the rest).
            return Response(code, 0, b"", 0, b"", written=pending.written)
        total = pending.pi_in + pending.data_in + pending.data_out
        if sense_length > self.sense_size:
            raise DeviceError(f"{name}: sense_len is {sense_length}, sense_size {self.sense_size}")
        if residual > total:
            raise DeviceError(f"{name}: resid is {residual}, and there was room for {total} bytes of data")
        at = self._response.size
        sense = raw[at : at + sense_length]
        at = self.response_size
        pi, data = raw[at : at + pending.pi_in], raw[at + pending.pi_in :]
        # Of a command both ways nobody can tell whose residual it is.
        arrived = pending.data_in if pending.data_out else max(0, pending.data_in - residual)
        return Response(code, status, sense, residual, data[:arrived], qualifier, pi, pending.written)
