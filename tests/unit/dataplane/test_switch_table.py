"""The learning table beside a dictionary that forgets nothing."""

from __future__ import annotations

import random
import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from guarded import Guarded
from pyvhost.dataplane import blocks, policy
from pyvhost.dataplane.switch_table import learn, look_up


class Table:
    """A switch's block and its table, against pages that can't be touched."""

    def __init__(self, entries: int) -> None:
        self.entries = Guarded.of(bytes(entries * blocks.SWITCH_ENTRY_BYTES))
        block = np.zeros(blocks.SWITCH_BYTES // 8, np.int64)
        block[blocks.SWITCH_TABLE // 8] = self.entries.address
        block[blocks.SWITCH_MASK // 8] = entries - 1
        self._block = Guarded.of(block.tobytes())
        self.address = self._block.address

    def learn(self, mac: int, member: int) -> None:
        learn(self.address, mac, member)

    def look_up(self, mac: int) -> int:
        return int(look_up(self.address, mac))

    def known(self) -> list[tuple[int, int]]:
        rows = list(struct.iter_unpack("<qq", self.entries.get()))
        return [(key, member) for key, member in rows if key]


MACS = [0, 1, (1 << 48) - 1, 1 << 47, 0x123456005452]


def test_what_was_learnt_is_known_and_nothing_else() -> None:
    table = Table(64)
    for number, mac in enumerate(MACS):
        assert table.look_up(mac) == -1
        table.learn(mac, number)
        assert table.look_up(mac) == number
    assert [table.look_up(mac) for mac in MACS] == [0, 1, 2, 3, 4]
    assert table.look_up(2) == -1


def test_an_address_that_moves_is_in_one_place() -> None:
    table = Table(64)
    for member in (3, 0, 255):
        table.learn(0xABC, member)
        assert table.look_up(0xABC) == member
        assert len(table.known()) == 1


@settings(deadline=None)
@given(
    st.sampled_from([1, 2, 8, 64]),
    st.lists(
        st.tuples(st.integers(0, 40) | st.integers(0, (1 << 48) - 1), st.integers(0, 255)), max_size=120
    ),
)
def test_an_answer_is_the_last_that_was_learnt_or_none(size: int, steps: list[tuple[int, int]]) -> None:
    table = Table(size)
    truth: dict[int, int] = {}
    for mac, member in steps:
        table.learn(mac, member)
        truth[mac] = member
        assert table.look_up(mac) == member
    for mac, member in truth.items():
        assert table.look_up(mac) in (-1, member)
    keys = [key for key, _ in table.known()]
    assert len(keys) == len(set(keys))
    if len(truth) <= blocks.SWITCH_PROBES and size >= 64:
        # So few that none can have pushed out another.
        assert all(table.look_up(mac) == member for mac, member in truth.items())


def test_a_flood_of_addresses_displaces_and_never_grows() -> None:
    table = Table(256)
    dice = random.Random(4)
    flood = 2000 if policy.PLAIN else 100_000
    for number in range(flood):
        mac = dice.getrandbits(48)
        table.learn(mac, number & 0xFF)
        assert table.look_up(mac) == number & 0xFF
    assert len(table.known()) <= 256
    # One that goes on talking is found again at once.
    table.learn(0x525400123456, 7)
    assert table.look_up(0x525400123456) == 7


def test_addresses_spread_over_the_table() -> None:
    """A host's addresses differ in a few bits: they are not to push out each other."""
    for shift in range(0, 41, 8):
        table = Table(4096)
        macs = [0x525400123456 ^ number << shift for number in range(256)]
        for number, mac in enumerate(macs):
            table.learn(mac, number)
        assert [table.look_up(mac) for mac in macs] == list(range(256))
