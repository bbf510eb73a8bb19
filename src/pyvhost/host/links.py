"""Hearing of it when an interface of the host comes, goes, or changes its state (rtnetlink(7)).

Promises: after any change of any interface of this network namespace the callback is called at least once; many
changes at once may be one call. Never: says what changed: whoever is called looks for itself, which can't be wrong
where messages were lost.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from pyvhost.host.poller import Poller

#: linux/rtnetlink.h: the multicast group of RTM_NEWLINK and RTM_DELLINK.
RTMGRP_LINK = 1


class LinkMonitor:
    """Calls `callback` on the poller's thread until `close`."""

    def __init__(self, poller: Poller, callback: Callable[[], object]) -> None:
        self._poller = poller
        self._callback = callback
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._socket = socket.socket(socket.AF_NETLINK, flags, socket.NETLINK_ROUTE)
        try:
            self._socket.bind((0, RTMGRP_LINK))
            poller.register(self._socket.fileno(), select.EPOLLIN, self._heard)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Listen no more; nothing happens the second time."""
        if self._socket.fileno() >= 0:
            self._poller.unregister(self._socket.fileno())
            self._socket.close()

    def _heard(self, mask: int) -> None:
        # What is left after these is told in the next round.
        for _ in range(64):
            try:
                self._socket.recv(1, socket.MSG_TRUNC)
            except BlockingIOError:
                break
            except OSError:
                continue  # ENOBUFS: messages were lost, which is no matter
        self._callback()
