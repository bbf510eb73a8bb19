"""A guest's connections when things cross, come too late or too often, or were never right."""

from __future__ import annotations

import logging

import pytest

from pyvhost.abi import virtio_vsock as abi
from pyvhost.vsock.connections import UNANSWERED, Connection, State
from pyvhost.vsock.contract import Key
from vsock_parts import BOTH, PlainEnd, Scene, Sent

KEY = Key(abi.TYPE_STREAM, 40000, 2, 80)


def rst(key: Key = KEY) -> list[Sent]:
    return [(key, abi.OP_RST, 0)]


def opened(scene: Scene, key: Key = KEY) -> tuple[Connection, PlainEnd]:
    end = PlainEnd()
    scene.says(key, abi.OP_REQUEST)
    connection = scene.requests.popleft().accept(end)
    assert connection is not None
    scene.carrier.got()
    return connection, end


# --- what crosses -----------------------------------------------------------------------------------------


def test_what_is_told_of_a_connection_that_was_closed_meanwhile_is_nothing() -> None:
    scene = Scene()
    connection, end = opened(scene)
    connection.reset()
    # The data path has not heard of it yet.
    for op in (abi.OP_SHUTDOWN, abi.OP_RST, abi.OP_RESPONSE, abi.OP_RW, abi.OP_CREDIT_UPDATE, 99):
        scene.connections.packet(connection.slot, KEY, op, BOTH)
    scene.connections.eof(connection.slot)
    scene.connections.failed(connection.slot, 32)
    scene.connections.failed(connection.slot, 5)
    scene.connections.violated(connection.slot, "nonsense")
    scene.connections.drained(connection.slot)
    assert scene.carrier.got() == rst()
    assert end.told == ["reset"]
    scene.nothing_left()


def test_a_port_is_used_again_before_the_data_path_has_let_go() -> None:
    scene = Scene()
    connection, end = opened(scene)
    connection.reset()
    scene.carrier.obey(1)
    # The guest has its RST, and connects at once; the data path has not come to `close`.
    assert scene.carrier.wire == rst()
    scene.carrier.guest(KEY, abi.OP_REQUEST)
    scene.carrier.tell()
    assert scene.carrier.rows.keys() == {0, 1}
    again = PlainEnd()
    second = scene.requests.popleft().accept(again)
    assert second is not None
    assert second.slot == 1
    assert scene.carrier.got() == [*rst(), (KEY, abi.OP_RESPONSE, 0)]
    assert end.told == ["reset"]
    assert again.told == []
    # And what follows is the second one's.
    assert scene.says(KEY, abi.OP_SHUTDOWN, BOTH) == rst()
    assert again.told == ["shutdown 1", "shutdown 2", "closed"]
    scene.nothing_left()


def test_a_request_that_crosses_and_its_end_are_one_connections() -> None:
    scene = Scene()
    connection, _ = opened(scene)
    connection.reset()
    scene.carrier.obey(1)
    scene.carrier.guest(KEY, abi.OP_REQUEST)
    scene.carrier.guest(KEY, abi.OP_RST)
    scene.carrier.tell()
    assert not scene.requests.popleft().pending
    assert scene.carrier.got() == rst()
    scene.nothing_left()


def test_what_a_former_connection_has_to_say_is_not_heard_as_the_new_ones() -> None:
    scene = Scene()
    first = PlainEnd()
    connection = scene.connections.connect(first, abi.TYPE_STREAM, 22, 2, 5000)
    assert connection is not None
    scene.carrier.got()
    connection.reset()
    # The guest has answered before it heard of that, and the name is used again at once.
    scene.carrier.guest(connection.key, abi.OP_RESPONSE)
    scene.carrier.guest(connection.key, abi.OP_RST)
    second_end = PlainEnd()
    second = scene.connections.connect(second_end, abi.TYPE_STREAM, 22, 2, 5000)
    assert second is not None
    assert scene.carrier.got() == [*rst(second.key), (second.key, abi.OP_REQUEST, 0)]
    assert first.told == ["refused"]
    assert second_end.told == []
    assert scene.says(second.key, abi.OP_RESPONSE) == []
    assert second_end.told == ["accepted"]


