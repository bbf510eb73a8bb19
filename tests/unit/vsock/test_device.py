"""The socket device as a front end sees it, with a driver in the same process."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from in_process import FrontEnd, open_fds, served, serving
from pyvhost.abi import virtio
from pyvhost.abi import virtio_vsock as abi
from pyvhost.dataplane.vsock_blocks import MAX_OF_GUEST
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.vsock import VsockDriver
from pyvhost.host.poller import Poller
from pyvhost.vhost.errors import VhostError
from pyvhost.vsock.contract import Key
from pyvhost.vsock.device import EVENT, VsockDevice
from pyvhost.vsock.plane import VsockWorker

CID = 52


@pytest.fixture
def device() -> VsockDevice:
    return VsockDevice(CID)


@pytest.fixture
def front(device: VsockDevice) -> Iterator[FrontEnd]:
    with served(device) as front:
        yield front


@pytest.mark.parametrize("cid", [-1, 0, 1, 2, (1 << 32) - 1, 1 << 32])
def test_no_guest_has_a_cid_that_is_somebody_elses(cid: int) -> None:
    with pytest.raises(ValueError, match=f"CID {cid}: "):
        VsockDevice(cid)


@pytest.mark.parametrize("options", [{"buffer": 4096}, {"buffer": 100_000}, {"max_connections": 0}])
def test_what_can_not_be_is_said_at_once(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VsockDevice(CID, **options)  # type: ignore[arg-type]


def test_the_configuration_is_the_cid(front: FrontEnd) -> None:
    assert front.get_config(0, 64) == CID.to_bytes(8, "little")
    with pytest.raises(VhostError):
        front.device.set_config(0, bytes(8), 0)


@pytest.mark.parametrize(
    ("acked", "types"),
    [
        ((), {abi.TYPE_STREAM}),
        ((abi.F_SEQPACKET,), {abi.TYPE_STREAM, abi.TYPE_SEQPACKET}),
        ((abi.F_SEQPACKET, abi.F_NO_IMPLIED_STREAM), {abi.TYPE_SEQPACKET}),
        ((abi.F_STREAM, abi.F_NO_IMPLIED_STREAM), {abi.TYPE_STREAM}),
    ],
)
def test_types_are_what_was_negotiated(
    front: FrontEnd, device: VsockDevice, acked: tuple[int, ...], types: set[int]
) -> None:
    device.set_features(sum(1 << bit for bit in (*acked, virtio.F_VERSION_1)))
    assert device.connections.types == types


def test_a_driver_that_has_known_another_back_end_hears_of_it(front: FrontEnd, device: VsockDevice) -> None:
    with GuestMemory(16 * MIB) as memory:
        driver = VsockDriver(front, memory)
        driver.start()
        queues = (driver.rx, driver.tx, driver.event)
        # Nobody listens there: one packet each way, so that the rings stand elsewhere than at their beginning.
        with serving(device), pytest.raises(ConnectionError):
            driver.connect(1)
        assert driver.transport_resets == 0
        bases = [front.stop_ring(index) for index in range(len(queues))]
        assert bases[0] > 0
        for index, queue in enumerate(queues):
            # Stopped and let on, as QEMU does to a guest that is paused: its connections are there.
            front.start_ring(index, queue, bases[index])
        with serving(device):
            driver.pump()
        assert driver.transport_resets == 0
        bases = [front.stop_ring(index) for index in range(len(queues))]
        device.reset()
        front.negotiate(driver.features)
        front.set_mem_table(memory.regions)
        for index, queue in enumerate(queues):
            front.start_ring(index, queue, bases[index])
        with serving(device):
            driver.wait_for(lambda: driver.transport_resets == 1, "transport reset")
        assert device.get_vring_base(EVENT) == 1


def test_a_driver_that_begins_anew_has_no_connections(front: FrontEnd, device: VsockDevice) -> None:
    with GuestMemory(16 * MIB) as memory:
        for _ in range(2):
            driver = VsockDriver(front, memory)
            driver.start()
            driver.answers = False
            device.connections.connect(Silent(), abi.TYPE_STREAM, 81)
            driver.stray()
            # The loop let go of the former one before it asked for this one, and has told so.
            device.link.serve()
            assert device.link.open_connections == 1
            # QEMU's reset: the rings are stopped, and those of the next driver start where rings begin.
            for index in range(3):
                front.stop_ring(index)


class Silent:
    """An end that is never connected."""

    fd = -1

    def accepted(self) -> None:
        raise AssertionError("nobody accepts it")

    def refused(self, reason: str) -> None:
        pass

    def shutdown(self, flags: int) -> None:
        pass

    def ended(self) -> int:
        return 0

    def close(self, reset: bool) -> None:
        pass


def test_a_connection_that_there_is_no_memory_for_is_none(
    front: FrontEnd, device: VsockDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key(abi.TYPE_STREAM, 1, abi.VMADDR_CID_HOST, 2)
    refusing = True

    def refuse(*arguments: int) -> mmap.mmap:
        if refusing:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return mapped(*arguments)

    mapped = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", refuse)
    assert device.link.open(key, True) is None
    refusing = False
    assert device.link.open(key, True) == 0, "the same place, which nobody has"
    assert device.link.open_connections == 1
    device.link.close(0)


def test_a_device_that_ends_in_a_hurry_is_no_ones_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop has not let go of its connections, whose memory goes: those that were joined to them know no other."""
    hasty, other = (VsockDevice(cid, group="hurry") for cid in (61, 62))
    with Poller() as poller, GuestMemory(16 * MIB) as one, GuestMemory(16 * MIB) as two:
        try:
            hasty.attach(poller)
            other.attach(poller)
            asking, asked = VsockDriver(FrontEnd(hasty), one), VsockDriver(FrontEnd(other), two)
            asking.start()
            asked.start()
            with serving(hasty):
                listener = asked.listen(80)
                connecting = asking.connect(80, 62, wait=False)
                sock = listener.accept()
                connecting.wait_connected()
            worker, port = other.link.worker, other.link.port
            records = worker.connections
            (joined,) = (slot for slot in list(other.link._held) if records[slot]["other"] >= 0)
            gone = int(records[joined]["other"])
            monkeypatch.setattr(hasty.link, "_hand_on", lambda *arguments: None)
            monkeypatch.setattr("pyvhost.vsock.device.CLOSE_WAITS", 0.0)
            hasty.close()
            assert records[joined]["guest"] == port
            assert records[joined]["other"] == records[gone]["other"] == -1
            assert not records[gone]["open"]
            sock.packet(abi.OP_RW, b"to nobody")
            asked.wait_sent()
            # And the other guest hears of it: nobody else would tell it.
            with serving(other):
                asked.wait_for(lambda: sock.reset, "RST")
        finally:
            hasty.close()
            other.close()


