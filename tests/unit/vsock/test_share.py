"""A guest's share of memory and of connections: what nobody takes from it, and what siblings may."""

from __future__ import annotations

import errno
import itertools
import logging

import pytest

from in_process import served
from pyvhost.abi import virtio_vsock as abi
from pyvhost.dataplane import vsock_blocks as layout
from pyvhost.host import fds
from pyvhost.vsock import plane
from pyvhost.vsock.contract import Key
from pyvhost.vsock.device import BUFFER, VsockDevice
from pyvhost.vsock.link import Link
from pyvhost.vsock.share import BUDGET, LEAST, SIBLINGS, Asked, Share
from vsock_parts import GUEST, PlainEnd, Scene

HOST = abi.VMADDR_CID_HOST
SIBLING, ANOTHER = GUEST + 1, GUEST + 2


# Memory


def test_all_that_is_granted_is_bounded_and_given_back() -> None:
    share = Share()
    granted = [share.grant(BUFFER, HOST) for _ in range(4096)]
    assert granted[:900] == [BUFFER] * 900
    assert sorted(granted, reverse=True) == granted, "who comes late gets less"
    assert granted[-1] == LEAST
    assert share.granted <= BUDGET + 4096 * LEAST
    for number in granted:
        share.give_back(number, HOST)
    assert share.granted == 0
    assert share.grant(BUFFER, HOST) == BUFFER


def test_siblings_lower_nothing_that_a_guest_has_with_the_host() -> None:
    share = Share()
    for number in range(2048):
        share.grant(BUFFER, SIBLING + number % 10)
    assert share.granted <= SIBLINGS + 2048 * LEAST
    assert [share.grant(BUFFER, HOST) for _ in range(900)] == [BUFFER] * 900


def test_a_sibling_that_takes_all_it_can_leaves_something_for_another() -> None:
    share = Share()
    greedy = [share.grant(BUFFER, SIBLING) for _ in range(1024)]
    assert greedy[-1] == LEAST
    assert [share.grant(BUFFER, ANOTHER) for _ in range(50)] == [BUFFER] * 50
    for number in greedy:
        share.give_back(number, SIBLING)
    assert share.grant(BUFFER, SIBLING) == BUFFER


# Connections


@pytest.mark.parametrize("limit", [1, 2, 50, 4096])
def test_siblings_ask_for_half_at_most(limit: int) -> None:
    asked = Asked(limit)
    taken = 0
    for cid in range(SIBLING, SIBLING + 100):
        while asked.may(cid):
            asked.add(cid)
            taken += 1
            if cid == SIBLING:
                assert 2 * taken <= (limit + 1) // 2 + 1, "as much is left for the next"
    assert taken == (limit + 1) // 2
    assert asked.may(HOST)
    asked.remove(SIBLING)
    assert asked.may(ANOTHER + 1000)


def test_a_siblings_requests_leave_room_for_the_host_and_the_guest() -> None:
    scene = Scene(limit=8)
    ends = []
    for number in range(8):
        ends.append(PlainEnd(fd=-1))
        scene.connections.connect(ends[-1], abi.TYPE_STREAM, 80, SIBLING, 1000 + number)
    assert [end.told for end in ends] == [[]] * 2 + [["refused"]] * 6
    another = PlainEnd(fd=-1)
    assert scene.connections.connect(another, abi.TYPE_STREAM, 80, ANOTHER, 1000)
    for number in range(3):
        assert scene.connections.connect(PlainEnd(), abi.TYPE_STREAM, 81 + number)
    scene.says(Key(abi.TYPE_STREAM, 5, HOST, 80), abi.OP_REQUEST)
    assert len(scene.requests) == 1
    # The guest refuses them, and their places are free again.
    for number in range(2):
        scene.says(Key(abi.TYPE_STREAM, 80, SIBLING, 1000 + number), abi.OP_RST)
    scene.carrier.settle()
    assert scene.connections.connect(PlainEnd(fd=-1), abi.TYPE_STREAM, 80, SIBLING, 2000)


# Guests that are served


def key(number: int, peer_cid: int = HOST) -> Key:
    return Key(abi.TYPE_STREAM, number, peer_cid, 80)


def opened(link: Link, number: int) -> list[int]:
    """Slots of so many connections, or of as many as there can be."""
    slots = (link.open(key(at), True) for at in range(number))
    return [slot for slot in itertools.takewhile(lambda slot: slot is not None, slots) if slot is not None]


def close(link: Link, slots: list[int]) -> None:
    for slot in slots:
        link.close(slot)


def test_a_guest_that_takes_all_it_can_takes_nothing_of_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # None of these connections has a descriptor.
    monkeypatch.setattr(fds, "room_for", lambda number: number)
    greedy = VsockDevice(52, group="one worker", max_connections=layout.MAX_OF_GUEST)
    before = VsockDevice(53, group="one worker")
    after = VsockDevice(54, group="one worker")
    with served(before), served(greedy):
        assert len(opened(greedy.link, layout.MAX_OF_GUEST)) == layout.MAX_OF_GUEST
        with served(after):
            for device in (before, after):
                slots = opened(device.link, 500)
                assert len(slots) == 500
                assert {int(device.link.worker.connections[slot]["buf_alloc"]) for slot in slots} == {BUFFER}
                close(device.link, slots)
            close(greedy.link, list(greedy.link._held))


def test_a_worker_takes_no_guest_that_it_has_no_places_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = VsockDevice(52, group="one worker")
    with served(device):
        worker = device.link.worker
        monkeypatch.setattr(worker, "_reserved", layout.MAX_CONNECTIONS - 100)
        with pytest.raises(OSError, match="101 more") as refused, worker.paused():
            worker.reserve(101)
        assert refused.value.errno == errno.ENOSPC
        with worker.paused():
            places = worker.reserve(100)
            assert len(set(places)) == 100
            worker.give_back(places)


def test_where_descriptors_are_few_guests_have_equal_shares(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fds, "room_for", lambda number: 3000)
    every = plane.Plane()
    first, second, modest = object(), object(), object()
    every.enter(modest, "modest", 100)
    assert every.each >= 100
    assert not caplog.records
    every.enter(first, "first", 4096)
    every.enter(second, "second", 4096)
    assert 100 < every.each < 1000
    with caplog.at_level(logging.WARNING):
        assert [record.getMessage().split(":")[0] for record in caplog.records] == ["first", "second"]
    assert "3000 open files" in caplog.text
    for guest in (first, second, modest):
        every.leave(guest)
    assert every.each == layout.MAX_OF_GUEST
    # However many they are, all have some.
    for guest in range(60):
        every.enter(guest, "one of many", 4096)
    assert every.each > 30


def test_a_share_of_descriptors_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    device = VsockDevice(52)
    with served(device):
        monkeypatch.setattr(plane.Plane.get(), "_each", 2)
        slots = opened(device.link, 3)
        assert len(slots) == 2
        close(device.link, slots)
