"""`/dev/vhost-net` in process with frames: taps and packet sockets, each ring with its own, while things change."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

import pyvhost
from in_process import open_fds
from netns import network_namespace
from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio, virtio_net
from pyvhost.dataplane import blocks
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.vhost_ioctl import VhostNetFrontend
from pyvhost.host import net_fd, tap
from pyvhost.vhost.handle import Handle
from pyvhost.vhost.worker import Worker

VERSION_1 = 1 << virtio.F_VERSION_1
HEADER_OURS = 1 << abi.NET_F_VIRTIO_NET_HDR
EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX
MRG_RXBUF = 1 << virtio_net.F_MRG_RXBUF
PATIENCE = 30.0
RX, TX = 0, 1

Ip = Callable[[str], str]


def frame(number: int, size: int = 60) -> bytes:
    """A frame of an EtherType that nobody answers."""
    return bytes.fromhex("ffffffffffff 020000000001 88b5") + number.to_bytes(4, "big") + bytes(size - 18)


class Wire:
    """A tap, and the interface that it is for the host."""

    def __init__(self, ip: Ip, name: str, header: int = 0) -> None:
        (self.fd,) = tap.open_tap(name, vnet_hdr=bool(header))
        if header:
            tap.set_vnet_hdr_size(self.fd, header)
        # Without addresses of IPv6 the interface is silent but for what a test sends.
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w") as switch:
            switch.write("1")
        ip(f"link set {name} up")
        self.host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x88B5)
        self.host.bind((name, 0x88B5))
        self.host.settimeout(PATIENCE)
        self.host.setsockopt(263, 23, 1)  # PACKET_IGNORE_OUTGOING: what the host sent itself

    def hear(self, count: int = 1) -> list[bytes]:
        return [self.host.recv(65536) for _ in range(count)]

    def say(self, data: bytes) -> None:
        self.host.send(data)

    def close(self) -> None:
        self.host.close()
        os.close(self.fd)


class Scene:
    """What tests take: devices, wires, drivers; all of it closed in the end."""

    def __init__(self, ip: Ip) -> None:
        self._ip = ip
        self._closing = ExitStack()
        self._names = iter(f"vn{i}" for i in range(99))

    def open(self) -> Handle:
        return self._closing.enter_context(pyvhost.open("/dev/vhost-net"))

    def wire(self, header: int = 0) -> Wire:
        wire = Wire(self._ip, next(self._names), header)
        self._closing.callback(wire.close)
        return wire

    def driver(self, handle: Handle, backends: int | tuple[int, int], features: int) -> NetDriver:
        memory = GuestMemory(8 << 20, anonymous=True)
        self._closing.callback(memory.close)
        driver = NetDriver(
            VhostNetFrontend(handle, backends), memory, ring_size=64, features=features, timeout=PATIENCE
        )
        self._closing.callback(driver.close)
        driver.start()
        return driver

    def close(self) -> None:
        self._closing.close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with network_namespace() as ip:
        scene = Scene(ip)
        try:
            yield scene
        finally:
            scene.close()


def exchange(driver: NetDriver, wire: Wire, count: int = 20) -> None:
    """Frames each way, all of them whole and in order."""
    frames = [frame(i, 60 + 40 * i) for i in range(count)]
    for data in frames:
        driver.send(data)
    assert wire.hear(count) == frames
    for data in frames:
        wire.say(data)
    assert [received.frame for received in driver.receive(count)] == frames


@pytest.mark.parametrize(
    ("header", "features"),
    [
        (10, 0),
        (12, VERSION_1),
        (12, VERSION_1 | MRG_RXBUF | EVENT_IDX),
        (10, VERSION_1),
        (0, HEADER_OURS),
        (0, HEADER_OURS | VERSION_1),
        (0, HEADER_OURS | MRG_RXBUF | VERSION_1),
        (0, VERSION_1),
    ],
)
def test_frames_go_both_ways_whoever_makes_the_header(scene: Scene, header: int, features: int) -> None:
    wire = scene.wire(header)
    exchange(scene.driver(scene.open(), wire.fd, features), wire)


def test_a_packet_socket(scene: Scene) -> None:
    wire = scene.wire()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3) as lo:
        lo.bind(("lo", 3))
        driver = scene.driver(scene.open(), lo.fileno(), HEADER_OURS | VERSION_1)
        wire.host.bind(("lo", 0x88B5))
        driver.send(frame(1))
        assert wire.hear() == [frame(1)]


def test_each_ring_has_a_backend_of_its_own(scene: Scene) -> None:
    one, two = scene.wire(), scene.wire()
    driver = scene.driver(scene.open(), (one.fd, two.fd), HEADER_OURS)
    driver.send(frame(1))
    assert two.hear() == [frame(1)]
    one.say(frame(2))
    assert driver.receive()[0].frame == frame(2)


def test_another_backend_while_it_runs(scene: Scene) -> None:
    one, two = scene.wire(), scene.wire()
    handle = scene.open()
    driver = scene.driver(handle, one.fd, HEADER_OURS)
    exchange(driver, one)
    for index in (RX, TX):
        handle.ioctl(abi.NET_SET_BACKEND, abi.VringFile(index, two.fd))
    exchange(driver, two)


def test_a_backend_that_can_not_be_watched_costs_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC: this user may watch no more descriptors. The one before stays, as if nobody had asked."""
    one, two = scene.wire(), scene.wire()
    handle = scene.open()
    driver = scene.driver(handle, one.fd, HEADER_OURS)
    exchange(driver, one)
    os.set_blocking(two.fd, True)
    fds = open_fds()
    watch = Worker.watch
    refused: list[int] = []

    def full(worker: Worker, fd: int, events: int, kind: int, index: int) -> None:
        if kind == blocks.EVENT_PORT and net_fd.same(fd, two.fd):
            refused.append(fd)
            raise OSError(errno.ENOSPC, f"descriptor {fd} can't be watched")
        watch(worker, fd, events, kind, index)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "watch", full)
        for index in (RX, TX):
            with pytest.raises(OSError, match="can't be watched") as caught:
                handle.ioctl(abi.NET_SET_BACKEND, abi.VringFile(index, two.fd))
            assert caught.value.errno == errno.ENOSPC
    assert len(refused) == 2
    assert open_fds() == fds
    assert os.get_blocking(two.fd)
    exchange(driver, one)
    for index in (RX, TX):
        handle.ioctl(abi.NET_SET_BACKEND, abi.VringFile(index, two.fd))
    exchange(driver, two)


