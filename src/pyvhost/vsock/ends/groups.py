"""The guests of this process, by CID: who is there, and who is whose sibling.

Promises: a CID is one guest's at a time; guests of different groups, and those without one, do not know each other.
Any thread may ask. Never: keeps a guest that has left.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pyvhost.vsock.ends.base import Guest


class Groups:
    """Guests by CID. There is one for a process (`of_process`)."""

    _the: ClassVar[Groups | None] = None
    _making: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._guests: dict[int, Guest] = {}

    @classmethod
    def of_process(cls) -> Groups:
        """The process's own."""
        with cls._making:
            if cls._the is None:
                cls._the = cls()
            return cls._the

    def add(self, guest: Guest) -> None:
        """A guest has come. OSError EADDRINUSE: another has its CID."""
        with self._lock:
            self._check(guest.cid, guest)
            self._guests[guest.cid] = guest

    def move(self, guest: Guest, cid: int) -> None:
        """Gives a guest another CID. OSError EADDRINUSE: another guest has it."""
        with self._lock:
            self._check(cid, guest)
            if self._guests.get(guest.cid) is guest:
                del self._guests[guest.cid]
                self._guests[cid] = guest
            guest.cid = cid

    def remove(self, guest: Guest) -> None:
        """A guest has gone, if it was there."""
        with self._lock:
            if self._guests.get(guest.cid) is guest:
                del self._guests[guest.cid]

    def find(self, cid: int) -> Guest | None:
        """The guest of this CID."""
        with self._lock:
            return self._guests.get(cid)

    def sibling(self, guest: Guest, cid: int) -> Guest | None:
        """The guest of this CID, if it is in the same group as `guest`, and is another one."""
        found = self.find(cid)
        if found is None or found is guest or found.group is None or found.group != guest.group:
            return None
        # Two control threads would have to wait for each other.
        return found if found.poller is guest.poller else None

    def _check(self, cid: int, guest: Guest) -> None:
        other = self._guests.get(cid)
        if other is not None and other is not guest:
            raise OSError(errno.EADDRINUSE, f"CID {cid} is that of {other.name} already")
