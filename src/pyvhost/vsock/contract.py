"""What the rooms of vsock want of each other: keys, the data path as connections know it, and the other end.

Promises: everything here is called on the control thread. Never: has behaviour.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Key(NamedTuple):
    """What tells a guest's connections apart (virtio 1.2, 5.10.6.1)."""

    #: TYPE_STREAM or TYPE_SEQPACKET.
    type: int
    guest_port: int
    #: 2 (the host), or a sibling's CID.
    peer_cid: int
    peer_port: int


class Carrier(Protocol):
    """The data path of one guest. What it is asked for is done in the order of the calls."""

    def open(self, key: Key) -> int | None:
        """A slot; the connection is known from now on, and carries no data yet. None: there is no room."""

    def attach(self, slot: int, fd: int) -> None:
        """Its other end is this non-blocking socket, which is used from `start` until `closed`, and never closed."""

    def join(self, slot: int, other: Carrier, other_slot: int) -> None:
        """Its other end is a connection of a sibling; called once for both."""

    def send(self, slot: int, op: int, flags: int = 0) -> None:
        """A packet without data to the guest: REQUEST, RESPONSE, SHUTDOWN, RST."""

    def reset(self, key: Key) -> None:
        """RST to the guest, for a connection that nobody knows."""

    def start(self, slot: int) -> None:
        """Data may flow, both ways."""

    def when_drained(self, slot: int) -> None:
        """`drained` is told, later, when all that the guest has sent so far has gone to the other end."""

    def hush(self, slot: int) -> None:
        """The guest takes nothing more: nothing more is read for it."""

    def message(self, slot: int) -> None:
        """SEQPACKET: an empty message goes to the guest, and reading, which `eof` has ended, goes on."""

    def close(self, slot: int) -> None:
        """The connection is over, and what is under way is dropped; `closed` is told when its slot is free."""


class End(Protocol):
    """The other side of a connection."""

    @property
    def fd(self) -> int:
        """Its socket; -1: it is joined."""

    def accepted(self) -> None:
        """The guest has accepted what this end has asked for."""

    def refused(self, reason: str) -> None:
        """It has not. Nothing is called after this."""

    def shutdown(self, flags: int) -> None:
        """The guest has shut down. SHUTDOWN_SEND: it sends nothing more, and all is delivered; SHUTDOWN_RCV."""

    def hung_up(self) -> bool:
        """After `eof`: whether the other side has closed both ways, and not only its sending one."""

    def close(self, reset: bool) -> None:
        """It is over, and its descriptor may be closed. Called once, unless `refused` was."""
