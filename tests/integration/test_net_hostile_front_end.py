"""Front ends that send garbage, lie about memory, or take it away: theirs ends or is told no, all others live."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from back_end import PATIENCE, BackEnd
from pyvhost.abi import virtio
from pyvhost.driver.errors import BackendGoneError, DeviceError, RefusedError
from pyvhost.driver.memory import MIB, PAGE, GuestMemory, Region, Span
from pyvhost.driver.net import NetDriver
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.net.device import NetDevice

VERSION_1 = 1 << virtio.F_VERSION_1


def frame(number: int) -> bytes:
    return b"\xff" * 6 + bytes.fromhex("0200000000aa 88b5") + number.to_bytes(4, "big") + bytes(50)


class Neighbour:
    """A guest on another device of the same process, whose frames must go on coming back."""

    def __init__(self, back_end: BackEnd) -> None:
        self.memory = GuestMemory(4 * MIB)
        self.frontend = back_end.connect(1)
        self.driver = NetDriver(self.frontend, self.memory, ring_size=64, timeout=PATIENCE)
        self.driver.start()
        self.number = 0

    def lives(self) -> None:
        self.number += 1
        self.driver.send(frame(self.number))
        assert [got.frame for got in self.driver.receive()] == [frame(self.number)]

    def close(self) -> None:
        self.driver.close()
        self.frontend.close()
        self.memory.close()


@pytest.fixture(scope="module")
def back_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackEnd]:
    devices = NetDevice(backend="loop"), NetDevice(backend="loop")
    with BackEnd(tmp_path_factory.mktemp("hostile"), *devices) as back_end:
        yield back_end


@pytest.fixture(scope="module")
def neighbour(back_end: BackEnd) -> Iterator[Neighbour]:
    neighbour = Neighbour(back_end)
    yield neighbour
    neighbour.close()


def next_one_works(back_end: BackEnd) -> None:
    """The device serves the next front end as if nothing had been."""
    with (
        GuestMemory(4 * MIB) as memory,
        back_end.connect() as frontend,
        NetDriver(frontend, memory, ring_size=64, timeout=PATIENCE) as driver,
    ):
        driver.start()
        driver.send(frame(7))
        assert [got.frame for got in driver.receive()] == [frame(7)]


@pytest.fixture(autouse=True)
def others_live(back_end: BackEnd, neighbour: Neighbour) -> Iterator[None]:
    """After every test: the neighbour, the next front end, and no descriptor too many."""
    next_one_works(back_end)
    before = back_end.open_descriptors()
    yield
    neighbour.lives()
    next_one_works(back_end)
    assert back_end.open_descriptors() == before


# --- bytes ------------------------------------------------------------------------------------------------


def message(request: int, payload: bytes = b"", *, flags: int = 1, size: int | None = None) -> bytes:
    return struct.pack("=III", request, flags, len(payload) if size is None else size) + payload


def state(request: int, index: int, number: int) -> bytes:
    return message(request, struct.pack("=II", index, number))


def number(request: int, value: int) -> bytes:
    return message(request, struct.pack("=Q", value))


ENDS = {
    "zeros": bytes(100),
    "ones": b"\xff" * 100,
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another version": message(1, flags=2),
    "a reply": message(1, flags=5),
    "a size of 4 GiB - 1": message(1, size=0xFFFFFFFF),
    "a size of 1 GiB": message(5, size=1 << 30),
    "a payload too short": message(2, b"1234"),
    "a payload too long": message(2, bytes(16)),
    "a payload where none is due": message(1, bytes(8)),
    "a table of more regions than it has": message(5, struct.pack("=II", 8, 0) + bytes(32)),
    "a table of 4 billion regions": message(5, struct.pack("=II", 0xFFFFFFFF, 0) + bytes(32)),
    "a table without descriptors": message(5, struct.pack("=II4Q", 1, 0, 0, PAGE, 0, 0)),
    "features nobody offered": number(2, 1 << 63),
    "protocol features nobody offered": number(16, 1 << 63),
    "a ring that is not there": state(8, 77, 256),
    "a ring far away": state(8, 0xFFFFFFFF, 256),
    "a ring of 3": state(8, 0, 3),
    "a ring of 65536": state(8, 0, 65536),
    "a ring of nothing": state(8, 0, 0),
    "a base above 65535": state(10, 0, 65536),
    "half enabled": state(18, 0, 2),
    "a kick for a ring that is not there": number(12, 0x100 | 99),
    "a kick without a descriptor that says it has one": number(12, 0),
    "an unaligned available ring": message(9, struct.pack("=II4Q", 0, 0, 0x1000, 0x2000, 0x3001, 0)),
    "an unaligned used ring": message(9, struct.pack("=II4Q", 0, 0, 0x1000, 0x2002, 0x3000, 0)),
    "unknown address flags": message(9, struct.pack("=II4Q", 0, 6, 0x1000, 0x2000, 0x3000, 0)),
    "a request that was not offered": message(28),
    "a region to remove that is not there": message(38, struct.pack("=5Q", 0, 0, PAGE, 0, 0)),
    "the base of a ring that is not there": state(11, 200, 0),
}


@pytest.mark.parametrize("garbage", ENDS.values(), ids=ENDS)
def test_garbage_ends_the_connection(back_end: BackEnd, garbage: bytes) -> None:
    """Without REPLY_ACK there is no other way to say no."""
    with back_end.connect() as frontend:
        frontend.send(garbage)
        frontend.wait_closed()


@pytest.mark.parametrize("cut", [1, 3, 4, 11, 12, 13, 19])
def test_a_message_that_breaks_off(back_end: BackEnd, cut: int) -> None:
    with back_end.connect() as frontend:
        frontend.send(number(2, 0)[:cut])
        frontend.socket.shutdown(socket.SHUT_WR)
        frontend.wait_closed()


def test_a_message_in_pieces_of_one_byte(back_end: BackEnd) -> None:
    with back_end.connect() as frontend:
        data = frontend.session.request(1)
        for at in range(len(data)):
            frontend.send(data[at : at + 1])
        with frontend.receive().fds:
            pass


def test_random_bytes(back_end: BackEnd) -> None:
    for seed in range(50):
        with back_end.connect() as frontend:
            try:
                frontend.send(random.Random(seed).randbytes(200))
                frontend.socket.shutdown(socket.SHUT_WR)
            except (BackendGoneError, OSError):
                pass
            frontend.wait_closed()


def test_random_requests_with_random_contents(back_end: BackEnd) -> None:
    """Well-formed headers, plausible sizes, wild contents, and descriptors of the wrong kind."""
    pipe = os.pipe()
    memory = GuestMemory(MIB)
    kinds = [pipe[0], pipe[1], memory.regions[0].fd, os.eventfd(0)]
    try:
        for seed in range(200):
            dice = random.Random(seed)
            with back_end.connect() as frontend:
                try:
                    for _ in range(20):
                        size = dice.choice([0, 8, 8, 8, 8, 16, 40, 40, 72, 12, 20])
                        words = [
                            dice.choice([0, 1, 2, 255, PAGE, 1 << 20, 1 << 63, (1 << 64) - 1])
                            for _ in range(9)
                        ]
                        payload = struct.pack("=9Q", *words)[:size]
                        fds = [dice.choice(kinds) for _ in range(dice.choice([0, 0, 0, 1, 1, 2, 8]))]
                        frontend.send(message(dice.randrange(46), payload, flags=dice.choice([1, 1, 9])), fds)
                except BackendGoneError:
                    pass
                frontend.socket.close()
    finally:
        memory.close()
        for fd in (*pipe, kinds[3]):
            os.close(fd)


@pytest.mark.parametrize("count", [1, 8, 9, 253])
def test_descriptors_where_none_are_due(back_end: BackEnd, count: int) -> None:
    with back_end.connect() as frontend:
        fd = os.eventfd(0)
        try:
            frontend.send(message(1), [fd] * count)
        finally:
            os.close(fd)
        frontend.wait_closed()


def test_a_front_end_that_never_reads(back_end: BackEnd, neighbour: Neighbour) -> None:
    """Its replies fill its socket; nobody else waits for it."""
    with back_end.connect() as frontend:
        frontend.socket.setblocking(False)
        try:
            while True:
                frontend.socket.send(message(1) * 100)
        except BlockingIOError:
            neighbour.lives()


@pytest.mark.parametrize("request_number", [12, 13, 14])
def test_what_is_no_eventfd(back_end: BackEnd, request_number: int) -> None:
    with back_end.connect() as frontend, open("/dev/null", "rb") as null:
        frontend.negotiate(VERSION_1)
        send = {12: frontend.set_vring_kick, 13: frontend.set_vring_call, 14: frontend.set_vring_err}
        with pytest.raises(RefusedError):
            send[request_number](0, null.fileno())


# --- memory -------------------------------------------------------------------------------------------------


def refused(frontend: VhostUserFrontend, regions: list[Region]) -> None:
    """The table is refused, whole or by its last region, and the connection lives."""
    frontend.negotiate(VERSION_1)
    with pytest.raises(RefusedError, match="SET_MEM_TABLE"):
        frontend.set_mem_table(regions)
    frontend.set_mem_table([])
    *good, bad = regions
    for region in good:
        frontend.add_mem_reg(region)
    with pytest.raises(RefusedError, match="ADD_MEM_REG"):
        frontend.add_mem_reg(bad)
    for region in good:
        frontend.rem_mem_reg(region)


Lie = Callable[[Region], list[Region]]

TABLES: dict[str, Lie] = {
    "overlapping": lambda r: [r, Region(r.guest_phys_addr + PAGE, PAGE, 1 << 40, PAGE, r.fd)],
    "the same twice": lambda r: [r, Region(r.guest_phys_addr, r.memory_size, 1 << 40, 0, r.fd)],
    "overlapping for the front end": lambda r: [r, Region(1 << 40, PAGE, r.userspace_addr, 0, r.fd)],
    "beyond the file": lambda r: [Region(0, r.memory_size + PAGE, 0, 0, r.fd)],
    "an offset beyond the file": lambda r: [Region(0, PAGE, 0, r.memory_size, r.fd)],
    "an offset far beyond the file": lambda r: [Region(0, PAGE, 0, 1 << 62, r.fd)],
    "an offset that wraps": lambda r: [Region(0, PAGE, 0, (1 << 64) - PAGE, r.fd)],
    "of nothing": lambda r: [Region(0, 0, 0, 0, r.fd)],
    "of everything": lambda r: [Region(0, (1 << 64) - 1, 0, 0, r.fd)],
    "that wraps": lambda r: [Region((1 << 64) - PAGE, 2 * PAGE, 0, 0, r.fd)],
    "that wraps for the front end": lambda r: [Region(0, 2 * PAGE, (1 << 64) - PAGE, 0, r.fd)],
    "in something that is no file": lambda r: [Region(0, PAGE, 0, 0, NOT_MEMORY)],
}
NOT_MEMORY = -2


@pytest.mark.parametrize("lie", TABLES.values(), ids=TABLES)
def test_regions_that_can_not_be(back_end: BackEnd, lie: Lie) -> None:
    read, write = os.pipe()
    try:
        with GuestMemory(16 * PAGE) as memory, back_end.connect() as frontend:
            regions = [
                Region(r.guest_phys_addr, r.memory_size, r.userspace_addr, r.mmap_offset, read)
                if r.fd == NOT_MEMORY
                else r
                for r in lie(memory.regions[0])
            ]
            refused(frontend, regions)
    finally:
        os.close(read)
        os.close(write)


def test_a_file_that_may_only_be_read(back_end: BackEnd, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE))
    with back_end.connect() as frontend, open(path, "rb") as file:
        refused(frontend, [Region(0, PAGE, 0, 0, file.fileno())])


def test_more_regions_than_there_is_room_for(back_end: BackEnd) -> None:
    spans = [Span(2 * at * PAGE, PAGE, at * PAGE, file=1) for at in range(510)]
    with GuestMemory(spans) as memory, back_end.connect() as frontend:
        frontend.negotiate(VERSION_1)
        slots = frontend.get_max_mem_slots()
        assert slots == 509
        for region in memory.regions[:slots]:
            frontend.add_mem_reg(region)
        with pytest.raises(RefusedError):
            frontend.add_mem_reg(memory.regions[slots])
        frontend.rem_mem_reg(memory.regions[3])
        frontend.add_mem_reg(memory.regions[slots])


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize(
    "where", [-PAGE, 4 * MIB, 4 * MIB - 16, 1 << 62], ids=["before", "behind", "end", "far"]
)
def test_rings_that_are_not_in_memory(back_end: BackEnd, part: str, where: int) -> None:
    with (
        GuestMemory(4 * MIB) as memory,
        back_end.connect() as frontend,
        NetDriver(frontend, memory, ring_size=64, timeout=PATIENCE) as driver,
    ):
        driver.start()
        base = memory.regions[0].userspace_addr
        good = {
            f"{name}_user_addr": base + address
            for name, address in driver.tx[0].ring.layout._asdict().items()
        }
        with pytest.raises(RefusedError):
            frontend.set_vring_addr(1, **(good | {f"{part}_user_addr": base + where}))
        # What was refused has changed nothing.
        driver.send(frame(1))
        assert driver.receive()[0].frame == frame(1)
        # And a ring that rests may have them, but not run with them.
        frontend.stop_ring(1)
        frontend.set_vring_addr(1, **(good | {f"{part}_user_addr": base + where}))
        with pytest.raises(RefusedError):
            _start(frontend, driver)


def _start(frontend: VhostUserFrontend, driver: NetDriver) -> None:
    frontend.set_vring_kick(1, driver.tx[0].kick_fd)
    frontend.set_vring_enable(1, True)


def test_rings_of_one_another(back_end: BackEnd) -> None:
    """Both rings in the same place: foolish, and its own business."""
    with (
        GuestMemory(4 * MIB) as memory,
        back_end.connect() as frontend,
        NetDriver(frontend, memory, ring_size=64, timeout=PATIENCE) as driver,
    ):
        driver.start()
        frontend.stop_ring(0)
        frontend.start_ring(0, driver.tx[0], 0)
        try:
            driver.send_many([frame(n) for n in range(30)])
        except DeviceError:
            pass
        frontend.sync()


# --- memory that goes away ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["frame", "ring", "all"])
def test_memory_that_is_cut_off(back_end: BackEnd, neighbour: Neighbour, what: str) -> None:
    """The back end takes no SIGBUS for it: that front end's connection ends, and nothing else."""
    spans = [Span(0, MIB), Span(MIB, MIB)]
    with GuestMemory(spans) as memory, back_end.connect() as frontend:
        driver = NetDriver(frontend, memory, ring_size=64, features=VERSION_1, rx_depth=8, timeout=PATIENCE)
        driver.start()
        driver.send(frame(1))
        assert driver.receive()[0].frame == frame(1)
        driver.wait_sent()
        queue = driver.tx[0]
        data = memory.allocate(76, region=1)
        memory.write(data, bytes(12) + frame(2))
        queue.ring.add([(data, 76)])
        if what == "frame":
            memory.shrink_file(memory.regions[1], 0)
            queue.publish()
        else:
            queue.ring.publish()
            memory.shrink_file(memory.regions[0], 0)
            if what == "all":
                memory.shrink_file(memory.regions[1], 0)
        queue.kick()
        neighbour.lives()
        frontend.wait_closed()
        driver.close()


