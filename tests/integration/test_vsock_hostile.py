"""Guests and host's ends that do what they may not, or nothing at all: each costs itself alone.

Every test ends with a connection that behaves, of the same guest where it still has rings, or of its neighbour.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from back_end import PATIENCE
from pyvhost.abi import virtio_vsock as abi
from pyvhost.dataplane import blocks
from pyvhost.driver.vsock import VsockDriver
from pyvhost.driver.vsock_packet import HEADER, Packet
from pyvhost.vsock.connections import UNANSWERED
from vsock_scene import CID, VsockScene

STREAM, SEQPACKET = abi.TYPE_STREAM, abi.TYPE_SEQPACKET
BOTH = abi.SHUTDOWN_RCV | abi.SHUTDOWN_SEND
HOST = abi.VMADDR_CID_HOST


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[VsockScene]:
    with VsockScene(tmp_path, CID, CID + 1) as scene:
        yield scene


@pytest.fixture
def guest(scene: VsockScene) -> Iterator[VsockDriver]:
    with scene.guest() as guest:
        yield guest


@pytest.fixture
def neighbour(scene: VsockScene) -> Iterator[VsockDriver]:
    with scene.guest(1) as neighbour:
        yield neighbour


def well(scene: VsockScene, guest: VsockDriver, port: int = 9999) -> None:
    """A connection works as it should."""
    sock, end = scene.pair(guest, port)
    sock.send(b"there")
    assert end.theirs.recv(5) == b"there"
    end.theirs.send(b"back")
    assert sock.recv_exactly(4) == b"back"
    sock.close()
    assert end.wait_over() == "close"


@pytest.mark.parametrize("type_", [STREAM, SEQPACKET])
def test_more_than_was_granted(
    scene: VsockScene, guest: VsockDriver, type_: int, caplog: pytest.LogCaptureFixture
) -> None:
    sock, end = scene.pair(guest, type=type_)
    other, other_end = scene.pair(guest, 81)
    for _ in range(40):
        if not sock.reset:
            sock.packet(abi.OP_RW, bytes(65_536), abi.SEQ_EOM if type_ == SEQPACKET else 0)
    guest.wait_for(lambda: sock.reset, "reset")
    assert end.wait_over() == "reset"
    assert len([record for record in caplog.records if "guest port" in record.message]) == 1
    other.send(b"well")
    assert other_end.theirs.recv(10) == b"well"
    well(scene, guest)


@pytest.mark.parametrize("length", [4, 1 << 16, (1 << 16) + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_of_more_than_there_is(scene: VsockScene, guest: VsockDriver, length: int) -> None:
    sock, end = scene.pair(guest)
    sock.packet(abi.OP_RW, b"abc", length=length)
    guest.wait_for(lambda: sock.reset, "reset")
    assert end.wait_over() == "reset"
    assert end.theirs.recv(10) == b""
    well(scene, guest)


def test_a_length_of_less_than_there_is(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    sock.packet(abi.OP_RW, b"abcdef", length=3)
    sock.packet(abi.OP_RW, b"gh")
    guest.wait_sent()
    assert end.theirs.recv(100) in (b"abcgh", b"abc", b"")
    well(scene, guest)


@pytest.mark.parametrize(("size", "writable"), [(0, []), (1, []), (43, []), (44, [100]), (0, [100])])
def test_chains_that_are_no_packets(
    scene: VsockScene, neighbour: VsockDriver, size: int, writable: list[int]
) -> None:
    with scene.guest() as guest:
        _, end = scene.pair(guest)
        guest.send_raw(bytes(size), [size], writable)
        assert guest.tx.wait_error(PATIENCE), "that ring has ended"
        well(scene, neighbour)
    assert end.wait_over() == "reset"
    with scene.guest() as guest:
        well(scene, guest)


@pytest.mark.parametrize("cid", [0, 1, HOST, CID + 1, CID + 100, 0xFFFFFFFF, CID + (1 << 32), (1 << 64) - 1])
def test_a_false_name(scene: VsockScene, guest: VsockDriver, neighbour: VsockDriver, cid: int) -> None:
    theirs, their_end = scene.pair(neighbour, 80, from_port=5000)
    asked = scene.hold(82)
    for op in range(9):
        for port in (80, 82):
            payload = b"forged" if op == abi.OP_RW else b""
            guest.send_packet(guest.packet(op, 5000, port, payload, src_cid=cid, flags=BOTH))
    guest.wait_sent()
    well(scene, guest)
    assert asked.empty(), "nobody has asked under another name"
    theirs.send(b"mine")
    assert their_end.theirs.recv(100) == b"mine"
    their_end.theirs.send(b"yours")
    assert theirs.recv_exactly(5) == b"yours"


@pytest.mark.parametrize("cid", [0, 1, CID, CID + 1, CID + 100, 0xFFFFFFFF, 2 + (1 << 32), (1 << 64) - 1])
def test_nobody_of_another_group_is_reached(
    scene: VsockScene, guest: VsockDriver, neighbour: VsockDriver, cid: int
) -> None:
    for type_ in (STREAM, SEQPACKET):
        sock = guest.connect(80, cid, type=type_, wait=False)
        with pytest.raises((ConnectionRefusedError, TimeoutError)):
            sock.wait_connected(timeout=0.2)
    well(scene, guest)
    neighbour.pump()
    assert not neighbour._stray


def test_types_and_operations_that_nobody_knows(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest, 80)
    for type_ in (0, 3, 0xFFFF):
        guest.send_packet(guest.packet(abi.OP_REQUEST, 7, 80, type=type_))
    for op in (0, 8, 0xFFFF):
        guest.send_packet(guest.packet(op, 7, 80))
    guest.wait_sent()
    guest.pump()
    well(scene, guest)
    sock.send(b"well")
    assert end.theirs.recv(10) == b"well"


@pytest.mark.parametrize("op", [abi.OP_RESPONSE, abi.OP_RW, abi.OP_SHUTDOWN, abi.OP_CREDIT_UPDATE])
def test_what_nobody_knows_is_reset(scene: VsockScene, guest: VsockDriver, op: int) -> None:
    guest.send_packet(guest.packet(op, 7, 80, b"x" if op == abi.OP_RW else b""))
    (answer,) = guest.stray()
    assert answer == Packet(abi.OP_RST, HOST, CID, 80, 7)
    guest.send_packet(guest.packet(abi.OP_RST, 7, 80))
    well(scene, guest)
    assert not guest._stray, "no answer to a reset"


def test_a_second_request_for_the_same(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    sock.packet(abi.OP_REQUEST)
    guest.wait_for(lambda: sock.reset, "reset")
    assert end.wait_over() == "reset"
    well(scene, guest)


def test_data_after_the_last(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    sock.send(b"last")
    sock.shutdown(abi.SHUTDOWN_SEND)
    sock.packet(abi.OP_RW, b"more")
    guest.wait_sent()
    end.wait_told("shutdown 2")
    assert end.theirs.recv(100) == b"last"
    assert end.theirs.recv(100) == b""
    well(scene, guest)


def test_a_flood_of_requests_that_are_never_answered(
    scene: VsockScene, guest: VsockDriver, neighbour: VsockDriver
) -> None:
    scene.hold(81)
    for number in range(5000):
        guest.send_packet(guest.packet(abi.OP_REQUEST, number, 81), publish=number % 100 == 99)
    guest.wait_for(lambda: len(guest._stray) > 4000, "refusals")
    # The guest's share, and the neighbour's one.
    assert scene.open_connections() <= UNANSWERED + 1
    well(scene, neighbour)
    scene.wait_closed(guest)
    well(scene, guest)


def test_a_flood_of_connections(tmp_path: Path) -> None:
    with VsockScene(tmp_path, CID, CID + 1, max_connections=50) as scene:
        accepted = scene.listen(81)
        with scene.guest() as guest, scene.guest(1) as neighbour:
            socks = [guest.connect(81, wait=False) for _ in range(200)]
            guest.wait_for(lambda: all(sock.connected or sock.reset for sock in socks), "answers")
            assert sum(sock.connected for sock in socks) == 50
            well(scene, neighbour)
            for sock in socks:
                if sock.connected:
                    sock.shutdown(BOTH)
            guest.wait_for(lambda: not guest.sockets, "confirmations")
            for _ in range(50):
                assert accepted.get(timeout=PATIENCE).wait_over() == "close"
            well(scene, guest)


def test_requests_and_resets_without_end(scene: VsockScene, guest: VsockDriver) -> None:
    scene.listen(81)
    guest.answers = False
    for number in range(2000):
        guest.send_packet(guest.packet(abi.OP_REQUEST, number % 7, 81), publish=False)
        guest.send_packet(guest.packet(abi.OP_RST, number % 7, 81))
    guest.wait_sent()
    scene.wait_closed(guest)
    well(scene, guest)


def test_a_guest_that_never_reads(scene: VsockScene, neighbour: VsockDriver) -> None:
    accepted = scene.listen(81)
    with scene.guest(rx_depth=2) as guest:
        sock = guest.connect(81)
        end = accepted.get(timeout=PATIENCE)
        guest.reads = False
        end.theirs.settimeout(0.3)
        with pytest.raises(TimeoutError):
            end.theirs.sendall(bytes(4 << 20))
        # It asks for more and more, and reads nothing of what is said to that.
        for number in range(3000):
            guest.send_packet(guest.packet(abi.OP_RW, number, 99))
            sock.packet(abi.OP_CREDIT_REQUEST)
        well(scene, neighbour)
    assert end.wait_over() == "reset"
    with scene.guest() as guest:
        well(scene, guest)


def test_a_guest_that_grants_without_end(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    sock.buf_alloc = 0xFFFFFFFF
    sock.update_credit()
    for lie in (1, 0x7FFFFFFF, 0xFFFFFFFF, 12345):
        guest.send_packet(sock._made(abi.OP_CREDIT_UPDATE, b"", 0, None))
        packet = guest.packet(abi.OP_CREDIT_UPDATE, sock.key.port, 80, buf_alloc=0xFFFFFFFF, fwd_cnt=lie)
        guest.send_packet(packet)
    guest.wait_sent()
    well(scene, guest)
    sock.abort()
    assert end.wait_over() == "reset"


@pytest.mark.parametrize("size", [1, HEADER - 1, HEADER])
def test_receive_buffers_that_hold_nothing(scene: VsockScene, neighbour: VsockDriver, size: int) -> None:
    with scene.guest(rx_buffers=(size,)) as guest:
        guest.connect(80, wait=False)
        guest.wait_sent()
        well(scene, neighbour)
    with scene.guest() as guest:
        well(scene, guest)


def test_anything_at_all(scene: VsockScene, guest: VsockDriver, neighbour: VsockDriver) -> None:
    chance = random.Random(7)
    scene.listen(81)
    guest.answers = False
    ports = (0, 1, 80, 81, 0xFFFFFFFF)
    for _ in range(8000):
        payload = chance.randbytes(chance.choice((0, 0, 1, 100, 5000)))
        packet = Packet(
            chance.choice((*range(9), 1, 4, 5, 5, 5)),
            chance.choice((CID, CID, CID, CID, CID + 1, 0)),
            chance.choice((HOST, HOST, HOST, HOST, CID, CID + 1)),
            chance.choice((1, 2, 3)),
            chance.choice(ports),
            payload,
            chance.choice((STREAM, STREAM, SEQPACKET, 3)),
            chance.choice((0, 0, 1, 2, 3, 0xFFFFFFFF)),
            chance.choice((0, 1, 65_536, 0xFFFFFFFF)),
            chance.choice((0, 1, 0x80000000, chance.randrange(1 << 32))),
            chance.choice((None, None, None, 0, len(payload) + 1)),
        )
        guest.send_packet(packet)
        guest._stray.clear()
    guest.wait_sent()
    well(scene, neighbour)
    guest.answers = True
    well(scene, guest)


def test_a_guest_that_goes_in_the_middle(scene: VsockScene, neighbour: VsockDriver) -> None:
    for _ in range(5):
        with scene.guest() as guest:
            ends = [scene.pair(guest, port)[1] for port in range(80, 90)]
            senders = [threading.Thread(target=_send_till_broken, args=(end.theirs,)) for end in ends]
            for sender in senders:
                sender.start()
            guest.wait_for(lambda: all(sock.received > 10_000 for sock in guest.sockets.values()), "data")
        for sender, end in zip(senders, ends, strict=True):
            assert end.wait_over() == "reset"
            sender.join(PATIENCE)
        scene.wait_closed()
    well(scene, neighbour)


def _send_till_broken(sock: object) -> None:
    try:
        while True:
            sock.sendall(bytes(10_000))  # type: ignore[attr-defined]
    except OSError:
        pass


def test_a_host_that_vanishes(scene: VsockScene, guest: VsockDriver) -> None:
    for _ in range(20):
        sock, end = scene.pair(guest)
        sock.send(bytes(50_000))
        end.theirs.close()
        guest.wait_for(lambda sock=sock: sock.reset, "end")  # type: ignore[misc]
        end.wait_over()
    scene.wait_closed()
    well(scene, guest)


def test_a_request_to_a_number_of_64_bits(
    scene: VsockScene, guest: VsockDriver, caplog: pytest.LogCaptureFixture
) -> None:
    far = [(1 << 64) - 1, 1 << 63, (1 << 63) - 1]
    for number, cid in enumerate(far):
        guest.send_packet(guest.packet(abi.OP_REQUEST, number, 80, dst_cid=cid))
    guest.wait_for(lambda: len(guest._stray) == len(far), "refusals")
    assert {(packet.op, packet.src_cid) for packet in guest._stray} == {(abi.OP_RST, cid) for cid in far}
    scene.wait_closed(guest)
    assert not [record for record in caplog.records if record.exc_info]
    well(scene, guest)


def test_lies_about_lengths_are_not_counted(scene: VsockScene, guest: VsockDriver) -> None:
    sock, _ = scene.pair(guest)
    row = scene.device._rows[1]
    before = int(row[blocks.C_BYTES // 8])
    sock.packet(abi.OP_RW, b"abc", length=(1 << 32) - 1)
    guest.wait_for(lambda: sock.reset, "reset")
    assert int(row[blocks.C_BYTES // 8]) == before


def test_a_host_that_vanishes_where_nobody_reads(scene: VsockScene) -> None:
    """The guest takes nothing more and says nothing; what the host had sent is unread, and it has gone."""
    with scene.guest(buf_alloc=1024) as guest:
        sock, end = scene.pair(guest)
        end.theirs.send(bytes(4096))
        guest.wait_for(lambda: sock.received == 1024, "all that it takes")
        end.theirs.close()
        well(scene, guest)
        sock.shutdown(abi.SHUTDOWN_RCV)
        guest.wait_for(lambda: sock.peer_shutdown == BOTH, "the host's end")
        well(scene, guest)
