"""Dirty log and IOTLB on every way in: each backend writes to guest memory by a path of its own."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from back_end import PATIENCE, BackEnd
from both_ways import (
    EVENT_IDX,
    INDIRECT,
    MRG_RXBUF,
    VERSION_1,
    devices_part,
    driver_on,
    frame,
    parted,
    used_pages,
)
from netns import network_namespace
from pyvhost.driver.dirty_log import DirtyLog, Snapshot
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.net.device import NetDevice

MODERN = VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT
ETHERTYPE = 0x88B5

#: Says frames to the guest.
Say: TypeAlias = Callable[[list[bytes]], None]
Host: TypeAlias = Callable[[Path], AbstractContextManager[tuple[BackEnd, Say]]]


@contextmanager
def behind(interface: str) -> Iterator[Say]:
    """A packet socket on the host's side of an interface."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE)) as host:
        host.bind((interface, ETHERTYPE))

        def say(frames: list[bytes]) -> None:
            for one in frames:
                host.send(one)

        yield say


def quiet(*interfaces: str) -> None:
    """No host speaks of its own accord there."""
    for name in interfaces:
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")


@contextmanager
def at_a_tap(directory: Path) -> Iterator[tuple[BackEnd, Say]]:
    with network_namespace() as ip:
        ip("tuntap add mode tap name t0 vnet_hdr")
        quiet("t0")
        with BackEnd(directory, NetDevice("tap:t0")) as back_end:
            ip("link set t0 up")
            with behind("t0") as say:
                yield back_end, say


@contextmanager
def at_a_packet_socket(directory: Path) -> Iterator[tuple[BackEnd, Say]]:
    with network_namespace() as ip:
        ip("link add name v0 type veth peer name v1")
        quiet("v0", "v1")
        ip("link set v0 up")
        ip("link set v1 up")
        with BackEnd(directory, NetDevice("packet:v0")) as back_end, behind("v1") as say:
            yield back_end, say


@contextmanager
def at_a_stream(directory: Path) -> Iterator[tuple[BackEnd, Say]]:
    path = directory / "peer"
    with (
        BackEnd(directory, NetDevice(f"stream:{path}")) as back_end,
        socket.socket(socket.AF_UNIX) as peer,
    ):
        peer.settimeout(PATIENCE)
        peer.connect(str(path))
        yield back_end, lambda frames: peer.sendall(b"".join(struct.pack(">I", len(f)) + f for f in frames))


@contextmanager
def at_a_switch(directory: Path) -> Iterator[tuple[BackEnd, Say]]:
    """The other guest on the switch has memory and rings of its own, and no log."""
    with (
        BackEnd(directory, NetDevice("switch:lan"), NetDevice("switch:lan")) as back_end,
        back_end.connect(1) as front,
        GuestMemory(16 * MIB) as memory,
        NetDriver(front, memory, features=MODERN, timeout=PATIENCE) as other,
    ):
        other.start()

        def say(frames: list[bytes]) -> None:
            other.send_many(frames)

        yield back_end, say


HOSTS: dict[str, Host] = {
    "tap": at_a_tap,
    "packet": at_a_packet_socket,
    "stream": at_a_stream,
    "switch": at_a_switch,
}
KINDS: dict[str, dict[str, Any]] = {
    "modern": {"features": MODERN},
    "legacy, big-endian": {"features": MRG_RXBUF, "byteorder": "big"},
    "merged buffers": {"features": MODERN, "rx_buffer": 300},
}


def until_heard(driver: NetDriver, say: Say) -> None:
    """A switch drops what comes for a ring whose misses have no answer yet."""
    for number in itertools.count(1000):
        say([frame(number, 60)])
        try:
            # In order: behind the last, none of those before it can come.
            while driver.receive(1, timeout=1.0)[-1].frame != frame(number, 60):
                pass
            return
        except TimeoutError:
            continue


@pytest.mark.parametrize("mapped", [False, True], ids=["physical", "behind an IOMMU"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
def test_what_comes_in_is_logged_page_by_page(tmp_path: Path, host: Host, kind: str, mapped: bool) -> None:
    with parted() as memory, DirtyLog.covering(memory) as log, host(tmp_path) as (back_end, say):
        options = KINDS[kind] | {"iommu": Iommu(memory) if mapped else None}
        with back_end.connect() as front, driver_on(front, memory, **options) as driver:
            driver.start()
            until_heard(driver, say)
            driver.start_log(log)
            log.take()
            before = Snapshot(memory)
            for turn in range(5):
                frames = [frame(turn * 4 + number, 60 + 71 * (turn * 4 + number)) for number in range(4)]
                say(frames)
                assert [got.frame for got in driver.receive(4)] == frames
            driver.stop()
            marked, changed = log.take(), devices_part(memory, before.changed())
            # The transmit ring has nothing to do, but may ask for kicks.
            quiet_ring = used_pages(driver, 1)
            assert marked - quiet_ring == changed - quiet_ring
            assert marked > used_pages(driver, 0)
            if driver.iommu is not None:
                assert driver.iommu.faults == []


@pytest.mark.parametrize("mapped", [False, True], ids=["physical", "behind an IOMMU"])
def test_what_is_generated_is_logged_page_by_page(tmp_path: Path, mapped: bool) -> None:
    with (
        parted() as memory,
        DirtyLog.covering(memory) as log,
        BackEnd(tmp_path, NetDevice("generate:1000,count=40")) as back_end,
        back_end.connect() as front,
        driver_on(front, memory, features=MODERN, iommu=Iommu(memory) if mapped else None) as driver,
    ):
        driver.start(post=False)
        driver.start_log(log)
        log.take()
        before = Snapshot(memory)
        driver.post()
        assert len(driver.receive(40)) == 40
        driver.stop()
        # The transmit ring has nothing to do, but may ask for kicks.
        marked, changed, quiet_ring = (
            log.take(),
            devices_part(memory, before.changed()),
            used_pages(driver, 1),
        )
        assert marked - quiet_ring == changed - quiet_ring
        assert marked > used_pages(driver, 0)
