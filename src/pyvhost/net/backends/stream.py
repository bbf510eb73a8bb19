"""`stream:PATH`: a peer on a Unix stream socket, in QEMU's framing: another hypervisor, passt, a program.

QEMU's own word for the other end is `-netdev stream,id=n,server=off,addr.type=unix,addr.path=PATH` (or
server=on). The peer may come, go and come again; the guest sees its cable go in and out.

Promises and never: as `base`.
"""

from __future__ import annotations

from typing import ClassVar

from pyvhost.host.poller import Poller
from pyvhost.host.stream import Role, StreamPeer
from pyvhost.net.backends.base import Backend, PortKind
from pyvhost.net.backends.spec import Spec


class StreamBackend(Backend):
    """The one peer at a path."""

    kind = PortKind.STREAM
    offloads = False
    queue_pairs_max = 1
    usage: ClassVar[str] = "stream:PATH[,connect|,listen]"
    summary: ClassVar[str] = "a peer on a Unix socket, in QEMU's framing"

    def __init__(self, spec: str, path: str, role: Role = Role.AUTO) -> None:
        super().__init__(spec)
        self.path = path
        self.role = role
        self._peer: StreamPeer | None = None

    @classmethod
    def from_spec(cls, spec: Spec) -> StreamBackend:
        path = spec.required("path", str)
        connect, listen = spec.flag("connect"), spec.flag("listen")
        if connect and listen:
            raise spec.wrong("it can connect or listen, not both; without either it finds out which")
        return cls(spec.text, path, Role.CONNECT if connect else Role.LISTEN if listen else Role.AUTO)

    def open(self, queue_pairs: int, poller: Poller | None = None) -> list[int]:
        self.check_pairs(queue_pairs)
        if poller is None:
            raise ValueError(f"{self.spec}: it needs a poller, to hear of its peer")
        peer = StreamPeer(self.path, self.role, poller, self._changed)
        peer.open()
        self._peer = peer
        self.fds = [peer.fd]
        return self.fds

    def close(self) -> None:
        peer, self._peer, self.fds = self._peer, None, []
        if peer is not None:
            peer.close()

    def link_up(self) -> bool:
        return self._peer is not None and self._peer.fd >= 0

    def reopen(self) -> None:
        if self._peer is not None:
            self._peer.drop()

    def _changed(self) -> None:
        if self._peer is not None:
            self.fds = [self._peer.fd]
            self.changed()
