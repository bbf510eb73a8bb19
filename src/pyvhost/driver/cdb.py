"""Command descriptor blocks, built: what a disk's driver says (SPC-4, SBC-3), and the parameter data that go along.

Block addresses and counts are logical blocks, allocation and list lengths bytes; all big endian, as SCSI is.
`control` bytes are 0. Promises: fields go where the standard has them, and a value too large for its field is
OverflowError. Never: checks whether a value makes sense, so that a test can say what makes none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

DPO, FUA = 0x10, 0x08
"""Bits of READ's, WRITE's and VERIFY's second byte."""

REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, REGISTER_AND_IGNORE, REGISTER_AND_MOVE = range(
    8
)
"""PERSISTENT RESERVE OUT's service actions."""

READ_KEYS, READ_RESERVATION, REPORT_CAPABILITIES, READ_FULL_STATUS = range(4)
"""PERSISTENT RESERVE IN's."""


def _u(value: int, size: int) -> bytes:
    return value.to_bytes(size, "big")


# --- SPC ---------------------------------------------------------------------------------------------------


def test_unit_ready() -> bytes:
    return bytes(6)


def request_sense(length: int = 252, *, descriptor: bool = False) -> bytes:
    return bytes((0x03, int(descriptor), 0, 0)) + _u(length, 1) + b"\0"


def inquiry(length: int = 96, page: int | None = None) -> bytes:
    """Standard data, or a vital product data page."""
    return bytes((0x12, int(page is not None), page or 0)) + _u(length, 2) + b"\0"


def report_luns(length: int = 16384, select: int = 0) -> bytes:
    return bytes((0xA0, 0, select, 0, 0, 0)) + _u(length, 4) + bytes(2)


def mode_sense6(
    page: int = 0x3F, length: int = 252, *, subpage: int = 0, pc: int = 0, dbd: bool = False
) -> bytes:
    """`pc`: 0 current, 1 changeable, 2 default, 3 saved values."""
    return bytes((0x1A, dbd << 3, pc << 6 | page, subpage)) + _u(length, 1) + b"\0"


def mode_sense10(
    page: int = 0x3F, length: int = 4096, *, subpage: int = 0, pc: int = 0, dbd: bool = False
) -> bytes:
    return bytes((0x5A, dbd << 3, pc << 6 | page, subpage, 0, 0, 0)) + _u(length, 2) + b"\0"


def mode_select6(length: int, *, save: bool = False, pf: bool = True) -> bytes:
    return bytes((0x15, pf << 4 | save, 0, 0)) + _u(length, 1) + b"\0"


def mode_select10(length: int, *, save: bool = False, pf: bool = True) -> bytes:
    return bytes((0x55, pf << 4 | save)) + bytes(5) + _u(length, 2) + b"\0"


def persistent_reserve_in(action: int, length: int = 8192) -> bytes:
    return bytes((0x5E, action)) + bytes(5) + _u(length, 2) + b"\0"


def persistent_reserve_out(action: int, kind: int = 0, *, scope: int = 0, length: int = 24) -> bytes:
    return bytes((0x5F, action, scope << 4 | kind, 0, 0)) + _u(length, 4) + b"\0"


def reservation_parameters(
    key: int = 0,
    action_key: int = 0,
    *,
    aptpl: bool = False,
    all_tg_pt: bool = False,
    spec_i_pt: bool = False,
) -> bytes:
    """PERSISTENT RESERVE OUT's parameter list of 24 bytes."""
    return struct.pack(">QQIBxxx", key, action_key, 0, spec_i_pt << 3 | all_tg_pt << 2 | aptpl)


def reserve6() -> bytes:
    return bytes((0x16, 0, 0, 0, 0, 0))


def release6() -> bytes:
    return bytes((0x17, 0, 0, 0, 0, 0))


def report_supported_operation_codes(
    length: int = 65536, *, options: int = 0, opcode: int = 0, action: int = 0, timeouts: bool = False
) -> bytes:
    head = bytes((0xA3, 0x0C, timeouts << 7 | options, opcode))
    return head + _u(action, 2) + _u(length, 4) + bytes(2)


def report_supported_task_management_functions(length: int = 16) -> bytes:
    return bytes((0xA3, 0x0D, 0, 0, 0, 0)) + _u(length, 4) + bytes(2)


# --- SBC ---------------------------------------------------------------------------------------------------


def read_capacity10() -> bytes:
    return bytes((0x25,)) + bytes(9)


def read_capacity16(length: int = 32) -> bytes:
    return bytes((0x9E, 0x10)) + bytes(8) + _u(length, 4) + bytes(2)


def get_lba_status(lba: int, length: int = 4096) -> bytes:
    return bytes((0x9E, 0x12)) + _u(lba, 8) + _u(length, 4) + bytes(2)


