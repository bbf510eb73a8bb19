"""The socket device, driven by a guest's half over vhost-user: both types, both ways, credit, shutdown, restart."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from back_end import PATIENCE
from pyvhost.abi import virtio
from pyvhost.abi import virtio_vsock as abi
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vsock import FEATURES, VsockDriver
from pyvhost.driver.vsock_packet import HEADER
from pyvhost.driver.vsock_socket import VsockSocket
from vsock_scene import CID, PairEnd, VsockScene

STREAM, SEQPACKET = abi.TYPE_STREAM, abi.TYPE_SEQPACKET
BOTH = abi.SHUTDOWN_RCV | abi.SHUTDOWN_SEND
SIZES = [0, 1, 43, 44, 4095, 4096, 4097, 65_535, 65_536, 65_537, 200_000]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[VsockScene]:
    with VsockScene(tmp_path) as scene:
        yield scene


@pytest.fixture
def guest(scene: VsockScene) -> Iterator[VsockDriver]:
    with scene.guest() as guest:
        yield guest


def sending(sock: socket.socket, *pieces: bytes) -> threading.Thread:
    """The host sends while the guest is driven by the test's own thread."""

    def send() -> None:
        for piece in pieces:
            sock.sendall(piece)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def received(sock: socket.socket, size: int) -> bytes:
    """So many bytes, fewer at the end."""
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def message(sock: VsockSocket) -> bytes:
    found = sock.recv_message()
    assert found is not None
    return found.data


def came(sock: VsockSocket) -> bytes:
    return sock.recv(100) if sock.key.type == STREAM else message(sock)


def test_the_configuration_space_says_the_cid(guest: VsockDriver) -> None:
    assert guest.guest_cid == CID
    assert guest.has(abi.F_STREAM)
    assert guest.has(abi.F_SEQPACKET)


@pytest.mark.parametrize("type_", [STREAM, SEQPACKET])
def test_a_guest_connects(scene: VsockScene, guest: VsockDriver, type_: int) -> None:
    sock, end = scene.pair(guest, type=type_)
    sock.send(b"there")
    assert end.theirs.recv(100) == b"there"
    end.theirs.send(b"back")
    assert came(sock) == b"back"
    sock.close()
    assert end.wait_over() == "close"
    assert end.theirs.recv(1) == b""


@pytest.mark.parametrize("type_", [STREAM, SEQPACKET])
def test_the_host_connects(scene: VsockScene, guest: VsockDriver, type_: int) -> None:
    listener = guest.listen(80, type=type_)
    end = scene.connect(80, type_)
    sock = listener.accept()
    end.wait_told("accepted")
    end.theirs.send(b"there")
    assert came(sock) == b"there"
    sock.send(b"back")
    assert end.theirs.recv(100) == b"back"


def test_what_a_guest_says_with_its_acceptance_arrives(scene: VsockScene, guest: VsockDriver) -> None:
    end = scene.connect(80)
    (request,) = guest.stray() if not guest.answers else _unanswered(guest)
    for op, payload in ((abi.OP_RESPONSE, b""), (abi.OP_RW, b"banner")):
        guest.send_packet(guest.packet(op, 80, request.src_port, payload), publish=op == abi.OP_RW)
    assert received(end.theirs, 6) == b"banner"


def _unanswered(guest: VsockDriver) -> list[Any]:
    guest.answers = False
    return guest.stray()


def test_nobody_listens(scene: VsockScene, guest: VsockDriver) -> None:
    with pytest.raises(ConnectionRefusedError):
        guest.connect(81)
    end = scene.connect(81)
    guest.stray()
    end.wait_told("refused")
    scene.wait_closed(guest)


def test_a_host_that_does_not_answer_in_time_has_refused(scene: VsockScene, guest: VsockDriver) -> None:
    asked = scene.hold(81)
    with pytest.raises(ConnectionRefusedError):
        guest.connect(81)
    request = asked.get(timeout=PATIENCE)
    end = PairEnd()
    scene.back_end.ask(lambda: request.accept(end))
    end.wait_over()
    end.theirs.close()


def test_a_guest_that_does_not_answer_in_time_has_refused(scene: VsockScene, guest: VsockDriver) -> None:
    guest.answers = False
    end = scene.connect(81)
    request, reset = guest.stray(2)
    assert (request.op, reset.op) == (abi.OP_REQUEST, abi.OP_RST)
    end.wait_told("refused")


