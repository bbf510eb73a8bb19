"""Numbers of the other byte order: compiled and plain, held against Python's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plain_twin import plain_twin
from pyvhost.dataplane import swap

quick = settings(deadline=None)
int64s = st.integers(-(1 << 63), (1 << 63) - 1)
NAMES = {"swap16": 2, "swap32": 4, "swap64": 8}


def turned(value: int, size: int) -> int:
    return int.from_bytes((value % (1 << 8 * size)).to_bytes(size, "little"), "big")


WAYS = {
    "compiled": {name: getattr(swap, name) for name in (*NAMES, "swap_descriptor", "swap_header")},
    "plain": {name: getattr(plain_twin(swap), name) for name in (*NAMES, "swap_descriptor", "swap_header")},
}
both = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@both
@pytest.mark.parametrize("name", NAMES)
@quick
@given(value=int64s)
def test_bytes_are_turned_round(way: dict[str, Callable[[int], int]], name: str, value: int) -> None:
    size = NAMES[name]
    got = way[name](value)
    assert got % (1 << 8 * size) == turned(value, size)
    # What `load64` would have given.
    assert -(1 << 63) <= got < 1 << 63


@both
@quick
@given(value=int64s)
def test_fields_of_a_descriptor_and_a_header(way: dict[str, Callable[[int], int]], value: int) -> None:
    raw = (value % (1 << 64)).to_bytes(8, "little")
    descriptor = raw[3::-1] + raw[5:3:-1] + raw[7:5:-1]
    assert way["swap_descriptor"](value) % (1 << 64) == int.from_bytes(descriptor, "little")
    header = raw[:2] + raw[3:1:-1] + raw[5:3:-1] + raw[7:5:-1]
    assert way["swap_header"](value) % (1 << 64) == int.from_bytes(header, "little")
