"""A guest that offers no buffers, and messages that a guest has too little room for: the others see their end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from back_end import PATIENCE, BackEnd
from pyvhost.abi import virtio_vsock as abi
from pyvhost.dataplane.vsock_blocks import GONE
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vsock import VsockDriver
from pyvhost.driver.vsock_socket import VsockSocket
from pyvhost.vsock.connections import Connection
from pyvhost.vsock.device import BUFFER, VsockDevice
from vsock_scene import CID, PairEnd, VsockScene

STREAM, SEQPACKET = abi.TYPE_STREAM, abi.TYPE_SEQPACKET
BOTH = abi.SHUTDOWN_RCV | abi.SHUTDOWN_SEND


def well(scene: VsockScene, guest: VsockDriver) -> None:
    """A connection works as it should."""
    sock, end = scene.pair(guest)
    sock.send(b"there")
    assert end.theirs.recv(5) == b"there"
    end.theirs.send(b"back")
    assert sock.recv_exactly(4) == b"back"
    sock.close()
    assert end.wait_over() == "close"


# --- a guest that offers no buffers --------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[VsockScene]:
    with VsockScene(tmp_path, CID, CID + 1) as scene:
        yield scene


def fill(guest: VsockDriver) -> None:
    """It reads no more, and what it asks for fills its buffers, and more than these."""
    guest.reads = False
    for number in range(10):
        guest.send_packet(guest.packet(abi.OP_RW, number, 99))
    guest.wait_sent()


def test_who_is_connected_to_a_guest_that_offers_no_buffers_sees_its_ends(scene: VsockScene) -> None:
    with scene.guest(rx_depth=4) as guest:
        closing, closed = scene.pair(guest, 80)
        resetting, was_reset = scene.pair(guest, 81)
        staying, stays = scene.pair(guest, 82)
        fill(guest)
        closing.send(b"last words")
        closing.shutdown(BOTH)
        resetting.packet(abi.OP_RST)
        assert closed.theirs.recv(100) == b"last words"
        assert closed.theirs.recv(100) == b""
        assert closed.wait_over() == "close"
        assert was_reset.wait_over() == "reset"
        assert scene.open_connections() == 1
        # What it was not told it is told when it has buffers.
        guest.reads = True
        guest.wait_for(lambda: closing.reset, "the answer to its end")
        assert len(guest.stray(10)) == 10
        staying.send(b"there")
        assert stays.theirs.recv(100) == b"there"
        stays.theirs.send(b"back")
        assert staying.recv_exactly(4) == b"back"


@pytest.mark.parametrize("type_", [STREAM, SEQPACKET])
def test_what_waits_comes_in_its_order(scene: VsockScene, type_: int) -> None:
    with scene.guest(rx_depth=4) as guest:
        accepted = scene.listen(80)
        fill(guest)
        sock = guest.connect(80, type=type_, wait=False)
        end = accepted.get(timeout=PATIENCE)
        end.theirs.send(b"first")
        end.theirs.close()
        # It is asked for once more by the same name: RST for the former, and then nothing of it.
        again = guest.connect(80, type=type_, wait=False)
        other = accepted.get(timeout=PATIENCE)
        again.packet(abi.OP_REQUEST)
        assert other.wait_over() == "reset"
        guest.reads = True
        # The driver refuses data before RESPONSE.
        sock.wait_connected()
        part = sock.recv_message() if type_ == SEQPACKET else sock.recv(100)
        assert part == b"first" or (part is not None and getattr(part, "data", b"") == b"first")
        guest.wait_for(lambda: again.reset, "RST")
        sock.close()
        scene.wait_closed(guest)


def test_what_waits_for_buffers_is_bounded(tmp_path: Path) -> None:
    with (
        VsockScene(tmp_path, CID, CID + 1, max_connections=16) as scene,
        scene.guest(rx_depth=4) as guest,
        scene.guest(1) as neighbour,
    ):
        scene.hold(81)
        fill(guest)
        for number in range(10_000):
            # Asked for twice, it is broken off, and its place is free for the next.
            for _ in range(2):
                guest.send_packet(guest.packet(abi.OP_REQUEST, number, 81), publish=number % 50 == 49)
        guest.wait_sent()
        link = scene.device.link
        assert scene.back_end.ask(link._behind)
        waiting = link._packets.put - link._packets.taken
        assert waiting <= link._packets.size
        assert waiting < 10_000, "no answer to all of it"
        well(scene, neighbour)
        # Nothing is added until the guest has read; then all is as ever.
        guest.reads = True
        guest.wait_for(lambda: link._packets.put == link._packets.taken, "all that waited")
        guest.pump()
        scene.wait_closed(guest)
        well(scene, guest)


def test_a_host_that_goes_before_its_guest_was_told_of_it(scene: VsockScene) -> None:
    """The guest takes nothing, so that nobody would read, and find out: it is found out when data may flow."""
    with scene.guest(rx_depth=4) as guest:
        accepted = scene.listen(80)
        fill(guest)
        sock = guest.connect(80, wait=False)
        end = accepted.get(timeout=PATIENCE)
        sock.packet(abi.OP_SHUTDOWN, flags=abi.SHUTDOWN_RCV)
        end.wait_told(f"shutdown {abi.SHUTDOWN_RCV}")
        end.theirs.close()
        link = scene.device.link
        (slot,) = link._held
        tick = threading.Event()
        while link.worker.connections[slot]["hung_up"] != GONE:
            tick.wait(0.005)
        guest.reads = True
        guest.wait_for(lambda: sock.peer_shutdown == BOTH, "the host's end")


def test_nothing_comes_before_the_answer(scene: VsockScene) -> None:
    """Not even credit: a driver that waits for RESPONSE takes it for a fault."""
    with scene.guest() as guest:
        asked = scene.hold(80)
        sock = guest.connect(80, wait=False)
        request = asked.get(timeout=PATIENCE)
        sock.packet(abi.OP_CREDIT_REQUEST)
        guest.wait_sent()
        well(scene, guest)
        assert not sock.counts
        end = PairEnd()
        scene.back_end.ask(lambda: request.accept(end))
        # Which tells it what it has asked for.
        sock.wait_connected()
        assert sock.peer_buf_alloc == BUFFER
        end.theirs.close()


def test_what_was_sent_on_a_former_connection_is_not_of_the_next(scene: VsockScene) -> None:
    """A sibling uses its port again, and this guest has not heard yet that the former connection is over."""
    with scene.guest(rx_depth=4, answers=False) as guest:
        fill(guest)
        end = PairEnd()
        scene.back_end.ask(lambda: scene.device.connections.connect(end, STREAM, 81, peer_port=5555))
        link, tick = scene.device.link, threading.Event()
        while link._commands.taken != link._commands.put:
            tick.wait(0.001)
        for packet in (
            guest.packet(abi.OP_RW, 81, 5555, b"of the former"),
            guest.packet(abi.OP_RESPONSE, 81, 5555),
            guest.packet(abi.OP_RW, 81, 5555, b"of this one"),
        ):
            guest.send_packet(packet)
        guest.wait_sent()
        guest.reads = True
        # RST for what filled its buffers, and the REQUEST.
        assert [packet.op for packet in guest.stray(11)].count(abi.OP_REQUEST) == 1
        end.wait_told("accepted")
        assert end.theirs.recv(100) == b"of this one"
        guest.send_packet(guest.packet(abi.OP_RST, 81, 5555))
        assert end.wait_over() == "reset"
        end.theirs.close()


def test_what_waits_of_a_former_connection_is_not_of_the_next(scene: VsockScene) -> None:
    """The guest has given one up and begins another by its name: an old RESPONSE would have it connected."""
    with scene.guest(rx_depth=4) as guest:
        accepted = scene.listen(80)
        fill(guest)
        guest.send_packet(guest.packet(abi.OP_REQUEST, 5555, 80))
        former = accepted.get(timeout=PATIENCE)
        guest.send_packet(guest.packet(abi.OP_RST, 5555, 80))
        assert former.wait_over() == "reset"
        asked = scene.hold(80)
        sock = guest.connect(80, from_port=5555, wait=False)
        request = asked.get(timeout=PATIENCE)
        guest.reads = True
        packets = scene.device.link._packets
        guest.wait_for(lambda: packets.put == packets.taken, "all that waited")
        guest.pump()
        assert not sock.counts
        end = PairEnd()
        scene.back_end.ask(lambda: request.accept(end))
        sock.wait_connected()
        end.theirs.send(b"of this one")
        assert sock.recv_exactly(11) == b"of this one"
        end.theirs.close()


def test_one_that_begins_anew_by_its_name_ends_the_former_first(scene: VsockScene) -> None:
    """The guest has not heard that it is over: RST comes before REQUEST."""
    with scene.guest(rx_depth=4) as guest:
        listener = guest.listen(81)

        def connect() -> tuple[PairEnd, Connection]:
            end = PairEnd()
            connections = scene.device.connections
            connection = scene.back_end.ask(lambda: connections.connect(end, STREAM, 81, peer_port=5555))
            assert connection is not None
            return end, connection

        first, connection = connect()
        former = listener.accept()
        first.wait_told("accepted")
        fill(guest)
        scene.back_end.ask(connection.reset)
        assert first.wait_over() == "reset"
        second, _ = connect()
        guest.reads = True
        sock = listener.accept()
        assert former.reset
        second.wait_told("accepted")
        second.theirs.send(b"of this one")
        assert sock.recv_exactly(11) == b"of this one"
        first.theirs.close()
        second.theirs.close()


def test_a_driver_that_begins_anew_hears_nothing_of_what_waited(scene: VsockScene) -> None:
    with scene.guest(rx_depth=4) as guest:
        accepted = scene.listen(80)
        fill(guest)
        guest.connect(80, wait=False)
        end = accepted.get(timeout=PATIENCE)
        guest.send_packet(guest.packet(abi.OP_RW, 1024, 80, b"said too early"))
        guest.send_packet(guest.packet(abi.OP_SHUTDOWN, 1024, 80, flags=BOTH))
        guest.wait_sent()
    # Its last words are delivered all the same.
    assert end.theirs.recv(100) == b"said too early"
    assert end.wait_over() == "close"
    scene.wait_closed()
    with scene.guest() as guest:
        sock, end = scene.pair(guest)
        assert not guest._stray
        end.theirs.send(b"well")
        assert sock.recv_exactly(4) == b"well"


# --- messages that a guest has no room for any more ------------------------------------------------------------


@pytest.fixture
def siblings(tmp_path: Path) -> Iterator[tuple[VsockDriver, VsockDriver]]:
    devices = [VsockDevice(cid, group="lab") for cid in (3, 4)]
    with BackEnd(tmp_path, *devices) as back_end, driver(back_end, 0) as one, driver(back_end, 1) as two:
        yield one, two


@contextmanager
def driver(back_end: BackEnd, at: int) -> Iterator[VsockDriver]:
    with (
        back_end.connect(at) as front,
        GuestMemory(64 * MIB) as memory,
        VsockDriver(front, memory, timeout=PATIENCE) as guest,
    ):
        guest.start()
        yield guest


def pair(one: VsockDriver, two: VsockDriver) -> tuple[VsockSocket, VsockSocket]:
    """Of one sibling's, which has asked, and of the other's."""
    listener = two.listen(80, type=SEQPACKET)
    ours = one.connect(80, two.guest_cid, type=SEQPACKET, wait=False)
    theirs = listener.accept()
    ours.wait_connected()
    return ours, theirs


def shrink(sock: VsockSocket, room: int) -> None:
    sock.buf_alloc = room
    sock.update_credit()
    sock.driver.wait_sent()


def both_reset(ours: VsockSocket, theirs: VsockSocket, caplog: pytest.LogCaptureFixture) -> None:
    theirs.driver.wait_for(lambda: theirs.reset, "RST")
    ours.driver.wait_for(lambda: ours.reset, "RST")
    (line,) = [
        record.getMessage() for record in caplog.records if "a message is longer" in record.getMessage()
    ]
    assert line.startswith("vsock 4: guest port 80 to port 1024 of CID 3: reset")


@pytest.mark.parametrize("whole", [True, False])
def test_a_siblings_message_that_there_is_too_little_room_for(
    siblings: tuple[VsockDriver, VsockDriver], whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = siblings
    ours, theirs = pair(one, two)
    ours.send(bytes(200_000))
    two.wait_for(lambda: theirs.pending == 200_000, "the first")
    # The second one is longer than what is left, so that it waits.
    ours.packet(abi.OP_RW, bytes(65_536))
    if whole:
        ours.packet(abi.OP_RW, bytes(10_000), abi.SEQ_EOM)
        two.wait_for(lambda: theirs.received == theirs.buf_alloc, "its beginning")
    one.wait_sent()
    shrink(theirs, 65_536)
    both_reset(ours, theirs, caplog)
    # Their ports, and both guests, are well.
    again, accepted = pair(one, two)
    again.send(b"well")
    message = accepted.recv_message()
    assert message is not None
    assert message.data == b"well"


def test_a_message_that_fits_waits_for_room(siblings: tuple[VsockDriver, VsockDriver]) -> None:
    one, two = siblings
    ours, theirs = pair(one, two)
    ours.send(bytes(200_000))
    two.wait_for(lambda: theirs.pending == 200_000, "the first")
    ours.send(bytes(100_000))
    two.wait_for(lambda: theirs.received == theirs.buf_alloc, "the beginning of the second")
    shrink(theirs, 100_000)
    for length in (200_000, 100_000):
        message = theirs.recv_message()
        assert message is not None
        assert len(message.data) == length
    assert not ours.reset


def test_a_hosts_message_that_there_is_too_little_room_for(
    scene: VsockScene, caplog: pytest.LogCaptureFixture
) -> None:
    with scene.guest() as guest:
        sock, end = scene.pair(guest, type=SEQPACKET)
        send_long(end, 200_000)
        guest.wait_for(lambda: sock.pending == 200_000, "the first")
        send_long(end, 150_000)
        guest.wait_for(lambda: sock.received == guest.buf_alloc, "the beginning of the second")
        shrink(sock, 100_000)
        guest.wait_for(lambda: sock.reset, "RST")
        assert end.wait_over() == "reset"
        assert len([record for record in caplog.records if "a message is longer" in record.getMessage()]) == 1


def send_long(end: PairEnd, length: int) -> None:
    end.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    end.theirs.send(bytes(length))