def _six(opcode: int, lba: int, blocks: int) -> bytes:
    return bytes((opcode,)) + _u(lba, 3) + _u(blocks, 1) + b"\0"


def _ten(opcode: int, lba: int, blocks: int, bits: int, group: int = 0) -> bytes:
    return bytes((opcode, bits)) + _u(lba, 4) + _u(group, 1) + _u(blocks, 2) + b"\0"


def _twelve(opcode: int, lba: int, blocks: int, bits: int) -> bytes:
    return bytes((opcode, bits)) + _u(lba, 4) + _u(blocks, 4) + bytes(2)


def _sixteen(opcode: int, lba: int, blocks: int, bits: int) -> bytes:
    return bytes((opcode, bits)) + _u(lba, 8) + _u(blocks, 4) + bytes(2)


def read6(lba: int, blocks: int) -> bytes:
    """`blocks` 0 means 256."""
    return _six(0x08, lba, blocks)


def read10(lba: int, blocks: int, bits: int = 0) -> bytes:
    return _ten(0x28, lba, blocks, bits)


def read12(lba: int, blocks: int, bits: int = 0) -> bytes:
    return _twelve(0xA8, lba, blocks, bits)


def read16(lba: int, blocks: int, bits: int = 0) -> bytes:
    return _sixteen(0x88, lba, blocks, bits)


def write6(lba: int, blocks: int) -> bytes:
    """`blocks` 0 means 256."""
    return _six(0x0A, lba, blocks)


def write10(lba: int, blocks: int, bits: int = 0) -> bytes:
    return _ten(0x2A, lba, blocks, bits)


def write12(lba: int, blocks: int, bits: int = 0) -> bytes:
    return _twelve(0xAA, lba, blocks, bits)


def write16(lba: int, blocks: int, bits: int = 0) -> bytes:
    return _sixteen(0x8A, lba, blocks, bits)


def write_atomic16(lba: int, blocks: int, bits: int = 0, *, boundary: int = 0) -> bytes:
    return bytes((0x9C, bits)) + _u(lba, 8) + _u(boundary, 2) + _u(blocks, 2) + bytes(2)


def write_and_verify10(lba: int, blocks: int, bits: int = 0) -> bytes:
    return _ten(0x2E, lba, blocks, bits)


def write_and_verify16(lba: int, blocks: int, bits: int = 0) -> bytes:
    return _sixteen(0x8E, lba, blocks, bits)


def verify10(lba: int, blocks: int, *, bytchk: int = 0) -> bytes:
    return _ten(0x2F, lba, blocks, bytchk << 1)


def verify16(lba: int, blocks: int, *, bytchk: int = 0) -> bytes:
    return _sixteen(0x8F, lba, blocks, bytchk << 1)


def compare_and_write(lba: int, blocks: int, bits: int = 0) -> bytes:
    """Its data are the blocks to compare with, then those to write."""
    return bytes((0x89, bits)) + _u(lba, 8) + bytes(3) + _u(blocks, 1) + bytes(2)


def write_same10(lba: int, blocks: int, *, unmap: bool = False) -> bytes:
    return _ten(0x41, lba, blocks, unmap << 3)


def write_same16(lba: int, blocks: int, *, unmap: bool = False, ndob: bool = False) -> bytes:
    return _sixteen(0x93, lba, blocks, unmap << 3 | ndob)


def unmap(length: int, *, anchor: bool = False) -> bytes:
    return bytes((0x42, int(anchor))) + bytes(5) + _u(length, 2) + b"\0"


def unmap_parameters(ranges: Iterable[tuple[int, int]]) -> bytes:
    """UNMAP's parameter list for (LBA, blocks) pairs."""
    rows = b"".join(struct.pack(">QI4x", lba, blocks) for lba, blocks in ranges)
    return struct.pack(">HH4x", len(rows) + 6, len(rows)) + rows


def synchronize_cache10(lba: int = 0, blocks: int = 0, *, immediate: bool = False) -> bytes:
    return _ten(0x35, lba, blocks, immediate << 1)


def synchronize_cache16(lba: int = 0, blocks: int = 0, *, immediate: bool = False) -> bytes:
    return _sixteen(0x91, lba, blocks, immediate << 1)


def prefetch10(lba: int, blocks: int, *, immediate: bool = False) -> bytes:
    return _ten(0x34, lba, blocks, immediate << 1)


def start_stop_unit(
    start: bool = True, *, loej: bool = False, power: int = 0, immediate: bool = False
) -> bytes:
    return bytes((0x1B, int(immediate), 0, 0, power << 4 | loej << 1 | start, 0))


def prevent_allow_medium_removal(prevent: int) -> bytes:
    return bytes((0x1E, 0, 0, 0, prevent, 0))
