"""Workers: the thread in its loop, how it is got out of it, and what it says when it comes back by itself."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from in_process import PATIENCE, FrontEnd, echo, open_fds, refused, served
from pyvhost.dataplane import blocks
from pyvhost.dataplane.net_loop import net_loop
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.net.backends.base import Backend, PortKind
from pyvhost.net.device import NetDevice
from pyvhost.net.process import Process
from pyvhost.vhost.worker import Slots, Worker, Workers


def row(name: str = "") -> np.ndarray:
    return np.zeros(len(blocks.COUNTERS), np.int64)


@pytest.fixture
def worker() -> Iterator[Worker]:
    Process.prepare()
    worker = Worker(net_loop, "test-worker", row())
    yield worker
    worker.close()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


# Slots


def test_slots_are_given_out_lowest_first_and_again() -> None:
    slots = Slots(3, "seats")
    assert [slots.take() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="3 seats"):
        slots.take()
    slots.give_back(2)
    slots.give_back(0)
    assert [slots.take(), slots.take()] == [0, 2]


# The thread


def test_a_worker_has_a_thread_once_it_has_a_port_and_until_it_is_closed() -> None:
    Process.prepare()
    fds = open_fds()
    worker = Worker(net_loop, "short-lived", row())
    with worker.paused():
        assert "short-lived" not in threads()
        port = worker.add_port()
    assert "short-lived" in threads()
    with worker.paused():
        worker.remove_port(port)
    assert "short-lived" in threads()
    worker.close()
    assert "short-lived" not in threads()
    assert open_fds() == fds


def test_a_worker_that_never_ran_is_closed_as_well() -> None:
    fds = open_fds()
    Worker(net_loop, "never", row()).close()
    assert open_fds() == fds


def test_pauses_nest(worker: Worker) -> None:
    with worker.paused():
        worker.add_port()
        with worker.paused(), worker.paused():
            pass
        # Still out: the array may be changed.
        worker.add_port()


def test_pauses_of_many_threads(worker: Worker) -> None:
    with worker.paused():
        worker.add_port()
    failures: list[BaseException] = []
    left = [0]

    def pause() -> None:
        try:
            for _ in range(200):
                with worker.paused():
                    left[0] += 1
        except BaseException as error:
            failures.append(error)

    players = [threading.Thread(target=pause) for _ in range(4)]
    for player in players:
        player.start()
    for player in players:
        player.join(PATIENCE)
        assert not player.is_alive()
    assert failures == []


def test_no_two_threads_change_workers_at_once(worker: Worker) -> None:
    """Ports and rings of many devices are in one worker's books, and a device may have several workers."""
    other = Worker(net_loop, "other-worker", row())
    inside: list[int] = []
    failures: list[BaseException] = []

    def change(first: Worker, second: Worker) -> None:
        try:
            for _ in range(100):
                with first.paused(), second.paused():
                    inside.append(1)
                    os.sched_yield()
                    assert len(inside) == 1
                    port = first.add_port()
                    ring = first.add_ring(port, row(), "ring")
                    os.sched_yield()
                    first.remove_ring(ring)
                    first.remove_port(port)
                    inside.pop()
        except BaseException as error:
            failures.append(error)

    # In either order: nobody waits for somebody who waits.
    players = [threading.Thread(target=change, args=pair) for pair in ((worker, other), (other, worker)) * 2]
    for player in players:
        player.start()
    for player in players:
        player.join(PATIENCE)
        assert not player.is_alive()
    other.close()
    assert failures == []


def test_nothing_moves_during_a_pause(driver: NetDriver, front: FrontEnd) -> None:
    """The ring is polled, the guest has sent, and for as long as the pause lasts nothing is used."""
    assert isinstance(front.device, NetDevice)
    (pair,) = front.device.pairs
    front.device.set_vring_kick(1, -1)
    for number in range(20):
        with pair.worker.paused():
            used = driver.tx[0].ring.used_idx
            driver.send_many([b"x" * 60] * 3)
            assert driver.tx[0].ring.used_idx == used
            assert number * 3 == used
        assert len(driver.receive(3)) == 3
        driver.wait_sent()


