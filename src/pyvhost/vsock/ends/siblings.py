"""Siblings: guests of one group, which this process serves, connect to each other by CID.

Each of the two has a connection of its own, and the data path carries bytes from one to the other; what begins and
ends a connection is passed on here.

Promises: who is in no group, or in another one, is not reached. Never: carries a byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.ends.base import Guest
from pyvhost.vsock.ends.groups import Groups

if TYPE_CHECKING:
    from pyvhost.vsock.connection import Connection, Request

_BOTH: Final = abi.SHUTDOWN_RCV | abi.SHUTDOWN_SEND


class SiblingEnds:
    """What a guest asks of its siblings."""

    def __init__(self, groups: Groups | None = None) -> None:
        self._groups = groups or Groups.of_process()
        self._guest: Guest | None = None

    def open(self, guest: Guest) -> None:
        """Says whose siblings they are."""
        self._guest = guest

    def take(self, request: Request) -> bool:
        """Asks the sibling; False: there is none of that CID."""
        guest = self._guest
        sibling = self._groups.sibling(guest, request.key.peer_cid) if guest is not None else None
        if guest is None or sibling is None:
            return False
        asked = _Asked(request)
        key = request.key
        asked.own = sibling.connections.connect(
            asked, key.type, key.peer_port, peer_cid=guest.cid, peer_port=key.guest_port
        )
        if asked.own is not None:
            request.on_cancelled = asked.own.reset
        return True

    def close(self) -> None:
        """No more of them."""
        self._guest = None


class SiblingEnd:
    """The end of one guest's connection; `connection` is the other guest's."""

    fd = -1

    def __init__(self) -> None:
        self.connection: Connection | None = None

    def accepted(self) -> None:
        """It is the one that was asked."""

    def refused(self, reason: str) -> None:
        """Its guest has not."""
        if self.connection is not None:
            self.connection.reset()

    def shutdown(self, flags: int) -> None:
        """Passes on what its guest has shut down."""
        if self.connection is not None:
            self.connection.shut_down(flags)

    def ended(self) -> int:
        """It has no socket that could end."""
        return _BOTH

    def close(self, reset: bool) -> None:
        """Its guest's connection is over: so is the other's, at once or when that guest has read what there is."""
        if self.connection is None:
            return
        if reset:
            self.connection.reset()
        else:
            self.connection.shut_down(_BOTH)


class _Asked(SiblingEnd):
    """The end of the guest that is asked; `own` is that guest's connection."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.own: Connection | None = None
        self._request = request

    def accepted(self) -> None:
        """The guest has accepted: now the one that asked has a connection too. Too late: there is neither."""
        asking = SiblingEnd()
        asking.connection = self.own
        self.connection = self._request.accept(asking, joined=self.own)

    def refused(self, reason: str) -> None:
        """The guest has not."""
        self._request.refuse()
