"""`packet:IFNAME`: the guest shares an interface of the host, by a raw socket.

The guest hears what comes in on the interface, whatever its address, and its frames leave through it. What the
host itself sends there it does not hear: host and guest meet where the other end is (a veth's peer, a switch).
A raw socket can't be told what a driver takes: frames come as the host has them, GRO's super-frames included,
and the loop makes of them what the driver asked for.

Promises and never: as `base` and `interface`.
"""

from __future__ import annotations

from typing import ClassVar

from pyvhost.host import interface, packet
from pyvhost.net.backends.interface import InterfaceBackend
from pyvhost.net.backends.spec import Spec


class PacketBackend(InterfaceBackend):
    """A raw socket. `qdisc`: through the interface's queueing discipline; `promisc`: hear every address."""

    usage: ClassVar[str] = "packet:IFNAME[,qdisc][,promisc=off]"
    summary: ClassVar[str] = "an interface of the host, shared by a raw socket"

    def __init__(self, spec: str, name: str, *, qdisc: bool = False, promiscuous: bool = True) -> None:
        super().__init__(spec, name)
        self._qdisc = qdisc
        self._promiscuous = promiscuous
        self._index = 0
        self._wanted_header = 10
        self._spread = 1

    @classmethod
    def from_spec(cls, spec: Spec) -> PacketBackend:
        return cls(
            spec.text,
            spec.required("ifname", interface.valid_name),
            qdisc=spec.flag("qdisc"),
            promiscuous=spec.flag("promisc", True),
        )

    def set_vnet_hdr_size(self, size: int) -> None:
        self._wanted_header = size
        for fd in self.fds:
            if fd >= 0:
                self.header_size = packet.set_vnet_hdr_size(fd, size)

    def set_pairs(self, pairs: int) -> None:
        self._spread = pairs
        if len(self.fds) > 1 and self.fds[0] >= 0:
            packet.spread(self.fds[0], pairs)

    def link_up(self) -> bool:
        try:
            flags = interface.flags(self.name)
        except OSError:
            return False
        wanted = interface.IFF_UP | interface.IFF_RUNNING
        return self.fds[:1] != [-1] and flags & wanted == wanted

    def _open_fds(self, queue_pairs: int) -> list[int]:
        # Before the sockets: should the interface be replaced just then, it is found to be lost.
        self._index = interface.index(self.name)
        return packet.open_packet(
            self.name, queue_pairs, qdisc_bypass=not self._qdisc, promiscuous=self._promiscuous
        )

    def _set_up(self) -> None:
        self.set_vnet_hdr_size(self._wanted_header)
        self.set_pairs(self._spread)

    def _lost(self) -> bool:
        try:
            return interface.index(self.name) != self._index
        except OSError:
            return True
