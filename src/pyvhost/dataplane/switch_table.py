"""The learning switch's table: which member a MAC address was last seen behind (IEEE 802.1D, 7.8, without ageing).

Promises: bounded: a look-up touches at most `SWITCH_PROBES` entries, and a flood of made-up addresses only
displaces others. Never: frees an entry by itself; Python forgets a member when it leaves.
"""

from __future__ import annotations

from typing import Final

from pyvhost.dataplane.access import load64, store64
from pyvhost.dataplane.blocks import SWITCH_ENTRY_BYTES, SWITCH_MASK, SWITCH_PROBES, SWITCH_TABLE
from pyvhost.dataplane.policy import inline

_KNOWN: Final = 1 << 48
_SPREAD: Final = 0x1E3779B97F4A7C15
_LOW62: Final = (1 << 62) - 1


@inline
def _entry(switch: int, key: int, probe: int) -> int:
    place = (((key * _SPREAD) & _LOW62) >> 36) + probe
    return load64(switch + SWITCH_TABLE) + (place & load64(switch + SWITCH_MASK)) * SWITCH_ENTRY_BYTES


@inline
def look_up(switch: int, address: int) -> int:
    """The member behind a MAC address (its 6 bytes as a little-endian number); -1 if it is not known."""
    key = address | _KNOWN
    for probe in range(SWITCH_PROBES):
        entry = _entry(switch, key, probe)
        found = load64(entry)
        if found == key:
            return load64(entry + 8)
        if found == 0:
            break
    return -1


@inline
def learn(switch: int, address: int, member: int) -> None:
    """Notes that `address` is behind `member`, in place of what was known."""
    key = address | _KNOWN
    place = _entry(switch, key, 0)
    for probe in range(SWITCH_PROBES):
        entry = _entry(switch, key, probe)
        found = load64(entry)
        if found == key or found == 0:
            place = entry
            break
    if load64(place) != key or load64(place + 8) != member:
        store64(place, key)
        store64(place + 8, member)