@pytest.mark.parametrize("size", SIZES)
def test_a_stream_both_ways(scene: VsockScene, guest: VsockDriver, size: int) -> None:
    sock, end = scene.pair(guest)
    data = random.Random(size).randbytes(size)
    sender = sending(end.theirs, data)
    assert sock.recv_exactly(size) == data
    sender.join()
    # The host does not read yet: all of it has room under way.
    sock.send(data)
    assert received(end.theirs, size) == data


@pytest.mark.parametrize("type_", [STREAM, SEQPACKET])
@pytest.mark.parametrize(
    "rx_buffers", [(44, 4096), (44 + 4096,), (20, 24, 100), (45,), (44 + 65_536,)], ids=str
)
def test_packets_are_split_to_the_guests_buffers(
    scene: VsockScene, rx_buffers: tuple[int, ...], type_: int
) -> None:
    data = random.Random(1).randbytes(5000)
    with scene.guest(rx_buffers=rx_buffers) as guest:
        sock, end = scene.pair(guest, type=type_)
        sender = sending(end.theirs, data, b"x")
        if type_ == STREAM:
            assert sock.recv_exactly(5001) == data + b"x"
        else:
            assert message(sock) == data
            assert message(sock) == b"x"
        sender.join()
        most = sum(rx_buffers) - HEADER
        assert sock.counts[abi.OP_RW] >= -(-5000 // most)


def cuts(*sizes: int) -> Any:
    def cut(size: int) -> list[int]:
        pieces = []
        for piece in sizes:
            pieces.append(min(piece, size))
            size -= pieces[-1]
        return [*pieces, size]

    return cut


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(
    "tx_cut", [cuts(44), cuts(), cuts(10, 10, 10, 10, 10), cuts(0, 1, 0, 43, 1, 0)], ids=range(4)
)
def test_a_guests_packets_lie_anywhere(scene: VsockScene, tx_cut: Any, indirect: bool) -> None:
    data = random.Random(2).randbytes(70_000)
    with scene.guest(tx_cut=tx_cut, indirect=indirect) as guest:
        sock, end = scene.pair(guest)
        sock.send(data)
        assert received(end.theirs, len(data)) == data


def test_messages_there_and_back(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest, type=SEQPACKET)
    for size in (1, 4096, 4097, 65_536, 65_537, 150_000):
        data = random.Random(size).randbytes(size)
        sock.send(data)
        assert end.theirs.recv(1 << 20) == data
        sender = sending(end.theirs, data)
        assert message(sock) == data
        sender.join()
    sock.send(b"")
    sock.send(b"after")
    assert end.theirs.recv(10) == b""
    assert end.theirs.recv(10) == b"after"
    end.theirs.send(b"")
    end.theirs.send(b"after")
    assert sock.recv_message() == (b"", False)
    assert message(sock) == b"after"


def test_a_guest_never_waits_for_a_reader(scene: VsockScene, guest: VsockDriver) -> None:
    stalled, silent = scene.pair(guest, 80)
    sent = 0
    while stalled.credit:
        stalled.send(bytes(min(stalled.credit, 65_536)))
        sent += 65_536
        guest.wait_sent()
        guest.pump()
    assert sent >= guest.buf_alloc
    other, end = scene.pair(guest, 81)
    data = random.Random(3).randbytes(1 << 20)
    # Its reader is there.
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(received(end.theirs, len(data))))
    reader.start()
    other.send(data)
    reader.join()
    assert found == [data]
    assert silent.theirs.recv(1) == b"\0"


