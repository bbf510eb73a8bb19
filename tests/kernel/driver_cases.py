"""What a driver does with a vhost-net device by ioctls: the same for `pyvhost.open`'s and for a kernel's own.

    with Tapped("t0") as tap:
        CASES["log/exact"](open_device, tap)       # open_device() gives a handle; raises where the device is wrong

Promises: the standard library and `pyvhost.driver` alone, so that it runs where nothing else is; frames leave a
packet socket on the tap's side of the host, which needs root and a network namespace without other traffic.
Never: skips by itself. `UnsupportedError` says that the device has not what the case is about.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.dirty_log import LOG_PAGE, DirtyLog, Snapshot
from pyvhost.driver.iommu import Iommu
from pyvhost.driver.memory import MIB, GuestMemory, Span
from pyvhost.driver.net import NetDriver
from pyvhost.driver.net_frame import Shape
from pyvhost.driver.ring_parts import RingLayout
from pyvhost.driver.vhost_ioctl import Handle, VhostNetFrontend
from pyvhost.host import interface, tap

Open: TypeAlias = Callable[[], Handle]

PATIENCE: Final = 30.0
ETHERTYPE: Final = 0x88B5
VERSION_1: Final = 1 << virtio.F_VERSION_1
MRG_RXBUF: Final = 1 << abi.F_MRG_RXBUF
EVENT_IDX: Final = 1 << virtio.RING_F_EVENT_IDX
INDIRECT: Final = 1 << virtio.RING_F_INDIRECT_DESC
MODERN: Final = VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT

#: Which region of a `Bench`'s memory is whose to write to; the last one is RX and USED, seen at another address.
DRIVERS, RX, USED = range(3)
_POISON: Final = 0xEE


class UnsupportedError(Exception):
    """The device has not what this case is about; the text says what."""


class Tapped:
    """A tap that is up, and a socket on the host's side of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        (self.fd,) = tap.open_tap(name)
        try:
            # A host that speaks of its own accord would be heard by the guest.
            with suppress(OSError):
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            interface.set_up(name)
            self.host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
            self.host.bind((name, ETHERTYPE))
            self.host.settimeout(PATIENCE)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        self.host.close()
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def frame(number: int, size: int = 200) -> bytes:
    """A frame of `size` bytes, none of which is what buffers are poisoned with."""
    head = b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5")
    return (head + bytes((number * 7 + at * 13) % _POISON for at in range(size)))[:size]


