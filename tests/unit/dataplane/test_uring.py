"""io_uring driven by compiled code, and by its plain twin: pushed, submitted, reaped, and taken back."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plain_twin import plain_twin
from pyvhost.dataplane import scsi_blocks as layout
from pyvhost.dataplane import uring
from pyvhost.dataplane.plain import load32, load64, store64
from pyvhost.host.uring import Uring

TWINS = pytest.mark.parametrize("code", [uring, plain_twin(uring)], ids=["compiled", "plain"])


class Disks:
    """The words that `uring` reads, over a ring of the host's."""

    def __init__(self) -> None:
        self.ring = Uring(8)
        self._words = np.zeros(layout.DISKS_BYTES // 8, np.int64)
        self.address = int(self._words.ctypes.data)
        for at, value in (
            (layout.DISKS_URING_FD, self.ring.fd),
            (layout.DISKS_SQ_TAIL, self.ring.sq_tail),
            (layout.DISKS_SQ_MASK, self.ring.sq_mask),
            (layout.DISKS_SQ_ARRAY, self.ring.sq_array),
            (layout.DISKS_SQES, self.ring.sqes),
            (layout.DISKS_CQ_HEAD, self.ring.cq_head),
            (layout.DISKS_CQ_TAIL, self.ring.cq_tail),
            (layout.DISKS_CQ_MASK, self.ring.cq_mask),
            (layout.DISKS_CQES, self.ring.cqes),
        ):
            store64(self.address + at, value)

    def __getitem__(self, at: int) -> int:
        return load64(self.address + at)

    def reap(self, code: Any, count: int) -> dict[int, int]:
        """What so many operations came to, by mark."""
        ended: dict[int, int] = {}
        while len(ended) < count:
            at = code.next_completion(self.address)
            if at == 0:
                assert select.select([self.ring.fd], [], [], 30)[0]
                continue
            result = load32(at + 8)
            ended[load64(at)] = result - (1 << 32) if result >> 31 else result
            code.consume(self.address)
        return ended


@pytest.fixture
def disks() -> Iterator[Disks]:
    try:
        disks = Disks()
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    yield disks
    disks.ring.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, bytes(range(256)) * 16, 0)
    yield fd
    os.close(fd)


def iovec(*parts: Any) -> Any:
    return np.array([[int(part.ctypes.data), part.nbytes] for part in parts], np.int64)


@TWINS
def test_reads_and_writes(code: Any, disks: Disks, file: int) -> None:
    rooms = [np.zeros(100, np.uint8) for _ in range(4)]
    vectors = [iovec(room[:60], room[60:]) for room in rooms]
    for mark, vector in enumerate(vectors):
        code.push(disks.address, uring.OP_READV, file, int(vector.ctypes.data), 2, 256 + mark, 0, mark)
    assert disks[layout.DISKS_PUSHED] == 4
    assert code.submit(disks.address) == 1
    assert (disks[layout.DISKS_PUSHED], disks[layout.DISKS_BUSY]) == (0, 4)
    assert disks.reap(code, 4) == dict.fromkeys(range(4), 100)
    assert disks[layout.DISKS_BUSY] == 0
    for mark, room in enumerate(rooms):
        assert bytes(room) == (bytes(range(256)) * 2)[mark : mark + 100]

    room = np.full(50, 7, np.uint8)
    vector = iovec(room)
    code.push(disks.address, uring.OP_WRITEV, file, int(vector.ctypes.data), 1, 1000, 2, 77)
    assert code.submit(disks.address) == 1
    assert disks.reap(code, 1) == {77: 50}
    assert os.pread(file, 50, 1000) == bytes([7]) * 50


@TWINS
def test_round_and_round(code: Any, disks: Disks, file: int) -> None:
    room = np.zeros(16, np.uint8)
    vector = iovec(room)
    for number in range(50):
        code.push(disks.address, uring.OP_READV, file, int(vector.ctypes.data), 1, number, 0, number)
        assert code.submit(disks.address) == 1
        assert disks.reap(code, 1) == {number: 16}
        assert room[0] == number


@TWINS
def test_what_the_host_fails(code: Any, disks: Disks, file: int) -> None:
    room = np.zeros(16, np.uint8)
    vector = iovec(room)
    code.push(disks.address, uring.OP_READV, 9999, int(vector.ctypes.data), 1, 0, 0, 1)
    code.push(disks.address, uring.OP_READV, file, int(vector.ctypes.data), 1, 1 << 20, 0, 2)
    code.push(disks.address, uring.OP_READV, file, 8, 1, 0, 0, 3)
    assert code.submit(disks.address) >= 1
    assert disks.reap(code, 3) == {1: -errno.EBADF, 2: 0, 3: -errno.EFAULT}


@TWINS
def test_what_it_does_not_take_is_taken_back(code: Any, disks: Disks, file: int) -> None:
    """The newest first; nothing of it is ever done, and the ring goes on."""
    room = np.full(16, 9, np.uint8)
    vector = iovec(room)
    store64(disks.address + layout.DISKS_URING_FD, 9999)
    for mark in (10, 11, 12):
        code.push(disks.address, uring.OP_WRITEV, file, int(vector.ctypes.data), 1, 0, 0, mark)
    assert code.submit(disks.address) == -errno.EBADF
    assert [code.withdraw(disks.address) for _ in range(4)] == [12, 11, 10, -1]
    assert (disks[layout.DISKS_PUSHED], disks[layout.DISKS_BUSY]) == (0, 0)
    store64(disks.address + layout.DISKS_URING_FD, disks.ring.fd)
    code.push(disks.address, uring.OP_READV, file, int(vector.ctypes.data), 1, 3, 0, 13)
    assert code.submit(disks.address) == 1
    assert disks.reap(code, 1) == {13: 16}
    assert room[0] == 3
    assert os.pread(file, 4, 0) == bytes(range(4))


@TWINS
def test_one_buffer_needs_no_iovec(disks: Disks, file: int, code: Any) -> None:
    data, back = np.full(512, 7, np.uint8), np.zeros(512, np.uint8)
    code.push(disks.address, code.OP_WRITE, file, int(data.ctypes.data), 512, 1024, 0, 1)
    assert code.submit(disks.address) == 1
    assert disks.reap(code, 1) == {1: 512}
    code.push(disks.address, code.OP_READ, file, int(back.ctypes.data), 512, 1024, 0, 2)
    code.submit(disks.address)
    assert disks.reap(code, 1) == {2: 512}
    assert back.tobytes() == data.tobytes()


@TWINS
def test_completions_are_counted_until_they_are_consumed(disks: Disks, file: int, code: Any) -> None:
    back = np.zeros(512, np.uint8)
    for mark in range(3):
        code.push(disks.address, code.OP_READ, file, int(back.ctypes.data), 512, 0, 0, mark)
    assert code.completions(disks.address) == 0
    code.submit(disks.address)
    disks.reap(code, 1)
    while code.completions(disks.address) < 2:
        assert select.select([disks.ring.fd], [], [], 30)[0]
    disks.reap(code, 2)
    assert code.completions(disks.address) == 0
