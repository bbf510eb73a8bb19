"""A guest's share: how much its connections may have under way, and how many of them siblings may ask it for.

Every guest has a share of its own, so that none lowers another's; and what it has with the host and what it has with
siblings are apart, so that a sibling can't lower what it has with the host.

Promises: what is granted to a guest is bounded in all, `LEAST` for each connection apart; a sibling takes no more
than it leaves for others. Never: knows another guest.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from pyvhost.abi import virtio_vsock as abi

#: What a connection is granted at least, bytes.
LEAST: Final = 16 << 10
#: What all of a guest's connections with the host may have under way before `LEAST` is all they get, and those with
#: its siblings.
BUDGET: Final = 256 << 20
SIBLINGS: Final = 128 << 20
#: A connection gets one part in so many of what is left, at most.
_PARTS: Final = 16


class Share:
    """One guest's memory."""

    def __init__(self) -> None:
        #: By the other side's CID; none that has nothing.
        self._granted: dict[int, int] = {}
        self._of_siblings = 0

    def grant(self, wanted: int, peer_cid: int) -> int:
        """What a connection with `peer_cid` may have under way: bytes, a power of two, less the more is granted."""
        theirs = self._granted.get(peer_cid, 0)
        if peer_cid == abi.VMADDR_CID_HOST:
            left = BUDGET - theirs
        else:
            # As much again stays for the next sibling.
            left = SIBLINGS - self._of_siblings - theirs
        share = max(LEAST, min(wanted, left // _PARTS))
        share = 1 << (share.bit_length() - 1)
        self._add(peer_cid, share)
        return share

    def give_back(self, granted: int, peer_cid: int) -> None:
        """A connection has ended."""
        self._add(peer_cid, -granted)

    @property
    def granted(self) -> int:
        """To all connections, bytes."""
        return sum(self._granted.values())

    def _add(self, peer_cid: int, number: int) -> None:
        theirs = self._granted.pop(peer_cid, 0) + number
        if theirs:
            self._granted[peer_cid] = theirs
        if peer_cid != abi.VMADDR_CID_HOST:
            self._of_siblings += number


class Asked:
    """How many of a guest's connections, of which it has `limit`, its siblings have asked it for: half at most."""

    def __init__(self, limit: int) -> None:
        self._most = (limit + 1) // 2
        self._of: Counter[int] = Counter()

    def may(self, cid: int) -> bool:
        """Whether this one may ask for another: the host always, a sibling while it leaves more than it has."""
        return cid == abi.VMADDR_CID_HOST or self._of[cid] < self._most - self._of.total()

    def add(self, cid: int) -> None:
        """It has asked."""
        if cid != abi.VMADDR_CID_HOST:
            self._of[cid] += 1

    def remove(self, cid: int) -> None:
        """A connection that it has asked for has ended."""
        if cid != abi.VMADDR_CID_HOST:
            self._of[cid] -= 1
            if not self._of[cid]:
                del self._of[cid]
