"""The vhost-user front end against a back end that is a script of bytes, written from the specification."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from pyvhost.driver.dirty_log import DirtyLog
from pyvhost.driver.errors import BackendGoneError, DeviceError, DriverError, RefusedError
from pyvhost.driver.iommu import Miss
from pyvhost.driver.memory import PAGE, GuestMemory, Span
from pyvhost.driver.queue import Queue
from pyvhost.driver.split_ring import SplitRing
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.host import memfd

REPLY = 5
BIT_30 = 1 << 30
MQ, REPLY_ACK, BACKEND_REQ, CONFIG, SLOTS, STATUS = (1 << bit for bit in (0, 3, 5, 9, 15, 16))
LOG_SHMFD, CROSS_ENDIAN, INFLIGHT_SHMFD = (1 << bit for bit in (1, 6, 12))


class ScriptedBackend:
    """Answers by a table of request number to payload; keeps what came as (request, flags, payload, fds)."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.answers: dict[int, bytes | Callable[[bytes], bytes]] = {}
        self.came: list[tuple[int, int, bytes, int]] = []
        self.fds: list[int] = []
        self.answer_fds: dict[int, list[int]] = {}
        self.acknowledge = 0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while True:
            try:
                header, fds, _, _ = socket.recv_fds(self.socket, 12, 8)
            except ConnectionResetError:
                break
            if not header:
                break
            request, flags, size = struct.unpack("=III", header)
            payload = self.socket.recv(size, socket.MSG_WAITALL) if size else b""
            self.fds += fds
            self.came.append((request, flags, payload, len(fds)))
            answer = self.answers.get(request)
            if callable(answer):
                answer = answer(payload)
            if answer is None and flags & 8:
                answer = struct.pack("=Q", self.acknowledge)
            if answer == b"hang up":
                break
            if answer is not None:
                data = struct.pack("=III", request, REPLY, len(answer)) + answer
                fds = self.answer_fds.get(request, [])
                assert socket.send_fds(self.socket, [data], fds) == len(data)
        self.socket.close()

    def numbers(self) -> list[int]:
        return [request for request, *_ in self.came]

    def close(self) -> None:
        self.thread.join()
        self.socket.close()
        for fd in self.fds + [fd for fds in self.answer_fds.values() for fd in fds]:
            os.close(fd)


@pytest.fixture
def pair() -> Iterator[tuple[VhostUserFrontend, ScriptedBackend]]:
    ours, theirs = socket.socketpair()
    backend = ScriptedBackend(theirs)
    with VhostUserFrontend(ours, timeout=10) as frontend:
        yield frontend, backend
    backend.close()


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def test_negotiation_takes_what_both_sides_have(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(0xF0 | BIT_30), 15: u64(MQ | REPLY_ACK | 1 << 63), 17: u64(7)}
    assert frontend.negotiate(0x3C) == 0x30
    assert frontend.get_queue_num() == 7
    assert [(request, payload) for request, _, payload, _ in backend.came] == [
        (3, b""),
        (1, b""),
        (15, b""),
        (16, u64(MQ | REPLY_ACK)),
        (2, u64(0x30 | BIT_30)),
        (17, b""),
    ]
    # With REPLY_ACK there is an answer to wait for, and only from then on.
    assert [flags for _, flags, _, _ in backend.came] == [1, 1, 1, 1, 9, 1]


def test_without_bit_30_nothing_needs_protocol_features(
    pair: tuple[VhostUserFrontend, ScriptedBackend],
) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(0xFF)}
    assert frontend.negotiate(1 << 3 | BIT_30) == 1 << 3
    assert frontend.get_queue_num() == 1
    frontend.set_status(0xF)
    frontend.sync()
    assert backend.numbers() == [3, 1, 2, 1]


