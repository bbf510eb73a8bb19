"""What waits for a connection's other end: bytes and messages that go round the buffer's end, and what they cost."""

from __future__ import annotations

import os
import random
import select
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from pyvhost.abi.virtio_vsock import SEQ_EOM, SEQ_EOR, TYPE_SEQPACKET, TYPE_STREAM
from pyvhost.dataplane import blocks, vsock_out
from pyvhost.dataplane import vsock_blocks as layout
from pyvhost.dataplane.plain import load64

SIZE = 4096
GRANTED = 2048


class Out:
    """A connection with a small buffer, and what a guest has sent on it."""

    def __init__(self, kind: int) -> None:
        self.buffer = np.zeros(SIZE, np.uint8)
        self.scratch = np.zeros(blocks.SCRATCH_BYTES // 8, np.int64)
        self.row = np.zeros(len(blocks.COUNTERS), np.int64)
        self.workers: Any = np.zeros(1, blocks.WORKER)
        self.workers[0]["scratch"] = self.scratch.ctypes.data
        self.workers[0]["row"] = self.row.ctypes.data
        self.todo = np.zeros((layout.QUEUE_ENTRIES + 16 * layout.ENTRY_BYTES) // 8, np.int64)
        self.guests: Any = np.zeros(1, layout.GUEST)
        self.guests[0]["todo"], self.guests[0]["todo_mask"] = self.todo.ctypes.data, 15
        self.guests[0]["ready_first"] = self.guests[0]["ready_last"] = -1
        self.connections: Any = np.zeros(1, layout.CONNECTION)
        self.connection = self.connections[0]
        for field, value in (
            ("open", 1),
            ("type", kind),
            ("fd", -1),
            ("other", -1),
            ("out", self.buffer.ctypes.data),
            ("out_size", SIZE),
            ("out_open", -1),
            ("buf_alloc", GRANTED),
            ("alloc_told", GRANTED),
        ):
            self.connection[field] = value

    def keep(self, data: bytes, flags: int = 0) -> int:
        """Takes `data` in from the guest, in two pieces, the first with something before it."""
        raw = np.frombuffer(b"head" + data, np.uint8)
        at, cut = int(raw.ctypes.data), 4 + len(data) // 3
        iov = np.array([at, cut, at + cut, raw.size - cut], np.int64)
        self.connection["rx_cnt"] = (self.connection["rx_cnt"] + len(data)) & 0xFFFFFFFF
        return int(vsock_out.keep(self.connection, int(iov.ctypes.data), 4, len(data), flags))

    def flush(self) -> None:
        vsock_out.flush(self.workers[0], self.guests[0], self.connections, 0)

    def told(self) -> list[tuple[int, int]]:
        """Kind and third word of what Python was told."""
        base = int(self.todo.ctypes.data)
        entries = [
            base + layout.QUEUE_ENTRIES + i * layout.ENTRY_BYTES
            for i in range(load64(base + layout.QUEUE_PUT))
        ]
        return [(load64(entry), load64(entry + layout.ENTRY_A)) for entry in entries]


@pytest.fixture
def epoll() -> Iterator[select.epoll]:
    with select.epoll() as epoll:
        yield epoll


def connect(out: Out, epoll: select.epoll, kind: socket.SocketKind) -> socket.socket:
    """A socket pair at the other end; the half that the test has."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, kind)
    mine.setblocking(False)
    epoll.register(mine, select.EPOLLIN | select.EPOLLET)
    out.workers[0]["epoll"] = epoll.fileno()
    out.connection["fd"] = mine.detach()
    out.connection["started"] = out.connection["writable"] = 1
    theirs.setblocking(False)
    return theirs


def test_bytes_go_round_the_end_and_come_out_in_order(epoll: select.epoll) -> None:
    out = Out(TYPE_STREAM)
    theirs = connect(out, epoll, socket.SOCK_STREAM)
    dice = random.Random(1)
    sent, got = bytearray(), bytearray()
    for _ in range(100):
        data = dice.randbytes(dice.randrange(1, GRANTED))
        assert out.keep(data) == 0
        sent += data
        out.flush()
        got += theirs.recv(2 * SIZE)
    assert got == sent
    assert out.connection["fwd_cnt"] == out.connection["rx_cnt"] == len(sent) & 0xFFFFFFFF
    assert out.told() == []
    os.close(int(out.connection["fd"]))


def test_messages_keep_their_bounds_and_their_flags() -> None:
    out = Out(TYPE_SEQPACKET)
    dice = random.Random(2)
    kept: deque[tuple[bytes, int]] = deque()
    iov = np.zeros(4, np.int64)
    for _ in range(300):
        message = dice.randbytes(dice.choice((0, 1, 7, 8, 9, 500)))
        flags = SEQ_EOM | dice.choice((0, SEQ_EOR))
        cut = dice.randrange(len(message) + 1)
        # A message that is not whole does not go on.
        before = vsock_out.whole(out.connection)
        assert out.keep(message[:cut]) == 0
        assert vsock_out.whole(out.connection) == before
        assert out.keep(message[cut:], flags) == 0
        kept.append((message, flags))
        while len(kept) > dice.randrange(4):
            length = vsock_out.record_bytes(out.connection)
            assert (vsock_out.record_flags(out.connection), length) == (kept[0][1], len(kept[0][0]))
            pieces = vsock_out.pieces_of(out.connection, layout.RECORD, length, int(iov.ctypes.data))
            start = int(out.buffer.ctypes.data)
            found = b"".join(
                out.buffer[iov[2 * i] - start : iov[2 * i] - start + iov[2 * i + 1]].tobytes()
                for i in range(pieces)
            )
            assert found == kept.popleft()[0]
            vsock_out.forget_record(out.connection, length)


def test_empty_messages_that_nobody_takes_are_refused_in_the_end() -> None:
    out = Out(TYPE_SEQPACKET)
    kept = 0
    while (came := out.keep(b"", SEQ_EOM)) == 0:
        kept += 1
        assert kept <= SIZE // layout.RECORD
    assert came == layout.VIOLATED_RECORDS
    assert kept > SIZE // layout.RECORD // 2


def test_who_does_not_read_is_waited_for_by_epoll(epoll: select.epoll) -> None:
    out = Out(TYPE_STREAM)
    theirs = connect(out, epoll, socket.SOCK_STREAM)
    sent = 0
    while out.connection["writable"]:
        assert out.keep(bytes(GRANTED)) == 0
        sent += GRANTED
        out.flush()
    assert out.connection["watches_writable"]
    assert vsock_out.whole(out.connection) == vsock_out.under_way(out.connection) > 0
    got = 0
    while got < sent:
        try:
            got += len(theirs.recv(1 << 20))
        except BlockingIOError:
            ((_, events),) = epoll.poll(10)
            assert events & select.EPOLLOUT
            out.connection["writable"] = 1
            out.flush()
    assert vsock_out.whole(out.connection) == 0
    assert not out.connection["watches_writable"]
    os.close(int(out.connection["fd"]))


def test_an_end_that_is_gone_takes_all_and_python_is_told_once(epoll: select.epoll) -> None:
    out = Out(TYPE_STREAM)
    connect(out, epoll, socket.SOCK_STREAM).close()
    out.keep(b"something")
    out.connection["drain"] = 1
    out.flush()
    out.flush()
    assert [kind for kind, _ in out.told()] == [layout.TODO_FAILED, layout.TODO_DRAINED]
    assert out.connection["mute"]
    assert vsock_out.under_way(out.connection) == 0
    os.close(int(out.connection["fd"]))


def test_credit_is_owed_when_the_guest_knows_of_less_than_half() -> None:
    out = Out(TYPE_STREAM)
    for part in (GRANTED // 4, GRANTED // 4, GRANTED // 4):
        out.keep(bytes(part))
        vsock_out.owe(out.guests[0], out.connections, 0)
        # Nothing has gone: there is nothing to tell.
        assert not out.connection["credit_due"]
    vsock_out.gone(out.guests[0], out.connections, 0, 1)
    assert out.connection["credit_due"]
    assert (out.guests[0]["ready_first"], out.guests[0]["ready_last"]) == (0, 0)
    vsock_out.dequeue(out.guests[0], out.connections, 0)
    assert (out.guests[0]["ready_first"], out.guests[0]["ready_last"]) == (-1, -1)


def test_all_that_was_granted_may_come_in_messages_of_one_byte() -> None:
    """A record of the least size for each byte: the buffer is as large as that (`link`)."""
    out = Out(TYPE_SEQPACKET)
    for _ in range(SIZE // (2 * layout.RECORD)):
        assert out.keep(b"x", SEQ_EOM) == 0
    assert out.keep(b"x", SEQ_EOM) == layout.VIOLATED_RECORDS
    # A message that goes on in another packet takes the last of it.
    out = Out(TYPE_SEQPACKET)
    assert out.keep(bytes(SIZE - layout.RECORD - 1)) == 0
    assert out.keep(b"xx", SEQ_EOM) == layout.VIOLATED_RECORDS
    assert out.keep(b"x", SEQ_EOM) == 0
    assert vsock_out.whole(out.connection) == SIZE


def test_more_messages_than_go_in_one_turn_are_not_forgotten(epoll: select.epoll) -> None:
    out = Out(TYPE_SEQPACKET)
    theirs = connect(out, epoll, socket.SOCK_SEQPACKET)
    for _ in range(150):
        assert out.keep(b"x", SEQ_EOM) == 0
    out.flush()
    got = 0
    while out.connection["watches_writable"]:
        with suppress(BlockingIOError):
            while theirs.recv(10) == b"x":
                got += 1
        ((_, events),) = epoll.poll(10)
        assert events & select.EPOLLOUT
        out.flush()
    assert vsock_out.whole(out.connection) == 0
    assert 0 < got < 150
    assert sum(len(theirs.recv(10)) for _ in range(150 - got)) == 150 - got
    os.close(int(out.connection["fd"]))