class Bench:
    """A driver on a device, its memory parted by who writes where, and the host behind the tap."""

    def __init__(self, driver: NetDriver, front: VhostNetFrontend, memory: GuestMemory, tap: Tapped) -> None:
        self.driver = driver
        self.front = front
        self.memory = memory
        self.tap = tap

    def out(self, *frames: bytes) -> None:
        """From the guest to the host."""
        self.driver.send_many(frames)
        # First, because an IOMMU answers while the driver waits.
        self.driver.wait_sent()
        for sent in frames:
            got = self.tap.host.recv(65536)
            assert got == sent, f"{len(sent)} bytes were sent, {len(got)} others came"

    def into(self, *frames: bytes) -> None:
        """From the host to the guest."""
        for sent in frames:
            self.tap.host.send(sent)
        got = [one.frame for one in self.driver.receive(len(frames))]
        assert got == list(frames), f"{len(frames)} frames were sent, {len(got)} came, not all the same"

    def both_ways(self, *frames: bytes) -> None:
        self.out(*frames)
        self.into(*frames)

    def changed(self, before: Snapshot) -> set[int]:
        """The pages of the device's parts that are not what they were."""
        first = self.memory.regions[RX].guest_phys_addr // LOG_PAGE
        return {page for page in before.changed() if page >= first}

    def used_pages(self) -> set[int]:
        return {queue.ring.layout.used // LOG_PAGE for queue in self.driver.queues.values()}


@contextmanager
def bench(
    open_device: Open,
    tapped: Tapped,
    features: int = MODERN,
    *,
    anonymous: bool = True,
    iommu: Callable[[GuestMemory], Iommu] | None = None,
    message_v2: bool = False,
    ring_size: int = 64,
    **options: Any,
) -> Iterator[Bench]:
    """A driver that has started. `anonymous` memory has no files, as an application's own has none."""
    long = bool(features & (VERSION_1 | MRG_RXBUF))
    tap.set_vnet_hdr_size(tapped.fd, 12 if long else 10)
    spans = [Span(0, 4 * MIB), Span(64 * MIB, 4 * MIB), Span(1 << 32, MIB)]
    handle = open_device()
    try:
        with GuestMemory(spans, anonymous=anonymous) as memory:
            rx = memory.regions[RX]
            memory.write(rx.guest_phys_addr, bytes([_POISON]) * rx.memory_size)

            def layout(index: int) -> RingLayout:
                desc, avail, used = RingLayout.sizes(ring_size)
                return RingLayout(
                    memory.allocate(desc, 16, DRIVERS),
                    memory.allocate(avail, 2, DRIVERS),
                    memory.allocate(-(-used // LOG_PAGE) * LOG_PAGE, LOG_PAGE, USED),
                )

            front = VhostNetFrontend(handle, tapped.fd, message_v2=message_v2)
            options.setdefault("rx_allocate", lambda size: memory.allocate(size, 16, RX))
            driver = NetDriver(
                front,
                memory,
                features=features,
                ring_size=ring_size,
                layout=layout,
                allocate=lambda size: memory.allocate(size, 16, DRIVERS),
                iommu=None if iommu is None else iommu(memory),
                timeout=PATIENCE,
                **options,
            )
            with driver:
                driver.start()
                try:
                    yield Bench(driver, front, memory, tapped)
                finally:
                    # Before memory goes: the device has its addresses.
                    handle.close()
    finally:
        handle.close()


SIZES: Final = [60, 61, 128, 1000, 1500, 1514]


def _some(count: int = 24) -> list[bytes]:
    return [frame(number, SIZES[number % len(SIZES)]) for number in range(count)]


# --- frames ----------------------------------------------------------------------------------------------


def _frames(features: int, **options: Any) -> Callable[[Open, Tapped], None]:
    def case(open_device: Open, tapped: Tapped) -> None:
        with bench(open_device, tapped, features, **options) as b:
            for _ in range(6):
                b.both_ways(*_some())

    return case


def stops_and_goes_on(open_device: Open, tapped: Tapped) -> None:
    """GET_VRING_BASE says where, and nothing that waited is lost."""
    with bench(open_device, tapped) as b:
        for number in range(5):
            b.both_ways(frame(number))
            bases = b.driver.stop()
            assert bases[1] == number * 2 + 1
            b.driver.send(frame(100 + number))
            tapped.host.send(frame(200 + number))
            b.driver.resume(bases=bases)
            assert tapped.host.recv(65536) == frame(100 + number)
            assert [got.frame for got in b.driver.receive()] == [frame(200 + number)]
            b.driver.wait_sent()


def busy_polling(open_device: Open, tapped: Tapped) -> None:
    """BUSYLOOP_TIMEOUT is kept, a ring each, and frames go on."""
    with bench(open_device, tapped) as b:
        for microseconds in (0, 1, 50, 1000, 0):
            for index in range(2):
                b.front.set_vring_busyloop_timeout(index, microseconds + index)
                assert b.front.get_vring_busyloop_timeout(index) == microseconds + index
            b.both_ways(*_some(4))


def big_endian(open_device: Open, tapped: Tapped) -> None:
    """A legacy guest of the other byte order. Its virtio_net_hdr goes to the tap as it is, which must be told."""
    handle = open_device()
    try:
        front = VhostNetFrontend(handle)
        front.set_owner()
        front.set_vring_endian(0, 1)
        assert front.get_vring_endian(0) == 1
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise UnsupportedError("a kernel without CONFIG_VHOST_CROSS_ENDIAN_LEGACY") from None
        raise
    finally:
        handle.close()
    for features in (0, MRG_RXBUF | EVENT_IDX):
        with bench(open_device, tapped, features, byteorder="big") as b:
            b.both_ways(*_some())


# --- the dirty log -----------------------------------------------------------------------------------------


def _log_exact(features: int, **options: Any) -> Callable[[Open, Tapped], None]:
    def case(open_device: Open, tapped: Tapped) -> None:
        with (
            bench(open_device, tapped, features, **options) as b,
            DirtyLog.covering(b.memory) as log,
        ):
            b.driver.start_log(log)
            log.take()
            before = Snapshot(b.memory)
            b.both_ways(*_some(10))
            b.driver.stop()
            marked, changed = log.take(), b.changed(before)
            assert marked == changed, f"marked but not changed {marked - changed}, missing {changed - marked}"
            assert marked > b.used_pages()

    return case


def _log_part(buffers: bool, rings: bool) -> Callable[[Open, Tapped], None]:
    def case(open_device: Open, tapped: Tapped) -> None:
        with bench(open_device, tapped) as b, DirtyLog.covering(b.memory) as log:
            b.driver.start_log(log, buffers=buffers, rings=rings)
            log.take()
            before = Snapshot(b.memory)
            b.both_ways(*_some(10))
            b.driver.stop()
            used = b.used_pages()
            expected = (b.changed(before) - used if buffers else set()) | (used if rings else set())
            marked = log.take()
            assert marked == expected, f"too many {marked - expected}, missing {expected - marked}"

    return case


def log_on_and_off(open_device: Open, tapped: Tapped) -> None:
    with bench(open_device, tapped) as b, DirtyLog.covering(b.memory) as log:
        for number in range(4):
            b.driver.start_log(log)
            b.both_ways(frame(number))
            b.driver.stop_log()
            assert log.take() >= b.used_pages()
            b.both_ways(frame(number + 10))
            b.driver.stop()
            assert log.pages() == set()
            b.driver.resume()


# --- the IOTLB ---------------------------------------------------------------------------------------------


def _mapped(
    features: int, table: Callable[[GuestMemory], Iommu], **options: Any
) -> Callable[[Open, Tapped], None]:
    def case(open_device: Open, tapped: Tapped) -> None:
        with bench(open_device, tapped, features, iommu=table, **options) as b:
            iommu = b.driver.iommu
            assert iommu is not None
            if not b.driver.has(virtio.F_ACCESS_PLATFORM):
                raise UnsupportedError("no ACCESS_PLATFORM")
            for _ in range(3):
                b.both_ways(*_some(12))
            assert iommu.faults == [], f"asked for what was not mapped: {iommu.faults}"
            assert iommu.missed > 0

    return case


def flushed_again_and_again(open_device: Open, tapped: Tapped) -> None:
    """A guest that invalidates everything while frames are under way."""
    with bench(open_device, tapped, iommu=Iommu) as b:
        iommu = b.driver.iommu
        assert iommu is not None
        for number in range(20):
            b.driver.send(frame(number))
            b.front.iotlb_invalidate(0, 1 << 62)
            b.driver.wait_sent()
            assert tapped.host.recv(65536) == frame(number)
            tapped.host.send(frame(number + 100))
            b.front.iotlb_invalidate(0, 1 << 62)
            assert [got.frame for got in b.driver.receive()] == [frame(number + 100)]
        assert iommu.faults == []


# --- memory that moves -------------------------------------------------------------------------------------


def table_replaced(open_device: Open, tapped: Tapped) -> None:
    """The same memory again, grown by a region that is used, and shrunk again."""
    with bench(open_device, tapped) as b:
        for number in range(10):
            b.driver.send(frame(number))
            b.front.set_mem_table(b.memory.regions)
            assert tapped.host.recv(65536) == frame(number)
            more = b.memory.add_region(Span(1 << 34, MIB))
            tapped.host.send(frame(number + 100))
            b.front.set_mem_table(b.memory.regions)
            assert [got.frame for got in b.driver.receive()] == [frame(number + 100)]
            ring = b.driver.tx[0].ring
            at = b.memory.allocate(12 + 200, 16, USED + 1)
            b.memory.write(at, bytes(12) + frame(number + 200))
            ring.add([(at, 212)], token=[(at, 212)])
            b.driver.tx[0].publish()
            assert tapped.host.recv(65536) == frame(number + 200)
            b.driver.wait_sent()
            b.front.set_mem_table([region for region in b.memory.regions if region != more])
            b.memory.remove_region(more)
            b.both_ways(frame(number + 300))


def rings_move(open_device: Open, tapped: Tapped) -> None:
    """SET_VRING_ADDR while they run: the same memory at another address, and back."""
    tap.set_vnet_hdr_size(tapped.fd, 12)
    handle = open_device()
    spans = [Span(0, 8 * MIB, file=0), Span(1 << 34, 8 * MIB, file=0)]
    with GuestMemory(spans) as memory:
        front = VhostNetFrontend(handle, tapped.fd)
        driver = NetDriver(
            front,
            memory,
            features=MODERN,
            allocate=lambda size: memory.allocate(size, 16, 0),
            timeout=PATIENCE,
        )
        try:
            with driver:
                driver.start()
                b = Bench(driver, front, memory, tapped)
                for number in range(20):
                    driver.send(frame(number))
                    tapped.host.send(frame(number + 100))
                    for index in range(2):
                        layout = driver.queues[index].ring.layout
                        away = RingLayout(*(part ^ 1 << 34 for part in layout))
                        driver.move_ring(index, away, copy=False)
                    assert tapped.host.recv(65536) == frame(number)
                    assert [got.frame for got in driver.receive()] == [frame(number + 100)]
                    driver.wait_sent()
                b.both_ways(*_some(4))
        finally:
            handle.close()


_PIECES: Final = {"tx_shape": Shape(True, 90), "rx_shape": Shape(True, 600), "rx_buffer": 1530}
_TABLES: Final = {"tx_shape": Shape(True, 400, indirect=True), "rx_shape": Shape(piece=600, indirect=True)}

CASES: Final[dict[str, Callable[[Open, Tapped], None]]] = {
    "frames/legacy": _frames(0),
    "frames/modern": _frames(MODERN),
    "frames/mergeable": _frames(MRG_RXBUF),
    "frames/merged buffers": _frames(MODERN, rx_buffer=300),
    "frames/in pieces": _frames(VERSION_1 | EVENT_IDX, **_PIECES),
    "frames/indirect": _frames(MODERN, **_TABLES),
    "frames/memory of files": _frames(MODERN, anonymous=False),
    "frames/stop and go on": stops_and_goes_on,
    "frames/busy polling": busy_polling,
    "frames/big-endian": big_endian,
    "log/exact, modern": _log_exact(MODERN),
    "log/exact, legacy": _log_exact(0),
    "log/exact, merged buffers": _log_exact(MODERN, rx_buffer=300),
    "log/exact, in pieces": _log_exact(VERSION_1, **_PIECES),
    "log/exact, behind an IOMMU": _log_exact(MODERN, iommu=Iommu),
    "log/buffers alone": _log_part(True, False),
    "log/rings alone": _log_part(False, True),
    "log/on and off": log_on_and_off,
    "iotlb/strict": _mapped(MODERN, Iommu),
    "iotlb/legacy": _mapped(0, Iommu),
    "iotlb/page by page": _mapped(MODERN, lambda memory: Iommu(memory, by_page=True), **_TABLES),
    "iotlb/byte by byte": _mapped(VERSION_1, lambda memory: Iommu(memory, page=1), **_PIECES),
    "iotlb/messages of version 2": _mapped(MODERN, Iommu, message_v2=True),
    "iotlb/what stays mapped": _mapped(MODERN, lambda memory: Iommu(memory, strict=False)),
    "iotlb/flushed again and again": flushed_again_and_again,
    "memory/table replaced, grown, shrunk": table_replaced,
    "memory/rings move": rings_move,
}
