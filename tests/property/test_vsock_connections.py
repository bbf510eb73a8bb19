"""Two guests' connections under any order of packets, ends that do as they like, time and restarts: nothing is called
after its end, nothing is left.

The data path is the plain one. It is behind with what it is asked, and with what it tells, by any number of steps,
and asserts what the contract promises it.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.connections import Connection, Request, State
from pyvhost.vsock.contract import Key
from vsock_parts import BOTH, PlainCarrier, PlainEnd, Scene

LIMIT = 6
#: Of either guest; the other guest is its sibling.
CIDS = (52, 53)
PORTS = (10, 11)
DATA = (abi.OP_RW, abi.OP_CREDIT_UPDATE, abi.OP_CREDIT_REQUEST)

guests = st.integers(0, 1)
any_number = st.integers(0, 1000)
types = st.sampled_from([abi.TYPE_STREAM, abi.TYPE_SEQPACKET])
shut_flags = st.integers(0, BOTH)
ops = st.sampled_from([*range(abi.OP_REQUEST, abi.OP_RW + 2), 0, 8])
#: What is legal is likelier than what is not.
replies = st.sampled_from(
    [*[abi.OP_SHUTDOWN, abi.OP_RST, abi.OP_RW] * 4, abi.OP_RESPONSE, abi.OP_RESPONSE, abi.OP_REQUEST, 0, 8]
)


class Wilful(PlainEnd):
    """An end that does something of its own when it is told something; joined, it passes on what it is told."""

    def __init__(self, fd: int, whim: int) -> None:
        super().__init__(fd)
        self.whim = whim
        #: Its own connection, and the sibling's if it is joined.
        self.mine: Connection | None = None
        self.other: Connection | None = None
        self.request: Request | None = None
        self.made: list[Wilful] = []

    def accepted(self) -> None:
        super().accepted()
        if self.request is not None:
            theirs = Wilful(-1, self.whim)
            self.made.append(theirs)
            theirs.other = self.mine
            self.other = theirs.mine = self.request.accept(theirs, joined=self.mine)
            if self.other is None and self.mine is not None:
                self.mine.reset()
        self._whim(1)

    def refused(self, reason: str) -> None:
        super().refused(reason)
        if self.request is not None:
            self.request.refuse()
        self._whim(2)

    def shutdown(self, flags: int) -> None:
        super().shutdown(flags)
        if self.other is not None:
            self.other.shut_down(flags)
        self._whim(3)

    def close(self, reset: bool) -> None:
        super().close(reset)
        if self.other is not None:
            if reset:
                self.other.reset()
            else:
                self.other.shut_down(BOTH)
        self._whim(4)

    def _whim(self, when: int) -> None:
        if self.mine is None or self.whim % 8 != when:
            return
        if self.whim // 8 % 2:
            self.mine.reset()
        else:
            self.mine.shut_down(self.whim // 16 % 4)


class TwoGuests(RuleBasedStateMachine):
    """Both guests' data paths go at their own pace."""

    def __init__(self) -> None:
        super().__init__()
        self.scenes = [Scene(limit=LIMIT) for _ in CIDS]
        self.ends: list[Wilful] = []
        self.connections: list[Connection] = []

    # --- the guests -----------------------------------------------------------------------------------------

    @rule(
        guest=guests,
        type=types,
        port=st.sampled_from(PORTS),
        to=st.booleans(),
        op=ops,
        flags=st.integers(0, 7),
    )
    def sends(self, guest: int, type: int, port: int, to: bool, op: int, flags: int) -> None:
        """A packet, of a connection of the host's or of its sibling's."""
        key = Key(type, port, CIDS[1 - guest] if to else 2, PORTS[0])
        self._send(self.scenes[guest].carrier, key, op, flags)

    @rule(guest=guests, which=any_number, op=replies, flags=st.integers(0, 7))
    def answers(self, guest: int, which: int, op: int, flags: int) -> None:
        """A packet of a connection that the data path knows."""
        carrier = self.scenes[guest].carrier
        if carrier.table:
            self._send(carrier, sorted(carrier.table)[which % len(carrier.table)], op, flags)

    def _send(self, carrier: PlainCarrier, key: Key, op: int, flags: int) -> None:
        slot = carrier.table.get(key)
        if slot is not None and op in DATA:
            # The data path's own.
            carrier.rows[slot].unread += op == abi.OP_RW
        else:
            carrier.guest(key, op, flags)

    @rule(guest=guests, type=types, port=st.sampled_from(PORTS), to=st.booleans(), whim=any_number)
    def begins(self, guest: int, type: int, port: int, to: bool, whim: int) -> None:
        """A connection of a guest's, made without any delay."""
        self.sends(guest, type, port, to, abi.OP_REQUEST, 0)
        scene = self.scenes[guest]
        self._settle(scene.carrier)
        if not scene.requests:
            return
        key = scene.requests[0].key
        self.decides(guest, 2, whim)
        if to:
            theirs = self.scenes[1 - guest].carrier
            self._settle(theirs)
            self._send(theirs, Key(type, key.peer_port, CIDS[guest], port), abi.OP_RESPONSE, 0)
            self._settle(theirs)

    @rule(
        guest=guests, which=any_number, flags=st.integers(1, BOTH), unread=st.booleans(), gone=st.booleans()
    )
    def shuts_down(self, guest: int, which: int, flags: int, unread: bool, gone: bool) -> None:
        """A guest that has or has not been read to the end shuts down, and perhaps waits for nothing."""
        carrier = self.scenes[guest].carrier
        started = [slot for slot in carrier.table.values() if carrier.rows[slot].started]
        if not started:
            return
        row = carrier.rows[started[which % len(started)]]
        row.unread += unread
        carrier.guest(row.key, abi.OP_SHUTDOWN, flags)
        if gone:
            carrier.guest(row.key, abi.OP_RST)
        while carrier.todo:
            self._tell(carrier)

    @rule(guest=guests, port=st.sampled_from(PORTS), whim=any_number)
    def is_called(self, guest: int, port: int, whim: int) -> None:
        """A connection of the host's to a guest, made without any delay."""
        self.connects(guest, abi.TYPE_STREAM, port, whim)
        carrier = self.scenes[guest].carrier
        self._settle(carrier)
        self._send(carrier, Key(abi.TYPE_STREAM, PORTS[0], 2, port), abi.OP_RESPONSE, 0)
        self._settle(carrier)

    # --- the data path --------------------------------------------------------------------------------------

    @rule(guest=guests, most=st.integers(1, 5))
    def obeys(self, guest: int, most: int) -> None:
        """Some of what was asked for is done."""
        self.scenes[guest].carrier.obey(most)

    @rule(guest=guests, most=st.integers(1, 5))
    def tells(self, guest: int, most: int) -> None:
        """Some of what has happened is told."""
        for _ in range(most):
            self._tell(self.scenes[guest].carrier)

    def _settle(self, carrier: PlainCarrier) -> None:
        while carrier.commands or carrier.todo:
            carrier.obey()
            self._tell(carrier)

    def _tell(self, carrier: PlainCarrier) -> None:
        if not carrier.todo:
            return
        what, rest = carrier.todo[0]
        before = len(carrier.commands)
        carrier.tell(1)
        if what == "packet" and rest[2] == abi.OP_RST:
            key = rest[1]
            for asked, slot, more in list(carrier.commands)[before:]:
                answer = (asked == "reset" and more[0] == key) or (
                    asked == "send" and carrier.rows[slot].key == key and more[0] == abi.OP_RST
                )
                assert not answer, "RST was answered by RST"

    @rule(
        guest=guests,
        which=any_number,
        flags=st.sampled_from([0, abi.SHUTDOWN_SEND, BOTH]),
        code=st.integers(0, 3),
    )
    def happens(self, guest: int, which: int, flags: int, code: int) -> None:
        """The other end ends, fails or hangs up, or the guest breaks the rules."""
        carrier = self.scenes[guest].carrier
        started = [slot for slot in carrier.table.values() if carrier.rows[slot].started]
        if not started:
            return
        slot = started[which % len(started)]
        for end in self.ends:
            end.end = flags
        what = [("eof", ()), ("failed", (32,)), ("failed", (5,)), ("violated", ("nonsense",))][code]
        carrier.todo.append((what[0], (slot, *what[1])))

    @rule(guest=guests, which=any_number)
    def takes(self, guest: int, which: int) -> None:
        """The other end takes what the guest has sent."""
        carrier = self.scenes[guest].carrier
        if carrier.table:
            carrier.take(sorted(carrier.table.values())[which % len(carrier.table)])

    # --- the ends -------------------------------------------------------------------------------------------

    @rule(guest=guests, type=types, port=st.sampled_from([*PORTS, None]), whim=any_number)
    def connects(self, guest: int, type: int, port: int | None, whim: int) -> None:
        """The host wants something of a guest."""
        end = self._end(7, whim)
        end.mine = self.scenes[guest].connections.connect(end, type, PORTS[0], 2, port)
        if end.mine is not None:
            self.connections.append(end.mine)

    @precondition(lambda self: any(scene.requests for scene in self.scenes))
    @rule(guest=guests, what=st.integers(0, 3), whim=any_number)
    def decides(self, guest: int, what: int, whim: int) -> None:
        """What a guest wants is granted, passed on to its sibling, or refused."""
        if not self.scenes[guest].requests:
            return
        request = self.scenes[guest].requests.popleft()
        self.connections.append(request.connection)
        if what == 0:
            request.refuse()
        elif request.key.peer_cid == 2 or what == 1:
            end = self._end(7, whim)
            end.mine = request.connection
            accepted = request.accept(end)
            assert (accepted is None) == end.over
        else:
            end = self._end(-1, whim)
            end.request = request
            key = request.key
            sibling = self.scenes[1 - guest].connections
            end.mine = sibling.connect(end, key.type, key.peer_port, CIDS[guest], key.guest_port)
            if end.mine is not None:
                self.connections.append(end.mine)
                if request.pending:
                    request.on_cancelled = end.mine.reset

    @precondition(lambda self: self.connections)
    @rule(which=any_number, flags=shut_flags, reset=st.booleans())
    def shuts(self, which: int, flags: int, reset: bool) -> None:
        """An end shuts down or resets, whether there is anything left or not."""
        connection = self.connections[which % len(self.connections)]
        if reset:
            connection.reset()
        else:
            connection.shut_down(flags)

    def _end(self, fd: int, whim: int) -> Wilful:
        end = Wilful(fd, whim)
        end.made = self.ends
        self.ends.append(end)
        return end

    # --- time -----------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 8.0]))
    def time_goes_by(self, seconds: float) -> None:
        """For both."""
        for scene in self.scenes:
            scene.now += seconds
            due = scene.connections.tick()
            assert due is None or due > 0

    @rule(guest=guests, seldom=st.integers(0, 7))
    def restarts(self, guest: int, seldom: int) -> None:
        """One of them boots."""
        if seldom == 7:
            self.scenes[guest].connections.restart()

    # --- what holds -----------------------------------------------------------------------------------------

    @invariant()
    def books_are_right(self) -> None:
        """Slots are the carrier's, names are of what is not on its way out, and the limit holds."""
        assert all(end.right for end in self.ends)
        for scene in self.scenes:
            assert not scene.carrier.wrong
            known = scene.connections._by_slot
            assert known.keys() == scene.carrier.rows.keys()
            assert len(known) <= LIMIT
            alive = {c.key: c for c in known.values() if c.state is not State.CLOSING}
            assert scene.connections._by_key == alive
            assert all(
                scene.carrier.rows[c.slot].closed == (c.state is State.CLOSING) for c in known.values()
            )
            asked = [c for c in known.values() if c.state is State.REQUESTED]
            assert scene.connections._unanswered == len(asked)
            waited_for = [c for c in known.values() if c.state in (State.REQUESTED, State.CONNECTING)]
            assert set(scene.connections._until_answer) == set(waited_for)
            assert all(c.state is State.OPEN for c in scene.connections._until_reset)

    def teardown(self) -> None:
        """All that is waited for comes, or its time goes by; then the guests go."""
        self._rest()
        self.time_goes_by(2.0)
        self._rest()
        for connection in self.connections:
            assert connection.state not in (State.REQUESTED, State.CONNECTING)
        for _ in range(4):
            # One that ends may have its sibling's shut down, which has time of its own.
            self.time_goes_by(8.0)
            self._rest()
        for scene in self.scenes:
            # Whoever was shut down both ways, by either side, has gone.
            for connection in scene.connections._by_slot.values():
                assert BOTH not in (connection.shut, connection.guest_shut), connection
        for scene in self.scenes:
            scene.connections.restart()
        self._rest()
        for scene in self.scenes:
            scene.nothing_left()
        assert all(end.over for end in self.ends)

    def _rest(self) -> None:
        for _ in range(6):
            for scene in self.scenes:
                self._settle(scene.carrier)
                for slot in list(scene.carrier.table.values()):
                    scene.carrier.take(slot)
                scene.requests.clear()


TestTwoGuests = TwoGuests.TestCase
TestTwoGuests.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