def test_memory_that_is_cut_while_frames_flow(back_end: BackEnd, neighbour: Neighbour) -> None:
    for turn in range(10):
        with GuestMemory([Span(0, MIB), Span(MIB, MIB)]) as memory, back_end.connect() as frontend:
            driver = NetDriver(
                frontend, memory, ring_size=256, features=VERSION_1, rx_depth=8, timeout=PATIENCE
            )
            driver.start()
            rooms = [memory.allocate(1500, region=1) for _ in range(200)]
            for room in rooms:
                driver.tx[0].ring.add([(room, 1500)])
            driver.post(0, 100)
            driver.tx[0].publish()
            memory.shrink_file(memory.regions[1], turn * PAGE)
            # The device stands still for want of buffers, with most of the frames gone: now it goes on.
            driver.post(0, 100)
            driver.tx[0].kick()
            neighbour.lives()
            frontend.wait_closed()
            driver.close()


def test_memory_that_is_cut_and_removed_in_time_is_no_fault(back_end: BackEnd) -> None:
    with (
        GuestMemory([Span(0, MIB), Span(MIB, MIB)]) as memory,
        back_end.connect() as frontend,
        NetDriver(frontend, memory, ring_size=64, timeout=PATIENCE) as driver,
    ):
        driver.start()
        region = memory.regions[1]
        frontend.rem_mem_reg(region)
        memory.shrink_file(region, 0)
        driver.send(frame(1))
        assert driver.receive()[0].frame == frame(1)


def test_nobody_has_taken_the_signal(back_end: BackEnd) -> None:
    """What is not a front end's doing still ends the process: the guard is for its mappings alone."""
    assert signal.getsignal(signal.SIGBUS) in (signal.SIG_DFL, None)
