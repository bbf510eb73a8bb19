"""A data path and other ends for `vsock.connections`, in plain Python: what is asked is done when the test says so.

Promises: commands are done in their order, and what they lead to is told in its own; what `contract` promises of
either side is asserted as it happens. Never: carries a byte; `unread` says how many a connection has under way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.connections import Connections, Request
from pyvhost.vsock.contract import Carrier, Key

BOTH = abi.SHUTDOWN_RCV | abi.SHUTDOWN_SEND
GUEST = 52

Sent: TypeAlias = tuple[Key, int, int]


@dataclass
class Row:
    """A connection as the data path has it."""

    key: Key
    fd: int | None = None
    other: tuple[PlainCarrier, int] | None = None
    #: Opened, attached or joined, started, closed: as it was asked for.
    started: bool = False
    closed: bool = False
    hushed: bool = False
    #: Bytes that the guest has sent and the other end has not taken.
    unread: int = 0
    #: `drained` was asked for, and is to be told.
    waits: bool = False
    drain: bool = False


class PlainCarrier:
    """One guest's. `obey` does what was asked, `tell` tells of what happened, `settle` both to the end."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.connections: Connections | None = None
        self.room = room
        self.rows: dict[int, Row] = {}
        #: As the data path knows it, which is later than it was asked.
        self.table: dict[Key, int] = {}
        #: What the guest got: key, op, flags; and all that was asked for.
        self.wire: list[Sent] = []
        self.asked: list[str] = []
        self.commands: deque[tuple[str, int, tuple[object, ...]]] = deque()
        self.todo: deque[tuple[str, tuple[object, ...]]] = deque()
        #: What it was asked against the contract; an exception might be taken for an end's.
        self.wrong: list[str] = []

    # --- contract.Carrier ---------------------------------------------------------------------------------

    def open(self, key: Key, by_guest: bool) -> int | None:
        if len(self.rows) >= self.room:
            return None
        slot = next(n for n in range(len(self.rows) + 1) if n not in self.rows)
        self.rows[slot] = Row(key)
        self._ask("open", slot)
        return slot

    def attach(self, slot: int, fd: int) -> None:
        row = self._row(slot)
        self._must(fd >= 0 and row.fd is None and row.other is None and not row.started, "attach")
        row.fd = fd
        self._ask("attach", slot, fd)

    def join(self, slot: int, other: Carrier, other_slot: int) -> None:
        assert isinstance(other, PlainCarrier)
        for row, its in ((self._row(slot), (other, other_slot)), (other._row(other_slot), (self, slot))):
            self._must(row.fd is None and row.other is None and not row.started, "join")
            row.other = its
        self._ask("join", slot)

    def send(self, slot: int, op: int, flags: int = 0) -> None:
        self._must(op in (abi.OP_REQUEST, abi.OP_RESPONSE, abi.OP_SHUTDOWN, abi.OP_RST), f"send {op}")
        self._must((flags != 0) == (op == abi.OP_SHUTDOWN), f"send {op} with {flags}")
        self._row(slot)
        self._ask("send", slot, op, flags)

    def reset(self, key: Key) -> None:
        self._ask("reset", -1, key)

    def start(self, slot: int) -> None:
        self._must(not self._row(slot).started, "start")
        self._row(slot).started = True
        self._ask("start", slot)

    def when_drained(self, slot: int) -> None:
        self._must(self._row(slot).started and not self._row(slot).waits, "when_drained")
        self._row(slot).waits = True
        self._ask("when_drained", slot)

    def hush(self, slot: int) -> None:
        self._must(self._row(slot).started and not self._row(slot).hushed, "hush")
        self._row(slot).hushed = True
        self._ask("hush", slot)

    def message(self, slot: int) -> None:
        self._must(self._row(slot).key.type == abi.TYPE_SEQPACKET, "message")
        self._ask("message", slot)

    def close(self, slot: int) -> None:
        self._row(slot).closed = True
        self._ask("close", slot)

    # --- the test's ---------------------------------------------------------------------------------------

    def guest(self, key: Key, op: int, flags: int = 0) -> None:
        """The guest has sent a packet; it is told of later."""
        self.todo.append(("packet", (self.table.get(key), key, op, flags)))

    def take(self, slot: int) -> None:
        """The other end has taken all there was."""
        self.rows[slot].unread = 0
        self._drain(slot)

    def obey(self, most: int = 1 << 30) -> None:
        """Does what was asked for first."""
        while self.commands and most > 0:
            most -= 1
            what, slot, rest = self.commands.popleft()
            if what == "send":
                op, flags = rest
                assert isinstance(op, int)
                assert isinstance(flags, int)
                self.wire.append((self.rows[slot].key, op, flags))
            elif what == "reset":
                (key,) = rest
                assert isinstance(key, Key)
                self.wire.append((key, abi.OP_RST, 0))
            elif what == "open":
                key = self.rows[slot].key
                assert key not in self.table, "two connections of one name"
                self.table[key] = slot
            elif what == "when_drained":
                self.rows[slot].drain = True
                self._drain(slot)
            elif what == "close":
                del self.table[self.rows[slot].key]
                self.todo.append(("closed", (slot,)))

    def tell(self, most: int = 1 << 30) -> None:
        """Tells of what happened first."""
        assert self.connections is not None
        while self.todo and most > 0:
            most -= 1
            what, rest = self.todo.popleft()
            if what == "closed":
                (slot,) = rest
                assert isinstance(slot, int)
                del self.rows[slot]
            getattr(self.connections, what)(*rest)

    def settle(self) -> None:
        """Until nothing is left to do."""
        while self.commands or self.todo:
            self.obey()
            self.tell()

    def got(self) -> list[Sent]:
        """What the guest got since the last time."""
        self.settle()
        assert not self.wrong
        wire, self.wire = self.wire, []
        return wire

    def _row(self, slot: int) -> Row:
        row = self.rows[slot]
        self._must(not row.closed, "something of a connection that was closed")
        return row

    def _must(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)

    def _ask(self, what: str, slot: int, *rest: object) -> None:
        self.asked.append(what)
        self.commands.append((what, slot, rest))

    def _drain(self, slot: int) -> None:
        row = self.rows[slot]
        if row.drain and row.unread == 0:
            row.drain = False
            self.todo.append(("drained", (slot,)))


