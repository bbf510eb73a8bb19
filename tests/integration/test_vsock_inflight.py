"""A socket device's back end that ends without a word, and what was in hand then (INFLIGHT_SHMFD).

Connections are the back end's, and end with it: the guest is told so by TRANSPORT_RESET (virtio 1.3, 5.10.6.7), the
next back end knows none of them (RST), and the host's programs find theirs closed. The rings are the guest's, and go
on: every chain comes back once.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from back_end import PATIENCE
from pyvhost.abi import virtio_vsock as abi
from pyvhost.cli.serving import Serving
from pyvhost.driver.inflight import Inflight
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.driver.vsock import RX, TX, VsockDriver
from pyvhost.driver.vsock_socket import VsockSocket
from vsock_scene import VsockScene

SIZE = 64
KINDS = {abi.TYPE_STREAM: (socket.SOCK_STREAM, ""), abi.TYPE_SEQPACKET: (socket.SOCK_SEQPACKET, ".seqpacket")}


def connected(path: Path, table: Inflight | None = None) -> VhostUserFrontend:
    """A front end that has its back end keep a table, a new one or the one before."""
    front = VhostUserFrontend.connect(path, timeout=PATIENCE)
    front.inflight, front.inflight_size = table, (3, SIZE)
    return front


def table_of(driver: VsockDriver) -> Inflight:
    front = driver.frontend
    assert isinstance(front, VhostUserFrontend)
    assert front.inflight is not None
    return front.inflight


@contextmanager
def dialled(uds: Path, driver: VsockDriver, type_: int) -> Iterator[tuple[socket.socket, VsockSocket]]:
    """A client of the host, connected to the guest's port 7, and the guest's socket."""
    kind, suffix = KINDS[type_]
    with socket.socket(socket.AF_UNIX, kind) as client:
        client.settimeout(PATIENCE)
        client.connect(f"{uds}{suffix}")
        client.send(b"CONNECT 7\n")
        sock = driver.listen(7, type=type_).accept()
        assert client.recv(32) == b"OK %d\n" % sock.key.peer_port
        yield client, sock


def came(sock: VsockSocket, size: int) -> bytes:
    if sock.key.type == abi.TYPE_STREAM:
        return sock.recv_exactly(size)
    message = sock.recv_message()
    assert message is not None
    return message.data


def test_a_back_end_that_is_killed_takes_its_connections_with_it_and_leaves_the_rings(
    tmp_path: Path, memory: GuestMemory
) -> None:
    path, uds = tmp_path / "vm0.sock", tmp_path / "v"
    words = ["vsock", "--socket-path", str(path), "--guest-cid", "42", "--uds-path", str(uds)]
    serving = Serving(words, [path])
    driver: VsockDriver | None = None
    try:
        serving.wait_ready()
        front = connected(path)
        driver = VsockDriver(front, memory, SIZE, timeout=PATIENCE)
        driver.start()
        posted = driver.rx.ring.outstanding
        for turn, type_ in enumerate(KINDS, 1):
            with dialled(uds, driver, type_) as (client, sock):
                client.send(b"there")
                assert came(sock, 5) == b"there"
                # Both ways, and nobody waits for the end of any of it: the device is at work on it, or not yet.
                for number in range(40):
                    client.send(bytes([number]) * 3000)
                    sock.packet(abi.OP_RW, bytes([number]) * 3000, abi.SEQ_EOM * sock.key.type >> 1)
                os.kill(serving.pid, signal.SIGKILL)
                serving.process.wait(PATIENCE)
                serving.close()
                with suppress(ConnectionResetError):
                    while client.recv(1 << 16):
                        pass
                serving = Serving(words, [path])
                serving.wait_ready()
                table = table_of(driver)
                front.close()
                front = connected(path, table)
                driver.resume(front)
                driver.wait_transport_reset(turn)
                assert sock.reset
                # Each packet of a connection of old is answered, in case that is not heard; what the former back end
                # had put into the ring comes before.
                sock.packet(abi.OP_CREDIT_REQUEST)
                with pytest.raises(ConnectionRefusedError):
                    # Nobody listens there, and who asks is answered behind all others.
                    driver.connect(9)
                ops = [packet.op for packet in driver.stray(0)]
                assert set(ops[: ops.index(abi.OP_RST)]) <= {abi.OP_RW, abi.OP_CREDIT_UPDATE}
                assert set(ops[ops.index(abi.OP_RST) :]) == {abi.OP_RST}
            driver.wait_sent()
            driver.pump()
            assert table.heads(RX) == table.heads(TX) == []
            assert driver.rx.ring.outstanding == posted
        with dialled(uds, driver, abi.TYPE_STREAM) as (client, sock):
            for number in range(2 * SIZE):
                client.send(b"%3d" % number)
                assert came(sock, 3) == b"%3d" % number
                sock.send(b"%3d" % number)
                assert client.recv(3) == b"%3d" % number
        table_of(driver).close()
        front.close()
    finally:
        if driver is not None:
            driver.close()
        serving.close()


def test_what_an_earlier_back_end_had_in_hand_is_done_again(tmp_path: Path, memory: GuestMemory) -> None:
    """A table that says so, written by nobody that is here: those packets first, in their order, then new ones."""
    with (
        VsockScene(tmp_path) as scene,
        connected(scene.back_end.paths[0]) as front,
        VsockDriver(front, memory, SIZE, timeout=PATIENCE) as driver,
    ):
        asked = scene.hold(80)
        driver.start()
        posted = driver.rx.ring.outstanding
        with pytest.raises(ConnectionRefusedError):
            driver.connect(81)
        driver.wait_sent()
        bases = driver.stop()
        assert bases[TX] == 1
        for port in (5001, 5002, 5003):
            driver.send_packet(driver.packet(abi.OP_REQUEST, port, 80))
        sent = [driver.tx.ring.avail_entry(bases[TX] + at) for at in range(3)]
        room = [driver.rx.ring.avail_entry(bases[RX] + at) for at in range(2)]
        table = table_of(driver)
        # Two of each taken by the one before, the second first.
        _taken(table, TX, (sent[1], sent[0]))
        _taken(table, RX, (room[1], room[0]))
        front.close()
        with connected(scene.back_end.paths[0], table) as again:
            driver.resume(again, bases | {TX: bases[TX] + 2, RX: bases[RX] + 2})
            assert [asked.get(timeout=PATIENCE).key.guest_port for _ in sent] == [5002, 5001, 5003]
            driver.wait_sent()
            driver.wait_transport_reset()
            # Nobody listens there: an answer for each of the receive buffers, and more, and those in hand first.
            before = driver.rx.ring.used_idx
            for _ in range(posted + 2):
                with pytest.raises(ConnectionRefusedError):
                    driver.connect(81)
            assert [driver.rx.ring.used_element(before + at)[0] for at in range(2)] == [room[1], room[0]]
            assert table.heads(RX) == table.heads(TX) == []
            assert driver.rx.ring.outstanding == posted
            driver.stop()
            table.close()


def _taken(table: Inflight, index: int, heads: tuple[int, int]) -> None:
    """Notes in the table that these were taken from ring `index`, in this order."""
    region = table.mmap_offset + index * ((16 + 16 * SIZE + 63) // 64 * 64)
    for counter, head in enumerate(heads, 100):
        entry = bytes([1, 0, 0, 0, 0, 0, 0, 0]) + counter.to_bytes(8, "little")
        os.pwrite(table.fd, entry, region + 16 + 16 * head)
    assert table.heads(index) == list(heads)
