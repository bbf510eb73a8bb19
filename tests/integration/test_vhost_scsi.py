"""`pyvhost.open("/dev/vhost-scsi")`: a driver's commands through the endpoints of this process."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvhost
from disk_scene import BLOCK, UNIT_ATTENTION, meet
from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio_scsi
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.scsi import FEATURES, ScsiDriver
from pyvhost.driver.scsi_command import Layout
from pyvhost.driver.vhost_ioctl import VhostScsiFrontend
from pyvhost.scsi import endpoints
from pyvhost.scsi.endpoints import Endpoint
from pyvhost.vhost.handle import Handle

WWPN = "naa.600140554cf3a18e"
PATIENCE = 30.0
T10_PI = 1 << virtio_scsi.F_T10_PI


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(16 * MIB, anonymous=True) as memory:
        yield memory


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 * MIB))
    endpoint = endpoints.register(WWPN, [f"1:0={image}", "1:1=memory:1M", "7:300=memory:1M"])
    yield endpoint
    endpoint.unregister()


@contextmanager
def driving(
    memory: GuestMemory, *, features: int = FEATURES, request_queues: int = 1, wwpn: str = WWPN
) -> Iterator[tuple[Handle, ScsiDriver]]:
    with pyvhost.open("/dev/vhost-scsi") as handle:
        front = VhostScsiFrontend(handle, wwpn)
        with ScsiDriver(
            front, memory, features=features, request_queues=request_queues, timeout=PATIENCE
        ) as driver:
            driver.start()
            yield handle, driver


def both_ways(driver: ScsiDriver, target: int, lun: int, content: bytes, *, queue: int = 0) -> None:
    """Writes and reads back, by the loop and by Python."""
    blocks = len(content) // BLOCK
    assert driver.command(target, lun, cdb.write10(8, blocks), content, queue=queue).good
    got = driver.command(target, lun, cdb.read10(8, blocks), data_in_length=len(content), queue=queue)
    assert got.data == content
    # FORCE UNIT ACCESS with DPO, and room to spare: none of it is plain.
    got = driver.command(target, lun, cdb.read16(8, blocks, 0x18), data_in_length=len(content) + 512)
    assert got.data == content


def test_disks_of_several_targets(memory: GuestMemory, endpoint: Endpoint, tmp_path: Path) -> None:
    content = os.urandom(32 * BLOCK)
    with driving(memory, request_queues=3) as (_, driver):
        for target, lun in ((1, 0), (1, 1), (7, 300)):
            assert driver.command(target, lun, cdb.inquiry(36), data_in_length=36).data[8:15] == b"PYVHOST"
            meet(driver, target, lun)
            both_ways(driver, target, lun, content, queue=2)
        assert driver.command(0, 0, cdb.test_unit_ready()).response == virtio_scsi.S_BAD_TARGET
    assert (tmp_path / "disk.img").read_bytes()[8 * BLOCK : 40 * BLOCK] == content


def test_all_of_the_queues(memory: GuestMemory, endpoint: Endpoint) -> None:
    """128 for requests, each with its own writes."""
    with driving(memory, request_queues=128) as (_, driver):
        meet(driver, 1, 1)
        pending = [
            driver.submit(1, 1, cdb.write10(number, 1), bytes([number]) * BLOCK, queue=number)
            for number in range(128)
        ]
        driver.wait_all(pending)
        got = driver.command(1, 1, cdb.read10(0, 128), data_in_length=128 * BLOCK)
        assert got.data == b"".join(bytes([number]) * BLOCK for number in range(128))


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(header_apart=False), Layout(indirect=True, piece=700)], ids=str
)
def test_requests_with_fields_for_protection_information(
    memory: GuestMemory, endpoint: Endpoint, layout: Layout
) -> None:
    """T10_PI makes headers longer; what comes along of protection is nobody's."""
    content = os.urandom(8 * BLOCK)
    with driving(memory, features=FEATURES | T10_PI) as (_, driver):
        assert driver.features & T10_PI
        meet(driver, 1, 0)
        both_ways(driver, 1, 0, content)
        wrote = driver.submit(1, 0, cdb.write10(64, 8), content, pi_out=b"\xff" * 64, layout=layout)
        assert driver.wait_for(wrote).good
        read = driver.submit(
            1, 0, cdb.read10(64, 8), data_in_length=8 * BLOCK, pi_in_length=64, layout=layout
        )
        assert driver.wait_for(read).data == content


def test_disks_come_go_and_grow(memory: GuestMemory, endpoint: Endpoint) -> None:
    with driving(memory) as (_, driver):
        endpoint.add_lun(3, 2, "memory:1M")
        assert [(event.reason, event.lun[:4]) for event in driver.wait_events()] == [
            (virtio_scsi.EVT_RESET_RESCAN, bytes((1, 3, 0, 2)))
        ]
        meet(driver, 3, 2)
        endpoint.resize_lun(3, 2, 2 * MIB)
        while driver.command(3, 2, cdb.test_unit_ready()).sense_key != UNIT_ATTENTION:
            pass
        capacity = driver.command(3, 2, cdb.read_capacity10(), data_in_length=8).data
        assert int.from_bytes(capacity[:4], "big") == 2 * MIB // BLOCK - 1
        endpoint.remove_lun(3, 2)
        assert [event.reason for event in driver.wait_events()] == [virtio_scsi.EVT_RESET_REMOVED]
        assert (3, 2) not in [(disk.target, disk.lun) for disk in endpoint.luns]


