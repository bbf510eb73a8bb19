"""Live migration between two QEMUs of this machine, pyvhost behind both, the guest busy all the while.

The guest has a card on a tap, whose two ends are two processes and two ports of one bridge, and cards on a switch,
whose ends are members of one process. Streams run both ways through all of it; what has arrived is compared
byte for byte, and so is the guest's whole memory while it stands still.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from interop.conftest import Card, Ip, Served, eventually
from pyvhost.cli.guests import Kernel, Nic, QemuGuest
from pyvhost.cli.guests.base import dying_with_parent
from pyvhost.cli.guests.migration import UNLIMITED, Migration, Passed, differing_pages
from requirements import need_program, need_root

#: What the streams consist of, again and again. No page of it is like another.
BLOCK = os.urandom(1 << 19)
#: Bytes a second that memory passes at: slow enough for some passes over it, and below what the guest dirties.
SLOW = 50 << 20
ETH_P_RARP = 0x8035
#: The guest is .2 and the host .1 of 10.N.0.0/24; the third card has no address, and says nothing by itself.
NETWORKS = {"tap": 1, "switch": 2}


class World:
    """The guest, and two places where it can be: each has an end of each card."""

    def __init__(self, served: Served, kernel: Kernel, ip: Ip) -> None:
        self.ip = ip
        ip("link add br0 type bridge forward_delay 0 stp_state 0")
        ip("link set br0 up")
        ip("address add 10.1.0.1/24 dev br0")
        taps = [served.start(f"tap{end}", f"tap:mig{end},bridge=br0")[0] for end in range(2)]
        lan = served.start("lan", "switch:lan,uplink=tap:lan0", "--queue-pairs", "2", sockets=4)
        served.wait()
        ip("address replace 10.2.0.1/24 dev lan0")
        ip("link set lan0 up")
        self.ends: list[list[Card]] = [[taps[end], lan[end], lan[2 + end]] for end in range(2)]
        self.here = 0
        nics = [
            Nic(self.ends[0][0].socket),
            Nic(self.ends[0][1].socket, queue_pairs=2),
            Nic(self.ends[0][2].socket, options="guest_announce=off"),
        ]
        self.guest = QemuGuest(nics, kernel=kernel, name="the guest", memory_mib=128, cpus=1, movable=True)

    def start(self) -> None:
        self.guest.start(120)
        for number, network in enumerate(NETWORKS.values()):
            self.guest.run(
                f"ip address add 10.{network}.0.2/24 dev eth{number}; ip link set eth{number} up;"
                f"ping -c 1 10.{network}.0.1"
            )
        self.guest.run("ethtool -L eth1 combined 2; ip link set eth2 up")
        with socket.create_server(("10.1.0.1", 0)) as server:
            sender = threading.Thread(target=serve_block, args=[server], daemon=True)
            sender.start()
            self.guest.run(f"nc 10.1.0.1 {server.getsockname()[1]} -e dd of=/tmp/block")
            sender.join(30)

    @contextmanager
    def destination(self) -> Iterator[QemuGuest]:
        """A QEMU at the other place, waiting; it stays if the guest is in it by the end."""
        sockets = [card.socket for card in self.ends[1 - self.here]]
        twin = self.guest.twin(sockets, f"the guest at {1 - self.here}")
        try:
            yield twin.start()
        finally:
            if self.guest is not twin:
                twin.stop()

    def migrate(self) -> Passed:
        """To the other place, with several passes over a memory that is written to, and compare all of it."""
        with self.destination() as destination:
            migration = Migration(self.guest, destination)
            migration.start(bandwidth=SLOW, downtime=0.001)
            migration.wait_pass(3)
            migration.limit(UNLIMITED)
            passed = migration.wait_completed()
            different = differing_pages(self.guest, destination)
            assert not different, [f"{page:#x}" for page in different]
            migration.resume()
            self.guest.stop()
            self.guest = destination
            self.here = 1 - self.here
        return passed

    def call_off(self) -> None:
        """Set out, and stay."""
        with self.destination() as destination:
            migration = Migration(self.guest, destination)
            migration.start(bandwidth=SLOW, downtime=0.001)
            # As slow as can be, it does not complete before it is told not to.
            migration.wait_pass(2)
            migration.limit(4096, 0.001)
            migration.cancel()
            # A destination that never got all of it ends by itself.
            assert destination.wait() == 1
        assert self.guest.execute("query-status")["status"] == "running"


def serve_block(server: socket.socket) -> None:
    """Give BLOCK to the first who comes."""
    server.settimeout(30)
    with server.accept()[0] as sock:
        sock.sendall(BLOCK)


@pytest.fixture(scope="module")
def world(kernel: Kernel, served: Served, ip: Ip | None) -> Iterator[World]:
    need_root()
    need_program("ping", package="iputils-ping")
    need_program("ethtool")
    assert ip is not None
    found = World(served, kernel, ip)
    try:
        found.start()
        yield found
    finally:
        found.guest.stop()


class Streams:
    """A stream each way between the host at `address` and the guest, for as long as this is entered.

    Both are BLOCK again and again. Leaving ends them, and fails if anything is missing or not as it was sent.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.address = f"10.{NETWORKS[name]}.0.1"
        self.name = name
        self.sent = self.received = 0
        self.wrong = ""
        self._digest = hashlib.md5()
        self._guests_digest = ""
        self._more = f"/tmp/more-{name}"
        self._over = threading.Event()
        self._stack = ExitStack()
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Streams:
        with ExitStack() as stack:
            servers = [stack.enter_context(socket.create_server((self.address, 0))) for _ in range(2)]
            down, up = (server.getsockname()[1] for server in servers)
            # What nc starts has the connection as its input and output.
            self.world.guest.run(
                f"touch {self._more}; nc {self.address} {down} -e md5sum >/dev/null 2>&1 &"
                f"nc {self.address} {up} -e sh -c 'while [ -e {self._more} ]; do cat /tmp/block; done'"
                " >/dev/null 2>&1 &"
            )
            for server in servers:
                server.settimeout(30)
                self._sockets.append(self._stack.enter_context(server.accept()[0]))
        self._threads = [
            threading.Thread(target=self._work, args=[way, sock], daemon=True)
            for way, sock in zip((self._send, self._receive), self._sockets, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def go_on(self, size: int = 1 << 19) -> None:
        """Wait until so much more has passed each way."""
        sent, received = self.sent + size, self.received + size
        eventually(lambda: self.wrong or (self.sent > sent and self.received > received), 60)
        assert not self.wrong, self.wrong

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        with self._stack:
            self._over.set()
            if kind is not None:
                for sock in self._sockets:
                    sock.shutdown(socket.SHUT_RDWR)
                for thread in self._threads:
                    thread.join(30)
                return
            self.world.guest.run(f"rm {self._more}")
            for thread in self._threads:
                thread.join(60)
            assert not self.wrong, self.wrong
            assert self._guests_digest == self._digest.hexdigest()
            assert self.received > 0
            assert self.received % len(BLOCK) == 0

    def _work(self, way: Callable[[socket.socket], None], sock: socket.socket) -> None:
        sock.settimeout(60)
        try:
            way(sock)
        except OSError as problem:
            self.wrong = self.wrong or f"{self.name}: {problem}"

    def _send(self, sock: socket.socket) -> None:
        # What lies in here at the end has to be taken in.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        while not self._over.is_set():
            sock.sendall(BLOCK)
            self._digest.update(BLOCK)
            self.sent += len(BLOCK)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile() as answer:
            self._guests_digest = answer.read().split()[0]

    def _receive(self, sock: socket.socket) -> None:
        while data := sock.recv(1 << 18):
            start = self.received % len(BLOCK)
            if data != (BLOCK + BLOCK)[start : start + len(data)]:
                self.wrong = f"{self.name}: not what was sent, within {len(data)} bytes at {self.received}"
            self.received += len(data)


def counted(world: World) -> dict[str, int]:
    """What the guest's kernel counts of ICMP."""
    names, values = re.findall(r"^Icmp: (.*)$", world.guest.run("cat /proc/net/snmp").output, re.M)
    return dict(zip(names.split(), map(int, values.split()), strict=True))


@contextmanager
def pings(world: World) -> Iterator[None]:
    """The host and the guest ask each other, as fast as they answer."""
    before = counted(world)
    host = subprocess.Popen(
        [*dying_with_parent(), "ping", "-A", "-q", "-s", "1400", "10.1.0.2"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        world.guest.run("ping -A -q -s 1400 10.1.0.1 >/dev/null 2>&1 & echo $! >/tmp/pinging")
        yield
        host.send_signal(signal.SIGINT)
        said = host.communicate(timeout=10)[0]
        world.guest.run("kill $(cat /tmp/pinging)")
        found = re.search(r"(\d+) packets transmitted, (\d+) received", said)
        assert found, said
        assert int(found[2]) > int(found[1]) // 2, said
        # Its ping is no witness: the host's questions lie in its socket as well, and push answers out of it.
        after = counted(world)
        asked, answered = (after[name] - before[name] for name in ("OutEchos", "InEchoReps"))
        assert answered > asked // 2 > 0, (asked, answered)
    finally:
        host.kill()
        host.communicate()


@contextmanager
def busy(world: World) -> Iterator[Callable[[], None]]:
    """Traffic of all kinds; what it gives waits until all of it has gone on."""
    with pings(world), Streams(world, "tap") as tap, Streams(world, "switch") as switch:

        def go_on() -> None:
            tap.go_on()
            switch.go_on()

        go_on()
        yield go_on


def port_of(mac: str) -> str:
    """Behind which port the host's bridge has an address."""
    said = subprocess.run(["bridge", "fdb", "show", "br", "br0"], capture_output=True, text=True, check=True)
    found = re.search(rf"^{mac} dev (\S+) ", said.stdout, re.M)
    return found[1] if found else ""


@contextmanager
def announcement(interface: str) -> Iterator[socket.socket]:
    """RARP requests that come out of an interface."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_RARP)) as sock:
        sock.bind((interface, ETH_P_RARP))
        sock.settimeout(30)
        yield sock


# --- the tests -------------------------------------------------------------------------------------------


def test_there_and_back(world: World) -> None:
    with busy(world) as go_on:
        for place in (1, 0):
            with announcement("lan0") as announced:
                source = world.ends[world.here][0].counted
                before = source("rx0").get("packets")
                passed = world.migrate()
                assert world.here == place
                assert source("rx0").get("packets") > before
                assert passed.passes >= 3, passed
                # The guest can't announce its third card: QEMU has the back end do it.
                mac = bytes.fromhex(world.guest.nics[2].address.replace(":", ""))
                while announced.recv(2048)[6:12] != mac:
                    pass
            go_on()
            eventually(lambda: port_of(world.guest.nics[0].address) == f"mig{world.here}")


def test_called_off(world: World) -> None:
    """The guest stays and stays busy, and then goes after all."""
    with busy(world) as go_on:
        for _ in range(2):
            world.call_off()
            go_on()
        world.migrate()
        go_on()


def test_an_idle_guest(world: World) -> None:
    """With nothing under way, one pass and what the guest's kernel does by itself."""
    world.migrate()
    world.guest.run("ping -c 1 10.1.0.1; ping -c 1 10.2.0.1")
