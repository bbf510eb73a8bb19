"""A guest's connections: how they begin, shut down and end (virtio 1.3, 5.10.6). Sans-IO.

The data path (`contract.Carrier`) has each connection's bytes and credit, and hands over what is neither; the
other ends (`contract.End`) have the sockets; the clock is passed in.

Promises: a connection ends once, and its end is closed after the data path has let go of it; what a guest sent before
it shut down is delivered, however slow the reader; what waits for a guest waits no longer than its deadline; RST is
never answered by RST; a guest has no more than `limit` connections, whatever it does, of which siblings take half at
most, and one of them no more than it leaves for others.
Never: blocks, keeps a guest's bytes, or is put off by an end that raises.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.connection import Connection, Request, State
from pyvhost.vsock.contract import Carrier, End, Key
from pyvhost.vsock.share import Asked

__all__ = ["Connection", "Connections", "Request", "State"]

_log = logging.getLogger(__name__)

#: Linux's: how long a connection may take to be accepted, and to be reset after it was shut down; seconds.
CONNECT_TIMEOUT: Final = 2.0
CLOSE_TIMEOUT: Final = 8.0
#: How many of a guest's requests may wait for an answer.
UNANSWERED: Final = 1024
#: The host's side of connections that it asks for: a port of its own each.
FIRST_PORT: Final = 1024
LAST_PORT: Final = abi.VMADDR_PORT_ANY - 1

_BOTH: Final = abi.SHUTDOWN_RCV | abi.SHUTDOWN_SEND
_CREDIT: Final = (abi.OP_CREDIT_UPDATE, abi.OP_CREDIT_REQUEST)


class Connections:
    """All connections of a guest. `limit`: how many at most; `clock`: seconds, as time.monotonic().

    `packet`, `eof`, `failed`, `violated`, `drained` and `closed` are `contract.Told`.
    """

    def __init__(
        self,
        carrier: Carrier,
        guest_cid: int,
        *,
        clock: Callable[[], float],
        limit: int = 4096,
        name: str,
        connect_timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        self.carrier = carrier
        self.guest_cid = guest_cid
        self.name = name
        #: What the driver has negotiated (5.10.3).
        self.types: frozenset[int] = frozenset((abi.TYPE_STREAM,))
        #: Told of what the guest wants to connect to. Whoever it is checks CID and port.
        self.on_request: Callable[[Request], object] = Request.refuse
        #: Told when there may be an earlier deadline than `tick` has said.
        self.on_timer: Callable[[], object] = lambda: None
        #: Connections that the guest has accepted, and those that it has asked for and got.
        self.connects = 0
        self.accepts = 0
        #: Requests that came to nothing, either way.
        self.refused = 0
        #: Connections that were broken off by either side.
        self.resets = 0
        self.timeouts = 0
        self.violations = 0
        #: Messages that the guest had too little room for.
        self.too_long = 0
        self._clock = clock
        self._limit = limit
        self._connect_timeout = connect_timeout
        #: Without those on their way out: their key is free for another.
        self._by_key: dict[Key, Connection] = {}
        self._by_slot: dict[int, Connection] = {}
        self._unanswered = 0
        self._asked = Asked(limit)
        # One timeout each, so that what was put last is due last.
        self._until_answer: OrderedDict[Connection, float] = OrderedDict()
        self._until_reset: OrderedDict[Connection, float] = OrderedDict()
        self._next_port = FIRST_PORT

    def __len__(self) -> int:
        """How many there are, those on their way out as well."""
        return len(self._by_slot)

    # --- the host's side ----------------------------------------------------------------------------------

    def connect(
        self,
        end: End,
        type: int,
        guest_port: int,
        peer_cid: int = abi.VMADDR_CID_HOST,
        peer_port: int | None = None,
    ) -> Connection | None:
        """Asks the guest for a connection; `end` hears what comes of it.

        `peer_port`: None for a free one. None: it can't be asked, and `end.refused` has been called.
        """
        if type not in self.types:
            self._refuse_end(end, "the guest has no sockets of this type")
            return None
        if peer_port is None:
            peer_port = self._free_port(type, guest_port, peer_cid)
        key = Key(type, guest_port, peer_cid, peer_port)
        if key in self._by_key:
            self._refuse_end(end, f"port {peer_port} is in use")
            return None
        connection = self._open(key, State.CONNECTING) if self._asked.may(peer_cid) else None
        if connection is None:
            self._refuse_end(end, "there are too many connections")
            return None
        self._asked.add(peer_cid)
        connection.end = end
        self.carrier.send(connection.slot, abi.OP_REQUEST)
        self._expect(connection, self._until_answer, self._connect_timeout)
        return connection

    def accept(self, request: Request, end: End, joined: Connection | None) -> Connection | None:
        """`Request.accept`."""
        connection = request.connection
        if connection.state is not State.REQUESTED:
            self._refuse_end(end, "the guest waits no longer")
            return None
        if joined is not None and joined.state not in (State.CONNECTING, State.OPEN):
            self.refuse(request)
            self._refuse_end(end, "its peer is gone")
            return None
        self._answered(connection)
        self.accepts += 1
        connection.state = State.OPEN
        connection.end = end
        if joined is not None:
            self.carrier.join(connection.slot, joined.owner.carrier, joined.slot)
        elif end.fd >= 0:
            self.carrier.attach(connection.slot, end.fd)
        self.carrier.send(connection.slot, abi.OP_RESPONSE)
        self.carrier.start(connection.slot)
        return connection

    def refuse(self, request: Request) -> None:
        """`Request.refuse`."""
        if request.pending:
            # The answer is his who would be told.
            request.on_cancelled = None
            self.break_off(request.connection, "")

    def shut_down(self, connection: Connection, flags: int) -> None:
        """`Connection.shut_down`."""
        news = flags & _BOTH & ~connection.shut
        if not news or connection.state not in (State.OPEN, State.LINGERING):
            return
        connection.shut |= news
        if connection.state is State.OPEN and connection.guest_shut != _BOTH:
            # Who has closed waits for RST alone.
            self.carrier.send(connection.slot, abi.OP_SHUTDOWN, connection.shut)
        if news & abi.SHUTDOWN_RCV:
            self._deliver(connection)
        self._settle(connection)

    def break_off(self, connection: Connection, reason: str) -> None:
        """`Connection.reset`: RST to the guest, and the end."""
        if connection.state in (State.CLOSING, State.CLOSED):
            return
        if connection.state is State.OPEN:
            self.resets += 1
        if connection.state is not State.LINGERING:
            self.carrier.send(connection.slot, abi.OP_RST)
        self._finish(connection, reset=True, reason=reason)

    # --- told by the data path ----------------------------------------------------------------------------

    def packet(self, slot: int | None, key: Key, op: int, flags: int) -> None:
        """A packet of the guest's that is neither data nor credit of a connection that carries any."""
        connection = None if slot is None else self._by_slot.get(slot)
        if connection is None or connection.state is State.CLOSING:
            former, connection = connection, self._by_key.get(key)
            if op != abi.OP_REQUEST and (
                # It was on its way when `close` was, or when another was asked for by the same name: the guest has
                # not heard of that, and what it has to say is of the former.
                (former is not None and connection is None)
                or (connection is not None and not connection.by_guest)
            ):
                return
        if op == abi.OP_REQUEST:
            self._requested(connection, key)
        elif connection is None:
            if op != abi.OP_RST:
                self.carrier.reset(key)
        elif op == abi.OP_RST:
            self._guest_resets(connection)
        elif connection.state is State.LINGERING or op in _CREDIT:
            return
        elif connection.state is State.OPEN and op == abi.OP_SHUTDOWN:
            self._guest_shuts(connection, flags & _BOTH)
        elif connection.state is State.OPEN and op == abi.OP_RESPONSE:
            # As in Linux. A port asked from twice, the first time in vain, is answered twice.
            return
        elif connection.state is State.CONNECTING and op == abi.OP_RESPONSE:
            self._accepted(connection)
        else:
            _log.debug("%s: %r: a packet with op %d", self.name, connection, op)
            self.break_off(connection, f"the guest answered with op {op}")

    def eof(self, slot: int) -> None:
        """A read of the other end gave nothing; all before is on its way to the guest."""
        connection = self._by_slot.get(slot)
        if connection is None or connection.state is not State.OPEN or connection.end is None:
            return
        try:
            flags = connection.end.ended()
        except Exception:
            _log.exception("%s: %r", self.name, connection)
            self.break_off(connection, "")
            return
        if flags:
            self.shut_down(connection, flags)
        elif connection.key.type == abi.TYPE_SEQPACKET:
            self.carrier.message(slot)
        else:
            self.shut_down(connection, abi.SHUTDOWN_SEND)

    def failed(self, slot: int, code: int) -> None:
        """The other end has failed: with EPIPE it takes nothing more, and may yet have something to say."""
        connection = self._by_slot.get(slot)
        if connection is None:
            return
        if code == errno.EPIPE:
            self.shut_down(connection, abi.SHUTDOWN_RCV)
            return
        if code == errno.EMSGSIZE and connection.state is State.OPEN:
            self.too_long += 1
            self._say(self.too_long, connection, "a message is longer than the guest has room for")
        else:
            _log.debug("%s: %r: %s", self.name, connection, os.strerror(code))
        self.break_off(connection, os.strerror(code))

    def violated(self, slot: int, what: str) -> None:
        """The guest has broken the rules. It is said once until its next restart: it could fill a disk with it."""
        connection = self._by_slot.get(slot)
        if connection is None or connection.state in (State.CLOSING, State.CLOSED):
            return
        self.violations += 1
        self._say(self.violations, connection, f"the guest sent {what}")
        self.break_off(connection, what)

    def drained(self, slot: int) -> None:
        """What the guest had sent before it shut down has gone to the other end."""
        connection = self._by_slot.get(slot)
        if connection is not None:
            self._deliver(connection)
            self._settle(connection)

    def closed(self, slot: int) -> None:
        """The data path has let go of a connection."""
        connection = self._by_slot.pop(slot, None)
        if connection is None:
            return
        if not connection.by_guest:
            self._asked.remove(connection.key.peer_cid)
        connection.state = State.CLOSED
        end, connection.end = connection.end, None
        if end is not None:
            self._tell(end.close, connection.was_reset)

    # --- time, and beginning anew -------------------------------------------------------------------------

    def tick(self) -> float | None:
        """Does what is due; seconds until something is again, or None."""
        now = self._clock()
        for waiting in (self._until_answer, self._until_reset):
            while waiting:
                connection, due = next(iter(waiting.items()))
                if due > now:
                    break
                del waiting[connection]
                self.timeouts += 1
                self.carrier.send(connection.slot, abi.OP_RST)
                self._finish(
                    connection,
                    reset=connection.state is not State.OPEN,
                    reason="the guest did not answer in time",
                )
        dues = [
            next(iter(waiting.values())) for waiting in (self._until_answer, self._until_reset) if waiting
        ]
        return min(dues) - now if dues else None

    def restart(self) -> None:
        """The guest's driver is gone, or begins anew: its connections end without a word to it.

        What it had sent before it shut down is still delivered.
        """
        self.violations = self.too_long = 0
        for connection in list(self._by_slot.values()):
            if connection.state is State.OPEN and connection.guest_shut & abi.SHUTDOWN_SEND:
                self._guest_resets(connection)
            elif connection.state is not State.LINGERING:
                self._finish(connection, reset=True, reason="the guest's driver is gone")

    def stop(self) -> None:
        """All end, nothing is delivered any more, and none begins."""
        self._limit = 0
        for connection in list(self._by_slot.values()):
            self._finish(connection, reset=True, reason="the device is gone")

    # --- within -------------------------------------------------------------------------------------------

    def _requested(self, known: Connection | None, key: Key) -> None:
        if known is not None:
            if known.state is State.LINGERING:
                # The port is free again when all has been delivered.
                known = None
            elif known.state is State.OPEN and known.shut == _BOTH:
                # We wait for RST, and the guest, which has forgotten the connection, uses its port again.
                self._finish(known, reset=False)
            else:
                self.break_off(known, "the guest asked for it once more")
                return
        connection = None
        if key.type in self.types and self._unanswered < UNANSWERED and key not in self._by_key:
            connection = self._open(key, State.REQUESTED)
        if connection is None:
            self.refused += 1
            self.carrier.reset(key)
            return
        request = connection.request = Request(connection)
        self._unanswered += 1
        self._expect(connection, self._until_answer, self._connect_timeout)
        try:
            self.on_request(request)
        except Exception:
            _log.exception("%s: %r", self.name, connection)
            self.refuse(request)

    def _accepted(self, connection: Connection) -> None:
        end = connection.end
        assert end is not None
        self.connects += 1
        self._until_answer.pop(connection, None)
        connection.state = State.OPEN
        if not self._tell(end.accepted):
            self.break_off(connection, "")
        if connection.state is not State.OPEN:
            return
        if end.fd >= 0:
            self.carrier.attach(connection.slot, end.fd)
        self.carrier.start(connection.slot)

    def _guest_shuts(self, connection: Connection, flags: int) -> None:
        news = flags & ~connection.guest_shut
        connection.guest_shut |= flags
        if news & abi.SHUTDOWN_RCV:
            self._hush(connection)
        if news & abi.SHUTDOWN_SEND and connection.state is State.OPEN:
            if connection.shut & abi.SHUTDOWN_RCV:
                self._deliver(connection)
            else:
                self.carrier.when_drained(connection.slot)
        self._settle(connection)

    def _guest_resets(self, connection: Connection) -> None:
        """RST came, or the guest is gone: what it had sent before SHUTDOWN_SEND is delivered all the same."""
        sent = connection.guest_shut & abi.SHUTDOWN_SEND
        if connection.state is State.OPEN and sent and not connection.delivered:
            connection.state = State.LINGERING
            self._until_reset.pop(connection, None)
            if not connection.guest_shut & abi.SHUTDOWN_RCV:
                connection.guest_shut = _BOTH
                self._hush(connection)
        elif connection.state is not State.LINGERING:
            clean = bool(sent) or connection.shut == _BOTH
            if connection.state is State.OPEN and not clean:
                self.resets += 1
            self._finish(connection, reset=not clean, reason="the guest refused it")

    def _hush(self, connection: Connection) -> None:
        self.carrier.hush(connection.slot)
        if connection.end is not None:
            self._tell(connection.end.shutdown, abi.SHUTDOWN_RCV)

    def _deliver(self, connection: Connection) -> None:
        """What the guest sent has gone to the end, as far as it takes it: the end is told if that was the last."""
        if connection.state not in (State.OPEN, State.LINGERING) or connection.delivered:
            return
        if connection.guest_shut & abi.SHUTDOWN_SEND and connection.end is not None:
            connection.delivered = True
            self._tell(connection.end.shutdown, abi.SHUTDOWN_SEND)

    def _settle(self, connection: Connection) -> None:
        """Ends a connection that has nothing left to carry, or sees to it that it ends."""
        if connection.state is State.LINGERING and connection.delivered:
            self._finish(connection, reset=False)
        if connection.state is not State.OPEN:
            return
        if connection.delivered and connection.guest_shut == _BOTH:
            self.carrier.send(connection.slot, abi.OP_RST)
            self._finish(connection, reset=False)
        elif connection.guest_shut == _BOTH:
            # It is the end that is waited for.
            self._until_reset.pop(connection, None)
        elif connection.shut == _BOTH:
            if connection not in self._until_reset:
                self._expect(connection, self._until_reset, CLOSE_TIMEOUT)
        elif connection.delivered and connection.shut & abi.SHUTDOWN_SEND and _has_socket(connection):
            # Neither side has anything to say. A sibling says itself when it closes; who has a socket may never.
            self.shut_down(connection, _BOTH)

    def _finish(self, connection: Connection, *, reset: bool, reason: str = "") -> None:
        if connection.state in (State.CLOSING, State.CLOSED):
            return
        former, connection.state = connection.state, State.CLOSING
        connection.was_reset = reset
        self._until_answer.pop(connection, None)
        self._until_reset.pop(connection, None)
        del self._by_key[connection.key]
        request = connection.request
        if former is State.REQUESTED:
            self._answered(connection)
        self.carrier.close(connection.slot)
        if former is State.REQUESTED:
            self.refused += 1
            if request is not None and request.on_cancelled is not None:
                self._tell(request.on_cancelled)
        elif former is State.CONNECTING and connection.end is not None:
            # Its socket was not the data path's yet.
            end, connection.end = connection.end, None
            self._refuse_end(end, reason)

    def _open(self, key: Key, state: State) -> Connection | None:
        if len(self._by_slot) >= self._limit:
            return None
        slot = self.carrier.open(key, state is State.REQUESTED)
        if slot is None:
            return None
        connection = Connection(self, key, slot, state)
        self._by_key[key] = connection
        self._by_slot[slot] = connection
        return connection

    def _answered(self, connection: Connection) -> None:
        self._unanswered -= 1
        connection.request = None
        self._until_answer.pop(connection, None)

    def _free_port(self, type: int, guest_port: int, peer_cid: int) -> int:
        """One after the other: nobody remembers what a port was used for when its turn comes again."""
        while True:
            port = self._next_port
            self._next_port = FIRST_PORT if port == LAST_PORT else port + 1
            if Key(type, guest_port, peer_cid, port) not in self._by_key:
                return port

    def _expect(
        self, connection: Connection, waiting: OrderedDict[Connection, float], seconds: float
    ) -> None:
        waiting[connection] = self._clock() + seconds
        if len(waiting) == 1:
            self.on_timer()

    def _say(self, number: int, connection: Connection, why: str) -> None:
        """Why a connection is reset, in the log: the first time."""
        key = connection.key
        level = logging.WARNING if number == 1 else logging.DEBUG
        ports = f"guest port {key.guest_port} to port {key.peer_port} of CID {key.peer_cid}"
        _log.log(level, "%s: %s: reset, as %s", self.name, ports, why)

    def _refuse_end(self, end: End, reason: str) -> None:
        self.refused += 1
        self._tell(end.refused, reason)

    def _tell(self, what: Callable[..., object], *arguments: object) -> bool:
        """Calls an end; False: it has raised."""
        try:
            what(*arguments)
        except Exception:
            _log.exception("%s: %r", self.name, what)
            return False
        return True


def _has_socket(connection: Connection) -> bool:
    return connection.end is not None and connection.end.fd >= 0