def test_a_guest_that_has_forgotten_what_we_wait_for_connects_again() -> None:
    scene = Scene()
    connection, end = opened(scene)
    connection.shut_down(BOTH)
    scene.carrier.got()
    assert scene.says(KEY, abi.OP_REQUEST) == []
    assert end.told == ["closed"]
    assert scene.requests.popleft().accept(PlainEnd()) is not None
    assert scene.carrier.got() == [(KEY, abi.OP_RESPONSE, 0)]
    assert scene.connections.tick() is None


def test_a_reset_crosses_shutdown() -> None:
    scene = Scene()
    connection, end = opened(scene)
    scene.carrier.guest(KEY, abi.OP_RST)
    connection.shut_down(abi.SHUTDOWN_SEND)
    assert scene.carrier.got() == [(KEY, abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)]
    assert end.told == ["reset"]
    scene.nothing_left()


def test_shutting_down_what_has_closed_says_nothing_more_to_the_guest() -> None:
    scene = Scene()
    connection, end = opened(scene)
    scene.carrier.rows[connection.slot].unread = 5
    scene.says(KEY, abi.OP_SHUTDOWN, BOTH)
    scene.connections.eof(connection.slot)
    assert scene.carrier.got() == []
    scene.connections.failed(connection.slot, 32)
    assert scene.carrier.got() == rst()
    assert end.told == ["shutdown 1", "shutdown 2", "closed"]
    scene.nothing_left()


# --- what was never right ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [abi.OP_RESPONSE, abi.OP_SHUTDOWN, abi.OP_RW, abi.OP_CREDIT_UPDATE, 0, 99])
def test_what_is_said_of_no_connection_is_reset(op: int) -> None:
    scene = Scene()
    assert scene.says(KEY, op, BOTH) == rst()
    scene.nothing_left()


def test_a_reset_is_not_answered() -> None:
    scene = Scene()
    assert scene.says(KEY, abi.OP_RST) == []


@pytest.mark.parametrize("type", [0, 3, 65535])
def test_an_unknown_type_is_reset(type: int) -> None:
    scene = Scene()
    assert scene.says(KEY._replace(type=type), abi.OP_REQUEST) == rst(KEY._replace(type=type))
    assert not scene.requests
    scene.nothing_left()


@pytest.mark.parametrize("op", [abi.OP_REQUEST, abi.OP_RW, 0, 99])
def test_what_an_open_connection_does_not_expect_breaks_it(op: int) -> None:
    scene = Scene()
    _, end = opened(scene)
    assert scene.says(KEY, op) == rst()
    assert end.told == ["reset"]
    scene.nothing_left()


@pytest.mark.parametrize("op", [abi.OP_REQUEST, abi.OP_RESPONSE, abi.OP_SHUTDOWN, abi.OP_RW, 0])
def test_what_a_guest_that_asks_must_not_say_ends_its_request(op: int) -> None:
    scene = Scene()
    scene.says(KEY, abi.OP_REQUEST)
    assert scene.says(KEY, op, BOTH) == rst()
    assert not scene.requests.popleft().pending
    scene.nothing_left()


@pytest.mark.parametrize("op", [abi.OP_REQUEST, abi.OP_SHUTDOWN, abi.OP_RW, 0])
def test_what_is_no_answer_refuses(op: int) -> None:
    scene = Scene()
    end = PlainEnd()
    connection = scene.connections.connect(end, abi.TYPE_STREAM, 22)
    assert connection is not None
    scene.carrier.got()
    assert scene.says(connection.key, op, BOTH) == rst(connection.key)
    assert end.told == ["refused"]
    scene.nothing_left()


def test_credit_and_a_second_answer_break_nothing() -> None:
    scene = Scene()
    connection, end = opened(scene)
    for op in (abi.OP_CREDIT_UPDATE, abi.OP_CREDIT_REQUEST, abi.OP_RESPONSE):
        assert scene.says(KEY, op) == []
    assert connection.state is State.OPEN
    assert end.told == []