def test_a_memory_disk_outlives_the_device_that_had_it(memory: GuestMemory, endpoint: Endpoint) -> None:
    content = os.urandom(BLOCK)
    with driving(memory) as (_, driver):
        meet(driver, 1, 1)
        assert driver.command(1, 1, cdb.write10(5, 1), content).good
    assert not endpoint.in_use
    with driving(memory) as (_, driver):
        assert driver.command(1, 1, cdb.test_unit_ready()).sense_key == UNIT_ATTENTION, (
            "it is another initiator"
        )
        assert driver.command(1, 1, cdb.read10(5, 1), data_in_length=BLOCK).data == content


def test_cleared_and_set_again_with_commands_in_flight(memory: GuestMemory, endpoint: Endpoint) -> None:
    """What was begun is done when CLEAR_ENDPOINT is back; the rings go on where they were."""
    content = os.urandom(8 * BLOCK)
    with driving(memory, request_queues=2) as (_, driver):
        meet(driver, 1, 0)
        for turn in range(10):
            pending = [driver.submit(1, 0, cdb.write10(8 * at, 8), content, queue=at % 2) for at in range(8)]
            bases = driver.stop()
            driver.resume(bases=bases)
            driver.wait_all(pending)
            told = [one.response for one in pending]
            assert all(one is not None and (one.good or one.sense_key == UNIT_ATTENTION) for one in told), (
                turn
            )
            meet(driver, 1, 0)
            got = driver.command(1, 0, cdb.read10(0, 8), data_in_length=8 * BLOCK)
            assert got.data in (content, bytes(8 * BLOCK))


def test_an_endpoint_is_one_devices(memory: GuestMemory, endpoint: Endpoint) -> None:
    with driving(memory) as (_, _), GuestMemory(16 * MIB, anonymous=True) as others:
        assert endpoint.in_use
        with pytest.raises(OSError, match="is free") as refused, driving(others):
            pass
        assert refused.value.errno == errno.ENODEV
        with pytest.raises(OSError, match="a device has it"):
            endpoint.unregister()


def test_two_devices_at_once(memory: GuestMemory, endpoint: Endpoint) -> None:
    second = endpoints.register("iqn.2026-11.test:second", ["memory:1M"])
    one, other = os.urandom(BLOCK * 4), os.urandom(BLOCK * 4)
    try:
        with (
            GuestMemory(16 * MIB, anonymous=True) as theirs,
            driving(memory) as (_, driver),
            driving(theirs, wwpn=second.wwpn) as (_, neighbour),
        ):
            meet(driver, 1, 1)
            meet(neighbour, 0, 0)
            both_ways(driver, 1, 1, one)
            both_ways(neighbour, 0, 0, other)
            both_ways(driver, 1, 1, one)
    finally:
        second.unregister()


def test_a_device_that_nobody_closes(memory: GuestMemory, endpoint: Endpoint) -> None:
    """The collector gives the endpoint back."""
    handle = pyvhost.open("/dev/vhost-scsi")
    front = VhostScsiFrontend(handle, WWPN)
    driver = ScsiDriver(front, memory, timeout=PATIENCE)
    driver.start()
    assert endpoint.in_use
    driver.close()
    del handle, front, driver
    gc.collect()
    assert not endpoint.in_use


def test_from_many_threads(memory: GuestMemory, endpoint: Endpoint) -> None:
    with pyvhost.open("/dev/vhost-scsi") as handle:
        front = VhostScsiFrontend(handle, WWPN)
        front.negotiate(0)
        wrong: list[BaseException] = []

        def ask(index: int) -> None:
            try:
                for num in (64, 128, 256):
                    front.set_vring_num(index, num)
                    front.set_events_missed(True)
                    assert front.get_abi_version() == 1
                    assert front.get_events_missed()
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_nothing_is_left_behind(memory: GuestMemory, endpoint: Endpoint) -> None:
    with driving(memory) as (_, driver):
        meet(driver, 1, 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with driving(memory) as (_, driver):
            meet(driver, 1, 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_and_places(endpoint: Endpoint) -> None:
    assert endpoints.registered() == [WWPN]
    with pytest.raises(FileExistsError):
        endpoints.register(WWPN)
    for wwpn in ("", "a\0b", "n" * 224):
        with pytest.raises(ValueError, match="no name of an endpoint"):
            endpoints.register(wwpn)
    with pytest.raises(ValueError, match="1:0 is taken"):
        endpoint.add_lun(1, 0, "memory:1M")
    with pytest.raises(ValueError, match="targets go from 0"):
        endpoint.add_lun(256, 0, "memory:1M")
    with pytest.raises(ValueError, match="no LUN 4:4"):
        endpoint.remove_lun(4, 4)
    with pytest.raises(FileNotFoundError):
        endpoints.register("other", ["memory:1M", "/there/is/no/such/file"])
    assert endpoints.registered() == [WWPN]


def test_a_name_of_full_length(memory: GuestMemory) -> None:
    name = "n" * 223
    endpoint = endpoints.register(name, ["memory:1M"])
    try:
        with driving(memory, wwpn=name) as (_, driver):
            meet(driver, 0, 0)
    finally:
        endpoint.unregister()


def test_what_a_forked_child_may_ask(endpoint: Endpoint) -> None:
    with pyvhost.open("/dev/vhost-scsi") as handle:
        pid = os.fork()
        if pid == 0:
            answer = 1
            try:
                version = handle.ioctl(abi.SCSI_GET_ABI_VERSION, bytes(4))
                refused = False
                try:
                    handle.ioctl(abi.SCSI_SET_EVENTS_MISSED, bytes(4))
                except OSError as error:
                    refused = error.errno == errno.EPERM
                answer = 0 if version == b"\1\0\0\0" and refused else 2
            finally:
                os._exit(answer)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
