"""`--pcap`: what a guest sends and gets is in the file, frame by frame, whatever the backend."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import RawPcapNgReader

from back_end import BackEnd
from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.net.device import NetDevice

VERSION_1 = 1 << virtio.F_VERSION_1
MRG_RXBUF = 1 << abi.F_MRG_RXBUF
INBOUND, OUTBOUND = 1, 2
SIZES = [60, 61, 62, 63, 300, 1514, 2000, 9000, 20000]


def frame_of(size: int, source: int = 1) -> bytes:
    """A broadcast frame of `size` bytes that no other size's is like."""
    return (
        b"\xff" * 6 + bytes((2, 0, 0, 0, 0, source)) + b"\x88\xb5" + random.Random(size).randbytes(size - 14)
    )


def recorded(path: Path) -> list[tuple[bytes, int, bytes]]:
    """Interface, direction and bytes of every frame, in the file's order."""
    with RawPcapNgReader(str(path)) as reader:
        found: list[tuple[bytes, Any]] = list(reader)
    return [(about.ifname, about.direction, frame) for frame, about in found]


@pytest.mark.parametrize("guest", [VERSION_1, VERSION_1 | MRG_RXBUF], ids=["big", "mergeable"])
def test_a_loop_is_recorded_both_ways(tmp_path: Path, guest: int) -> None:
    path = tmp_path / "a.pcap"
    # Without mergeable buffers a frame has to fit into one.
    frames = [frame_of(size) for size in SIZES if size <= 1514 or guest & MRG_RXBUF]
    with (
        BackEnd(tmp_path, NetDevice(backend="loop", pcap=path, name="vm0")) as back_end,
        GuestMemory(64 * MIB) as memory,
        back_end.connect() as frontend,
        NetDriver(frontend, memory, features=guest) as driver,
    ):
        driver.start()
        for frame in frames:
            driver.send(frame)
            assert driver.receive()[0].frame == frame
        driver.wait_sent()
    found = recorded(path)
    assert {name for name, _, _ in found} == {b"vm0"}
    assert [frame for _, direction, frame in found if direction == OUTBOUND] == frames
    assert [frame for _, direction, frame in found if direction == INBOUND] == frames
    assert len(found) == 2 * len(frames)


def test_what_is_generated_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    with (
        BackEnd(tmp_path, NetDevice(backend="generate:100", pcap=path)) as back_end,
        GuestMemory(64 * MIB) as memory,
        back_end.connect() as frontend,
        NetDriver(frontend, memory) as driver,
    ):
        driver.start()
        got = [received.frame for received in driver.receive(20)]
    found = recorded(path)
    assert [frame for _, _, frame in found][:20] == got[:20]
    assert {direction for _, direction, _ in found} == {INBOUND}


def test_guests_on_a_switch_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    devices = [NetDevice(backend="switch:recorded", pcap=path, name=f"vm{number}") for number in (0, 1)]
    frame = frame_of(1000)
    with (
        BackEnd(tmp_path, *devices) as back_end,
        GuestMemory(64 * MIB) as memory,
        GuestMemory(64 * MIB) as other_memory,
        back_end.connect(0) as frontend,
        back_end.connect(1) as other_frontend,
        NetDriver(frontend, memory) as driver,
        NetDriver(other_frontend, other_memory) as other,
    ):
        driver.start()
        other.start()
        driver.send(frame)
        assert other.receive()[0].frame == frame
        driver.wait_sent()
    assert sorted(recorded(path)) == [(b"vm0", OUTBOUND, frame), (b"vm1", INBOUND, frame)]


def test_a_front_end_that_leaves_and_one_that_comes(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    with BackEnd(tmp_path, NetDevice(backend="null", pcap=path)) as back_end:
        for number in range(3):
            with (
                GuestMemory(64 * MIB) as memory,
                back_end.connect() as frontend,
                NetDriver(frontend, memory) as driver,
            ):
                driver.start()
                driver.send(frame_of(100 + number))
                driver.wait_sent()
    assert [len(frame) for _, _, frame in recorded(path)] == [100, 101, 102]