def test_a_violation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            connection, end = opened(scene)
            scene.connections.violated(connection.slot, "more than it was granted")
            assert scene.carrier.got() == rst()
            assert end.told == ["reset"]
    assert [record.getMessage() for record in caplog.records] == [
        "vsock under test: guest port 40000 to port 80 of CID 2: reset, as the guest sent more than it was granted"
    ]
    assert scene.connections.violations == 3
    scene.nothing_left()


# --- too much ---------------------------------------------------------------------------------------------


def test_a_flood_of_requests_ends_at_the_limit() -> None:
    scene = Scene(limit=3)
    keys = [KEY._replace(guest_port=port) for port in range(5)]
    got = [scene.says(key, abi.OP_REQUEST) for key in keys]
    assert got == [[], [], [], rst(keys[3]), rst(keys[4])]
    assert len(scene.connections) == 3
    assert scene.connections.refused == 2
    host = PlainEnd()
    assert scene.connections.connect(host, abi.TYPE_STREAM, 22) is None
    assert host.told == ["refused"]
    # Room comes back when the data path lets go, and not before.
    scene.requests.popleft().refuse()
    scene.carrier.guest(keys[3], abi.OP_REQUEST)
    scene.carrier.tell()
    assert len(scene.requests) == 2
    scene.carrier.settle()
    scene.says(keys[4], abi.OP_REQUEST)
    assert len(scene.requests) == 3


def test_no_room_in_the_data_path_is_a_refusal() -> None:
    scene = Scene(room=1)
    opened(scene)
    other = KEY._replace(guest_port=1)
    assert scene.says(other, abi.OP_REQUEST) == rst(other)
    end = PlainEnd()
    assert scene.connections.connect(end, abi.TYPE_STREAM, 22) is None
    assert end.told == ["refused"]


def test_requests_that_nobody_answers_are_bounded() -> None:
    scene = Scene(limit=UNANSWERED + 10)
    for port in range(UNANSWERED):
        assert scene.says(KEY._replace(guest_port=port), abi.OP_REQUEST) == []
    more = KEY._replace(guest_port=UNANSWERED)
    assert scene.says(more, abi.OP_REQUEST) == rst(more)
    assert scene.requests.popleft().accept(PlainEnd()) is not None
    scene.carrier.got()
    assert scene.says(more, abi.OP_REQUEST) == []
    assert len(scene.later(2)) == UNANSWERED


# --- ends that raise, timers ------------------------------------------------------------------------------


def test_who_is_asked_and_raises_refuses(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()

    def broken(request: object) -> None:
        raise RuntimeError("no")

    scene.connections.on_request = broken
    assert scene.says(KEY, abi.OP_REQUEST) == rst()
    assert "RuntimeError: no" in caplog.text
    scene.nothing_left()


def test_an_end_that_raises_costs_itself_alone(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene()

    class Broken(PlainEnd):
        def accepted(self) -> None:
            raise RuntimeError("no")

        def ended(self) -> int:
            raise RuntimeError("never")

    asking = Broken()
    connection = scene.connections.connect(asking, abi.TYPE_STREAM, 22)
    assert connection is not None
    scene.carrier.got()
    assert scene.says(connection.key, abi.OP_RESPONSE) == rst(connection.key)
    assert asking.told == ["reset"]
    scene.says(KEY, abi.OP_REQUEST)
    end = Broken()
    accepted = scene.requests.popleft().accept(end)
    assert accepted is not None
    scene.carrier.got()
    scene.connections.eof(accepted.slot)
    assert scene.carrier.got() == rst()
    assert end.told == ["reset"]
    assert "RuntimeError: never" in caplog.text
    scene.nothing_left()


def test_an_earlier_deadline_is_told_of() -> None:
    scene = Scene()
    told: list[float | None] = []
    scene.connections.on_timer = lambda: told.append(scene.connections.tick())
    connection, _ = opened(scene)
    assert told == [2]
    connection.shut_down(BOTH)
    assert told == [2, 8]
    scene.now += 7
    scene.says(KEY._replace(guest_port=1), abi.OP_REQUEST)
    assert told == [2, 8, 1]
    scene.later(1)
    assert scene.connections.tick() == 1
