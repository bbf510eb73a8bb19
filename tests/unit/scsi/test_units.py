"""The table of logical units, as Python fills it and as compiled code reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plain_twin import plain_twin
from pyvhost.dataplane import scsi_blocks as layout
from pyvhost.dataplane import scsi_io
from pyvhost.dataplane.plain import load64, store64
from pyvhost.scsi.requests import REPORT_LUNS_WLUN, Address, parse_lun
from pyvhost.scsi.units import UnitTable

ROW = np.zeros(64, np.int64)
TWINS = pytest.mark.parametrize("code", [scsi_io, plain_twin(scsi_io)], ids=["compiled", "plain"])


def find(code: Any, table: UnitTable, raw: bytes) -> int:
    return int(code.find_unit(table.address, table.mask, int.from_bytes(raw, "little", signed=True)))


def flat(address: Address) -> bytes:
    return bytes([1, address.target]) + (0x4000 | address.lun).to_bytes(2, "big") + bytes(4)


@TWINS
def test_every_unit_is_found_in_each_form(code: SimpleNamespace) -> None:
    table = UnitTable()
    addresses = [
        Address(target, lun) for target in (0, 1, 7, 255) for lun in (0, 1, 2, 255, 256, 300, 0x3FFF)
    ]
    entries = {address: table.add(address, ROW) for address in addresses}
    assert len(set(entries.values())) == len(addresses)
    for address, entry in entries.items():
        for raw in (address.encode(), flat(address)):
            assert parse_lun(raw) == address
            assert find(code, table, raw) == entry
            # Whatever is wrong with it is Python's to say.
            for wrong in (raw[:4] + b"\1" + raw[5:], b"\0" + raw[1:], raw[:2] + b"\x80" + raw[3:]):
                assert find(code, table, wrong) == 0
    assert find(code, table, flat(Address(2, 0))) == 0
    assert find(code, table, b"\xff" * 8) == find(code, table, bytes(8)) == 0
    assert find(code, table, bytes.fromhex("c101000000000000")) == 0


@TWINS
def test_a_full_table(code: SimpleNamespace) -> None:
    """A target with all the units that it may have, and then some of them gone."""
    table = UnitTable()
    entries = [table.add(Address(3, lun), ROW) for lun in range(0x4000)]
    for lun in range(0, 0x4000, 3):
        table.remove(Address(3, lun))
    for lun in range(0x4000):
        assert find(code, table, flat(Address(3, lun))) == (entries[lun] if lun % 3 else 0)


def test_an_entry_is_not_given_away_while_the_host_has_something_of_it() -> None:
    table = UnitTable()
    entry = table.add(Address(0, 0), ROW)
    store64(entry + layout.UNIT_IN_FLIGHT, 1)
    table.remove(Address(0, 0))
    second = table.add(Address(0, 0), ROW)
    assert second != entry
    assert load64(entry + layout.UNIT_IN_FLIGHT) == 1
    assert table.find(Address(0, 0)) == second
    store64(entry + layout.UNIT_IN_FLIGHT, 0)
    table.remove(Address(0, 0))
    assert table.add(Address(0, 0), ROW) == entry


def test_addresses_that_are_none() -> None:
    for raw in (
        "0000000000000000",
        "0100800000000000",
        "0100c10100000001",
        "0101010000000000",
        "0201000000000000",
    ):
        assert parse_lun(bytes.fromhex(raw)) is None
    assert parse_lun(bytes.fromhex("c101000000000000")) == Address(0, REPORT_LUNS_WLUN)
    assert parse_lun(bytes.fromhex("0105c10100000000")) == Address(5, REPORT_LUNS_WLUN)
