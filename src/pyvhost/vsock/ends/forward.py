"""The host's own services: what listens on AF_VSOCK here, for the ports that were named and no others.

Promises: a port that was not named is never dialled. Never: listens; blocks.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.ends.base import Guest, SocketEnd, kind_of

if TYPE_CHECKING:
    from pyvhost.vsock.connection import Request

_log = logging.getLogger(__name__)

#: A non-blocking socket that is connecting, or connected, to a port: the type is TYPE_*. OSError.
Dial = Callable[[int, int], socket.socket]


def dial_host(type: int, port: int) -> socket.socket:
    """A socket on its way to `port` of this host. OSError: EAFNOSUPPORT, ENODEV: the host has no vsock loopback."""
    sock = socket.socket(socket.AF_VSOCK, kind_of(type) | socket.SOCK_NONBLOCK)
    try:
        code = sock.connect_ex((abi.VMADDR_CID_LOCAL, port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


class ForwardEnds:
    """What a guest reaches of its host's services: `ports`, the same here as there."""

    def __init__(self, ports: Iterable[int], *, dial: Dial = dial_host) -> None:
        self._ports = frozenset(ports)
        self._dial = dial
        self._guest: Guest | None = None
        self._pending: set[_Dialled] = set()
        self._told = ""

    def open(self, guest: Guest) -> None:
        """Says whose they are."""
        self._guest = guest

    def take(self, request: Request) -> bool:
        """Dials the host's service; False: it is not forwarded."""
        key, guest = request.key, self._guest
        if guest is None or key.peer_cid != abi.VMADDR_CID_HOST or key.peer_port not in self._ports:
            return False
        try:
            sock = self._dial(key.type, key.peer_port)
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.ECONNREFUSED):
                self._tell(guest, f"port {key.peer_port} of the host can't be reached: {error.strerror}")
            request.refuse()
            return True
        self._pending.add(_Dialled(guest, request, sock, self._pending.discard))
        return True

    def close(self) -> None:
        """No more of them."""
        for dialled in list(self._pending):
            dialled.give_up()
        self._guest = None

    def _tell(self, guest: Guest, what: str) -> None:
        """Once for each reason, not once for each attempt."""
        if what != self._told:
            self._told = what
            _log.warning("%s: %s", guest.name, what)


class _Dialled:
    """A socket on its way."""

    def __init__(
        self,
        guest: Guest,
        request: Request,
        sock: socket.socket,
        over: Callable[[_Dialled], object],
    ) -> None:
        self._poller = guest.poller
        self._request = request
        self._sock = sock
        self._over = over
        request.on_cancelled = self._cancelled
        guest.poller.register(sock.fileno(), select.EPOLLOUT, self._done)

    def give_up(self) -> None:
        """Nobody wants it any more."""
        self._cancelled()
        self._request.refuse()

    def _done(self, mask: int) -> None:
        self._forget()
        if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            self._request.accept(SocketEnd(self._sock))
        else:
            self._sock.close()
            self._request.refuse()

    def _cancelled(self) -> None:
        self._forget()
        self._sock.close()

    def _forget(self) -> None:
        self._poller.unregister(self._sock.fileno())
        self._over(self)
