"""Sense data: keys, additional sense codes, and the fixed and descriptor formats (SPC-4, 4.5).

Promises: what `Sense.encode` gives is whole sense data, 18 bytes in fixed format, 8 to 252 in descriptor format.
An INFORMATION that doesn't fit fixed format's 32 bits is left out there (VALID 0), as SPC-4 4.5.3 says.
Never: knows a command or a logical unit.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass, replace


class Key(enum.IntEnum):
    """Sense keys (SPC-4, table 48)."""

    NO_SENSE = 0x0
    RECOVERED_ERROR = 0x1
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    BLANK_CHECK = 0x8
    VENDOR_SPECIFIC = 0x9
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    VOLUME_OVERFLOW = 0xD
    MISCOMPARE = 0xE
    COMPLETED = 0xF


class Asc(enum.IntEnum):
    """Additional sense code and qualifier in one number (SPC-4, annex F.2)."""

    NO_ADDITIONAL_SENSE_INFORMATION = 0x0000
    OPERATION_IN_PROGRESS = 0x0016
    NOT_READY_CAUSE_NOT_REPORTABLE = 0x0400
    NOT_READY_BECOMING_READY = 0x0401
    NOT_READY_INITIALIZING_COMMAND_REQUIRED = 0x0402
    NOT_READY_FORMAT_IN_PROGRESS = 0x0404
    NOT_READY_SANITIZE_IN_PROGRESS = 0x041B
    WRITE_ERROR = 0x0C00
    COPY_TARGET_DEVICE_NOT_REACHABLE = 0x0D02
    INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT = 0x0E03
    UNRECOVERED_READ_ERROR = 0x1100
    PARAMETER_LIST_LENGTH_ERROR = 0x1A00
    MISCOMPARE_DURING_VERIFY_OPERATION = 0x1D00
    INVALID_COMMAND_OPERATION_CODE = 0x2000
    LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE = 0x2100
    INVALID_FIELD_IN_CDB = 0x2400
    LOGICAL_UNIT_NOT_SUPPORTED = 0x2500
    INVALID_FIELD_IN_PARAMETER_LIST = 0x2600
    INVALID_RELEASE_OF_PERSISTENT_RESERVATION = 0x2604
    TOO_MANY_TARGET_DESCRIPTORS = 0x2606
    UNSUPPORTED_TARGET_DESCRIPTOR_TYPE_CODE = 0x2607
    TOO_MANY_SEGMENT_DESCRIPTORS = 0x2608
    UNSUPPORTED_SEGMENT_DESCRIPTOR_TYPE_CODE = 0x2609
    COPY_SEGMENT_GRANULARITY_VIOLATION = 0x260D
    WRITE_PROTECTED = 0x2700
    LOGICAL_UNIT_SOFTWARE_WRITE_PROTECTED = 0x2702
    SPACE_ALLOCATION_FAILED_WRITE_PROTECT = 0x2707
    NOT_READY_TO_READY_CHANGE = 0x2800
    POWER_ON_RESET_OR_BUS_DEVICE_RESET_OCCURRED = 0x2900
    BUS_DEVICE_RESET_FUNCTION_OCCURRED = 0x2903
    I_T_NEXUS_LOSS_OCCURRED = 0x2907
    MODE_PARAMETERS_CHANGED = 0x2A01
    RESERVATIONS_PREEMPTED = 0x2A03
    RESERVATIONS_RELEASED = 0x2A04
    REGISTRATIONS_PREEMPTED = 0x2A05
    CAPACITY_DATA_HAS_CHANGED = 0x2A09
    COMMANDS_CLEARED_BY_ANOTHER_INITIATOR = 0x2F00
    COMMAND_SEQUENCE_ERROR = 0x2C00
    COMMAND_TIMEOUT_DURING_PROCESSING = 0x2E02
    SAVING_PARAMETERS_NOT_SUPPORTED = 0x3900
    MEDIUM_NOT_PRESENT = 0x3A00
    REPORTED_LUNS_DATA_HAS_CHANGED = 0x3F0E
    INVALID_MESSAGE_ERROR = 0x4900
    INTERNAL_TARGET_FAILURE = 0x4400
    MEDIUM_REMOVAL_PREVENTED = 0x5302
    INSUFFICIENT_REGISTRATION_RESOURCES = 0x5504


@dataclass(frozen=True, slots=True)
class Field:
    """Which field is at fault (SPC-4, 4.5.2.4.2): its first byte, and its leftmost bit if that says more."""

    byte: int
    bit: int | None = None
    in_cdb: bool = True


@dataclass(frozen=True, slots=True)
class Sense:
    """One report of sense data."""

    key: Key
    asc: int
    information: int | None = None
    command_specific: int | None = None
    field: Field | None = None
    #: How far something has come, in 65536ths (SPC-4, 4.5.2.4.4).
    progress: int | None = None

    def encode(self, descriptor: bool = False) -> bytes:
        """The sense data as the initiator gets it, for current (not deferred) information."""
        return self._descriptors() if descriptor else self._fixed()

    def at(self, information: int) -> Sense:
        """The same with its INFORMATION set: a logical block address, or what the command says it is."""
        return replace(self, information=information)

    def _specific(self) -> bytes | None:
        if self.field is not None:
            flags = 0x80 | (0x40 if self.field.in_cdb else 0)
            if self.field.bit is not None:
                flags |= 0x08 | self.field.bit
            return bytes([flags]) + self.field.byte.to_bytes(2, "big")
        if self.progress is not None:
            return b"\x80" + self.progress.to_bytes(2, "big")
        return None

    def _fixed(self) -> bytes:
        data = bytearray(18)
        data[0] = 0x70
        data[2] = self.key
        if self.information is not None and self.information < 1 << 32:
            data[0] |= 0x80
            data[3:7] = self.information.to_bytes(4, "big")
        data[7] = 10
        if self.command_specific is not None and self.command_specific < 1 << 32:
            data[8:12] = self.command_specific.to_bytes(4, "big")
        data[12:14] = self.asc.to_bytes(2, "big")
        specific = self._specific()
        if specific is not None:
            data[15:18] = specific
        return bytes(data)

    def _descriptors(self) -> bytes:
        data = bytearray([0x72, self.key, self.asc >> 8, self.asc & 0xFF, 0, 0, 0, 0])
        if self.information is not None:
            data += b"\x00\x0a\x80\x00" + self.information.to_bytes(8, "big")
        if self.command_specific is not None:
            data += b"\x01\x0a\x00\x00" + self.command_specific.to_bytes(8, "big")
        specific = self._specific()
        if specific is not None:
            data += b"\x02\x06\x00\x00" + specific + b"\x00"
        data[7] = len(data) - 8
        return bytes(data)


NO_SENSE = Sense(Key.NO_SENSE, Asc.NO_ADDITIONAL_SENSE_INFORMATION)


class CheckCondition(Exception):  # noqa: N818
    """A command that ends with CHECK CONDITION and this sense data."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(f"{sense.key.name}, {sense.asc:#06x}")
        self.sense = sense


def illegal(asc: int, field: Field | None = None) -> CheckCondition:
    """ILLEGAL REQUEST for a reason."""
    return CheckCondition(Sense(Key.ILLEGAL_REQUEST, asc, field=field))


def invalid_cdb(byte: int, bit: int | None = None) -> CheckCondition:
    """INVALID FIELD IN CDB, with a pointer to it."""
    return illegal(Asc.INVALID_FIELD_IN_CDB, Field(byte, bit))


def invalid_parameter(byte: int, bit: int | None = None) -> CheckCondition:
    """INVALID FIELD IN PARAMETER LIST, with a pointer to it."""
    return illegal(Asc.INVALID_FIELD_IN_PARAMETER_LIST, Field(byte, bit, in_cdb=False))


def out_of_range(lba: int) -> CheckCondition:
    """LOGICAL BLOCK ADDRESS OUT OF RANGE; `lba` is the first that is."""
    return CheckCondition(Sense(Key.ILLEGAL_REQUEST, Asc.LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE, information=lba))


def attention(asc: int) -> Sense:
    """A unit attention condition."""
    return Sense(Key.UNIT_ATTENTION, asc)


def store_failed(error: int, lba: int | None = None, writing: bool = False) -> CheckCondition:
    """What a store's errno means to an initiator; `lba`: where it happened, if somewhere in particular."""
    if error == errno.ENOSPC:
        sense = Sense(Key.DATA_PROTECT, Asc.SPACE_ALLOCATION_FAILED_WRITE_PROTECT)
    elif error == errno.EROFS:
        sense = Sense(Key.DATA_PROTECT, Asc.WRITE_PROTECTED)
    elif error in (errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESHUTDOWN):
        sense = Sense(Key.NOT_READY, Asc.NOT_READY_CAUSE_NOT_REPORTABLE)
    elif error == errno.ETIMEDOUT:
        sense = Sense(Key.ABORTED_COMMAND, Asc.COMMAND_TIMEOUT_DURING_PROCESSING)
    elif error == errno.ECANCELED:
        sense = Sense(Key.ABORTED_COMMAND, Asc.NO_ADDITIONAL_SENSE_INFORMATION)
    else:
        asc = Asc.WRITE_ERROR if writing else Asc.UNRECOVERED_READ_ERROR
        sense = Sense(Key.MEDIUM_ERROR, asc, information=lba)
    return CheckCondition(sense)
