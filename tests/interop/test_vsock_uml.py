"""Sockets of User Mode Linux, unmodified, against `pyvhost vsock`: with the host, and between two guests of a group.

VSOCK_SECONDS and VSOCK_BYTES make load and large transfers longer than they are here.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from interop import vsock_peer
from interop.conftest import Served, SocketDevice
from interop.vsock_peer import RECORDS
from pyvhost.cli.guests import UmlGuest
from requirements import need_program

PROGRAM = Path(vsock_peer.__file__)
KINDS = vsock_peer.TYPES
HOST = 2
CIDS = (3, 4)
#: In the guests: streams here, SEQPACKET at the next.
PORT = 7000
SECONDS = float(os.environ.get("VSOCK_SECONDS", "10"))
BYTES = int(os.environ.get("VSOCK_BYTES", f"{200 << 20}"))


class World:
    """Two guests in a group, both of which serve at PORT."""

    def __init__(self, served: Served) -> None:
        self.devices = served.start_vsock("lan", *CIDS, group=True)
        served.wait()
        self.guests = [
            UmlGuest(vsock=device.socket, name=f"guest {device.cid}", memory_mib=192)
            for device in self.devices
        ]

    def start(self) -> None:
        for guest in self.guests:
            guest.launch()
        for guest in self.guests:
            guest.wait_booted()
            python(guest, "listen", PORT)

    @property
    def device(self) -> SocketDevice:
        return self.devices[0]

    @property
    def guest(self) -> UmlGuest:
        return self.guests[0]


def python(guest: UmlGuest, *words: object, timeout: float = 90.0) -> str:
    """What `vsock_peer.py` prints in the guest."""
    return guest.run([sys.executable, "-I", str(PROGRAM), *map(str, words)], timeout=timeout).output.strip()


def port_of(name: str, base: int = PORT) -> int:
    return base + (name == "seqpacket")


@contextmanager
def host_serves(device: SocketDevice, port: int) -> Iterator[None]:
    """As `vsock_peer.py listen` in a guest."""
    with ExitStack() as stack:
        socks = [
            stack.enter_context(device.listen(port_of(name, port), kind)) for name, kind in KINDS.items()
        ]
        for name in KINDS:
            stack.callback(os.unlink, f"{device.uds}_{port_of(name, port)}")
        servers = vsock_peer.Servers(*socks)
        thread = threading.Thread(target=servers.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(servers.stop)
        yield


@pytest.fixture(scope="module")
def world(served: Served) -> Iterator[World]:
    need_program("linux.uml", package="user-mode-linux")
    vsock_peer.more_files()
    world = World(served)
    with ExitStack() as stack:
        for guest in world.guests:
            stack.callback(guest.stop)
        world.start()
        yield world


@pytest.mark.parametrize("name", KINDS)
def test_the_host_calls_the_guest(world: World, name: str) -> None:
    amount = 20 << 20 if name == "stream" else 200
    with world.device.connect(port_of(name), KINDS[name]) as sock:
        assert vsock_peer.exchange(sock, amount, amount, 1) == "ok"


@pytest.mark.parametrize("name", KINDS)
def test_the_guest_calls_the_host(world: World, name: str) -> None:
    amount = 20 << 20 if name == "stream" else 200
    with host_serves(world.device, 8000):
        assert python(world.guest, "exchange", name, HOST, port_of(name, 8000), amount, amount, 2) == "ok"


@pytest.mark.parametrize("name", KINDS)
def test_a_guest_calls_its_sibling(world: World, name: str) -> None:
    amount = 20 << 20 if name == "stream" else 200
    for guest, cid in zip(world.guests, reversed(CIDS), strict=True):
        assert python(guest, "exchange", name, cid, port_of(name), amount, amount, RECORDS) == "ok"


@pytest.mark.parametrize("name", KINDS)
def test_half_closed_either_way(world: World, name: str) -> None:
    # The whole of one direction comes when the other has ended, with the verdict on that at its end.
    for there, back in ((100, 0), (0, 100), (0, 0)):
        with world.device.connect(port_of(name), KINDS[name]) as sock:
            assert vsock_peer.exchange(sock, there, back, 4) == "ok"
        assert python(world.guest, "exchange", name, CIDS[1], port_of(name), there, back, 4) == "ok"


def test_large_transfers(world: World) -> None:
    seconds = 60 + BYTES / 1e7
    with world.device.connect(PORT) as sock:
        assert vsock_peer.exchange(sock, BYTES, 0, 5) == "ok"
    with host_serves(world.device, 8000):
        words = ("exchange", "stream", HOST, 8000, BYTES, 0, 6)
        assert python(world.guest, *words, timeout=seconds) == "ok"


def test_a_thousand_connections_at_once(world: World) -> None:
    assert vsock_peer.many(partial(world.device.connect, PORT), 1000) == "ok"
    with host_serves(world.device, 8000):
        assert python(world.guest, "many", "stream", HOST, 8000, 1000) == "ok"
    assert python(world.guest, "many", "stream", CIDS[1], PORT, 300) == "ok"


def test_nobody_listens(world: World) -> None:
    for name, kind in KINDS.items():
        with pytest.raises(ConnectionRefusedError):
            world.device.connect(99, kind)
        for cid in (HOST, CIDS[1], 77):
            assert python(world.guest, "errno", name, cid, 99) == "ECONNRESET"


def test_a_reader_that_stalls_holds_up_nobody(world: World) -> None:
    size = 8 << 20
    with world.device.connect(PORT) as stalled:
        stalled.sendall(b"hold %d 7\n" % size)
        found: list[str] = []

        def send() -> None:
            vsock_peer.give(stalled, size, 7)
            found.append(vsock_peer.rest(stalled).decode())

        sender = threading.Thread(target=send)
        sender.start()
        for seed in range(3):
            with world.device.connect(PORT) as sock:
                assert vsock_peer.exchange(sock, 4 << 20, 4 << 20, seed) == "ok"
        assert python(world.guest, "exchange", "stream", CIDS[1], PORT, 1 << 20, 1 << 20, 8) == "ok"
        assert not found
        with world.device.connect(PORT) as sock:
            sock.sendall(b"release\n")
            vsock_peer.rest(sock)
        sender.join(vsock_peer.TIMEOUT)
        assert found == ["ok"]


def test_siblings_under_load_both_ways(world: World) -> None:
    """Each guest calls the other on several connections at once, each carrying as much as it can both ways."""
    found: dict[int, str] = {}

    def load(guest: UmlGuest, cid: int) -> None:
        found[cid] = python(guest, "load", cid, PORT, 4, 2 << 20, SECONDS, timeout=SECONDS + 60)

    callers = [
        threading.Thread(target=load, args=(guest, cid))
        for guest, cid in zip(world.guests, reversed(CIDS), strict=True)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 2
    for told in found.values():
        word, _, moved = told.partition(" ")
        assert word == "ok", told
        assert int(moved) > 0


def test_short_messages_to_the_host_arrive(world: World) -> None:
    """As systemd tells READY=1: a connection for each message, closed as soon as that is sent."""
    texts = [f"READY={number}" for number in range(50)]
    with world.device.listen(9000, socket.SOCK_SEQPACKET) as server:
        received: list[str] = []

        def serve() -> None:
            for _ in texts:
                sock, _ = server.accept()
                with sock:
                    received.append(sock.recv(4096).decode())

        thread = threading.Thread(target=serve)
        thread.start()
        python(world.guest, "notify", HOST, 9000, *texts)
        thread.join(vsock_peer.TIMEOUT)
    os.unlink(f"{world.device.uds}_9000")
    assert received == texts


def test_a_guest_that_reboots_with_connections_open(world: World) -> None:
    socks = [world.device.connect(PORT) for _ in range(20)]
    for sock in socks:
        sock.sendall(b"echo\n" + b"x" * 100)
        assert len(sock.recv(100)) > 0
    world.guest.reboot()
    for sock in socks:
        with sock:
            try:
                assert not vsock_peer.rest(sock).strip(b"x")
            except ConnectionResetError:
                pass
    with pytest.raises(ConnectionRefusedError):
        world.device.connect(PORT)
    python(world.guest, "listen", PORT)
    test_the_host_calls_the_guest(world, "stream")
    test_a_guest_calls_its_sibling(world, "stream")
