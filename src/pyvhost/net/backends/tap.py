"""`tap:NAME`: an interface of the host whose other end the guest is.

The tap is made if it is absent, set up, and goes away with the device. It hands over what the driver can take
(TUNSETOFFLOAD), spreads flows over the queue pairs in use, and pulls the guest's cable when it is set down.

Promises and never: as `base` and `interface`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from pyvhost.abi import virtio_net
from pyvhost.host import interface, tap
from pyvhost.host.fds import close_all
from pyvhost.net.backends.interface import InterfaceBackend
from pyvhost.net.backends.spec import Spec, integer

_log = logging.getLogger(__name__)

#: What a driver says it can take, and what a tap calls that.
_OFFLOADS = (
    (virtio_net.F_GUEST_CSUM, tap.TUN_F_CSUM),
    (virtio_net.F_GUEST_TSO4, tap.TUN_F_TSO4),
    (virtio_net.F_GUEST_TSO6, tap.TUN_F_TSO6),
    (virtio_net.F_GUEST_ECN, tap.TUN_F_TSO_ECN),
    (virtio_net.F_GUEST_UFO, tap.TUN_F_UFO),
    (virtio_net.F_GUEST_USO4, tap.TUN_F_USO4),
    (virtio_net.F_GUEST_USO6, tap.TUN_F_USO6),
)


class TapBackend(InterfaceBackend):
    """A tap. `bridge`: made a port of that bridge; `sndbuf`: bytes on their way before the loop has to wait."""

    usage: ClassVar[str] = "tap:NAME[,mtu=BYTES][,bridge=NAME][,sndbuf=BYTES]"
    summary: ClassVar[str] = "an interface of the host, made if absent"

    def __init__(
        self,
        spec: str,
        name: str,
        *,
        mtu: int | None = None,
        bridge: str | None = None,
        sndbuf: int | None = None,
    ) -> None:
        super().__init__(spec, name)
        self._mtu = mtu
        self._bridge = bridge
        self._sndbuf = sndbuf
        self._attached = 1
        self._features = 0

    @classmethod
    def from_spec(cls, spec: Spec) -> TapBackend:
        return cls(
            spec.text,
            spec.required("name", interface.valid_name),
            mtu=spec.value("mtu", integer(68, 65535)),
            bridge=spec.value("bridge", interface.valid_name),
            sndbuf=spec.value("sndbuf", integer(4096, 2**31 - 1)),
        )

    def set_vnet_hdr_size(self, size: int) -> None:
        self.header_size = size
        self._apply(lambda fd: tap.set_vnet_hdr_size(fd, size))

    def set_offloads(self, features: int) -> None:
        self._features = features
        offload = sum(flag for bit, flag in _OFFLOADS if features >> bit & 1)
        self._apply(lambda fd: tap.set_offload(fd, offload))

    def set_pairs(self, pairs: int) -> None:
        self._attached = pairs
        if len(self.fds) > 1 and self.fds[0] >= 0:
            # At no time may there be none: the tap would drop what comes in.
            for attached in (True, False):
                for i, fd in enumerate(self.fds):
                    if (i < pairs) == attached:
                        self._quietly(fd, partial(tap.set_queue, attached=attached))

    def link_up(self) -> bool:
        try:
            return self.fds[:1] != [-1] and interface.is_up(self.name)
        except OSError:
            return False

    def _open_fds(self, queue_pairs: int) -> list[int]:
        there = interface.exists(self.name)
        fds = tap.open_tap(self.name, queue_pairs)
        try:
            if self._mtu is not None and interface.mtu(self.name) != self._mtu:
                interface.set_mtu(self.name, self._mtu)
            if self._bridge is not None:
                self._join_bridge(self._bridge)
            if not there:
                interface.set_up(self.name)
            elif not interface.is_up(self.name):
                _log.warning("%s: tap %s is down: ip link set %s up", self.spec, self.name, self.name)
        except BaseException:
            close_all(fds)
            raise
        return fds

    def _join_bridge(self, bridge: str) -> None:
        try:
            interface.add_to_bridge(self.name, bridge)
        except OSError as error:
            # A tap that was there may be its port already.
            if error.errno != errno.EBUSY or interface.bridge_of(self.name) != bridge:
                raise

    def _set_up(self) -> None:
        self.set_vnet_hdr_size(self.header_size)
        self.set_offloads(self._features)
        if self._sndbuf is not None:
            sndbuf = self._sndbuf
            self._apply(lambda fd: tap.set_sndbuf(fd, sndbuf))
        self.set_pairs(self._attached)

    def _lost(self) -> bool:
        try:
            self.name = tap.name_of(self.fds[0])  # it may have been renamed
        except OSError as error:
            return error.errno == errno.EBADFD
        return False

    def _apply(self, setting: Callable[[int], object]) -> None:
        """Set something that one descriptor sets for all of the tap."""
        if self.fds and self.fds[0] >= 0:
            self._quietly(self.fds[0], setting)

    def _quietly(self, fd: int, setting: Callable[[int], object]) -> None:
        """A tap that was deleted meanwhile is not this call's business: `_look` finds it so."""
        try:
            setting(fd)
        except OSError as error:
            if error.errno != errno.EBADFD:
                raise OSError(error.errno or 0, f"{self.spec}: {error.strerror}") from None