def test_a_ring_is_brought_up_and_taken_down(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(BIT_30), 15: u64(REPLY_ACK), 11: lambda payload: payload[:4] + b"\x09\0\0\0"}
    frontend.negotiate(0)
    backend.came.clear()
    with GuestMemory([Span(0x10000, 1 << 16, userspace_addr=0x7000_0000)]) as memory:
        ring = SplitRing(memory, 16, start=5)
        frontend.set_mem_table(memory.regions)
        with Queue(ring) as queue:
            frontend.start_ring(3, queue)
            assert frontend.stop_ring(3) == 9
        desc, avail, used = (address - 0x10000 + 0x7000_0000 for address in ring.layout)
    table = struct.pack("=II4Q", 1, 0, 0x10000, 1 << 16, 0x7000_0000, 0)
    assert [(request, payload, fds) for request, _, payload, fds in backend.came] == [
        (5, table, 1),
        (8, struct.pack("=II", 3, 16), 0),
        (10, struct.pack("=II", 3, 5), 0),
        (9, struct.pack("=II4Q", 3, 0, desc, used, avail, 0), 0),
        (13, u64(3), 1),
        (14, u64(3), 1),
        (12, u64(3), 1),
        (18, struct.pack("=II", 3, 1), 0),
        (18, struct.pack("=II", 3, 0), 0),
        (11, struct.pack("=II", 3, 0), 0),
    ]


def test_the_descriptors_that_arrive_are_the_ones_that_were_sent(
    pair: tuple[VhostUserFrontend, ScriptedBackend],
) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(0)}
    fd = os.eventfd(0)
    try:
        frontend.set_vring_kick(0, fd)
        frontend.set_vring_call(0)
        frontend.sync()
        assert backend.came[1][2:] == (u64(0x100), 0)
        os.eventfd_write(backend.fds[0], 7)
        assert os.eventfd_read(fd) == 7
    finally:
        os.close(fd)


def test_more_regions_than_a_message_holds(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(BIT_30), 15: u64(SLOTS), 36: u64(509)}
    with GuestMemory([Span(at * 2 * PAGE, PAGE) for at in range(9)]) as memory:
        with pytest.raises(DriverError, match="9 regions need"):
            frontend.set_mem_table(memory.regions)
        frontend.negotiate(0)
        assert frontend.get_max_mem_slots() == 509
        backend.came.clear()
        frontend.set_mem_table(memory.regions)
        frontend.rem_mem_reg(memory.regions[4])
        frontend.sync()
        assert backend.numbers() == [37] * 9 + [38, 1]
        assert backend.came[9][2] == struct.pack(
            "=5Q", 0, 8 * PAGE, PAGE, memory.regions[4].userspace_addr, 0
        )
        assert [fds for *_, fds in backend.came] == [1] * 9 + [0, 0]


def test_the_configuration_space(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {24: lambda asked: asked[:12] + b"abc"}
    assert frontend.get_config(4, 3) == b"abc"
    assert backend.came[0][2] == struct.pack("=III", 4, 3, 0) + bytes(3)
    backend.answers = {24: struct.pack("=III", 0, 3, 0) + b"abc"}
    with pytest.raises(DeviceError, match="3 bytes at 4 was answered with 3 bytes at 0"):
        frontend.get_config(4, 3)
    backend.answers = {24: b""}
    with pytest.raises(RefusedError, match="GET_CONFIG"):
        frontend.get_config(4, 3)


def test_a_failure_that_is_acknowledged_is_an_error(
    pair: tuple[VhostUserFrontend, ScriptedBackend],
) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(BIT_30), 15: u64(REPLY_ACK)}
    frontend.negotiate(0)
    backend.acknowledge = 1
    with pytest.raises(RefusedError, match="SET_VRING_NUM"):
        frontend.set_vring_num(0, 3)
    backend.acknowledge = 0
    frontend.set_vring_num(0, 4)


