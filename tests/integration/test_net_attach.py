"""Front ends that come, go, come back, and change their minds, over a real socket with real frames."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from back_end import PATIENCE, BackEnd
from pyvhost.abi import vhost_user, virtio
from pyvhost.driver.errors import BackendGoneError, RefusedError
from pyvhost.driver.memory import MIB, GuestMemory, Span
from pyvhost.driver.net import FEATURES, NetDriver
from pyvhost.driver.vhost_user import PROTOCOL_FEATURES, VhostUserFrontend
from pyvhost.net.device import NetDevice

VERSION_1 = 1 << virtio.F_VERSION_1


def frame(number: int) -> bytes:
    return b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5") + number.to_bytes(4, "big") + bytes(50)


def echo(driver: NetDriver, *numbers: int) -> None:
    driver.send_many([frame(number) for number in numbers])
    assert [got.frame for got in driver.receive(len(numbers))] == [frame(number) for number in numbers]


@pytest.fixture(scope="module")
def back_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackEnd]:
    with BackEnd(tmp_path_factory.mktemp("attach"), NetDevice(backend="loop", queue_pairs=2)) as back_end:
        yield back_end


def start(frontend: VhostUserFrontend, memory: GuestMemory, features: int = FEATURES) -> NetDriver:
    driver = NetDriver(frontend, memory, ring_size=64, features=features, timeout=PATIENCE)
    driver.start()
    return driver


def test_stop_and_go_on_again_and_again(back_end: BackEnd, memory: GuestMemory) -> None:
    with back_end.connect() as frontend, start(frontend, memory) as driver:
        for turn in range(20):
            echo(driver, turn, turn + 1000)
            # Sent, and perhaps back, perhaps not looked at: nothing is lost or comes twice.
            driver.send_many([frame(turn + 2000), frame(turn + 3000)])
            driver.resume(bases=driver.stop())
            assert [got.frame for got in driver.receive(2)] == [frame(turn + 2000), frame(turn + 3000)]


def visit(back_end: BackEnd, number: int) -> None:
    """Come, send, and leave with frames under way."""
    with GuestMemory(4 * MIB) as memory, back_end.connect() as frontend, start(frontend, memory) as driver:
        echo(driver, number)
        driver.send_many([frame(n) for n in range(20)])


def test_front_ends_that_leave_without_a_word(back_end: BackEnd) -> None:
    before = back_end.open_descriptors()
    for turn in range(20):
        visit(back_end, turn)
    assert back_end.open_descriptors() == before


def test_one_front_end_at_a_time(back_end: BackEnd, memory: GuestMemory) -> None:
    with back_end.connect() as frontend, start(frontend, memory) as driver:
        with back_end.connect() as second:
            second.wait_closed()
        echo(driver, 1)
    with back_end.connect() as third:
        third.sync()


def test_a_guest_that_reboots(back_end: BackEnd, memory: GuestMemory) -> None:
    """The front end stays; what comes up next has rings of its own, perhaps with other features."""
    with back_end.connect() as frontend:
        for turn, features in enumerate((FEATURES, VERSION_1, 0, FEATURES)):
            driver = start(frontend, memory, features)
            echo(driver, turn, turn + 1)
            driver.stop()
            frontend.set_status(0)
            driver.close()


def test_a_device_that_is_reset_with_its_rings_running(back_end: BackEnd, memory: GuestMemory) -> None:
    with back_end.connect() as frontend:
        with start(frontend, memory) as driver:
            echo(driver, 1)
            frontend.reset_device()
            queue = driver.tx[0]
            used = queue.ring.used_idx
            driver.send(frame(2))
            queue.kick()
            frontend.sync()
            assert queue.ring.used_idx == used
        with start(frontend, memory) as driver:
            echo(driver, 3)


def test_a_back_end_that_dies_and_comes_back(tmp_path: Path, memory: GuestMemory) -> None:
    """The guest never notices: its rings and what lies in them are as they were."""
    with BackEnd(tmp_path, NetDevice(backend="loop")) as back_end:
        frontend = back_end.connect()
        driver = start(frontend, memory)
        echo(driver, *range(10))
        driver.wait_sent()
    with frontend, pytest.raises(BackendGoneError):
        driver.receive()
    with BackEnd(tmp_path, NetDevice(backend="loop")) as back_end, back_end.connect() as frontend:
        driver.send(frame(99))
        driver.resume(frontend)
        assert [got.frame for got in driver.receive()] == [frame(99)]
        echo(driver, *range(10))
    driver.close()


def test_a_back_end_that_dials(tmp_path: Path, memory: GuestMemory) -> None:
    path = tmp_path / "front-end"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with BackEnd(None, NetDevice(backend="loop"), dial=path):
            for turn in range(2):
                frontend = VhostUserFrontend.accept(listener, timeout=PATIENCE)
                with frontend, start(frontend, memory) as driver:
                    echo(driver, turn)


def test_a_socket_that_was_handed_over(memory: GuestMemory) -> None:
    device = NetDevice(backend="loop")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    frontend = VhostUserFrontend(ours, timeout=PATIENCE)
    with BackEnd(None, device, handed_over=theirs), frontend, start(frontend, memory) as driver:
        echo(driver, 1)


def test_without_protocol_features_rings_run_at_once(back_end: BackEnd, memory: GuestMemory) -> None:
    with back_end.connect(protocol_features=0) as frontend, start(frontend, memory, VERSION_1) as driver:
        assert frontend.features == VERSION_1
        echo(driver, 1, 2, 3)
        driver.resume(bases=driver.stop())
        echo(driver, 4)


def test_a_ring_that_is_not_enabled_rests_and_misses_nothing(back_end: BackEnd, memory: GuestMemory) -> None:
    with back_end.connect() as frontend, start(frontend, memory) as driver:
        for turn in range(10):
            frontend.set_vring_enable(1, False)
            used = driver.tx[0].ring.used_idx
            driver.send(frame(turn))
            driver.tx[0].kick()
            frontend.sync()
            assert driver.tx[0].ring.used_idx == used
            # The kick came before; there is none after.
            frontend.set_vring_enable(1, True)
            assert [got.frame for got in driver.receive()] == [frame(turn)]
            driver.wait_sent()


def test_features_again_while_rings_run(back_end: BackEnd, memory: GuestMemory) -> None:
    """A front end does so to switch the dirty log; no ring stops for it."""
    with back_end.connect() as frontend, start(frontend, memory) as driver:
        for turn in range(5):
            frontend.set_features(frontend.features)
            echo(driver, turn)


def test_eventfds_that_change_while_rings_run(back_end: BackEnd, memory: GuestMemory) -> None:
    with back_end.connect() as frontend, start(frontend, memory) as driver:
        for turn in range(10):
            for index, queue in enumerate((driver.rx[0], driver.tx[0])):
                for name in ("kick_fd", "call_fd"):
                    old = getattr(queue, name)
                    setattr(queue, name, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
                    send = frontend.set_vring_kick if name == "kick_fd" else frontend.set_vring_call
                    send(index, getattr(queue, name))
                    os.close(old)
            echo(driver, turn, turn + 100)


def test_without_a_kick_the_back_end_polls(back_end: BackEnd, memory: GuestMemory) -> None:
    with back_end.connect() as frontend, start(frontend, memory) as driver:
        frontend.set_vring_kick(1)
        queue = driver.tx[0]
        for turn in range(5):
            room = memory.allocate(12 + 64)
            memory.write(room, bytes(12) + frame(turn))
            queue.ring.add([(room, 12 + len(frame(turn)))], token=[(room, 76)])
            queue.ring.publish()
            assert [got.frame for got in driver.receive()] == [frame(turn)]
        # And with one again it rests.
        frontend.set_vring_kick(1, queue.kick_fd)
        echo(driver, 9)


def test_without_a_call_the_driver_looks_for_itself(back_end: BackEnd, memory: GuestMemory) -> None:
    with back_end.connect() as frontend, start(frontend, memory) as driver:
        frontend.set_vring_call(1)
        driver.send(frame(1))
        assert driver.receive()[0].frame == frame(1)
        driver.stop()
        assert driver.tx[0].ring.used_pending() == 1
        assert driver.tx[0].take_calls() == 0


def test_memory_that_grows_and_shrinks_under_running_rings(back_end: BackEnd) -> None:
    with GuestMemory(4 * MIB) as memory, back_end.connect() as frontend, start(frontend, memory) as driver:
        for turn in range(5):
            region = memory.add_region(Span(16 * MIB, MIB))
            frontend.add_mem_reg(region)
            room = memory.allocate(76, region=1)
            memory.write(room, bytes(12) + frame(turn))
            driver.tx[0].ring.add([(room, 12 + len(frame(turn)))], token=[])
            driver.tx[0].publish()
            assert [got.frame for got in driver.receive()] == [frame(turn)]
            driver.wait_sent()
            frontend.rem_mem_reg(region)
            memory.remove_region(region)
            echo(driver, turn)
        # What was taken away is not memory any more.
        driver.tx[0].ring.add([(16 * MIB, 76)], token=[])
        driver.tx[0].publish()
        assert driver.tx[0].wait_error(PATIENCE)


def test_a_table_sent_again_does_not_disturb(back_end: BackEnd, memory: GuestMemory) -> None:
    """DPDK's virtio-user does so, without sending the rings' addresses again."""
    with back_end.connect() as frontend, start(frontend, memory) as driver:
        for turn in range(10):
            driver.send(frame(turn))
            frontend.set_mem_table(memory.regions)
            assert [got.frame for got in driver.receive()] == [frame(turn)]


def test_a_table_without_the_rings_is_refused_and_the_old_one_stays(
    back_end: BackEnd, memory: GuestMemory
) -> None:
    with back_end.connect() as frontend, start(frontend, memory) as driver, GuestMemory(MIB) as other:
        with pytest.raises(RefusedError, match="SET_MEM_TABLE"):
            frontend.set_mem_table(other.regions)
        echo(driver, 1)


@pytest.mark.parametrize(
    "wanted", [PROTOCOL_FEATURES, 1 << vhost_user.PROTOCOL_F_MQ], ids=["acks", "no acks"]
)
def test_a_pair_that_goes_and_comes_beside_another(
    back_end: BackEnd, memory: GuestMemory, wanted: int
) -> None:
    with (
        back_end.connect(protocol_features=wanted) as frontend,
        NetDriver(frontend, memory, queue_pairs=2, ring_size=32, timeout=PATIENCE) as driver,
    ):
        driver.start()
        bases = frontend.stop_ring(2), frontend.stop_ring(3)
        driver.send(frame(1), pair=0)
        assert driver.receive()[0].pair == 0
        driver.send(frame(2), pair=1)
        frontend.start_ring(2, driver.rx[1], bases[0])
        frontend.start_ring(3, driver.tx[1], bases[1])
        assert [(got.pair, got.frame) for got in driver.receive()] == [(1, frame(2))]


def test_a_second_guest_on_another_device_is_not_disturbed(tmp_path: Path) -> None:
    devices = NetDevice(backend="loop"), NetDevice(backend="loop")
    with (
        BackEnd(tmp_path, *devices) as back_end,
        GuestMemory(4 * MIB) as memory,
        back_end.connect(0) as frontend,
        start(frontend, memory) as driver,
    ):
        for turn in range(5):
            with (
                GuestMemory(4 * MIB) as theirs,
                back_end.connect(1) as other,
                start(other, theirs) as guest,
            ):
                echo(guest, turn)
                echo(driver, turn)
            echo(driver, turn)


def test_the_server_can_be_asked_for_its_end_while_frames_flow(tmp_path: Path, memory: GuestMemory) -> None:
    with BackEnd(tmp_path, NetDevice(backend="loop")) as back_end:
        frontend = back_end.connect()
        driver = start(frontend, memory)
        driver.send_many([frame(n) for n in range(20)])
    frontend.wait_closed()
    driver.close()
    frontend.close()
    assert not back_end.paths[0].exists()
