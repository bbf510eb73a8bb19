"""A guest's connections, packet by packet: how they begin, are used and end as they should."""

from __future__ import annotations

import pytest

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.connections import Connection, State
from pyvhost.vsock.contract import Key
from vsock_parts import BOTH, PlainEnd, Scene, Sent

STREAM = Key(abi.TYPE_STREAM, 40000, 2, 80)
MESSAGES = Key(abi.TYPE_SEQPACKET, 40000, 2, 80)


def rst(key: Key) -> list[Sent]:
    return [(key, abi.OP_RST, 0)]


def shutdown(key: Key, flags: int) -> list[Sent]:
    return [(key, abi.OP_SHUTDOWN, flags)]


def asked_by_guest(
    scene: Scene, key: Key = STREAM, end: PlainEnd | None = None
) -> tuple[Connection, PlainEnd]:
    """The guest has connected."""
    end = end or PlainEnd()
    assert scene.says(key, abi.OP_REQUEST) == []
    connection = scene.requests.popleft().accept(end)
    assert connection is not None
    assert scene.carrier.got() == [(key, abi.OP_RESPONSE, 0)]
    return connection, end


def asked_of_guest(scene: Scene, port: int = 22) -> tuple[Connection, PlainEnd]:
    """The guest was connected to."""
    end = PlainEnd()
    connection = scene.connections.connect(end, abi.TYPE_STREAM, port)
    assert connection is not None
    assert scene.carrier.got() == [(connection.key, abi.OP_REQUEST, 0)]
    assert scene.says(connection.key, abi.OP_RESPONSE) == []
    assert end.told == ["accepted"]
    assert connection.state is State.OPEN
    return connection, end


# --- beginning --------------------------------------------------------------------------------------------


def test_a_guest_connects() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    assert scene.carrier.asked == ["open", "attach", "send", "start"]
    assert connection.state is State.OPEN
    assert end.told == []
    assert scene.connections.accepts == 1
    assert scene.connections.tick() is None


def test_a_slot_is_opened_while_the_request_is_told_so_that_its_credit_is_at_hand() -> None:
    scene = Scene()
    scene.connections.packet(None, STREAM, abi.OP_REQUEST, 0)
    assert scene.carrier.asked == ["open"]


def test_a_guest_is_refused() -> None:
    scene = Scene()
    scene.says(STREAM, abi.OP_REQUEST)
    request = scene.requests.popleft()
    request.on_cancelled = lambda: pytest.fail("the answer was its own")
    request.refuse()
    assert not request.pending
    assert scene.carrier.got() == rst(STREAM)
    request.refuse()
    assert scene.carrier.got() == []
    assert scene.connections.refused == 1
    scene.nothing_left()


def test_a_guest_waits_two_seconds_for_an_answer() -> None:
    scene = Scene()
    scene.says(STREAM, abi.OP_REQUEST)
    request = scene.requests.popleft()
    cancelled: list[int] = []
    request.on_cancelled = lambda: cancelled.append(1)
    assert scene.connections.tick() == 2
    assert scene.later(1.9) == []
    assert scene.later(0.1) == rst(STREAM)
    assert cancelled == [1]
    assert scene.connections.timeouts == 1
    late = PlainEnd()
    assert request.accept(late) is None
    assert late.told == ["refused"]
    scene.nothing_left()


def test_a_guest_gives_up_before_it_is_answered() -> None:
    scene = Scene()
    # Nobody has opened the connection when the second packet comes.
    scene.carrier.guest(STREAM, abi.OP_REQUEST)
    scene.carrier.guest(STREAM, abi.OP_RST)
    assert scene.carrier.got() == []
    late = PlainEnd()
    assert scene.requests.popleft().accept(late) is None
    assert late.told == ["refused"]
    scene.nothing_left()


def test_a_guest_is_connected_to() -> None:
    scene = Scene()
    asked_of_guest(scene)
    assert scene.carrier.asked == ["open", "send", "attach", "start"]
    assert scene.connections.connects == 1
    assert scene.connections.tick() is None


def test_a_guest_refuses() -> None:
    scene = Scene()
    end = PlainEnd()
    connection = scene.connections.connect(end, abi.TYPE_STREAM, 22)
    assert connection is not None
    scene.carrier.settle()
    assert scene.says(connection.key, abi.OP_RST) == [(connection.key, abi.OP_REQUEST, 0)]
    assert end.told == ["refused"]
    assert scene.connections.refused == 1
    scene.nothing_left()


def test_a_guest_that_does_not_answer_is_given_two_seconds_and_its_answer_then_is_reset() -> None:
    scene = Scene()
    end = PlainEnd()
    connection = scene.connections.connect(end, abi.TYPE_STREAM, 22)
    assert connection is not None
    scene.carrier.got()
    assert scene.later(2) == rst(connection.key)
    assert end.told == ["refused"]
    assert scene.connections.timeouts == 1
    assert scene.says(connection.key, abi.OP_RESPONSE) == rst(connection.key)
    scene.nothing_left()


