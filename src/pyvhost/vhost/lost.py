"""Hearing of memory that its owner took away: from the SIGBUS handler's eventfd to the devices that it concerns.

Promises: a device whose memory is gone hears of it on its own control thread, whoever touched it and
however many control threads there are.
Never: decides what becomes of the front end.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from pyvhost.dataplane import guard
from pyvhost.host.poller import Poller


class Loser(Protocol):
    """What can lose its memory."""

    memory_lost: Callable[[], None] | None

    @property
    def lost_memory(self) -> bool:
        """Whether it has."""


_watched: WeakKeyDictionary[Poller, WeakSet[Loser]] = WeakKeyDictionary()


def watch(poller: Poller, device: Loser) -> None:
    """Has `device.memory_lost` called, on `poller`'s thread, when memory of its front end is gone."""
    event = guard.install()
    devices = _watched.get(poller)
    if devices is None:
        devices = _watched[poller] = WeakSet()
        known = devices

        def told(mask: int) -> None:
            for loser in [loser for loser in known if loser.lost_memory]:
                if loser.memory_lost is not None:
                    loser.memory_lost()

        # The handler's one eventfd is every poller's: none reads it, which would take the news from the others.
        poller.register(event, select.EPOLLIN | select.EPOLLET, told)
    devices.add(device)
