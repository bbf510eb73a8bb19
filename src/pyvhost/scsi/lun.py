"""Which logical unit is kept where, as a person writes it: [TARGET:LUN=]SPEC.

Promises: what is wrong is one ValueError that names it. Never: opens a store; judges a spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

#: 256 targets of 16384 logical units each (virtio 1.3, 5.6.6.1).
MAX_TARGET: Final = 255
MAX_LUN: Final = 16383

_PLACED: Final = re.compile(r"(\d+):(\d+)=(.*)", re.DOTALL)
_PLACE: Final = re.compile(r"(\d+):(\d+)")


class Lun(NamedTuple):
    """Logical unit `lun` of `target`, kept by the store that `spec` names."""

    target: int
    lun: int
    spec: str


def parse_place(text: str) -> tuple[int, int]:
    """TARGET:LUN. ValueError: it is not, or there is no such place."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not TARGET:LUN, as in 0:3")
    return _checked(int(found[1]), int(found[2]))


def place(specs: Iterable[str | Lun], taken: Iterable[tuple[int, int]] = ()) -> list[Lun]:
    """The units that are meant; one without a place gets the first LUN of target 0 that nobody asks for.

    `taken`: places that are in use. ValueError: a place that can't be, is taken, or is asked for twice; none left.
    """
    used = set(taken)
    found: list[Lun | str] = []
    for spec in specs:
        if isinstance(spec, str):
            placed = _PLACED.fullmatch(spec)
            if placed is None:
                found.append(_named(spec))
                continue
            spec = Lun(int(placed[1]), int(placed[2]), placed[3])
        where = _checked(spec.target, spec.lun)
        if where in used:
            raise ValueError(f"LUN {spec.target}:{spec.lun} is there already")
        used.add(where)
        found.append(Lun(*where, _named(spec.spec)))
    free = (lun for lun in range(MAX_LUN + 1) if (0, lun) not in used)
    placed_all: list[Lun] = []
    for unit in found:
        if isinstance(unit, str):
            number = next(free, None)
            if number is None:
                raise ValueError("target 0 has no LUN left")
            unit = Lun(0, number, unit)
        placed_all.append(unit)
    return placed_all


def _named(spec: str) -> str:
    if not spec:
        raise ValueError("a LUN needs a store: a path, memory:SIZE or nbd:URI")
    return spec


def _checked(target: int, lun: int) -> tuple[int, int]:
    if not 0 <= target <= MAX_TARGET or not 0 <= lun <= MAX_LUN:
        raise ValueError(f"LUN {target}:{lun}: targets go from 0 to {MAX_TARGET}, LUNs from 0 to {MAX_LUN}")
    return target, lun
