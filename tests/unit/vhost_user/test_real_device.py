"""The real device model behind a socket: log, inflight memory and IOTLB as a front end has them."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from fronts import BIT_30, Front, until
from pyvhost.abi import vhost, virtio
from pyvhost.abi import vhost_user as abi
from pyvhost.abi.vhost_user import BackendRequest, Request
from pyvhost.dataplane.plain import load16
from pyvhost.host import memfd
from pyvhost.host.fds import close_all
from pyvhost.host.fds import recv as recv_with_fds
from pyvhost.vhost_user.codec import Decoder, Stream, decode_one, encode
from pyvhost.vhost_user.payloads import (
    U64,
    Inflight,
    Iotlb,
    Log,
    MemTable,
    Payload,
    Region,
    VringAddr,
    VringFile,
    VringState,
)
from pyvhost.vhost_user.server import Server
from recording_device import InertDevice, no_fd_leaks, spare_fd

LOG_ALL = 1 << vhost.F_LOG_ALL
ACCESS_PLATFORM = 1 << virtio.F_ACCESS_PLATFORM
FEATURES = 1 << virtio.F_VERSION_1 | BIT_30
MEMORY = 1 << 20
#: Where the front end has it, and where the guest has it.
USER, GUEST = 0x7F0000000000, 0x100000
PROTOCOL = sum(
    1 << bit
    for bit in (
        abi.PROTOCOL_F_LOG_SHMFD,
        abi.PROTOCOL_F_REPLY_ACK,
        abi.PROTOCOL_F_BACKEND_REQ,
        abi.PROTOCOL_F_INFLIGHT_SHMFD,
    )
)


class Scene:
    """A front end with a MiB of memory, whose vring 0 is set up but for its kick."""

    def __init__(self, server: Server, path: str) -> None:
        self.device = InertDevice()
        self.server = server
        server.listen(path, self.device)
        self.front = Front.at(server, path)
        self.memory = memfd.create("guest", MEMORY)
        self.do(Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
        self.do(Request.SET_FEATURES, U64(FEATURES))
        table = MemTable((Region(GUEST, MEMORY, USER, 0),))
        self.do(Request.SET_MEM_TABLE, table, [os.dup(self.memory)])
        self.do(Request.SET_VRING_NUM, VringState(0, 64))

    def do(self, request: int, payload: Payload | None = None, fds: list[int] | None = None) -> int:
        """A request with need_reply; the number that it is answered with, 0 for success."""
        self.front.send(encode(request, payload, flags=abi.FLAG_NEED_REPLY), fds)
        answer = self.answer()
        assert isinstance(answer, U64)
        return answer.value

    def answer(self) -> Payload | None:
        """The next answer's payload."""
        answers: list[Payload | None] = []

        def answered() -> bool:
            message = self.front.reply()
            if message is not None:
                answers.append(message.payload)
            return bool(answers)

        until(self.server, answered)
        return answers[0]

    def run(self, at: int = USER, flags: int = 0, log: int = 0) -> None:
        """Vring 0, with its parts from `at` on."""
        addr = VringAddr(0, flags, at, at + 0x2000, at + 0x1000, log)
        assert self.do(Request.SET_VRING_ADDR, addr) == 0
        assert self.do(Request.SET_VRING_KICK, VringFile(0), [spare_fd()]) == 0
        assert self.do(Request.SET_VRING_ENABLE, VringState(0, 1)) == 0

    @property
    def record(self) -> dict[str, int]:
        record = self.device.places[0].record
        return {name: int(record[name]) for name in record.dtype.names}

    def close(self) -> None:
        self.front.close()
        until(self.server, lambda: not self.device.owned)
        self.device.close()
        os.close(self.memory)


@pytest.fixture
def scene(server: Server, path: str) -> Iterator[Scene]:
    with no_fd_leaks():
        scene = Scene(server, path)
        yield scene
        scene.close()
        server.close()


# --- the dirty log ---------------------------------------------------------------------------------


def set_log(scene: Scene, size: int) -> None:
    """As QEMU: the request carries no need_reply, and the answer is waited for."""
    scene.front.send(encode(Request.SET_LOG_BASE, Log(size, 0)), [memfd.create("log", size)])


def test_logging_goes_on_and_off_while_the_vring_runs_and_the_vring_keeps_its_place(scene: Scene) -> None:
    scene.run()
    before = scene.record
    set_log(scene, 4096)
    assert scene.answer() == Log(4096, 0)
    addr = VringAddr(0, 1 << vhost.VRING_F_LOG, USER, USER + 0x2000, USER + 0x1000, GUEST + 0x2000)
    assert scene.do(Request.SET_FEATURES, U64(FEATURES | LOG_ALL)) == 0
    assert scene.do(Request.SET_VRING_ADDR, addr) == 0
    on = scene.record
    assert on["log_data"]
    assert on["log_used"]
    assert scene.do(Request.SET_FEATURES, U64(FEATURES)) == 0
    assert scene.do(Request.SET_VRING_ADDR, VringAddr(0, 0, USER, USER + 0x2000, USER + 0x1000, 0)) == 0
    off = scene.record
    assert not off["log_data"]
    assert not off["log_used"]
    for name in ("desc", "avail", "used", "last_avail", "used_idx", "running"):
        assert before[name] == on[name] == off[name], name


def test_log_all_without_a_log_is_no_fault(scene: Scene) -> None:
    assert scene.do(Request.SET_FEATURES, U64(FEATURES | LOG_ALL)) == 0
    scene.run()
    assert scene.record["running"] == 1


