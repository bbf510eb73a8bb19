"""What `tap` and `packet` have in common: the other end is an interface of the host.

Promises: an interface that goes away leaves `fds` at -1 and the cable out; one of the same name that appears
later is opened, with the settings that were in force. Never: makes an interface that somebody took away.
"""

from __future__ import annotations

import logging
from abc import abstractmethod

from pyvhost.host import interface
from pyvhost.host.fds import close_all
from pyvhost.host.links import LinkMonitor
from pyvhost.host.poller import Poller
from pyvhost.net.backends.base import Backend, PortKind

_log = logging.getLogger(__name__)


class InterfaceBackend(Backend):
    """The interface `name`, through descriptors that carry a frame and its virtio_net_hdr each."""

    kind = PortKind.FD

    def __init__(self, spec: str, name: str) -> None:
        super().__init__(spec)
        self.name = name
        self.header_size = 10
        self._pairs = 0
        self._monitor: LinkMonitor | None = None
        #: What the device knows: descriptors and link.
        self._told: tuple[list[int], bool] = ([], False)

    @abstractmethod
    def _open_fds(self, queue_pairs: int) -> list[int]:
        """A descriptor for each queue pair."""

    @abstractmethod
    def _set_up(self) -> None:
        """Put the settings in force into `fds`, which were opened again."""

    @abstractmethod
    def _lost(self) -> bool:
        """Whether `fds` lead nowhere any more."""

    @property
    def mtu(self) -> int | None:
        try:
            return interface.mtu(self.name)
        except OSError:
            return None

    def open(self, queue_pairs: int, poller: Poller | None = None) -> list[int]:
        self.check_pairs(queue_pairs)
        self._pairs = queue_pairs
        self.fds = self._open_fds(queue_pairs)
        try:
            self._set_up()
            if poller is not None:
                self._monitor = LinkMonitor(poller, self._look)
        except BaseException:
            self.close()
            raise
        self._told = (list(self.fds), self.link_up())
        return self.fds

    def close(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        fds, self.fds = self.fds, []
        close_all(fds)

    def reopen(self) -> None:
        self._look()

    def _look(self) -> None:
        """Some interface changed, or something is wrong with ours."""
        if not self.fds:
            return
        former: list[int] = []
        if self.fds[0] >= 0 and self._lost():
            _log.warning("%s: interface %s is gone", self.spec, self.name)
            former, self.fds = self.fds, [-1] * self._pairs
        if self.fds[0] < 0 and interface.exists(self.name):
            self._open_again()
        state = (list(self.fds), self.link_up())
        if state == self._told:
            return
        if state[1] != self._told[1]:
            _log.info("%s: the link is %s", self.spec, "up" if state[1] else "down")
        self._told = state
        try:
            self.changed()
        finally:
            close_all(former)

    def _open_again(self) -> None:
        try:
            self.fds = self._open_fds(self._pairs)
            self._set_up()
        except (OSError, ValueError) as error:
            _log.warning("%s: it can't be opened again: %s", self.spec, error)
            close_all(self.fds)
            self.fds = [-1] * self._pairs
        else:
            _log.info("%s: interface %s is there again", self.spec, self.name)
