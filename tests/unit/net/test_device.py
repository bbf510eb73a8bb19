"""The net device: its configuration space, its queue pairs, its control queue, and how often it calls."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from in_process import PATIENCE, SPANS, FrontEnd, echo, refused, served, serving
from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.errors import RefusedError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import FEATURES, NetDriver
from pyvhost.driver.queue import Queue
from pyvhost.driver.split_ring import SplitRing
from pyvhost.net.backends.base import Backend, PortKind
from pyvhost.net.device import MAX_QUEUE_PAIRS, NetDevice, rarp
from pyvhost.observe import reader

MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("5254009abcde")
MQ = 1 << abi.F_MQ
CTRL_VQ = 1 << abi.F_CTRL_VQ
VERSION_1 = 1 << virtio.F_VERSION_1
EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX
ON_EMPTY = 1 << virtio.F_NOTIFY_ON_EMPTY


class Loop(Backend):
    """A loop that keeps what it was set to, and has opinions."""

    kind = PortKind.LOOP
    mtu = 9000
    mac = MAC

    def __init__(self) -> None:
        super().__init__("test-loop")
        self.pairs: list[int] = []
        self.offloads_set: list[int] = []
        self.up = True

    def set_pairs(self, pairs: int) -> None:
        self.pairs.append(pairs)

    def set_offloads(self, features: int) -> None:
        self.offloads_set.append(features)

    def link_up(self) -> bool:
        return self.up


@contextmanager
def guest(front: FrontEnd, pairs: int = 1, features: int = FEATURES, **options: int) -> Iterator[NetDriver]:
    with (
        GuestMemory(SPANS) as memory,
        NetDriver(front, memory, pairs, 32, features, timeout=PATIENCE, **options) as driver,  # type: ignore[arg-type]
    ):
        driver.start()
        yield driver


def counted(device: str) -> dict[str, dict[str, int]]:
    """The rows of a device, by queue."""
    (own,) = (process for process in reader.snapshot().processes if process.pid == os.getpid())
    return {row.label("queue"): row.values for row in own.rows if row.label("device") == device}


# Being made


@pytest.mark.parametrize("pairs", [0, -1, MAX_QUEUE_PAIRS + 1])
def test_a_number_of_pairs_that_can_not_be(pairs: int) -> None:
    with pytest.raises(ValueError, match="queue_pairs"):
        NetDevice("loop", queue_pairs=pairs)


@pytest.mark.parametrize(
    "mac", ["", "52:54:00:12:34", "zz:54:00:12:34:56", "01:00:5e:00:00:01", b"12345", b"\xff" * 6]
)
def test_an_address_that_is_no_stations(mac: str | bytes) -> None:
    with pytest.raises(ValueError, match="not the address of one station"):
        NetDevice("loop", mac=mac)


@pytest.mark.parametrize("mtu", [67, 65536, 0, -1])
def test_an_mtu_that_can_not_be(mtu: int) -> None:
    with pytest.raises(ValueError, match="mtu"):
        NetDevice("loop", mtu=mtu)


def test_most_pairs_there_can_be() -> None:
    device = NetDevice("null", queue_pairs=MAX_QUEUE_PAIRS, name="wide")
    assert len(device.vrings) == 255
    with served(device):
        assert len(counted("wide")) == 255
    assert counted("wide") == {}


def test_a_device_that_can_not_open_its_backend_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Loop, features: int) -> None:
        raise KeyError("a backend's own mistake")

    monkeypatch.setattr(Loop, "set_offloads", broken)
    with pytest.raises(KeyError), served(NetDevice(Loop(), queue_pairs=3, name="broken")):
        pass
    assert counted("broken") == {}


# The configuration space


def config_of(front: FrontEnd) -> abi.NetConfig:
    return abi.NetConfig.from_buffer_copy(front.get_config(0, ctypes.sizeof(abi.NetConfig)))


def test_the_configuration_says_what_the_device_is() -> None:
    device = NetDevice("loop", queue_pairs=3, mac="52:54:00:12:34:56", mtu=1400)
    with served(device) as front:
        config = config_of(front)
        assert bytes(config.mac) == MAC
        assert (config.status, config.max_virtqueue_pairs, config.mtu) == (abi.S_LINK_UP, 3, 1400)
        assert front.get_queue_num() == 3


def test_the_backend_is_asked_for_what_nobody_said() -> None:
    with served(NetDevice(Loop())) as front:
        config = config_of(front)
        assert (bytes(config.mac), config.mtu) == (MAC, 9000)
    with served(NetDevice("loop")) as front, served(NetDevice("loop")) as another:
        config = config_of(front)
        assert config.mtu == 1500
        mac = bytes(config.mac)
        assert mac[0] & 3 == 2, "locally administered, one station's"
        assert mac == bytes(config_of(front).mac)
        assert mac != bytes(config_of(another).mac)


def test_any_part_of_the_configuration_can_be_read() -> None:
    with served(NetDevice("loop", mac=MAC)) as front:
        whole = front.get_config(0, 1000)
        assert len(whole) == ctypes.sizeof(abi.NetConfig)
        for offset in (0, 1, 5, 6, 7, 11, 23, len(whole) - 1, len(whole), 1 << 31):
            for size in (1, 2, 3, 8, 256):
                assert front.get_config(offset, size) == whole[offset : offset + size]


def test_a_driver_writes_its_address_and_nothing_else() -> None:
    with served(NetDevice("loop", mac=MAC)) as front:
        device = front.device
        before = front.get_config(6, 100)
        device.set_config(1, b"\x11\x22", 0)
        assert front.get_config(0, 6) == bytes.fromhex("521122123456")
        device.set_config(5, b"\x77\xff\xff\xff\xff\xff", 0)
        assert front.get_config(0, 6) == bytes.fromhex("521122123477")
        # QEMU restores the whole space.
        device.set_config(0, OTHER + bytes(len(before)), 0)
        assert front.get_config(0, 6) == OTHER
        assert front.get_config(6, 100) == before
        for offset, size in ((0, 100), (1 << 31, 1), (ctypes.sizeof(abi.NetConfig), 1)):
            with refused(errno.EINVAL, "configuration bytes"):
                device.set_config(offset, bytes(size), 0)


def test_what_a_front_end_said_goes_with_it() -> None:
    with served(NetDevice("loop", mac=MAC, mtu=1400)) as front:
        front.device.set_config(0, OTHER, 0)
        front.device.set_mtu(9000)
        assert isinstance(front.device, NetDevice)
        front.device.announce()
        config = config_of(front)
        assert (bytes(config.mac), config.mtu, config.status) == (OTHER, 9000, abi.S_LINK_UP | abi.S_ANNOUNCE)
        front.device.reset()
        config = config_of(front)
        assert (bytes(config.mac), config.mtu, config.status) == (MAC, 1400, abi.S_LINK_UP)
    with served(NetDevice("loop", mtu=68)) as front:
        for mtu in (67, 65536):
            with refused(errno.EINVAL, "mtu"):
                front.device.set_mtu(mtu)
        assert config_of(front).mtu == 68


def test_link_and_announcement_are_told_when_they_change() -> None:
    backend = Loop()
    device = NetDevice(backend)
    with served(device) as front:
        told: list[int] = []
        device.config_changed = lambda: told.append(config_of(front).status)
        for up in (False, False, True, True):
            backend.up = up
            backend.changed()
        device.set_link(False)
        device.set_link(False)
        device.announce()
        device.announce()
        assert told == [0, abi.S_LINK_UP, 0, abi.S_ANNOUNCE]
        with guest(front, features=FEATURES | CTRL_VQ) as driver, serving(device):
            assert driver.control is not None
            driver.control.ack_announce()
        assert told[4:] == []
        assert config_of(front).status == 0


# Queue pairs


def test_every_pair_loops_on_its_own() -> None:
    with served(NetDevice("loop", queue_pairs=4)) as front, guest(front, 4) as driver:
        for number in range(40):
            pair = number % 4
            frame = b"\xff" * 12 + b"\x88\xb5" + bytes([number]) * 50
            driver.send(frame, pair=pair)
            (got,) = driver.receive()
            assert (got.pair, got.frame) == (pair, frame)


def test_where_the_control_queue_is_depends_on_mq() -> None:
    device = NetDevice("loop", queue_pairs=2)
    with served(device):
        pairs = [device.pairs[i].place(way) for i in (0, 1) for way in (0, 1)]
        control = device.place_of(2)
        assert [device.place_of(i) for i in (0, 1, 2, 3)] == [pairs[0], pairs[1], control, pairs[3]]
        with refused(errno.EINVAL, "MQ is not negotiated"):
            device.place_of(4)
        device.set_features(MQ)
        assert [device.place_of(i) for i in range(5)] == [*pairs, control]


def test_a_control_queue_that_moves_under_its_ring_is_refused() -> None:
    """It ran as vring 2; with MQ it is vring 4: two rings in one place would share one kick."""
    device = NetDevice("loop", queue_pairs=2)
    with served(device) as front, GuestMemory(SPANS) as memory:
        queues = [Queue(SplitRing(memory, 32)) for _ in range(2)]
        front.negotiate(CTRL_VQ)
        front.set_mem_table(memory.regions)
        front.start_ring(2, queues[0])
        device.set_features(CTRL_VQ | MQ)
        with refused(errno.EBUSY, "vring 4"):
            front.start_ring(4, queues[1])
        front.stop_ring(2)
        device.set_vring_running(4, True)
        poller = device.poller
        assert poller is not None
        assert poller.registered(device.vrings[4].kick)
        assert not poller.registered(device.vrings[2].kick)
        for queue in queues:
            queue.close()


@pytest.mark.parametrize("index", [3, 4])
def test_a_vring_that_has_no_place_does_not_start(index: int) -> None:
    device = NetDevice("loop", queue_pairs=1 if index == 3 else 2)
    with served(device) as front, GuestMemory(SPANS) as memory, Queue(SplitRing(memory, 32)) as queue:
        front.set_mem_table(memory.regions)
        with pytest.raises(OSError, match=f"vring {index}"):
            front.start_ring(index, queue)


def test_the_driver_says_how_many_pairs_it_uses() -> None:
    backend = Loop()
    device = NetDevice(backend, queue_pairs=4)
    with served(device) as front, guest(front, 4, FEATURES | CTRL_VQ) as driver:
        control = driver.control
        assert control is not None
        # The control queue is ours: one pair until the driver says otherwise.
        assert set(backend.pairs) == {1}
        with serving(device):
            for pairs in (4, 2, 3, 1):
                control.set_queue_pairs(pairs)
            for wrong in (0, 5, 0xFFFF):
                with pytest.raises(RefusedError):
                    control.set_queue_pairs(wrong)
        assert backend.pairs[-4:] == [4, 2, 3, 1]


def test_without_a_control_queue_all_pairs_that_run_are_used() -> None:
    backend = Loop()
    with served(NetDevice(backend, queue_pairs=3)) as front, guest(front, 3) as driver:
        assert backend.pairs == [1, 2, 3]
        driver.stop()
        assert backend.pairs == [1, 2, 3, 2, 1, 1]


def test_a_feature_that_has_nothing_to_do_with_it_leaves_the_pairs_and_offloads_alone() -> None:
    """The dirty log is switched on while a guest runs that has said how it wants to be served."""
    backend = Loop()
    device = NetDevice(backend, queue_pairs=2)
    offloads = 1 << abi.F_GUEST_CSUM | 1 << abi.F_GUEST_TSO4 | 1 << abi.F_CTRL_GUEST_OFFLOADS
    with served(device) as front, guest(front, 2, FEATURES | CTRL_VQ | offloads) as driver:
        control = driver.control
        assert control is not None
        with serving(device):
            control.set_queue_pairs(2)
            control.set_guest_offloads(1 << abi.F_GUEST_CSUM)
            with pytest.raises(RefusedError):
                control.set_guest_offloads(1 << abi.F_GUEST_TSO6)
        taken = driver.features & ~(1 << abi.F_GUEST_TSO4)
        assert backend.offloads_set[-1] == taken
        device.set_features(driver.features | ON_EMPTY)
        assert backend.pairs[-1] == 2
        assert backend.offloads_set[-1] == taken | ON_EMPTY
        device.set_features(driver.features & ~MQ)
        assert backend.offloads_set[-1] == taken & ~MQ


def test_the_drivers_other_commands_reach_the_device() -> None:
    device = NetDevice("loop", mac=MAC)
    with served(device) as front, guest(front, features=FEATURES | CTRL_VQ) as driver:
        control = driver.control
        assert control is not None
        with serving(device):
            control.set_mac(OTHER)
            control.set_rx_mode(abi.CTRL_RX_PROMISC, True)
            control.set_mac_table([MAC], [b"\x33" * 6])
            with pytest.raises(RefusedError):
                control.set_queue_pairs(1)
            with pytest.raises(RefusedError):
                control.add_vlan(1)
        assert front.get_config(0, 6) == OTHER
        # The data queues never stopped.
        echo(driver)


# Calls and kicks


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX], ids=["flags", "event index"])
def test_a_driver_that_wants_no_call_gets_none(features: int) -> None:
    with served(NetDevice("loop", name="quiet")) as front, guest(front, features=features) as driver:
        echo(driver)
        driver.wait_sent()
        # When another one has come back, the call for the first is over and done.
        echo(driver)
        driver.tx[0].take_calls()
        before = counted("quiet")["tx0"]
        # Of what is sent the driver wants to hear nothing; what comes back it waits for each time.
        for number in range(20):
            echo(driver, number)
        after = counted("quiet")["tx0"]
        assert driver.tx[0].take_calls() == 0
        assert after["calls"] == before["calls"]
        # The last one's may still be on its way, and that of the one before them was, then.
        assert 19 <= after["calls_suppressed"] - before["calls_suppressed"] <= 21


def test_with_an_event_index_a_call_comes_when_it_is_passed() -> None:
    with served(NetDevice("null")) as front, guest(front, features=VERSION_1 | EVENT_IDX) as driver:
        queue = driver.tx[0]
        driver.send(b"x" * 60)
        driver.wait_sent()
        for after in (0, 1, 5, 30):
            assert queue.ring.enable_calls(after)
            queue.take_calls()
            for _ in range(after):
                driver.send(b"x" * 60)
            assert queue.ring.used_event == (queue.ring.next_used + after) & 0xFFFF
            driver.send(b"x" * 60)
            assert queue.wait_call(PATIENCE)
            assert queue.ring.used_pending() == after + 1
            driver.wait_sent()


@pytest.mark.parametrize("extra", [0, EVENT_IDX], ids=["flags", "event index"])
def test_an_emptied_ring_calls_whatever_was_said(extra: int) -> None:
    with served(NetDevice("null")) as front, guest(front, features=VERSION_1 | ON_EMPTY | extra) as driver:
        for _ in range(5):
            driver.tx[0].ring.disable_calls()
            driver.send(b"x" * 60)
            assert driver.tx[0].wait_call(PATIENCE)
            driver.wait_sent()


def test_kicks_are_asked_for_where_buffers_are_short() -> None:
    """RX: none while buffers remain, one when it has run dry (as Linux's vhost does)."""
    with served(NetDevice("loop")) as front, guest(front, features=VERSION_1, rx_depth=2) as driver:
        rx = driver.rx[0]
        # The device says so when it has come to rest for the first time.
        turns = 0
        while not rx.ring.used_flags:
            echo(driver)
            turns += 1
            assert turns < 10_000, "it wants a kick for each buffer"
        kicks = rx.kicks
        for number in range(10):
            # One buffer is always left.
            echo(driver, number)
        assert rx.kicks == kicks
        driver.send_many([b"x" * 60] * 5)
        # It has used both, and says that it wants to hear of more: a word in memory, which nobody signals.
        deadline = time.monotonic() + PATIENCE
        while rx.ring.used_flags:
            assert time.monotonic() < deadline, "a dry ring is not to be kicked"
        assert rx.ring.used_pending() == 2
        assert len(driver.receive(5)) == 5
        assert rx.kicks > kicks


def test_generate_makes_as_many_frames_as_asked_for() -> None:
    with served(NetDevice("generate:100,count=50", name="gen")) as front, guest(front) as driver:
        frames = [got.frame for got in driver.receive(50)]
        assert [len(frame) for frame in frames] == [100] * 50
        driver.post(0)
        driver.rx[0].kick()
        with pytest.raises(TimeoutError):
            driver.receive(timeout=0.01)
        assert counted("gen")["rx0"]["packets"] == 50


# RARP


def test_a_rarp_says_who_is_where() -> None:
    from scapy.layers.l2 import ARP, Ether

    frame = Ether(rarp(MAC))
    assert (frame.dst, frame.src, frame.type) == ("ff:ff:ff:ff:ff:ff", "52:54:00:12:34:56", 0x8035)
    body = ARP(bytes(frame.payload))
    assert (body.op, body.hwsrc, body.hwdst) == (3, "52:54:00:12:34:56", "52:54:00:12:34:56")
    assert len(rarp(MAC)) == 60


class Stream(Backend):
    """A stream to a test."""

    kind = PortKind.STREAM
    queue_pairs_max = 1

    def __init__(self) -> None:
        super().__init__("test-stream")
        self.mine, self.peer = socket.socketpair()
        self.peer.settimeout(PATIENCE)

    def open(self, queue_pairs: int, poller: object = None) -> list[int]:
        self.mine.setblocking(False)
        self.fds = [self.mine.fileno()]
        return self.fds

    def close(self) -> None:
        self.fds = []
        self.mine.close()


def test_a_rarp_goes_between_the_frames_of_a_stream_and_never_into_one() -> None:
    backend = Stream()
    backend.mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with served(NetDevice(backend)) as front, guest(front) as driver, backend.peer as peer:
        frame = bytes(range(256)) * 200
        # More than the socket holds, so that one is half sent and the rest waits.
        driver.send_many([frame] * 4)
        assert peer.recv(1) == b"\0"
        for _ in range(20):
            front.device.send_rarp(MAC)
        data, rarps, frames = b"\0", 0, 0
        while frames < 4:
            while len(data) < 4:
                data += peer.recv(1 << 20)
            length = int.from_bytes(data[:4], "big")
            assert length in (60, len(frame)), "the framing is lost"
            while len(data) < 4 + length:
                data += peer.recv(1 << 20)
            got, data = data[4 : 4 + length], data[4 + length :]
            assert got == (rarp(MAC) if length == 60 else frame)
            rarps, frames = rarps + (length == 60), frames + (length != 60)
        front.device.send_rarp(MAC)
        while len(data) < 64:
            data += peer.recv(64)
        assert data[-64:] == (60).to_bytes(4, "big") + rarp(MAC)


def test_a_rarp_to_nobody_is_lost() -> None:
    with served(NetDevice("null")) as front:
        front.device.send_rarp(MAC)


def test_big_frames_need_memory_for_them() -> None:
    """A guest without mergeable buffers and with small ones: the frame is counted and dropped, the buffer kept."""
    with (
        served(NetDevice("loop", name="small")) as front,
        guest(front, features=VERSION_1, rx_buffer=200) as driver,
    ):
        driver.send(b"y" * 189)
        driver.wait_sent()
        assert counted("small")["rx0"]["oversize"] == 1
        driver.send(b"z" * 188)
        assert driver.receive()[0].frame == b"z" * 188