def test_credit_comes_before_the_guest_runs_dry(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    size = 4 << 20
    reader = threading.Thread(target=received, args=(end.theirs, size))
    reader.start()
    for _ in range(size // 16_384):
        sock.send(bytes(16_384))
    reader.join()
    assert sock.counts[abi.OP_CREDIT_UPDATE] < size // 16_384, "not one for each packet"


def test_a_guest_that_asks_for_credit_is_told(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    sock.send(b"abc")
    assert received(end.theirs, 3) == b"abc"
    sock.request_credit()
    guest.wait_for(lambda: sock.peer_fwd_cnt == 3, "credit")


def test_a_device_sends_no_more_than_it_was_granted(scene: VsockScene) -> None:
    # The driver raises when one byte more comes.
    with scene.guest(buf_alloc=5000) as guest:
        sock, end = scene.pair(guest)
        sock.auto_credit = False
        data = random.Random(4).randbytes(12_000)
        sender = sending(end.theirs, data)
        guest.wait_for(lambda: sock.pending == 5000, "all that was granted")
        assert sock.recv_exactly(5000) == data[:5000]
        guest.wait_for(lambda: abi.OP_CREDIT_REQUEST in sock.counts, "request for credit")
        for at in (5000, 10_000):
            sock.update_credit()
            size = min(5000, len(data) - at)
            assert sock.recv_exactly(size) == data[at : at + size]
        sender.join()


def test_the_guest_shuts_down_its_sending(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    sock.send(b"last")
    sock.shutdown(abi.SHUTDOWN_SEND)
    assert received(end.theirs, 100) == b"last"
    end.wait_told("shutdown 2")
    end.theirs.send(b"still")
    assert sock.recv_exactly(5) == b"still"
    end.theirs.close()
    guest.wait_for(lambda: sock.reset, "end")


def test_the_guest_shuts_down_its_receiving(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    sock.shutdown(abi.SHUTDOWN_RCV)
    end.wait_told("shutdown 1")
    with pytest.raises(BrokenPipeError):
        end.theirs.send(b"x")
    sock.send(b"still")
    assert end.theirs.recv(100) == b"still"


def test_the_host_shuts_down_its_sending(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    end.theirs.send(b"last")
    end.theirs.shutdown(socket.SHUT_WR)
    assert sock.recv_exactly(4) == b"last"
    assert sock.recv(1) == b""
    assert sock.peer_shutdown == abi.SHUTDOWN_SEND
    sock.send(b"still")
    assert received(end.theirs, 5) == b"still"
    sock.close()
    assert end.wait_over() == "close"


@pytest.mark.parametrize("unread", [0, 100])
def test_the_host_closes(scene: VsockScene, guest: VsockDriver, unread: int) -> None:
    sock, end = scene.pair(guest)
    end.theirs.send(b"last")
    sock.send(bytes(unread))
    guest.wait_sent()
    end.theirs.close()
    assert sock.recv_exactly(4) == b"last"
    if unread:
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    else:
        assert sock.recv(1) == b""
    guest.wait_for(lambda: sock.reset, "end")
    end.wait_over()


def test_what_was_sent_before_a_close_arrives(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest, end={"buffer": 4096})
    data = random.Random(5).randbytes(200_000)
    sock.send(data)
    sock.shutdown(BOTH)
    assert received(end.theirs, len(data) + 1) == data
    guest.wait_for(lambda: sock.reset, "confirmation")
    assert end.wait_over() == "close"


def test_a_reset_of_the_guests(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    sock.abort()
    assert end.wait_over() == "reset"


def test_many_at_once(scene: VsockScene, guest: VsockDriver) -> None:
    accepted = scene.listen(80)
    pairs: list[tuple[VsockSocket, PairEnd]] = []
    for _ in range(400):
        sock = guest.connect(80)
        pairs.append((sock, accepted.get(timeout=PATIENCE)))
    for number, (sock, end) in enumerate(pairs):
        sock.send(b"%d" % number)
        end.theirs.send(b"%d" % -number)
    for number, (sock, end) in enumerate(pairs):
        assert end.theirs.recv(10) == b"%d" % number
        assert sock.recv(10) == b"%d" % -number
    for sock, _ in pairs:
        sock.shutdown(BOTH)
    guest.wait_for(lambda: not guest.sockets, "confirmations")
    assert {end.wait_over() for _, end in pairs} == {"close"}
    scene.wait_closed(guest)


def test_those_that_have_something_take_turns(scene: VsockScene) -> None:
    with scene.guest(rx_depth=4) as guest:
        pairs = [scene.pair(guest, port) for port in range(80, 84)]
        guest.reads = False
        for _, end in pairs:
            sending(end.theirs, bytes(100_000)).join()
        guest.reads = True
        guest.wait_for(lambda: any(sock.received == 100_000 for sock, _ in pairs), "all of one of them")
        # While the first to have all of its own had it, the others had about as much.
        assert min(sock.received for sock, _ in pairs) >= 30_000
        guest.wait_for(lambda: all(sock.received == 100_000 for sock, _ in pairs), "all of all")


def test_a_guest_that_is_polled_is_asked_for_no_kicks(tmp_path: Path) -> None:
    with VsockScene(tmp_path, CID, busyloop_timeout=60_000_000) as scene, scene.guest() as guest:
        sock, end = scene.pair(guest)

        def talk() -> None:
            sock.send(b"there")
            assert end.theirs.recv(100) == b"there"
            end.theirs.send(b"back")
            assert sock.recv_exactly(4) == b"back"

        talk()
        kicks = guest.tx.kicks
        for _ in range(20):
            talk()
        assert guest.tx.kicks == kicks


def test_a_key_can_be_used_again(scene: VsockScene, guest: VsockDriver) -> None:
    accepted = scene.listen(80)
    for _ in range(50):
        sock = guest.connect(80, from_port=7777)
        end = accepted.get(timeout=PATIENCE)
        sock.send(b"x")
        assert end.theirs.recv(1) == b"x"
        sock.close()
        assert end.wait_over() == "close"


def test_another_driver_begins_with_nothing(scene: VsockScene) -> None:
    with scene.guest() as guest:
        _, end = scene.pair(guest)
        guest.stop()
    assert end.wait_over() == "reset"
    scene.wait_closed()
    with scene.guest() as guest:
        sock, end = scene.pair(guest)
        sock.send(b"new")
        assert received(end.theirs, 3) == b"new"


def test_connections_outlive_rings_that_stop(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest)
    bases = guest.stop()
    end.theirs.send(b"meanwhile")
    guest.resume(bases=bases)
    assert sock.recv_exactly(9) == b"meanwhile"
    sock.send(b"well")
    assert received(end.theirs, 4) == b"well"


def test_the_guest_is_told_that_its_connections_are_gone(scene: VsockScene, guest: VsockDriver) -> None:
    sock, _ = scene.pair(guest)
    assert scene.back_end.ask(scene.device.transport_reset)
    guest.wait_transport_reset()
    assert sock.reset


def test_messages_without_number_for_a_reader_who_comes_late(scene: VsockScene, guest: VsockDriver) -> None:
    sock, end = scene.pair(guest, type=SEQPACKET)
    for number in range(3000):
        sock.packet(abi.OP_RW, b"%d" % number, abi.SEQ_EOM)
    guest.wait_sent()
    for number in range(3000):
        assert end.theirs.recv(100) == b"%d" % number


@pytest.mark.parametrize("by_page", [False, True])
@pytest.mark.parametrize("type_", [STREAM, SEQPACKET])
def test_behind_an_iommu(scene: VsockScene, type_: int, by_page: bool) -> None:
    with GuestMemory(64 * MIB) as memory, scene.back_end.connect(0) as front:
        iommu = Iommu(memory, by_page=by_page)
        features = FEATURES | 1 << virtio.F_ACCESS_PLATFORM
        with VsockDriver(front, memory, iommu=iommu, features=features, timeout=PATIENCE) as guest:
            guest.start()
            sock, end = scene.pair(guest, type=type_)
            for number in range(60):
                data = random.Random(number).randbytes(5000)
                sock.send(data)
                # Only a driver that waits answers what the device asks.
                guest.wait_sent()
                assert received(end.theirs, len(data)) == data
                end.theirs.send(data)
                assert sock.recv_exactly(len(data)) == data


@pytest.mark.parametrize("type_", [STREAM, SEQPACKET])
def test_chains_of_single_bytes_as_long_as_they_may_be(scene: VsockScene, type_: int) -> None:
    with scene.guest(
        ring_size=1024, rx_buffers=(1,) * 1024, rx_depth=1, tx_cut=lambda size: [1] * size, indirect=True
    ) as guest:
        sock, end = scene.pair(guest, type=type_)
        data = random.Random(type_).randbytes(1024 - HEADER)
        for _ in range(2):
            sock.send(data)
            assert received(end.theirs, len(data)) == data
        end.theirs.send(data)
        assert sock.recv_exactly(len(data)) == data
