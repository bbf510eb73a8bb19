"""Ends of a vsock connection that come while nobody looks: each is noticed, and no last words are lost."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from back_end import PATIENCE
from pyvhost.abi import virtio_vsock as abi
from vsock_scene import VsockScene

BOTH = abi.SHUTDOWN_RCV | abi.SHUTDOWN_SEND
TYPES = pytest.mark.parametrize("type_", [abi.TYPE_STREAM, abi.TYPE_SEQPACKET], ids=["stream", "seqpacket"])


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[VsockScene]:
    with VsockScene(tmp_path) as scene:
        yield scene


def wait_readable(sock: socket.socket) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    assert poll.poll(1000 * PATIENCE)


@TYPES
def test_the_last_words_of_a_host_that_did_not_read_all(scene: VsockScene, type_: int) -> None:
    """It has closed with something unread, so that the next write may be ECONNRESET; what it had sent is there."""
    words = [bytes([number]) * 1000 for number in range(4)]
    with scene.guest(buf_alloc=1024) as guest:
        sock, end = scene.pair(guest, type=type_)
        sock.send(b"unread")
        wait_readable(end.theirs)
        for word in words:
            end.theirs.send(word)
        guest.wait_for(lambda: sock.received == 1024, "all that it takes")
        end.theirs.close()
        sock.send(b"more")
        guest.wait_for(lambda: sock.peer_shutdown & abi.SHUTDOWN_RCV != 0, "end of what the host takes")
        if type_ == abi.TYPE_STREAM:
            assert sock.recv_exactly(4000) == b"".join(words)
        else:
            assert [sock.recv_message().data for _ in words] == words
        guest.wait_for(lambda: sock.reset, "end")
        end.wait_over()


def test_a_host_that_had_said_its_last_and_vanishes(scene: VsockScene) -> None:
    """The guest is silent, and nothing more is read: only the loop's poll can tell."""
    with scene.guest() as guest:
        sock, end = scene.pair(guest)
        end.theirs.shutdown(socket.SHUT_WR)
        guest.wait_for(lambda: sock.peer_shutdown == abi.SHUTDOWN_SEND, "end of what the host sends")
        end.theirs.close()
        guest.wait_for(lambda: sock.peer_shutdown == BOTH, "the host's end")
        scene.wait_closed(guest)


@TYPES
def test_a_guest_that_goes_with_something_on_its_way_to_it(scene: VsockScene, type_: int) -> None:
    """Its receive ring has stopped, and connections wait for their turns there: they end all the same."""
    with scene.guest() as guest:
        ends = [scene.pair(guest, 80 + number, type=type_)[1] for number in range(5)]
        guest.frontend.stop_ring(0)
        for end in ends:
            end.theirs.send(b"never read")
    for end in ends:
        assert end.wait_over() == "reset"
    scene.wait_closed()


def test_a_guest_that_asks_says_what_it_takes(scene: VsockScene) -> None:
    """What the request said of credit is the connection's: nobody asks the guest again before something is sent."""
    with scene.guest(buf_alloc=5000) as guest:
        sock, end = scene.pair(guest)
        end.theirs.send(bytes(4999))
        guest.wait_for(lambda: sock.received == 4999, "what there is")
        assert abi.OP_CREDIT_REQUEST not in sock.counts
