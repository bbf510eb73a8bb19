"""A loop device behind a front end of each kind, and guest memory that is parted by who writes where.

    def test_something(tmp_path, way):        # `way` from WAYS, by pytest.mark.parametrize
        with way(tmp_path, NetDevice("loop")) as front: ...

Promises: memory of `parted` is written by the device in the regions RX and USED alone, by the driver in DRIVERS alone
once it has started, so that what changed there can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from back_end import PATIENCE, BackEnd
from in_process import FrontEnd, served
from pyvhost.abi import virtio
from pyvhost.abi import virtio_net as abi
from pyvhost.driver.device_driver import DeviceDriver
from pyvhost.driver.dirty_log import LOG_PAGE
from pyvhost.driver.memory import MIB, GuestMemory, Span
from pyvhost.driver.net import NetDriver
from pyvhost.driver.ring_parts import RingLayout
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.net.device import NetDevice

VERSION_1 = 1 << virtio.F_VERSION_1
EVENT_IDX = 1 << virtio.RING_F_EVENT_IDX
INDIRECT = 1 << virtio.RING_F_INDIRECT_DESC
MRG_RXBUF = 1 << abi.F_MRG_RXBUF

Front: TypeAlias = VhostUserFrontend | FrontEnd
Way: TypeAlias = Callable[[Path, NetDevice], AbstractContextManager[Front]]

#: Which region of `parted` is whose.
DRIVERS, RX, USED = range(3)
#: What no frame of `frame` has in it: buffers are filled with it, so that every byte that is written changes.
POISON = 0xEE


@contextmanager
def by_socket(directory: Path, device: NetDevice) -> Iterator[Front]:
    with BackEnd(directory, device) as back_end, back_end.connect() as front:
        yield front


@contextmanager
def by_calls(directory: Path, device: NetDevice) -> Iterator[Front]:
    with served(device) as front:
        yield front


WAYS = {"vhost-user": by_socket, "calls": by_calls}


def parted() -> GuestMemory:
    """Guest memory with a region for each writer; what the device writes to is poisoned."""
    memory = GuestMemory([Span(0, 8 * MIB), Span(64 * MIB, 8 * MIB), Span(1 << 32, MIB)])
    for region in memory.regions[RX : RX + 1]:
        memory.write(region.guest_phys_addr, bytes([POISON]) * region.memory_size)
    return memory


def parted_layout(memory: GuestMemory, size: int) -> Callable[[int], RingLayout]:
    """Rings of `size` whose used parts have pages of their own."""

    def layout(index: int) -> RingLayout:
        desc, avail, used = RingLayout.sizes(size)
        return RingLayout(
            memory.allocate(desc, 16, DRIVERS),
            memory.allocate(avail, 2, DRIVERS),
            memory.allocate(-(-used // LOG_PAGE) * LOG_PAGE, LOG_PAGE, USED),
        )

    return layout


def driver_on(front: Front, memory: GuestMemory, *, ring_size: int = 64, **options: Any) -> NetDriver:
    """A driver that keeps to the parts of `parted`."""
    options.setdefault("rx_allocate", lambda size: memory.allocate(size, 16, RX))
    return NetDriver(
        front,
        memory,
        ring_size=ring_size,
        layout=parted_layout(memory, ring_size),
        allocate=lambda size: memory.allocate(size, 16, DRIVERS),
        timeout=PATIENCE,
        **options,
    )


def frame(number: int, size: int = 200) -> bytes:
    """A frame of `size` bytes; those of different numbers differ in almost every byte."""
    head = (
        b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5") + number.to_bytes(4, "big").replace(b"\xee", b"\xed")
    )
    return (head + bytes((number * 7 + at * 13) % 0xEE for at in range(size)))[:size]


def echo(driver: NetDriver, *frames: bytes) -> None:
    """Frames go out and come back, in order, a few at a time: a loop waits for receive buffers. The device has used
    all of them at the end.
    """
    for at in range(0, len(frames), 4):
        few = frames[at : at + 4]
        assert driver.send_many(few) == len(few)
        assert [got.frame for got in driver.receive(len(few))] == list(few)
    driver.wait_sent()


def pages(address: int, length: int) -> set[int]:
    """The numbers of the pages that so many bytes lie in."""
    return set(range(address // LOG_PAGE, (address + length - 1) // LOG_PAGE + 1))


def used_pages(driver: DeviceDriver, *indices: int) -> set[int]:
    """The pages of the rings' used parts."""
    return {driver.queues[index].ring.layout.used // LOG_PAGE for index in indices}


def devices_part(memory: GuestMemory, numbers: set[int]) -> set[int]:
    """Those of the pages that only the device writes to."""
    return {page for page in numbers if page * LOG_PAGE >= memory.regions[RX].guest_phys_addr}