def test_what_was_offered_while_it_was_unbound_is_served_then(scene: Scene) -> None:
    wire, handle = scene.wire(), scene.open()
    driver = scene.driver(handle, wire.fd, HEADER_OURS)
    exchange(driver, wire)
    handle.ioctl(abi.NET_SET_BACKEND, abi.VringFile(TX, -1))
    driver.send(frame(7))
    state = abi.VringState(TX)
    handle.ioctl(abi.GET_VRING_BASE, state)
    assert state.num == 20
    handle.ioctl(abi.NET_SET_BACKEND, abi.VringFile(TX, wire.fd))
    assert wire.hear() == [frame(7)]


def test_a_descriptor_that_is_refused_leaves_the_one_before(scene: Scene) -> None:
    wire, handle = scene.wire(), scene.open()
    driver = scene.driver(handle, wire.fd, HEADER_OURS)
    unattached = os.open("/dev/net/tun", os.O_RDWR)
    for fd, code in ((os.eventfd(0), errno.ENOTSOCK), (unattached, errno.EINVAL), (9999, errno.ENOTSOCK)):
        for index in (RX, TX):
            with refused(code):
                handle.ioctl(abi.NET_SET_BACKEND, abi.VringFile(index, fd))
        if fd < 9999:
            os.close(fd)
    exchange(driver, wire)


def test_the_same_file_again_changes_nothing(scene: Scene) -> None:
    wire, handle = scene.wire(), scene.open()
    driver = scene.driver(handle, wire.fd, HEADER_OURS)
    again = os.dup(wire.fd)
    for index in (RX, TX):
        handle.ioctl(abi.NET_SET_BACKEND, abi.VringFile(index, again))
    os.close(again)
    exchange(driver, wire)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_descriptor_is_given_back_as_it_was(scene: Scene, blocking: bool) -> None:
    wire = scene.wire()
    os.set_blocking(wire.fd, blocking)
    one, two = scene.open(), scene.open()
    first = scene.driver(one, wire.fd, HEADER_OURS)
    scene.driver(two, wire.fd, HEADER_OURS)
    assert not os.get_blocking(wire.fd)
    two.close()
    assert not os.get_blocking(wire.fd), "another device is bound to it"
    first.send(frame(1))
    assert wire.hear() == [frame(1)]
    one.close()
    assert os.get_blocking(wire.fd) is blocking


# --- workers --------------------------------------------------------------------------------------------------


def new_worker(handle: Handle) -> int:
    state = abi.WorkerState()
    handle.ioctl(abi.NEW_WORKER, state)
    return int(state.worker_id)


def worker_of(handle: Handle, index: int) -> int:
    worker = abi.VringWorker(index, 99)
    handle.ioctl(abi.GET_VRING_WORKER, worker)
    return int(worker.worker_id)


def attach(handle: Handle, index: int, worker: int) -> None:
    handle.ioctl(abi.ATTACH_VRING_WORKER, struct.pack("II", index, worker))


