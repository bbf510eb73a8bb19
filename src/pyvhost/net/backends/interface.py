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
from pyvhost.host.poller import Poller, Timer
from pyvhost.net.backends.base import Backend, PortKind

#: Seconds between attempts to open an interface that is there again but refuses: from, to, doubling.
RETRY_FIRST = 0.05
RETRY_MOST = 2.0

_log = logging.getLogger(__name__)


class InterfaceBackend(Backend):
    """The interface `name`, through descriptors that carry a frame and its virtio_net_hdr each."""

    kind = PortKind.FD

    def __init__(self, spec: str, name: str) -> None:
        super().__init__(spec)
        self.name = name
        self.header_size = 10
        self._pairs = 0
        self._poller: Poller | None = None
        self._monitor: LinkMonitor | None = None
        self._timer: Timer | None = None
        self._delay = RETRY_FIRST
        self._refusal = ""
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
        self._poller = poller
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
        self._no_retry()
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
            close_all(self.fds)
            self.fds = [-1] * self._pairs
            if str(error) != self._refusal:
                self._refusal = str(error)
                _log.warning("%s: it can't be opened again yet: %s", self.spec, error)
            # Who made it may still hold it, and nobody tells of its letting go.
            if self._poller is not None and (self._timer is None or not self._timer.pending):
                self._timer = self._poller.call_later(self._delay, self._look)
                self._delay = min(2 * self._delay, RETRY_MOST)
        else:
            _log.info("%s: interface %s is there again", self.spec, self.name)
            self._no_retry()

    def _no_retry(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._delay = RETRY_FIRST
        self._refusal = ""