def test_a_worker_can_not_pause_itself_and_survives_the_attempt(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    """What is told in the worker's thread may go wrong: the rings of all others hang on that thread."""
    asked = threading.Event()

    def told(code: int) -> None:
        try:
            with worker.paused():
                raise AssertionError("it has paused itself")
        finally:
            asked.set()

    _break(worker, told)
    assert asked.wait(PATIENCE)
    with worker.paused():
        pass
    assert "can't pause itself" in caplog.text
    again = threading.Event()
    _break(worker, lambda code: again.set())
    assert again.wait(PATIENCE)


def _break(worker: Worker, told: object) -> None:
    """A port whose descriptor can't be read: a switch's uplink on a file that nobody reads frames from."""
    with worker.paused():
        port = worker.add_port()
        record = worker.ports[port]
        counters, bounce = row(), np.zeros(blocks.BOUNCE_BYTES // 8, np.int64)
        _alive.extend((counters, bounce))
        record["kind"] = blocks.PORT_FD
        record["row"], record["bounce"] = counters.ctypes.data, bounce.ctypes.data
        worker.on_backend_fault[port] = told  # type: ignore[assignment]
        # Readable at once, and a read of eight bytes at least.
        record["fd"] = _write_only()
        record["readable"] = 1
        worker.activate(port)


_alive: list[object] = []


def _write_only() -> int:
    fd = os.open("/dev/null", os.O_WRONLY)
    _alive.append(os.fdopen(fd, "wb", buffering=0))
    return fd


def test_each_errno_of_a_port_is_told_once_with_a_descriptor(worker: Worker) -> None:
    codes: list[int] = []
    told = threading.Semaphore(0)

    def note(code: int) -> None:
        codes.append(code)
        told.release()

    _break(worker, note)
    assert told.acquire(timeout=PATIENCE)
    assert codes == [errno.EBADF]
    with worker.paused():
        port = int(np.flatnonzero(worker.ports["used"])[-1])
        worker.ports[port]["readable"] = 1
        worker.activate(port)
    # Another port behind it in the same loop: when that has been heard of, the first has had its turn.
    _break(worker, lambda code: told.release())
    assert told.acquire(timeout=PATIENCE)
    with worker.paused():
        assert int(worker.ports[port]["readable"]) == 0
    assert codes == [errno.EBADF]
    # With the next descriptor all begins anew.
    out, into = os.pipe()
    os.close(into)
    os.set_blocking(out, False)
    with worker.paused():
        worker.ports[port]["fd"] = -1
    worker.use_fd(port, -1, out)
    with worker.paused():
        assert worker.ports[port]["error_told"] == 0
    worker.use_fd(port, out, -1)
    os.close(out)


def test_a_descriptor_that_can_not_be_watched_is_an_error(worker: Worker) -> None:
    with worker.paused(), open("/dev/null", "rb") as file:
        for fd, code in ((99999, errno.EBADF), (file.fileno(), errno.EPERM)):
            with pytest.raises(OSError, match="can't be watched") as caught:
                worker.watch(fd, select.EPOLLIN, blocks.EVENT_KICK, 0)
            assert caught.value.errno == code
        # It may have gone meanwhile.
        worker.unwatch(99999, blocks.EVENT_KICK)


def test_ports_that_were_active_are_forgotten_with_the_rest(worker: Worker) -> None:
    with worker.paused():
        ports = [worker.add_port() for _ in range(4)]
        for port in ports:
            worker.activate(port)
            worker.activate(port)
        worker.remove_port(ports[1])
        worker.remove_port(ports[3])
        assert [int(record["active"]) for record in worker.ports[:4]] == [1, 0, 1, 0]
        assert worker.add_port() == ports[1]
        assert int(worker.ports[ports[1]]["active"]) == 0


# Which worker


def test_workers_are_made_in_turn_and_shared_by_key() -> None:
    workers = Workers(lambda name: Worker(net_loop, name, row(name)), "kind", 2)
    first, second = workers.take(), workers.take()
    assert (first.name, second.name) == ("kind-worker0", "kind-worker1")
    assert workers.take() is first
    shared = workers.take("switch:lan")
    assert shared is second
    assert [workers.take("switch:lan") for _ in range(3)] == [shared] * 3
    assert workers.take() is first
    for worker in (first, second):
        worker.close()


def test_there_are_as_many_workers_as_processors_but_not_very_many() -> None:
    assert Workers(lambda name: Worker(net_loop, name, row(name)), "kind").count == min(
        len(os.sched_getaffinity(0)), 8
    )


# What a port is set to


class Silent(Backend):
    """One without a descriptor yet."""

    kind = PortKind.STREAM
    queue_pairs_max = 1


def test_a_port_without_a_descriptor_is_not_read(
    memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream whose peer is still to come is no fault of anybody's."""
    device = NetDevice(Silent("silent"))
    with served(device) as front, NetDriver(front, memory, timeout=PATIENCE) as driver:
        driver.start()
        driver.send(b"x" * 60)
        driver.wait_sent()
        (pair,) = device.pairs
        with pair.worker.paused():
            assert int(pair.worker.ports[pair.port]["error_told"]) == 0
    assert "silent" not in caplog.text


def test_a_kick_that_can_not_be_watched_leaves_the_ring_stopped(
    front: FrontEnd, driver: NetDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is out of memory for epoll: provoked, since no host here ever is."""
    driver.stop()

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "no room to watch another descriptor")

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "watch", full)
        with pytest.raises(OSError, match="no room"):
            front.device.set_vring_running(1, True)
    assert front.device.vrings[1].place is None
    driver.resume()
    echo(driver)
    with refused(errno.EBUSY, "while it runs"):
        front.device.set_vring_num(1, 16)