def test_an_end_may_reset_what_was_accepted() -> None:
    scene = Scene()

    class Gone(PlainEnd):
        def accepted(self) -> None:
            super().accepted()
            assert connection is not None
            connection.reset()

    end = Gone()
    connection = scene.connections.connect(end, abi.TYPE_STREAM, 22)
    assert connection is not None
    scene.carrier.got()
    assert scene.says(connection.key, abi.OP_RESPONSE) == rst(connection.key)
    assert end.told == ["accepted", "reset"]
    assert "start" not in scene.carrier.asked
    scene.nothing_left()


def test_ports_come_in_turn_and_none_that_is_in_use() -> None:
    scene = Scene()
    ports = []
    for _ in range(3):
        connection = scene.connections.connect(PlainEnd(), abi.TYPE_STREAM, 22)
        assert connection is not None
        ports.append(connection.key.peer_port)
        connection.reset()
        scene.carrier.settle()
    assert ports == [1024, 1025, 1026]
    scene.connections.connect(PlainEnd(), abi.TYPE_STREAM, 22, 2, 1027)
    connection = scene.connections.connect(PlainEnd(), abi.TYPE_STREAM, 22)
    assert connection is not None
    assert connection.key.peer_port == 1028
    taken = PlainEnd()
    assert scene.connections.connect(taken, abi.TYPE_STREAM, 22, 2, 1027) is None
    assert taken.told == ["refused"]


def test_a_type_that_was_not_negotiated_is_refused_both_ways() -> None:
    scene = Scene()
    scene.connections.types = frozenset((abi.TYPE_STREAM,))
    assert scene.says(MESSAGES, abi.OP_REQUEST) == rst(MESSAGES)
    end = PlainEnd()
    assert scene.connections.connect(end, abi.TYPE_SEQPACKET, 22) is None
    assert end.told == ["refused"]
    assert not scene.requests
    scene.nothing_left()


# --- ending -----------------------------------------------------------------------------------------------


def test_a_guest_closes_and_what_it_sent_is_delivered_first() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    scene.carrier.rows[connection.slot].unread = 5
    assert scene.says(STREAM, abi.OP_SHUTDOWN, BOTH) == []
    assert end.told == ["shutdown 1"]
    assert scene.carrier.asked[-2:] == ["hush", "when_drained"]
    assert scene.connections.tick() is None
    scene.carrier.take(connection.slot)
    assert scene.carrier.got() == rst(STREAM)
    assert end.told == ["shutdown 1", "shutdown 2", "closed"]
    assert scene.connections.resets == 0
    scene.nothing_left()


def test_a_guest_that_closed_and_lost_patience_has_its_words_delivered_all_the_same() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    scene.carrier.rows[connection.slot].unread = 5
    scene.says(STREAM, abi.OP_SHUTDOWN, BOTH)
    assert scene.says(STREAM, abi.OP_RST) == []
    assert connection.state is State.LINGERING
    assert not end.over
    # Until then its port can't be used again.
    assert scene.says(STREAM, abi.OP_REQUEST) == rst(STREAM)
    assert connection.state is State.LINGERING
    assert scene.says(STREAM, abi.OP_SHUTDOWN, BOTH) == []
    scene.carrier.take(connection.slot)
    assert scene.carrier.got() == []
    assert end.told == ["shutdown 1", "shutdown 2", "closed"]
    scene.nothing_left()


def test_who_reads_no_more_ends_what_lingers() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    scene.carrier.rows[connection.slot].unread = 5
    scene.says(STREAM, abi.OP_SHUTDOWN, BOTH)
    scene.says(STREAM, abi.OP_RST)
    scene.connections.failed(connection.slot, 32)
    assert scene.carrier.got() == []
    assert end.told == ["shutdown 1", "shutdown 2", "closed"]
    scene.nothing_left()


def test_the_host_half_closes_and_goes_on_reading() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    scene.connections.eof(connection.slot)
    assert scene.carrier.got() == shutdown(STREAM, abi.SHUTDOWN_SEND)
    assert connection.state is State.OPEN
    assert scene.connections.tick() is None
    assert scene.says(STREAM, abi.OP_SHUTDOWN, BOTH) == rst(STREAM)
    assert end.told == ["shutdown 1", "shutdown 2", "closed"]
    scene.nothing_left()


def test_a_guest_half_closes_and_goes_on_reading() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    assert scene.says(STREAM, abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND) == []
    assert scene.says(STREAM, abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND) == []
    assert end.told == ["shutdown 2"]
    assert scene.carrier.asked.count("when_drained") == 1
    # When the host has no more to say either, it is over: neither side may ever close.
    scene.connections.eof(connection.slot)
    assert scene.carrier.got() == shutdown(STREAM, abi.SHUTDOWN_SEND) + shutdown(STREAM, BOTH)
    assert scene.says(STREAM, abi.OP_RST) == []
    assert end.told == ["shutdown 2", "closed"]
    scene.nothing_left()


