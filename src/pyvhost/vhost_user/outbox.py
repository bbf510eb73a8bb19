"""What the back end has to say of its own accord, on the socket of SET_BACKEND_REQ_FD.

Promises: one message at a time waits to be sent, so that a front end that does not read costs nothing here;
however often the configuration changes meanwhile, it is told once; a miss of the IOTLB is taken from the device
when it can be said or an entry comes or goes, and waits its turn until then; no more than `MISSES_UNANSWERED` are
ever awaited. Nobody is asked again for what was asked for and has not come, nor for what came or went meanwhile: a
front end that gets to such a question when the driver has unmapped the page finds an access out of bounds. A vring
whose question was dropped looks again.
Never: reads or writes a socket; says anything while the device is suspended ("Suspended device state").
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Final

from pyvhost.abi import vhost
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest
from pyvhost.vhost.misses import WAITING, IotlbMiss
from pyvhost.vhost_user.codec import Message, encode
from pyvhost.vhost_user.device import Device
from pyvhost.vhost_user.payloads import U64, Iotlb

#: Misses told whose answer has not come yet, at most: as many as a front end may be behind.
MISSES_UNANSWERED = 64

_TOP: Final = 1 << 64

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Asked:
    """A miss that was told, and whether it still lacks its entry."""

    miss: IotlbMiss
    lacks: bool = True


class Outbox:
    """One front end's: what is to be said, and what was said and is not answered."""

    def __init__(self, device: Device, label: str) -> None:
        self.device = device
        self.label = label
        #: Bytes to send; who sends them deletes them, and calls `fill`.
        self.output = bytearray()
        #: Whether there is a socket.
        self.open = False
        self._news = False
        self._news_unanswered = False
        self._turn: deque[IotlbMiss] = deque()
        self._misses: deque[_Asked] = deque()
        self._refused = False

    def opened(self) -> None:
        """A new socket: nothing was said on it yet."""
        self.closed()
        self.open = True

    def closed(self) -> None:
        """Nobody listens any more."""
        self.open = False
        self.output.clear()
        self._news_unanswered = False
        self._turn.clear()
        self._misses.clear()

    def config_changed(self) -> None:
        """The configuration space is another."""
        self._news = True

    def takes_misses(self, protocol_features: int) -> bool:
        """Whether a miss could be said now, if the device has one."""
        if self.output or not self.open:
            return False
        return not _has(protocol_features, abi.PROTOCOL_F_REPLY_ACK) or len(self._misses) < MISSES_UNANSWERED

    def fill(self, protocol_features: int, *, iotlb: bool) -> None:
        """Put the next message into `output`, if there is one and it may be said; `iotlb`: a miss may be it."""
        if self.output or not self.open:
            return
        acks = _has(protocol_features, abi.PROTOCOL_F_REPLY_ACK)
        flags = abi.FLAG_NEED_REPLY if acks else 0
        if self._news and not self._news_unanswered and _has(protocol_features, abi.PROTOCOL_F_CONFIG):
            self._news, self._news_unanswered = False, acks
            self.output += encode(BackendRequest.CONFIG_CHANGE_MSG, flags=flags)
        elif iotlb and self.takes_misses(protocol_features):
            while (miss := self._next_miss()) is not None:
                if any(asked.lacks and _same(asked.miss, miss) for asked in self._misses):
                    continue
                told = Iotlb(miss.iova, 0, 0, miss.perm, vhost.IOTLB_MISS)
                self.output += encode(BackendRequest.IOTLB_MSG, told, flags=flags)
                if acks:
                    self._misses.append(_Asked(miss))
                return

    def take_misses(self) -> None:
        """Before an entry comes, or when one has gone: what the device has missed so far, it missed without."""
        while self.open and len(self._turn) < WAITING:
            miss = self.device.take_iotlb_miss()
            if miss is None:
                return
            self._turn.append(miss)

    def entered(self, entry: Iotlb) -> None:
        """An entry has come: whoever missed it goes on."""

        def settled(miss: IotlbMiss) -> bool:
            inside = entry.iova <= miss.iova < entry.iova + entry.size
            return inside and not miss.perm & ~entry.perm

        self._turn = deque(miss for miss in self._turn if not settled(miss))
        for asked in self._misses:
            if settled(asked.miss):
                asked.lacks = False

    def left(self, entry: Iotlb) -> None:
        """Entries have gone: what was missed there and not yet said is not said, for the driver may be done with it.

        Whoever missed it looks again: what it still needs it asks for anew.
        """
        self.take_misses()
        last = (entry.iova + entry.size - 1) % _TOP
        gone = [miss for miss in self._turn if entry.iova <= miss.iova <= last]
        self._turn = deque(miss for miss in self._turn if miss not in gone)
        for index in sorted({miss.index for miss in gone}):
            self.device.look_for_entries(index)

    def forget_misses(self, index: int) -> None:
        """A vring stops: what it missed is of no interest any more."""
        self._turn = deque(miss for miss in self._turn if miss.index != index)

    def _next_miss(self) -> IotlbMiss | None:
        return self._turn.popleft() if self._turn else self.device.take_iotlb_miss()

    def answered(self, message: Message) -> None:
        """The front end's answer to something that was said."""
        failed = message.payload.value if isinstance(message.payload, U64) else 0
        if message.request == BackendRequest.CONFIG_CHANGE_MSG:
            self._news_unanswered = False
            if failed:
                _log.warning("%s: it refused %s (%d)", self.label, message.name, failed)
        elif message.request == BackendRequest.IOTLB_MSG and self._misses:
            miss = self._misses.popleft().miss
            if failed:
                # A guest can make as many of these as it likes: one is for the person, the rest for whoever looks.
                _log.log(
                    logging.DEBUG if self._refused else logging.WARNING,
                    "%s: it has no translation of iova %#x for perm %d (%s refused: %d); the vring waits",
                    self.label,
                    miss.iova,
                    miss.perm,
                    message.name,
                    failed,
                )
                self._refused = True


def _same(one: IotlbMiss, other: IotlbMiss) -> bool:
    return (one.iova, one.perm) == (other.iova, other.perm)


def _has(protocol_features: int, bit: int) -> bool:
    return bool(protocol_features >> bit & 1)