def refused(code: int) -> pytest.RaisesExc[OSError]:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


def test_rings_move_between_workers_while_they_run(scene: Scene) -> None:
    wire, handle = scene.wire(), scene.open()
    driver = scene.driver(handle, wire.fd, HEADER_OURS)
    workers = [new_worker(handle), new_worker(handle)]
    for rx, tx in ((workers[0], workers[1]), (workers[1], workers[1]), (0, workers[0])):
        attach(handle, RX, rx)
        attach(handle, TX, tx)
        assert (worker_of(handle, RX), worker_of(handle, TX)) == (rx, tx)
        exchange(driver, wire)


def test_a_worker_that_serves_can_not_be_freed(scene: Scene) -> None:
    handle = scene.open()
    handle.ioctl(abi.SET_OWNER)
    worker = new_worker(handle)
    attach(handle, TX, worker)
    for busy in (0, worker):
        with refused(errno.EBUSY):
            handle.ioctl(abi.FREE_WORKER, struct.pack("I", busy))
    attach(handle, TX, 0)
    handle.ioctl(abi.FREE_WORKER, struct.pack("I", worker))
    for request, argument in (
        (abi.FREE_WORKER, struct.pack("I", worker)),
        (abi.ATTACH_VRING_WORKER, struct.pack("II", TX, worker)),
    ):
        with refused(errno.ENODEV):
            handle.ioctl(request, argument)


def test_workers_come_to_an_end(scene: Scene) -> None:
    handle = scene.open()
    handle.ioctl(abi.SET_OWNER)
    with refused(errno.ENOMEM):
        for _ in range(100):
            new_worker(handle)
    handle.ioctl(abi.RESET_OWNER)
    handle.ioctl(abi.SET_OWNER)
    assert new_worker(handle) == 1


def test_workers_of_the_kernels_can_not_be_made(scene: Scene) -> None:
    handle = scene.open()
    assert handle.ioctl(abi.GET_FORK_FROM_OWNER, b"\7") == b"\1"
    with refused(errno.EINVAL):
        handle.ioctl(abi.SET_FORK_FROM_OWNER, b"\2")
    handle.ioctl(abi.SET_FORK_FROM_OWNER, b"\0")
    handle.ioctl(abi.SET_OWNER)
    with refused(errno.EBUSY):
        handle.ioctl(abi.SET_FORK_FROM_OWNER, b"\1")
    with refused(errno.EFAULT):
        new_worker(handle)


# --- features in words -------------------------------------------------------------------------------------------


def test_features_in_words_of_64_bits(scene: Scene) -> None:
    handle = scene.open()
    for count in range(5):
        answer = handle.ioctl(abi.GET_FEATURES_ARRAY, struct.pack("Q", count) + b"\xff" * 8 * count)
        assert answer == struct.pack(f"{1 + count}Q", count, *[0x33D008000, 0, 0, 0][:count])
        good = struct.pack(f"{1 + count}Q", count, *[VERSION_1, 0, 0, 0][:count])
        handle.ioctl(abi.SET_FEATURES_ARRAY, good)
        if count:
            with refused(errno.EOPNOTSUPP):
                handle.ioctl(abi.SET_FEATURES_ARRAY, good[:-8] + struct.pack("Q", 1 << 60))
    for request in (abi.GET_FEATURES_ARRAY, abi.SET_FEATURES_ARRAY):
        with refused(errno.EFAULT):
            handle.ioctl(request, struct.pack("Q", 1 << 40))


# --- memory that is not there -------------------------------------------------------------------------------------


def test_a_ring_without_memory_signals_err_at_each_kick(scene: Scene) -> None:
    wire, handle = scene.wire(), scene.open()
    memory = GuestMemory(1 << 20, anonymous=True)
    front = VhostNetFrontend(handle, wire.fd)
    front.negotiate(0)
    front.set_mem_table(memory.regions)
    front.set_vring_num(TX, 16)
    base = memory.regions[0].userspace_addr
    front.set_vring_addr(TX, 16, base + 0x2000, base + 0x1000)
    kick, err = os.eventfd(0), os.eventfd(0)
    front.set_vring_kick(TX, kick)
    front.set_vring_err(TX, err)
    front.bind(TX)
    poll = select.poll()
    poll.register(err, select.POLLIN)
    for _ in range(3):
        os.eventfd_write(kick, 1)
        assert poll.poll(PATIENCE * 1000), "err was not signalled"
        os.eventfd_read(err)
    front.set_vring_addr(TX, base, base + 0x2000, base + 0x1000)
    assert front.get_vring_base(TX) == 0
    front.unbind(TX)
    os.close(kick)
    os.close(err)
    memory.close()
