"""Which ports have turns in a worker's loop, and what a kick does to a ring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyvhost.dataplane import blocks
from pyvhost.dataplane.turns import activate, enlist, kicked, retire


class Loop:
    """A worker's record, with room for ports and the rings of none."""

    def __init__(self, ports: int) -> None:
        self._active = np.zeros(ports, np.int64)
        self._row = np.zeros(len(blocks.COUNTERS), np.int64)
        self.worker: Any = np.zeros(1, blocks.WORKER)[0]
        self.worker["active"] = self._active.ctypes.data
        self.rings: Any = np.zeros(1, blocks.RING)
        self.rings[0]["row"] = self._row.ctypes.data
        self.ports: Any = np.zeros(ports, blocks.PORT)
        for port in self.ports:
            port["rx"] = port["tx"] = -1
            port["used"] = 1

    @property
    def active(self) -> list[int]:
        return [int(index) for index in self._active[: self.worker["active_count"]]]

    @property
    def kicks(self) -> int:
        return int(self._row[blocks.C_KICKS // 8])


def test_a_port_is_active_once() -> None:
    loop = Loop(3)
    for index in (2, 0, 2, 0):
        activate(loop.worker, loop.rings, loop.ports, index)
    assert loop.active == [2, 0]


def test_a_place_that_nobody_has_is_never_active() -> None:
    loop = Loop(1)
    loop.ports[0]["used"] = 0
    activate(loop.worker, loop.rings, loop.ports, 0)
    assert loop.active == []


@pytest.mark.parametrize(("at", "left"), [(0, [3, 2]), (1, [1, 3]), (2, [1, 2])])
def test_the_last_takes_the_place_of_who_rests(at: int, left: list[int]) -> None:
    loop = Loop(4)
    for index in (1, 2, 3):
        enlist(loop.worker, loop.ports[index], index)
    resting = loop.active[at]
    retire(loop.worker, loop.ports[resting], at)
    assert loop.active == left
    assert [bool(port["active"]) for port in loop.ports] == [index in left for index in range(4)]


@pytest.mark.parametrize(
    ("located", "running", "fault", "goes_on", "misses"),
    [
        (1, 1, 0, True, False),
        (1, 0, blocks.FAULT_HEAD, True, False),
        (1, 0, 0, False, False),
        (0, 0, 0, False, True),
        (0, 0, blocks.IOTLB_MISS, False, True),
    ],
)
def test_a_kick(located: int, running: int, fault: int, goes_on: bool, misses: bool) -> None:
    """A ring at fault is looked at again; one whose parts can't be reached asks for them."""
    loop = Loop(1)
    ring = loop.rings[0]
    ring["located"], ring["running"], ring["fault"], ring["fault_told"] = located, running, fault, 1
    kicked(loop.worker, ring)
    assert loop.kicks == 1
    assert bool(ring["running"]) is goes_on
    assert bool(loop.worker["reason"] & blocks.REASON_RING) is misses
    if misses:
        assert (ring["fault"], ring["fault_told"]) == (blocks.IOTLB_MISS, 0)
    elif goes_on:
        assert ring["fault"] == 0
