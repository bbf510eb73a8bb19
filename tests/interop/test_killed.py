"""Either side killed in the middle of traffic, with SIGKILL, and started again: the other one goes on by itself.

QEMU dials a back end that has gone once a second, and what was in no used ring yet is done again by the next one.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from interop.conftest import Card, Ip, Served
from interop.transfer import through
from pyvhost.cli.guests import Kernel, Nic, QemuGuest
from requirements import need_root

KILLS = 10
#: Each way, between one kill and the next.
BYTES = 1 << 19
TIMEOUT = 60.0

# Sends its file again and again, and receives, until it is told that this is enough.
LOAD = """
cd /tmp
rm -f enough sent.sum received.sum
[ -e block ] || head -c 1000003 /dev/urandom >block
[ -p copy ] || mkfifo copy never
sha256sum <copy >sent.sum &
(until [ -e enough ]; do cat block; done | tee copy | nc 10.1.0.1 {to_host}) >/dev/null 2>&1 &
(nc 10.1.0.1 {to_guest} <>never | sha256sum >received.sum) 2>/dev/null &
"""
ENOUGH = """
cd /tmp
touch enough
until [ -s sent.sum ] && [ -s received.sum ]; do usleep 50000; done
cat sent.sum received.sum
"""


class Load:
    """The host's end of two TCP connections with a guest, one each way, that go on until `finish`."""

    def __init__(self, guest: QemuGuest) -> None:
        self._guest = guest
        self._block = os.urandom(1_000_003)
        self._changed = threading.Condition()
        self._enough = False
        self.received = 0
        self.sent = 0
        self._digests = [hashlib.sha256(), hashlib.sha256()]  # received, sent
        servers = [socket.create_server(("10.1.0.1", 0)) for _ in range(2)]
        targets = (self._receive, self._send)
        self._threads = [
            threading.Thread(target=self._serve, args=pair, daemon=True)
            for pair in zip(servers, targets, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        to_host, to_guest = (server.getsockname()[1] for server in servers)
        guest.run(LOAD.format(to_host=to_host, to_guest=to_guest))

    def flow(self, size: int) -> None:
        """Until so many bytes more have gone each way."""
        with self._changed:
            received, sent = self.received + size, self.sent + size
            went = self._changed.wait_for(lambda: self.received >= received and self.sent >= sent, TIMEOUT)
            assert went, f"received {received - self.received}, sent {sent - self.sent} bytes too few"

    def finish(self) -> None:
        """Have it end; what was sent is what was received, both ways."""
        with self._changed:
            self._enough = True
            self._changed.notify_all()
        sent, received = (
            line.split()[0] for line in self._guest.run(ENOUGH, timeout=TIMEOUT).output.splitlines()
        )
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        assert sent == self._digests[0].hexdigest()
        assert received == self._digests[1].hexdigest()

    def _serve(self, server: socket.socket, what: Callable[[socket.socket], None]) -> None:
        with server:
            connection, _ = server.accept()
        # The other end may be killed too.
        with connection, suppress(ConnectionResetError):
            what(connection)

    def _receive(self, connection: socket.socket) -> None:
        while data := connection.recv(1 << 16):
            self._digests[0].update(data)
            with self._changed:
                self.received += len(data)
                self._changed.notify_all()

    def _send(self, connection: socket.socket) -> None:
        # What is counted as sent is to have left, nearly.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
        while not self._enough:
            for start in range(0, len(self._block), 1 << 16):
                data = self._block[start : start + (1 << 16)]
                # An emulated guest that receives all it can sends next to nothing.
                with self._changed:
                    self._changed.wait_for(lambda: self._enough or self.sent < self.received + BYTES)
                connection.sendall(data)
                self._digests[1].update(data)
                with self._changed:
                    self.sent += len(data)
                    self._changed.notify_all()


@pytest.fixture(scope="module")
def tap(ip: Ip | None) -> str:
    """One that stays when nobody has it: the host's routes and connections stay with it."""
    need_root()
    assert ip is not None
    ip("tuntap add dev vm1 mode tap vnet_hdr")
    ip("address add 10.1.0.1/24 dev vm1")
    ip("link set vm1 up")
    return "tap:vm1"


def start(served: Served, tap: str) -> Card:
    (card,) = served.start("one", tap)
    card.serving.wait_ready()
    return card


def boot(card: Card, kernel: Kernel) -> QemuGuest:
    guest = QemuGuest([Nic(card.socket)], kernel=kernel, name="the guest", reconnect=1, programs=())
    guest.start(120)
    guest.run("ip address add 10.1.0.2/24 dev eth0; ip link set eth0 up")
    return guest


@pytest.fixture
def card(served: Served, tap: str) -> Iterator[Card]:
    card = start(served, tap)
    yield card
    if card.serving.running:
        served.end(card.serving)


def test_the_back_end_is_killed_ten_times_during_a_transfer(
    card: Card, served: Served, kernel: Kernel, tap: str
) -> None:
    with boot(card, kernel) as guest:
        load = Load(guest)
        for _ in range(KILLS):
            load.flow(BYTES)
            served.kill(card.serving)
            card = start(served, tap)
        load.flow(BYTES)
        load.finish()
        served.end(card.serving)


def test_the_front_end_is_killed_during_a_transfer(card: Card, kernel: Kernel) -> None:
    """The back end is the same process throughout, and serves the next guest as the first."""
    for _ in range(2):
        with boot(card, kernel) as guest:
            load = Load(guest)
            load.flow(BYTES)
            os.kill(guest.pid, signal.SIGKILL)
            assert guest.wait() == -signal.SIGKILL
    with boot(card, kernel) as guest:
        through(guest, "10.1.0.1", BYTES)
