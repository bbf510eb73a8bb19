"""How a request says which unit is meant."""

from __future__ import annotations

import pytest

from pyvhost.scsi.requests import Address, parse_lun


@pytest.mark.parametrize(
    ("raw", "address"),
    [
        ("0100000000000000", Address(0, 0)),
        ("0103000500000000", Address(3, 5)),
        ("01ff00ff00000000", Address(255, 255)),
        ("0103410000000000", Address(3, 256)),
        ("01037fff00000000", Address(3, 16383)),
        ("0103c10100000000", Address(3, 0xC101)),
    ],
)
def test_a_unit_is_named_as_report_luns_names_it(raw: str, address: Address) -> None:
    assert address.encode().hex() == raw
    assert parse_lun(bytes.fromhex(raw)) == address


def test_both_forms_are_understood() -> None:
    assert parse_lun(bytes.fromhex("0103400500000000")) == Address(3, 5)


@pytest.mark.parametrize("raw", ["00" * 8, "0100000000000001", "0100010000000000", "0100800000000000"])
def test_what_names_none(raw: str) -> None:
    assert parse_lun(bytes.fromhex(raw)) is None