def test_answers_that_are_none(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {1: b"12345"}
    with pytest.raises(DeviceError, match=r"no message.*GET_FEATURES.*5 bytes"):
        frontend.get_features()


def test_an_answer_to_something_else(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {11: struct.pack("=II", 1, 9)}
    with pytest.raises(DeviceError, match="ring 0 was answered for ring 1"):
        frontend.get_vring_base(0)


def test_a_back_end_that_hangs_up(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {1: b"hang up"}
    with pytest.raises(BackendGoneError, match="instead of sending a reply"):
        frontend.get_features()
    frontend.wait_closed()


def test_a_back_end_that_says_nothing() -> None:
    ours, theirs = socket.socketpair()
    with theirs, VhostUserFrontend(ours, timeout=0.01) as frontend:
        with pytest.raises(TimeoutError, match="for a reply"):
            frontend.get_features()
        with pytest.raises(TimeoutError, match="did not close"):
            frontend.wait_closed()


def test_any_bytes_can_be_sent(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    fd = os.eventfd(0)
    try:
        frontend.send(struct.pack("=III", 77, 0xFFF1, 3) + b"abc", [fd] * 8)
    finally:
        os.close(fd)
    backend.answers = {1: u64(0)}
    frontend.sync()
    assert backend.came[0] == (77, 0xFFF1, b"abc", 8)


def test_the_back_ends_own_requests(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    with pytest.raises(DriverError, match="BACKEND_REQ"):
        frontend.backend_request()
    backend.answers = {1: u64(BIT_30), 15: u64(REPLY_ACK | BACKEND_REQ)}
    frontend.negotiate(0)
    frontend.sync()
    assert backend.numbers()[:5] == [3, 1, 15, 16, 21]
    with socket.socket(fileno=os.dup(backend.fds[0])) as channel:
        channel.sendall(struct.pack("=III", 2, 1, 0))
        assert frontend.backend_request().name == "CONFIG_CHANGE_MSG"
        channel.sendall(struct.pack("=III", 2, 9, 0))
        assert frontend.backend_request(result=0).need_reply
        assert channel.recv(100) == struct.pack("=IIIQ", 2, 5, 8, 0)
        with pytest.raises(TimeoutError, match="a request"):
            frontend.backend_request(timeout=0.01)


def test_connecting_and_being_connected_to(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(FileNotFoundError, match="no back end to connect to"):
        VhostUserFrontend.connect(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        with pytest.raises(ConnectionRefusedError, match="no back end to connect to"):
            VhostUserFrontend.connect(path)
        listener.listen()
        with pytest.raises(TimeoutError, match="no back end connected"):
            VhostUserFrontend.accept(listener, timeout=0.01)
        with VhostUserFrontend.connect(path) as dialled, VhostUserFrontend.accept(listener) as taken:
            dialled.send(b"hello")
            assert taken.socket.recv(5) == b"hello"


def test_a_listener_that_accepts_nobody(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(0)
        # The queue has room for one.
        with VhostUserFrontend.connect(path), pytest.raises(TimeoutError, match="nobody accepts within"):
            VhostUserFrontend.connect(path, timeout=0.01)


def test_the_log_goes_by_file_and_the_ring_by_guest_address(
    pair: tuple[VhostUserFrontend, ScriptedBackend],
) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(BIT_30 | 1 << 26), 15: u64(REPLY_ACK | LOG_SHMFD), 6: b""}
    frontend.negotiate(0)
    backend.came.clear()
    with (
        GuestMemory([Span(0, 1 << 16, userspace_addr=0x7000_0000)]) as memory,
        DirtyLog.covering(memory) as log,
        Queue(SplitRing(memory, 4)) as queue,
    ):
        frontend.set_log(log)
        frontend.change_features(1 << 26)
        frontend.set_ring_addr(1, queue, log=True)
        frontend.set_log_fd(queue.err_fd)
        frontend.set_log_fd(-1)
        layout = queue.ring.layout
    user = [0x7000_0000 + part for part in (layout.desc, layout.used, layout.avail)]
    assert [(request, payload, fds) for request, _, payload, fds in backend.came] == [
        (6, struct.pack("=QQ", log.size, 0), 1),
        (2, u64(1 << 26 | BIT_30), 0),
        (9, struct.pack("=II4Q", 1, 1, *user, layout.used), 0),
        (7, b"", 1),
        (7, b"", 0),
    ]


def test_without_log_shmfd_there_is_no_log(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, _ = pair
    with DirtyLog(1) as log, pytest.raises(DriverError, match="LOG_SHMFD"):
        frontend.set_log(log)


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_a_legacy_guests_byte_order_is_told(
    pair: tuple[VhostUserFrontend, ScriptedBackend], byteorder: Literal["little", "big"]
) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(BIT_30), 15: u64(REPLY_ACK | CROSS_ENDIAN)}
    frontend.negotiate(0)
    with GuestMemory(1 << 16) as memory, Queue(SplitRing(memory, 4, byteorder=byteorder)) as queue:
        frontend.start_ring(1, queue)
    told = [payload for request, _, payload, _ in backend.came if request == 23]
    assert told == [struct.pack("=II", 1, byteorder == "big")]


def test_a_big_endian_guest_needs_cross_endian(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(0)}
    frontend.negotiate(0)
    with (
        GuestMemory(1 << 16) as memory,
        Queue(SplitRing(memory, 4, byteorder="big")) as queue,
        pytest.raises(DriverError, match="CROSS_ENDIAN"),
    ):
        frontend.start_ring(1, queue)


INFLIGHT = struct.pack("=QQHH4x", 8192, 0, 2, 64)


def test_the_inflight_table_comes_once_and_goes_before_the_first_ring(
    pair: tuple[VhostUserFrontend, ScriptedBackend],
) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(BIT_30), 15: u64(REPLY_ACK | INFLIGHT_SHMFD), 31: INFLIGHT}
    backend.answer_fds[31] = [memfd.create("inflight", 8192)]
    frontend.negotiate(0)
    frontend.inflight_size = (2, 64)
    backend.came.clear()
    with GuestMemory(1 << 16) as memory:
        for index in range(2):
            with Queue(SplitRing(memory, 4)) as queue:
                frontend.start_ring(index, queue)
    assert frontend.inflight is not None
    with frontend.inflight as table:
        assert os.fstat(table.fd).st_size == 8192
        assert backend.came[0][2] == struct.pack("=QQHH4x", 0, 0, 2, 64)
        assert backend.numbers()[:3] == [31, 32, 8]
        assert backend.numbers().count(32) == backend.numbers().count(31) == 1
        assert backend.came[1][2:] == (INFLIGHT, 1)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [(INFLIGHT, DeviceError, "0 descriptors"), (bytes(24), RefusedError, "no memory")],
    ids=["no descriptor", "no table"],
)
def test_an_inflight_table_that_does_not_come(
    pair: tuple[VhostUserFrontend, ScriptedBackend], answer: bytes, error: type[Exception], words: str
) -> None:
    frontend, backend = pair
    backend.answers = {31: answer}
    with pytest.raises(error, match=words):
        frontend.get_inflight(2, 64)


def test_misses_come_by_the_channel_and_leave_the_rest_there(
    pair: tuple[VhostUserFrontend, ScriptedBackend],
) -> None:
    frontend, backend = pair
    backend.answers = {1: u64(BIT_30), 15: u64(REPLY_ACK | BACKEND_REQ), 22: u64(0)}
    frontend.negotiate(0)
    with socket.socket(fileno=backend.fds.pop()) as channel:
        assert frontend.take_miss() is None
        assert frontend.iotlb_fileno() >= 0
        channel.sendall(struct.pack("=III", 2, 1, 0))
        channel.sendall(struct.pack("=III", 1, 9, 32) + struct.pack("=QQQBB6x", 0x1000, 0, 0, 2, 1))
        channel.sendall(struct.pack("=III", 1, 1, 32) + struct.pack("=QQQBB6x", 0x2000, 0, 0, 1, 4))
        assert frontend.take_miss() == Miss(0x1000, 2)
        assert channel.recv(100) == struct.pack("=IIIQ", 1, REPLY, 8, 0)
        assert frontend.take_miss() is None
        assert [frontend.backend_request().request for _ in range(2)] == [2, 1]
        channel.sendall(struct.pack("=III", 1, 1, 32) + struct.pack("=QQQBB6x", 0x2000, 0, 0, 1, 2))
        with pytest.raises(DeviceError, match="type 2"):
            frontend.take_miss()
    frontend.iotlb_update(0x1000, 0x2000, 0x7000, 3)
    frontend.iotlb_invalidate(0x1000, 0x2000)
    assert [(request, payload) for request, _, payload, _ in backend.came[-2:]] == [
        (22, struct.pack("=QQQBB6x", 0x1000, 0x2000, 0x7000, 3, 2)),
        (22, struct.pack("=QQQBB6x", 0x1000, 0x2000, 0, 0, 3)),
    ]
    backend.answers[22] = u64(1)
    with pytest.raises(RefusedError, match="IOTLB_MSG"):
        frontend.iotlb_update(0x1000, 0x2000, 0x7000, 3)


def test_without_a_channel_nothing_is_missed(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, _ = pair
    assert (frontend.iotlb_fileno(), frontend.take_miss()) == (-1, None)


def test_a_ring_is_stopped_without_draining_it(pair: tuple[VhostUserFrontend, ScriptedBackend]) -> None:
    frontend, backend = pair
    backend.answers = {45: struct.pack("=II", 1, 9)}
    assert frontend.get_vring_base_skip_drain(1) == 9
