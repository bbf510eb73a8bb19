"""A virtio-scsi request as the driver lays it out, and the response that goes back (virtio 1.2, 5.6.6.1).

Promises: any layout of header, data and response over a chain's pieces; lengths are judged, not trusted.
Never: carries out a command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyvhost.abi import virtio_scsi as abi
from pyvhost.scsi.task import Attribute, Outcome, Task
from pyvhost.vhost.chains import Chain

HEADER_BYTES: Final = 51
CDB_BYTES: Final = 32
#: With T10_PI negotiated: pi_bytesout and pi_bytesin come before the CDB.
PROTECTED_HEADER_BYTES: Final = 59
RESPONSE_BYTES: Final = 108
#: Logical unit numbers in flat form have 14 bits (SAM-5, 4.7.7.3).
MAX_LUN: Final = 0x3FFF
#: The REPORT LUNS well known logical unit (SAM-5, 4.7.7.5.1): C1h 01h.
REPORT_LUNS_WLUN: Final = 0xC101


@dataclass(frozen=True)
class Address:
    """A target and a logical unit of it; `REPORT_LUNS_WLUN` is the one that is well known."""

    target: int
    lun: int

    def encode(self) -> bytes:
        """The eight bytes, in REPORT LUNS' form: Linux takes two forms of one number for two units."""
        number = self.lun if self.lun < 0x100 or self.lun == REPORT_LUNS_WLUN else self.lun | 0x4000
        return bytes([1, self.target]) + number.to_bytes(2, "big") + bytes(4)


#: virtio 1.2, 5.6.6.1: as the well known logical unit is addressed, of no target in particular.
_WELL_KNOWN: Final = REPORT_LUNS_WLUN.to_bytes(2, "big") + bytes(6)


def parse_lun(raw: bytes) -> Address | None:
    """The first field of each request: 1, target, number in peripheral or flat form, four zeros; None: it is none."""
    if raw == _WELL_KNOWN:
        return Address(0, REPORT_LUNS_WLUN)
    if raw[0] != 1 or any(raw[4:8]):
        return None
    number = int.from_bytes(raw[2:4], "big")
    if number == REPORT_LUNS_WLUN:
        return Address(raw[1], number)
    if number >> 14 == 0:
        # Peripheral device addressing: bus 0 alone.
        return Address(raw[1], number) if number < 0x100 else None
    return Address(raw[1], number & MAX_LUN) if number >> 14 == 1 else None


def skip(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is behind the first `count` bytes."""
    rest = []
    for view in views:
        if count >= len(view):
            count -= len(view)
        else:
            rest.append(view[count:])
            count = 0
    return rest


@dataclass(frozen=True)
class Request:
    """A command request."""

    chain: Chain
    lun: bytes
    tag: int
    attribute: int
    priority: int
    crn: int
    cdb: bytes
    #: Where data begin: behind the header and the response, and protection information that nobody asked for.
    out_at: int = HEADER_BYTES
    in_at: int = RESPONSE_BYTES

    @classmethod
    def parse(cls, chain: Chain, *, protected: bool = False) -> Request | None:
        """The request in a chain; None: it is too short for its header, or has no room for a response.

        `protected`: T10_PI was negotiated. No unit has protection information, so that what comes along is skipped.
        """
        size = PROTECTED_HEADER_BYTES if protected else HEADER_BYTES
        raw = chain.read(size)
        if len(raw) < size or sum(map(len, chain.writable)) < RESPONSE_BYTES:
            return None
        tag = int.from_bytes(raw[8:16], chain.byteorder)
        out_at, in_at = size, RESPONSE_BYTES
        if protected:
            out_at += int.from_bytes(raw[19:23], chain.byteorder)
            in_at += int.from_bytes(raw[23:27], chain.byteorder)
        return cls(chain, raw[:8], tag, raw[16], raw[17], raw[18], raw[size - CDB_BYTES :], out_at, in_at)

    @property
    def data_out(self) -> list[memoryview]:
        """Where data of the driver's lie."""
        return skip(self.chain.readable, self.out_at)

    @property
    def data_in(self) -> list[memoryview]:
        """Where data for the driver go."""
        return skip(self.chain.writable, self.in_at)

    @property
    def task_attribute(self) -> Attribute:
        """Unknown ones count as SIMPLE, as on Linux."""
        return Attribute(self.attribute) if self.attribute in tuple(Attribute) else Attribute.SIMPLE

    def respond(self, code: int) -> int:
        """Writes a response of the transport's alone; how many bytes of the chain were written."""
        return self._write(bytes(11) + bytes([code]) + bytes(96), 0)

    def complete(self, task: Task) -> int:
        """Writes what came of a task; how many bytes of the chain were written."""
        if task.outcome is Outcome.ABORTED:
            return self.respond(abi.S_ABORTED)
        if task.outcome is Outcome.RESET:
            return self.respond(abi.S_RESET)
        sense = task.sense[: abi.SENSE_SIZE]
        code = abi.S_OVERRUN if task.overflow else abi.S_OK
        head = (
            len(sense).to_bytes(4, self.chain.byteorder)
            + task.residual.to_bytes(4, self.chain.byteorder)
            + bytes(2)
            + bytes([task.status, code])
        )
        before = self.in_at - RESPONSE_BYTES if task.transferred_in else 0
        return self._write(head + sense.ljust(96, b"\0"), before + task.transferred_in)

    def _write(self, response: bytes, data: int) -> int:
        return self.chain.write(response[:RESPONSE_BYTES]) + data
