"""Two guests' connections, joined: what one does reaches the other, and both end."""

from __future__ import annotations

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.connections import Connection, Request
from pyvhost.vsock.contract import Key
from vsock_parts import BOTH, PlainEnd, Scene

#: A's name of the connection, and B's.
AT_A = Key(abi.TYPE_STREAM, 40000, 53, 80)
AT_B = Key(abi.TYPE_STREAM, 80, 52, 40000)


class Sibling(PlainEnd):
    """Passes on what its guest does to the other guest's connection."""

    def __init__(self, request: Request | None = None) -> None:
        super().__init__(fd=-1)
        self.other: Connection | None = None
        self._request = request

    def accepted(self) -> None:
        super().accepted()
        assert self._request is not None
        assert self.other is not None
        theirs = Sibling()
        mine, theirs.other = self.other, self.other
        self.other = self._request.accept(theirs, joined=mine)
        if self.other is None:
            mine.reset()

    def refused(self, reason: str) -> None:
        super().refused(reason)
        if self._request is not None:
            self._request.refuse()

    def shutdown(self, flags: int) -> None:
        super().shutdown(flags)
        if self.other is not None:
            self.other.shut_down(flags)

    def close(self, reset: bool) -> None:
        super().close(reset)
        if self.other is not None:
            self.other.reset() if reset else self.other.shut_down(BOTH)


class Pair:
    """Guests A and B; A has asked B for a connection."""

    def __init__(self) -> None:
        self.a, self.b = Scene(), Scene()
        assert self.a.says(AT_A, abi.OP_REQUEST) == []
        self.request = self.a.requests.popleft()
        self.end = Sibling(self.request)
        self.end.other = self.at_b = self.b.connections.connect(self.end, abi.TYPE_STREAM, 80, 52, 40000)
        assert self.at_b is not None
        self.request.on_cancelled = self.at_b.reset
        assert self.got() == ([], [(abi.OP_REQUEST, 0)])

    def got(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """What A and B got since the last time: op and flags."""
        for _ in range(4):
            self.a.carrier.settle()
            self.b.carrier.settle()
        assert all(key == AT_A for key, _, _ in self.a.carrier.wire)
        assert all(key == AT_B for key, _, _ in self.b.carrier.wire)
        return (
            [(op, flags) for _, op, flags in self.a.carrier.got()],
            [(op, flags) for _, op, flags in self.b.carrier.got()],
        )

    def accepted(self) -> Pair:
        self.b.carrier.guest(AT_B, abi.OP_RESPONSE)
        assert self.got() == ([(abi.OP_RESPONSE, 0)], [])
        assert self.a.carrier.asked == ["open", "join", "send", "start"]
        assert self.b.carrier.asked == ["open", "send", "start"]
        return self

    def nothing_left(self) -> None:
        self.a.nothing_left()
        self.b.nothing_left()


def test_b_refuses() -> None:
    pair = Pair()
    pair.b.carrier.guest(AT_B, abi.OP_RST)
    assert pair.got() == ([(abi.OP_RST, 0)], [])
    pair.nothing_left()


def test_b_does_not_answer() -> None:
    pair = Pair()
    pair.b.now += 2
    pair.b.connections.tick()
    assert pair.got() == ([(abi.OP_RST, 0)], [(abi.OP_RST, 0)])
    pair.nothing_left()


def test_a_gives_up_first() -> None:
    pair = Pair()
    pair.a.carrier.guest(AT_A, abi.OP_RST)
    assert pair.got() == ([], [(abi.OP_RST, 0)])
    assert pair.end.told == ["refused"]
    pair.nothing_left()


def test_b_accepts_what_a_has_given_up() -> None:
    pair = Pair()
    pair.request.on_cancelled = None
    pair.a.carrier.guest(AT_A, abi.OP_RST)
    pair.got()
    pair.b.carrier.guest(AT_B, abi.OP_RESPONSE)
    assert pair.got() == ([], [(abi.OP_RST, 0)])
    assert pair.end.told == ["accepted", "reset"]
    pair.nothing_left()


def test_a_closes_and_b_has_all_before_it_hears_of_that() -> None:
    pair = Pair().accepted()
    pair.a.carrier.rows[0].unread = 5
    pair.a.carrier.guest(AT_A, abi.OP_SHUTDOWN, BOTH)
    # B's writes fail at once, what A sent comes first.
    assert pair.got() == ([], [(abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV)])
    pair.a.carrier.take(0)
    assert pair.got() == ([(abi.OP_RST, 0)], [(abi.OP_SHUTDOWN, BOTH)])
    pair.b.carrier.guest(AT_B, abi.OP_RST)
    assert pair.got() == ([], [])
    assert pair.end.told == ["accepted", "closed"]
    pair.nothing_left()


def test_a_reads_no_more_and_b_hears_of_it_without_a_byte_sent() -> None:
    pair = Pair().accepted()
    pair.a.carrier.guest(AT_A, abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV)
    assert pair.got() == ([], [(abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV)])


def test_both_send_no_more_and_both_stay_until_they_close() -> None:
    pair = Pair().accepted()
    pair.a.carrier.guest(AT_A, abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)
    pair.b.carrier.guest(AT_B, abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)
    assert pair.got() == ([(abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)], [(abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)])
    assert pair.a.connections.tick() is None
    assert pair.b.connections.tick() is None
    pair.b.carrier.guest(AT_B, abi.OP_SHUTDOWN, BOTH)
    assert pair.got() == ([(abi.OP_SHUTDOWN, BOTH)], [(abi.OP_RST, 0)])
    pair.a.carrier.guest(AT_A, abi.OP_RST)
    assert pair.got() == ([], [])
    pair.nothing_left()


def test_a_resets_and_so_does_b() -> None:
    pair = Pair().accepted()
    pair.a.carrier.guest(AT_A, abi.OP_RST)
    assert pair.got() == ([], [(abi.OP_RST, 0)])
    assert pair.end.told == ["accepted", "reset"]
    pair.nothing_left()


def test_a_is_restarted() -> None:
    pair = Pair().accepted()
    pair.a.connections.restart()
    assert pair.got() == ([], [(abi.OP_RST, 0)])
    pair.nothing_left()