def test_the_loop_is_woken_for_what_can_not_wait(
    front: FrontEnd, device: VsockDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is opened waits for its first packet; who was told of nothing has nothing to say."""
    bells = []
    monkeypatch.setattr(os, "eventfd_write", lambda fd, number: bells.append(fd))
    slot = device.link.open(Key(abi.TYPE_STREAM, 1, abi.VMADDR_CID_HOST, 2), True)
    assert slot is not None
    device.link.serve()
    assert bells == []
    device.link.send(slot, abi.OP_REQUEST)
    assert len(bells) == 1
    monkeypatch.undo()
    device.link.close(slot)


def test_a_driver_without_event_buffers_hears_nothing(front: FrontEnd, device: VsockDevice) -> None:
    assert not device.transport_reset()


def test_a_device_that_is_gone_writes_to_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """More was asked of its loop than the queue takes; by the time that the rest was due, the number is another's."""
    device = VsockDevice(CID)
    with Poller() as poller:
        device.attach(poller)
        with device.link.worker.paused():
            for port in range(5000):
                device.link.reset(Key(abi.TYPE_STREAM, port, abi.VMADDR_CID_HOST, 2))
        device.close()
        written: list[int] = []
        monkeypatch.setattr(os, "eventfd_write", lambda fd, number: written.append(fd))
        poller.run_once(0.05)
        assert written == []


@pytest.mark.parametrize("failing", ["eventfd", "add_port", "register"])
def test_a_device_that_there_is_no_room_for_takes_none(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Whatever it is that lacks, nothing stays behind of what was there."""
    with Poller() as poller:
        before = open_fds()
        for _ in range(3):
            device = VsockDevice(CID, group="full", max_connections=MAX_OF_GUEST)
            owner = {"eventfd": os, "add_port": VsockWorker, "register": poller}[failing]
            with monkeypatch.context() as patch:
                patch.setattr(owner, failing, refuse_all)
                with pytest.raises(OSError, match="no more"):
                    device.attach(poller)
            device.close()
        assert open_fds() == before
        # Sixteen of these are all that a worker has room for.
        devices = [
            VsockDevice(CID + number, group="full", max_connections=MAX_OF_GUEST) for number in range(16)
        ]
        try:
            for device in devices:
                device.attach(poller)
        finally:
            for device in devices:
                device.close()


def refuse_all(*arguments: object, **options: object) -> None:
    raise OSError(errno.EMFILE, "no more")