def test_flags_of_shutdown_add_up() -> None:
    scene = Scene()
    _, end = asked_by_guest(scene)
    assert scene.says(STREAM, abi.OP_SHUTDOWN, 0) == []
    assert scene.says(STREAM, abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV) == []
    assert end.told == ["shutdown 1"]
    assert scene.says(STREAM, abi.OP_SHUTDOWN, 0x80000000 | abi.SHUTDOWN_SEND) == rst(STREAM)
    assert end.told == ["shutdown 1", "shutdown 2", "closed"]
    scene.nothing_left()


def test_the_host_closes_and_the_guest_answers() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene, end=PlainEnd(end=BOTH))
    scene.connections.eof(connection.slot)
    assert scene.carrier.got() == shutdown(STREAM, BOTH)
    assert scene.connections.tick() == 8
    assert scene.says(STREAM, abi.OP_RST) == []
    assert end.told == ["closed"]
    assert scene.connections.resets == 0
    scene.nothing_left()


def test_the_host_closes_and_the_guest_has_eight_seconds_to_answer() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene, end=PlainEnd(end=BOTH))
    scene.connections.eof(connection.slot)
    scene.carrier.got()
    assert scene.later(7.9) == []
    assert scene.later(0.1) == rst(STREAM)
    assert end.told == ["closed"]
    assert scene.connections.timeouts == 1
    scene.nothing_left()


def test_both_close_at_once() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene, end=PlainEnd(end=BOTH))
    scene.connections.eof(connection.slot)
    assert scene.says(STREAM, abi.OP_SHUTDOWN, BOTH) == shutdown(STREAM, BOTH) + rst(STREAM)
    assert end.told == ["shutdown 1", "shutdown 2", "closed"]
    # The guest's own answer to ours, which had crossed.
    assert scene.says(STREAM, abi.OP_RST) == []
    scene.nothing_left()


def test_a_host_that_takes_nothing_more_may_go_on_sending() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    scene.connections.failed(connection.slot, 32)
    assert scene.carrier.got() == shutdown(STREAM, abi.SHUTDOWN_RCV)
    scene.connections.eof(connection.slot)
    assert scene.carrier.got() == shutdown(STREAM, BOTH)
    assert scene.says(STREAM, abi.OP_RST) == []
    assert end.told == ["closed"]
    scene.nothing_left()


def test_a_host_that_fails_otherwise_is_reset() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    scene.connections.failed(connection.slot, 104)
    assert scene.carrier.got() == rst(STREAM)
    assert end.told == ["reset"]
    assert scene.connections.resets == 1
    scene.nothing_left()


def test_a_guest_resets() -> None:
    scene = Scene()
    _, end = asked_of_guest(scene)
    assert scene.says(Key(abi.TYPE_STREAM, 22, 2, 1024), abi.OP_RST) == []
    assert end.told == ["accepted", "reset"]
    assert scene.connections.resets == 1
    scene.nothing_left()


def test_an_empty_message_is_no_end() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene, MESSAGES, PlainEnd(end=0))
    scene.connections.eof(connection.slot)
    assert scene.carrier.asked[-1] == "message"
    assert scene.carrier.got() == []
    end.end = abi.SHUTDOWN_SEND
    scene.connections.eof(connection.slot)
    assert scene.carrier.got() == shutdown(MESSAGES, abi.SHUTDOWN_SEND)


def test_a_restart_ends_all_without_a_word_but_delivers_last_words() -> None:
    scene = Scene()
    _, open_end = asked_by_guest(scene)
    last, last_end = asked_by_guest(scene, STREAM._replace(guest_port=40001))
    scene.carrier.rows[last.slot].unread = 5
    scene.says(last.key, abi.OP_SHUTDOWN, BOTH)
    asking = PlainEnd()
    assert scene.connections.connect(asking, abi.TYPE_STREAM, 22) is not None
    scene.says(MESSAGES, abi.OP_REQUEST)
    request = scene.requests.popleft()
    scene.carrier.got()
    scene.connections.restart()
    assert scene.carrier.got() == []
    assert open_end.told == ["reset"]
    assert asking.told == ["refused"]
    assert not request.pending
    assert len(scene.connections) == 1
    assert not last_end.over
    scene.carrier.take(last.slot)
    assert scene.carrier.got() == []
    assert last_end.told == ["shutdown 1", "shutdown 2", "closed"]
    scene.nothing_left()


def test_stop_ends_what_lingers_too_and_lets_nothing_begin() -> None:
    scene = Scene()
    connection, end = asked_by_guest(scene)
    scene.carrier.rows[connection.slot].unread = 5
    scene.says(STREAM, abi.OP_SHUTDOWN, BOTH)
    scene.connections.restart()
    scene.connections.stop()
    assert scene.says(STREAM, abi.OP_REQUEST) == rst(STREAM)
    assert end.told == ["shutdown 1", "reset"]
    scene.nothing_left()
