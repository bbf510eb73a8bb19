"""Guests of one group reach each other; what begins and ends on one side does so on the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvhost.abi import virtio_vsock as abi
from pyvhost.host.poller import Poller
from pyvhost.vsock.contract import Key
from pyvhost.vsock.ends.groups import Groups
from pyvhost.vsock.ends.siblings import SiblingEnds
from vsock_host import PlainHost
from vsock_parts import BOTH

RESPONSE = (abi.OP_RESPONSE, 0)
RST = (abi.OP_RST, 0)


@pytest.fixture
def one(poller: Poller) -> Iterator[PlainHost]:
    with PlainHost(SiblingEnds(), cid=3, group="lab", poller=poller) as host:
        yield host


@pytest.fixture
def two(poller: Poller) -> Iterator[PlainHost]:
    with PlainHost(SiblingEnds(), cid=4, group="lab", poller=poller) as host:
        yield host


def connect(one: PlainHost, two: PlainHost, type_: int = abi.TYPE_STREAM) -> tuple[Key, Key]:
    """A connection of `one` to `two`: both keys."""
    key = one.request(80, two.guest.cid, type_)
    other = two.asked()
    two.says(other, abi.OP_RESPONSE)
    assert one.answer(key) == RESPONSE
    return key, other


def test_the_sibling_is_asked_and_the_two_are_joined(one: PlainHost, two: PlainHost) -> None:
    key, other = connect(one, two, abi.TYPE_SEQPACKET)
    assert other == Key(abi.TYPE_SEQPACKET, 80, 3, key.guest_port)
    row, its = one.carrier.rows[one.carrier.table[key]], two.carrier.rows[two.carrier.table[other]]
    assert row.started
    assert its.started
    assert row.other == (two.carrier, two.carrier.table[other])


def test_a_sibling_that_refuses(one: PlainHost, two: PlainHost) -> None:
    key = one.request(80, 4)
    two.says(two.asked(), abi.OP_RST)
    assert one.answer(key) == RST
    assert len(one.connections) == len(two.connections) == 0


def test_a_sibling_that_says_nothing(one: PlainHost, two: PlainHost) -> None:
    key = one.request(80, 4)
    other = two.asked()
    two.now += 3
    two.connections.tick()
    assert (two.answer(other), one.answer(key)) == (RST, RST)


@pytest.mark.parametrize("how", ["RST", "time", "restart"])
def test_who_asked_and_waits_no_longer(one: PlainHost, two: PlainHost, how: str) -> None:
    key = one.request(80, 4)
    other = two.asked()
    if how == "RST":
        one.says(key, abi.OP_RST)
    elif how == "time":
        one.now += 3
        one.connections.tick()
        assert one.answer(key) == RST
    else:
        one.connections.restart()
        one.settle()
    assert two.answer(other) == RST
    two.says(other, abi.OP_RESPONSE)
    assert len(one.connections) == len(two.connections) == 0


def test_shutting_down_is_passed_on(one: PlainHost, two: PlainHost) -> None:
    key, other = connect(one, two)
    one.says(key, abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV)
    assert two.answer(other) == (abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV)
    two.says(other, abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV)
    assert one.answer(key) == (abi.OP_SHUTDOWN, abi.SHUTDOWN_RCV)


def test_the_end_of_what_is_sent_comes_behind_it(one: PlainHost, two: PlainHost) -> None:
    key, other = connect(one, two)
    slot = one.carrier.table[key]
    one.carrier.rows[slot].unread = 100
    one.says(key, abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)
    assert two.carrier.got() == []
    one.carrier.take(slot)
    one.settle()
    assert two.answer(other) == (abi.OP_SHUTDOWN, abi.SHUTDOWN_SEND)


def test_closing_on_one_side_and_then_the_other(one: PlainHost, two: PlainHost) -> None:
    key, other = connect(one, two)
    one.says(key, abi.OP_SHUTDOWN, BOTH)
    assert one.answer(key) == RST
    assert two.answer(other)[0] == abi.OP_SHUTDOWN
    two.settle()
    assert two.answer(other) == (abi.OP_SHUTDOWN, BOTH)
    # It has read what there was, and confirms.
    two.says(other, abi.OP_RST)
    assert len(one.connections) == len(two.connections) == 0


@pytest.mark.parametrize("how", ["RST", "restart", "violated"])
def test_a_reset_is_one_for_both(one: PlainHost, two: PlainHost, how: str) -> None:
    key, other = connect(one, two)
    if how == "RST":
        one.says(key, abi.OP_RST)
    elif how == "restart":
        one.connections.restart()
        one.settle()
    else:
        one.tell("violated", key, "more than it was granted")
        assert one.answer(key) == RST
    assert two.answer(other) == RST
    assert len(one.connections) == len(two.connections) == 0


def test_a_sibling_that_takes_no_more_connections(one: PlainHost, poller: Poller) -> None:
    with PlainHost(SiblingEnds(), cid=5, group="lab", poller=poller, limit=1) as small:
        connect(one, small)
        assert one.answer(one.request(80, 5)) == RST
        small.connections.restart()
        small.settle()


@pytest.mark.parametrize("group", ["elsewhere", None])
def test_who_is_in_another_group_or_in_none_is_not_there(
    one: PlainHost, poller: Poller, group: str | None
) -> None:
    with PlainHost(SiblingEnds(), cid=9, group=group, poller=poller) as stranger:
        assert one.answer(one.request(80, 9)) == RST
        assert stranger.answer(stranger.request(80, 3)) == RST


def test_nor_is_the_guest_itself_nor_somebody_absent(one: PlainHost) -> None:
    assert one.answer(one.request(80, 3)) == RST
    assert one.answer(one.request(80, 77)) == RST


def test_a_guest_without_a_group_reaches_nobody_without_one(poller: Poller) -> None:
    with (
        PlainHost(SiblingEnds(), cid=20, poller=poller) as one,
        PlainHost(SiblingEnds(), cid=21, poller=poller),
    ):
        assert one.answer(one.request(80, 21)) == RST


def test_a_cid_is_one_guests_at_a_time(one: PlainHost, two: PlainHost) -> None:
    with pytest.raises(OSError, match="CID 3 is that of guest 3 already"):
        PlainHost(cid=3)
    with pytest.raises(OSError, match="CID 4 is that of guest 4"):
        one.host.move(4)
    one.host.move(30)
    assert Groups.of_process().find(30) is one.guest
    with PlainHost(cid=3):
        pass
    assert Groups.of_process().find(3) is None
