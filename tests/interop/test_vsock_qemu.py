"""Sockets of Debian's stock kernel in QEMU, emulated, against `pyvhost vsock`: host, sibling in UML, resets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from interop import vsock_peer
from interop.conftest import Served, SocketDevice
from interop.test_vsock_uml import HOST, KINDS, PORT, host_serves, port_of
from interop.test_vsock_uml import python as in_uml
from interop.vsock_peer import RECORDS
from kernel.lab import add_python, interpreter
from pyvhost.cli.guests import Kernel, QemuGuest, UmlGuest
from pyvhost.cli.guests.initramfs import Initramfs
from requirements import need_program

PROGRAM = Path(vsock_peer.__file__)
CIDS = (13, 14)
SIZE = 2 << 20
MESSAGES = 40


class PythonGuest(QemuGuest):
    """A guest that has the host's interpreter."""

    def _furnish(self, tree: Initramfs) -> None:
        add_python(tree, ["interop.vsock_peer", "runpy"])

    def peer(self, *words: object) -> str:
        """What `vsock_peer.py` prints in it."""
        command = [str(interpreter()), "-S", str(PROGRAM), *map(str, words)]
        return self.run(command, timeout=90).output.strip()


class World:
    """The guest, and a sibling in UML."""

    def __init__(self, served: Served, kernel: Kernel) -> None:
        self.served = served
        self.devices = served.start_vsock("mixed", *CIDS, group=True)
        served.wait()
        self.guest = PythonGuest(
            vsock=self.device.socket,
            kernel=kernel,
            name="the guest",
            modules=["virtio_pci", "vmw_vsock_virtio_transport"],
            programs=(),
        )
        self.far = UmlGuest(vsock=self.devices[1].socket, name="the sibling", memory_mib=192)

    @property
    def device(self) -> SocketDevice:
        return self.devices[0]

    def start(self) -> None:
        self.guest.launch()
        self.far.launch()
        self.far.wait_booted()
        in_uml(self.far, "listen", PORT)
        self.guest.wait_booted(120)
        self.guest.peer("listen", PORT)


@pytest.fixture(scope="module")
def world(kernel: Kernel, served: Served) -> Iterator[World]:
    need_program("linux.uml", package="user-mode-linux")
    world = World(served, kernel)
    try:
        world.start()
        yield world
    finally:
        world.guest.stop()
        world.far.stop()


def amount(name: str) -> int:
    return SIZE if name == "stream" else MESSAGES


def with_the_host(world: World, name: str) -> None:
    """Both ways, whoever calls."""
    with world.device.connect(port_of(name), KINDS[name]) as sock:
        assert vsock_peer.exchange(sock, amount(name), amount(name), 1) == "ok"
    with host_serves(world.device, 8000):
        port = port_of(name, 8000)
        assert world.guest.peer("exchange", name, HOST, port, amount(name), amount(name), 2) == "ok"


@pytest.mark.parametrize("name", KINDS)
def test_with_the_host(world: World, name: str) -> None:
    with_the_host(world, name)


@pytest.mark.parametrize("name", KINDS)
def test_with_a_sibling(world: World, name: str) -> None:
    words = (port_of(name), amount(name), amount(name), RECORDS)
    assert world.guest.peer("exchange", name, CIDS[1], *words) == "ok"
    assert in_uml(world.far, "exchange", name, CIDS[0], *words) == "ok"


def test_a_hundred_connections(world: World) -> None:
    with host_serves(world.device, 8000):
        assert world.guest.peer("many", "stream", HOST, 8000, 100) == "ok"


def test_nobody_listens(world: World) -> None:
    with pytest.raises(ConnectionRefusedError):
        world.device.connect(99)
    assert world.guest.peer("errno", "stream", HOST, 99) == "ECONNRESET"


def test_the_reset_button_with_connections_open(world: World) -> None:
    socks = [world.device.connect(PORT) for _ in range(5)]
    world.guest.reset()
    for sock in socks:
        with sock:
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                pass
    world.guest.peer("listen", PORT)
    with_the_host(world, "stream")
