"""One connection of a guest, and a guest's request for one, as their other ends see them. Sans-IO.

Promises: every method may be called at any time, from within an end's methods as well; what comes too late does
nothing.
Never: decides anything; that is `connections`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol

from pyvhost.vsock.contract import Carrier, End, Key


class State(enum.Enum):
    """Where a connection is between `Carrier.open` and `Told.closed`."""

    #: The guest has asked, and its peer has not answered.
    REQUESTED = enum.auto()
    #: The guest was asked, and has not answered.
    CONNECTING = enum.auto()
    OPEN = enum.auto()
    #: The guest has done with it; what it sent before is still on its way to the other end.
    LINGERING = enum.auto()
    #: Over; the data path has not let go of it yet.
    CLOSING = enum.auto()
    CLOSED = enum.auto()


class Owner(Protocol):
    """What a connection asks of `Connections`."""

    carrier: Carrier

    def shut_down(self, connection: Connection, flags: int) -> None:
        """See `Connection.shut_down`."""
        ...

    def break_off(self, connection: Connection, reason: str) -> None:
        """See `Connection.reset`."""
        ...

    def accept(self, request: Request, end: End, joined: Connection | None) -> Connection | None:
        """See `Request.accept`."""
        ...

    def refuse(self, request: Request) -> None:
        """See `Request.refuse`."""
        ...


class Connection:
    """One connection. `shut_down` and `reset` are for its other end; all else is its owner's to change."""

    __slots__ = (
        "by_guest",
        "delivered",
        "end",
        "guest_shut",
        "key",
        "owner",
        "request",
        "shut",
        "slot",
        "state",
        "was_reset",
    )

    def __init__(self, owner: Owner, key: Key, slot: int, state: State) -> None:
        self.owner = owner
        self.key = key
        self.slot = slot
        self.state = state
        self.end: End | None = None
        #: The guest has asked for it, by this request until it is answered.
        self.by_guest = state is State.REQUESTED
        self.request: Request | None = None
        #: SHUTDOWN_* that the guest has sent, and those that it was sent.
        self.guest_shut = 0
        self.shut = 0
        #: The guest sends nothing more, and the end has been told so, behind the last byte.
        self.delivered = False
        self.was_reset = False

    def __repr__(self) -> str:
        return f"<{self.key} {self.state.name}>"

    def shut_down(self, flags: int) -> None:
        """The other end sends nothing more (SHUTDOWN_SEND), takes nothing more (SHUTDOWN_RCV), or both."""
        self.owner.shut_down(self, flags)

    def reset(self) -> None:
        """The other end is gone: RST to the guest. One that was not accepted yet has its end `refused`."""
        self.owner.break_off(self, "it was given up")


class Request:
    """A guest wants a connection. It is to be answered once, at any time until its timeout."""

    __slots__ = ("connection", "key", "on_cancelled")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.key = connection.key
        #: Told if the guest has given up, or the time is over, before there was an answer.
        self.on_cancelled: Callable[[], object] | None = None

    @property
    def pending(self) -> bool:
        """Whether an answer is still waited for."""
        return self.connection.state is State.REQUESTED

    def accept(self, end: End, joined: Connection | None = None) -> Connection | None:
        """With this other end; None: it was too late, and `end.refused` has been called.

        `joined`: a sibling's connection that the data is to come from and go to; `end.fd` is -1 then.
        """
        return self.connection.owner.accept(self, end, joined)

    def refuse(self) -> None:
        """Not: RST to the guest."""
        self.connection.owner.refuse(self)
