"""`user`: the host's network without any privilege, by way of passt.

passt answers the guest's DHCP, ARP and DNS, and makes its connections as an ordinary program of this user. The
gateway's address leads to the host's own loopback unless `no-map-gw` is there.

Promises: a passt that ends is started again, after a pause that grows. Never: runs it with more rights than this
process has (started by root, it becomes `nobody`, or `runas`).
"""

from __future__ import annotations

import logging
import time
from typing import ClassVar

from pyvhost.host.passt import Passt
from pyvhost.host.poller import Poller, Timer
from pyvhost.net.backends.base import Backend, PortKind
from pyvhost.net.backends.spec import Spec, integer

_log = logging.getLogger(__name__)

#: Seconds before passt is started again: from, to, doubling.
PAUSE_FIRST = 0.5
PAUSE_MOST = 30.0

#: What passt tells the guest by DHCP: nothing is on the way but memory, so a frame may be as long as it can be.
MTU = 65520

#: Options with a value, which passt has under these names.
_VALUES = {
    "address": "--address",
    "netmask": "--netmask",
    "gateway": "--gateway",
    "interface": "--interface",
    "dns": "--dns",
    "search": "--search",
    "runas": "--runas",
}
_FLAGS = {
    "no-map-gw": "--no-map-gw",
    "no-dhcp": "--no-dhcp",
    "ipv4-only": "--ipv4-only",
    "ipv6-only": "--ipv6-only",
}


class UserBackend(Backend):
    """passt with the given options of its own."""

    kind = PortKind.STREAM
    offloads = False
    queue_pairs_max = 1
    usage: ClassVar[str] = "user[,tcp=PORTS][,udp=PORTS][,mtu=BYTES][,address=IP]..."
    summary: ClassVar[str] = "the host's network without privileges, by passt; ports as 2222:22"

    def __init__(self, spec: str, options: list[str] | None = None, mtu: int | None = None) -> None:
        super().__init__(spec)
        self.options = options or []
        if mtu is not None:
            self.options += ["--mtu", str(mtu)]
        self._mtu = mtu
        self._poller: Poller | None = None
        self._passt: Passt | None = None
        self._timer: Timer | None = None
        self._pause = PAUSE_FIRST
        self._started = 0.0
        self._up = False

    @classmethod
    def from_spec(cls, spec: Spec) -> UserBackend:
        spec.no_argument()
        options: list[str] = []
        for name, flag in (("tcp", "--tcp-ports"), ("udp", "--udp-ports")):
            ports = spec.values(name)
            if ports:
                options += [flag, ",".join(ports)]
        mtu = spec.value("mtu", integer(68, MTU))
        for name, flag in _VALUES.items():
            for value in spec.values(name):
                options += [flag, value]
        for name, flag in _FLAGS.items():
            if spec.flag(name):
                options.append(flag)
        return cls(spec.text, options, mtu)

    @property
    def mtu(self) -> int | None:
        return self._mtu or MTU

    @property
    def passt_pid(self) -> int:
        """passt's process id; -1 while there is none."""
        return self._passt.pid if self._passt is not None else -1

    def open(self, queue_pairs: int, poller: Poller | None = None) -> list[int]:
        self.check_pairs(queue_pairs)
        if poller is None:
            raise ValueError(f"{self.spec}: it needs a poller, to hear of passt")
        self._poller = poller
        passt = Passt(self.options, poller, self._ended)
        passt.start()
        self._started = time.monotonic()
        self._passt, self._up = passt, True
        self.fds = [passt.fd]
        return self.fds

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        passt, self._passt, self._up, self.fds = self._passt, None, False, []
        if passt is not None:
            passt.close()

    def link_up(self) -> bool:
        return self._up

    def reopen(self) -> None:
        # Either it is ending, or it talks nonsense; both ways `_ended` is next.
        if self._up and self._passt is not None:
            self._passt.kill()

    def _ended(self) -> None:
        """passt has gone. Its socket is closed once the device has let go of it."""
        if time.monotonic() - self._started > PAUSE_MOST:
            self._pause = PAUSE_FIRST  # it had been well
        self._again_later()
        self._up, self.fds = False, [-1]
        try:
            self.changed()
        finally:
            if self._passt is not None:
                self._passt.close()

    def _again_later(self) -> None:
        assert self._poller is not None
        self._timer = self._poller.call_later(self._pause, self._again)
        self._pause = min(2 * self._pause, PAUSE_MOST)

    def _again(self) -> None:
        assert self._passt is not None
        try:
            # It isn't waited for: a control thread has other things to do. If it fails, `_ended` is next.
            self._passt.start(wait=False)
        except OSError as error:
            _log.error("%s: %s", self.spec, error)
            self._again_later()
            return
        self._started = time.monotonic()
        self._up, self.fds = True, [self._passt.fd]
        self.changed()
