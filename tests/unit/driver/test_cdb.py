"""Command descriptor blocks, byte by byte (SPC-4, SBC-3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyvhost.driver import cdb


@pytest.mark.parametrize(
    ("built", "raw"),
    [
        (cdb.inquiry(0x1234, 0x83), "12 01 83 1234 00"),
        (cdb.report_luns(0x01020304, 2), "a0 00 02 000000 01020304 0000"),
        (cdb.request_sense(96, descriptor=True), "03 01 0000 60 00"),
        (cdb.mode_sense6(0x08, 192, subpage=1, pc=2, dbd=True), "1a 08 88 01 c0 00"),
        (cdb.mode_sense10(0x0A, 0x1000, pc=3), "5a 00 ca 00 000000 1000 00"),
        (cdb.mode_select6(24, save=True), "15 11 0000 18 00"),
        (cdb.mode_select10(0x102), "55 10 0000000000 0102 00"),
        (cdb.persistent_reserve_in(cdb.READ_FULL_STATUS, 0x100), "5e 03 0000000000 0100 00"),
        (cdb.persistent_reserve_out(cdb.RESERVE, 5, scope=1), "5f 01 15 0000 00000018 00"),
        (
            cdb.reservation_parameters(1, 2, aptpl=True, spec_i_pt=True),
            "0000000000000001 0000000000000002 00000000 09 000000",
        ),
        (
            cdb.report_supported_operation_codes(64, options=3, opcode=0x9E, action=0x10, timeouts=True),
            "a3 0c 83 9e 0010 00000040 0000",
        ),
        (cdb.read_capacity16(), "9e 10 0000000000000000 00000020 0000"),
        (cdb.get_lba_status(5), "9e 12 0000000000000005 00001000 0000"),
        (cdb.read6(0x123456, 7), "08 123456 07 00"),
        (cdb.write6(1, 0), "0a 000001 00 00"),
        (cdb.read10(0x12345678, 0x9ABC, cdb.FUA), "28 08 12345678 00 9abc 00"),
        (cdb.write12(1, 2, cdb.DPO), "aa 10 00000001 00000002 0000"),
        (cdb.read16(0x0102030405060708, 9), "88 00 0102030405060708 00000009 0000"),
        (cdb.write_atomic16(1, 2, boundary=3), "9c 00 0000000000000001 0003 0002 0000"),
        (cdb.compare_and_write(4, 1), "89 00 0000000000000004 000000 01 0000"),
        (cdb.verify16(1, 1, bytchk=3), "8f 06 0000000000000001 00000001 0000"),
        (cdb.write_same16(1, 8, unmap=True, ndob=True), "93 09 0000000000000001 00000008 0000"),
        (cdb.write_same10(1, 8, unmap=True), "41 08 00000001 00 0008 00"),
        (cdb.unmap(24, anchor=True), "42 01 0000000000 0018 00"),
        (cdb.unmap_parameters([(1, 2)]), "0016 0010 00000000 0000000000000001 00000002 00000000"),
        (cdb.synchronize_cache10(1, 2, immediate=True), "35 02 00000001 00 0002 00"),
        (cdb.start_stop_unit(False, loej=True), "1b 00 0000 02 00"),
        (cdb.prevent_allow_medium_removal(1), "1e 000000 01 00"),
    ],
)  # fmt: skip
def test_fields_lie_where_the_standard_has_them(built: bytes, raw: str) -> None:
    assert built == bytes.fromhex(raw)


@pytest.mark.parametrize(
    ("build", "value"), [(cdb.read6, 1 << 24), (cdb.write10, 1 << 32), (cdb.read16, 1 << 64)]
)
def test_what_no_field_holds(build: Callable[[int, int], bytes], value: int) -> None:
    with pytest.raises(OverflowError):
        build(value, 1)
    with pytest.raises(OverflowError):
        build(0, -1)