@dataclass(eq=False)
class PlainEnd:
    """Notes what it is told."""

    fd: int = 7
    #: What `ended` says.
    end: int = abi.SHUTDOWN_SEND
    told: list[str] = field(default_factory=list)

    def accepted(self) -> None:
        self._note("accepted")

    def refused(self, reason: str) -> None:
        self._note("refused")

    def shutdown(self, flags: int) -> None:
        self._note(f"shutdown {flags}")

    def ended(self) -> int:
        return self.end

    def close(self, reset: bool) -> None:
        self._note("reset" if reset else "closed")

    @property
    def over(self) -> bool:
        """Whether it has had its last word."""
        return bool(self.told) and self.told[-1] in ("refused", "reset", "closed")

    @property
    def right(self) -> bool:
        """Whether each thing was told once, and nothing after the last word."""
        last = [what for what in self.told if what in ("refused", "reset", "closed")]
        return len(set(self.told)) == len(self.told) and len(last) <= 1 and (not last or self.over)

    def _note(self, what: str) -> None:
        self.told.append(what)


class Scene:
    """A guest's connections, their data path, a clock, and what the guest has asked for."""

    def __init__(self, *, limit: int = 100, room: int = 1 << 20) -> None:
        self.now = 1000.0
        self.carrier = PlainCarrier(room)
        self.connections = Connections(
            self.carrier, GUEST, clock=lambda: self.now, limit=limit, name="vsock under test"
        )
        self.carrier.connections = self.connections
        self.connections.types = frozenset((abi.TYPE_STREAM, abi.TYPE_SEQPACKET))
        self.connections.on_request = self._requested
        self.requests: deque[Request] = deque()

    def _requested(self, request: Request) -> None:
        self.requests.append(request)

    def says(self, key: Key, op: int, flags: int = 0) -> list[Sent]:
        """The guest sends a packet; what it gets for that."""
        self.carrier.guest(key, op, flags)
        return self.carrier.got()

    def later(self, seconds: float) -> list[Sent]:
        """Time goes by; what the guest gets."""
        self.now += seconds
        self.connections.tick()
        return self.carrier.got()

    def nothing_left(self) -> None:
        """Neither connections nor slots nor anything that is waited for."""
        self.carrier.settle()
        assert not self.carrier.wrong
        assert len(self.connections) == 0
        assert self.carrier.rows == {}
        assert self.carrier.table == {}
        assert self.connections.tick() is None
