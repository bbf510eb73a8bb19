"""What the parts of the socket device ask of one another: protocols, and the name of a connection.

`Connections` (the state machine) stands between a `Carrier`, which is one guest's side of the data path, and `End`s,
which are the other sides of its connections. The data path tells `Connections` what happened by the methods of
`Told`. All of it belongs to the control thread; no carrier calls back from within.

Promises, of the state machine: an end gets one of `refused` and `close`, once, as the last thing that is called; a
slot gets one `close`, and nothing after it. Of a carrier: `Told.closed` comes once for each slot that was closed, at
any time later, and is the last that is told of this slot until `open` has given it out again; what is asked of it is
done in order, but that packets, and a `start` behind them, may wait for the guest, and nothing else waits for them.
Never: has behaviour.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Key(NamedTuple):
    """What a connection is known by, at the guest. A CID of 2 is the host; another is a sibling's."""

    #: `abi.virtio_vsock.TYPE_*`; of a packet that came from a guest it may be any number.
    type: int
    guest_port: int
    peer_cid: int
    peer_port: int


class Carrier(Protocol):
    """What the state machine asks of the data path, in the order that the module says."""

    def open(self, key: Key, by_guest: bool) -> int | None:
        """A slot. The data path knows the connection from now on and carries no data yet; None: there is no room.

        `by_guest`: it is for a guest's REQUEST. Then it is called from within `Told.packet`, so that the credit in
        that packet's header is at hand. What the guest sends after its RESPONSE may come before `start`, and is kept
        for it.
        """
        ...

    def attach(self, slot: int, fd: int) -> None:
        """Its other end: a non-blocking socket, never closed here, read and written from `start` until `closed`."""
        ...

    def join(self, slot: int, other: Carrier, other_slot: int) -> None:
        """Its other end is a connection of a sibling. Called once for both sides, before either is started."""
        ...

    def send(self, slot: int, op: int, flags: int = 0) -> None:
        """REQUEST, RESPONSE, SHUTDOWN or RST to the guest; behind all data that was taken from the other end."""
        ...

    def reset(self, key: Key) -> None:
        """RST to the guest, for what is no connection."""
        ...

    def start(self, slot: int) -> None:
        """Data may flow, both ways: RESPONSE was received, or asked to be sent."""
        ...

    def when_drained(self, slot: int) -> None:
        """`Told.drained` is to come when all that the guest has sent until now has gone to the other end.

        Perhaps at once, but never from within. What can't go any more, as the other end has failed, counts as gone.
        """
        ...

    def hush(self, slot: int) -> None:
        """Nothing more is read for the guest: it takes nothing more."""
        ...

    def message(self, slot: int) -> None:
        """SEQPACKET: an empty message goes to the guest, and reading goes on (see `Told.eof`)."""
        ...

    def close(self, slot: int) -> None:
        """Out of the table. What is buffered is dropped; `Told.closed` follows.

        Packets that were asked for go, if need be later: before anything of another connection.
        """
        ...


class Told(Protocol):
    """What the data path tells the state machine."""

    def packet(self, slot: int | None, key: Key, op: int, flags: int) -> None:
        """A packet of the guest: any but RW and CREDIT_* of connections that the data path carries.

        `slot` is what the data path's table had for the key when the packet came: None if nothing, and one that
        `Carrier.close` was called for if that had not arrived.
        """
        ...

    def eof(self, slot: int) -> None:
        """A read of the other end gave 0; all before it is on its way to the guest. Nothing is read any more.

        Of a SEQPACKET socket it may as well have been an empty message: `End.ended` knows.
        """
        ...

    def failed(self, slot: int, errno: int) -> None:
        """The other end failed. EPIPE: writing did, whatever the error was; it may still have something to read."""
        ...

    def violated(self, slot: int, what: str) -> None:
        """The guest broke a connection's rules: more than it was granted, data after its last, a false length."""
        ...

    def drained(self, slot: int) -> None:
        """The answer to `Carrier.when_drained`."""
        ...

    def closed(self, slot: int) -> None:
        """The answer to `Carrier.close`: neither slot nor descriptor is used any more."""
        ...


class End(Protocol):
    """The other side of a connection. After `refused`, and after `close`, nothing more is called."""

    #: A non-blocking socket; -1: it is joined with a sibling's connection. Looked at when the connection is made.
    fd: int

    def accepted(self) -> None:
        """The guest has accepted what this end has asked for; data flows when this returns. May reset instead."""
        ...

    def refused(self, reason: str) -> None:
        """The guest has not, or not in time; or the answer to its request came too late, or there is no room."""
        ...

    def shutdown(self, flags: int) -> None:
        """The guest has shut down; each flag comes once.

        SHUTDOWN_SEND: nothing comes any more, and all that came has been delivered. SHUTDOWN_RCV: it takes nothing
        more.
        """
        ...

    def ended(self) -> int:
        """After a read of 0: SHUTDOWN_SEND, or that and SHUTDOWN_RCV if the other side has closed both ways.

        0: it has not ended, and this was an empty message (SEQPACKET).
        """
        ...

    def close(self, reset: bool) -> None:
        """It is over, `reset`: not as it should be. The descriptor may be closed now."""
        ...