def test_a_log_too_small_for_the_memory_ends_the_connection(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    assert scene.do(Request.SET_FEATURES, U64(FEATURES | LOG_ALL)) == 0
    set_log(scene, 32)
    until(scene.server, scene.front.gone)
    assert "SET_LOG_BASE mmap_size=0x20 mmap_offset=0x0" in caplog.text
    assert "a dirty log of 32 bytes has no bit for 0x1fffff" in caplog.text


# --- inflight memory -------------------------------------------------------------------------------


def test_inflight_memory_comes_back_before_the_base_is_set(scene: Scene) -> None:
    scene.front.send(encode(Request.GET_INFLIGHT_FD, Inflight(0, 0, 2, 64)))
    got: list[tuple[bytes, list[int]]] = []

    def arrived() -> bool:
        try:
            got.append(recv_with_fds(scene.front.sock, 64))
        except BlockingIOError:
            return False
        return True

    until(scene.server, arrived)
    ((data, fds),) = got
    made = decode_one(Stream.REPLY, data).payload
    assert isinstance(made, Inflight)
    assert os.fstat(fds[0]).st_size == made.mmap_size >= 2 * (16 + 16 * 64)
    assert scene.do(Request.SET_INFLIGHT_FD, made, [os.dup(fds[0])]) == 0
    assert scene.do(Request.SET_VRING_BASE, VringState(0, 7)) == 0
    scene.run()
    # Its region is in use: version 1, 64 descriptors.
    region = os.pread(fds[0], 16, 0)
    assert (int.from_bytes(region[8:10], "little"), int.from_bytes(region[10:12], "little")) == (1, 64)
    assert scene.front.ask(Request.GET_VRING_BASE, VringState(0, 0)) == VringState(0, 7)
    close_all(fds)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (Inflight(64, 0, 2, 64), "inflight memory of 64 bytes for 2 queues of 64: 2176 are needed"),
        (Inflight(4096, 4096, 2, 64), "bytes 0x1000 to 0x2000 of a file of 0x1000"),
        (Inflight(4096, 0, 8, 0xFFFF), "inflight memory of 4096 bytes for 8 queues of 65535"),
    ],
)
def test_inflight_memory_that_is_too_small_is_refused_with_its_numbers(
    scene: Scene, told: Inflight, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = scene.do(Request.SET_INFLIGHT_FD, told, [memfd.create("inflight", 4096)])
    assert answer == errno.EINVAL
    assert words in caplog.text


# --- the IOTLB -------------------------------------------------------------------------------------


def test_a_vring_starts_before_its_translations_and_asks_for_them_one_by_one(scene: Scene) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    assert scene.do(Request.SET_BACKEND_REQ_FD, fds=[theirs.detach()]) == 0
    assert scene.do(Request.SET_FEATURES, U64(FEATURES | ACCESS_PLATFORM)) == 0
    scene.run(at=0xFFFF0000)
    decoder = Decoder(Stream.BACKEND_REQUEST)
    asked: list[int] = []

    def asked_again() -> bool:
        try:
            message = decoder.feed(ours.recv(decoder.wanted))
        except BlockingIOError:
            return False
        if message is None:
            return False
        assert isinstance(message.payload, Iotlb)
        assert message.payload.type == vhost.IOTLB_MISS
        asked.append(message.payload.iova)
        return True

    while not scene.record["running"]:
        until(scene.server, asked_again)
        page = asked[-1] & ~0xFFF
        update = Iotlb(page, 0x1000, USER + page - 0xFFFF0000, vhost.ACCESS_RW, vhost.IOTLB_UPDATE)
        assert scene.do(Request.IOTLB_MSG, update) == 0
        ours.sendall(encode(BackendRequest.IOTLB_MSG, U64(0), flags=abi.FLAG_REPLY))
    assert {iova & ~0xFFF for iova in asked} == {0xFFFF0000, 0xFFFF1000, 0xFFFF2000}
    assert len(asked) == 3
    record = scene.record
    os.pwrite(scene.memory, b"\x39\x30", 0x1002)
    assert load16(record["avail"] + 2) == 12345
    # What is taken back is asked for again, and the vring rests meanwhile.
    assert scene.do(Request.IOTLB_MSG, Iotlb(0xFFFF1000, 0x1000, 0, 0, vhost.IOTLB_INVALIDATE)) == 0
    assert scene.record["running"] == 0
    until(scene.server, asked_again)
    assert asked[-1] & ~0xFFF == 0xFFFF1000
    ours.close()


def test_an_update_to_what_is_not_memory_and_any_without_the_feature_are_refused(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    update = Iotlb(0x1000, 0x1000, USER, vhost.ACCESS_RW, vhost.IOTLB_UPDATE)
    assert scene.do(Request.IOTLB_MSG, update) == errno.EFAULT
    assert scene.do(Request.SET_FEATURES, U64(FEATURES | ACCESS_PLATFORM)) == 0
    assert scene.do(Request.IOTLB_MSG, update) == 0
    beyond = Iotlb(0x1000, 0x1000, USER + MEMORY, vhost.ACCESS_RW, vhost.IOTLB_UPDATE)
    assert scene.do(Request.IOTLB_MSG, beyond) == errno.EFAULT
    wraps = Iotlb((1 << 64) - 0x1000, 0x2000, USER, vhost.ACCESS_RW, vhost.IOTLB_UPDATE)
    assert scene.do(Request.IOTLB_MSG, wraps) == errno.EFAULT
    assert f"{USER + MEMORY:#x}" in caplog.text
