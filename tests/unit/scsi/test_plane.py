"""The scsi workers by themselves: their queue to Python, the operations under way, and hosts without io_uring."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest

from in_process import open_fds
from pyvhost.dataplane import blocks
from pyvhost.dataplane import scsi_blocks as layout
from pyvhost.dataplane.plain import load64, store64
from pyvhost.dataplane.scsi_io import tell
from pyvhost.host.poller import Poller
from pyvhost.scsi import plane
from pyvhost.scsi.plane import DiskWorker, Plane

RING = 3
Told = tuple[int, int, int]


def make() -> DiskWorker:
    return DiskWorker("test-disks", np.zeros(len(blocks.COUNTERS), np.int64))


@pytest.fixture
def worker() -> Iterator[DiskWorker]:
    """One that has no queue, and so no thread: the test says what the loop would."""
    Plane.prepare()
    worker = make()
    yield worker
    worker.close()


def say(worker: DiskWorker, *entries: Told, ring: int = RING) -> None:
    for kind, head, extra in entries:
        tell(worker.disks, kind, ring, head, extra)


# The queue to Python


def test_what_the_loop_says_comes_in_order(worker: DiskWorker) -> None:
    told: list[Told] = []
    worker.own(RING, lambda *entry: told.append(entry), None)
    entries = [(layout.TODO_CHAIN, head, head * 7) for head in range(1000)]
    say(worker, *entries)
    worker.serve()
    assert told == entries
    worker.serve()
    assert len(told) == 1000, "each of it once"


def test_it_goes_round_its_end(worker: DiskWorker) -> None:
    told: list[int] = []
    worker.own(RING, lambda kind, head, extra: told.append(extra), None)
    step = layout.ENTRIES // 4
    for turn in range(6):
        say(worker, *((layout.TODO_CHAIN, 0, number) for number in range(turn * step, (turn + 1) * step)))
        worker.serve()
    assert told == list(range(6 * step))


def test_an_owner_that_raises_costs_nobody_else_anything(
    worker: DiskWorker, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []

    def owner(kind: int, head: int, extra: int) -> None:
        told.append(head)
        if head == 1:
            raise ValueError("this one")

    worker.own(RING, owner, None)
    say(worker, *((layout.TODO_CHAIN, head, 0) for head in range(3)))
    worker.serve()
    assert told == [0, 1, 2]
    assert "chain 1 of ring 3" in caplog.text


def test_an_owner_that_serves_the_rest_itself(worker: DiskWorker) -> None:
    """As a task management function's sweep does, from within another entry."""
    told: list[int] = []

    def owner(kind: int, head: int, extra: int) -> None:
        if head == 0:
            worker.serve()
        told.append(head)

    worker.own(RING, owner, None)
    say(worker, *((layout.TODO_CHAIN, head, 0) for head in range(3)))
    worker.serve()
    assert told == [1, 2, 0]


def test_rings_that_nobody_owns_any_more(worker: DiskWorker) -> None:
    told: list[int] = []
    worker.own(RING, lambda kind, head, extra: told.append(head), None)
    worker.own(RING + 1, lambda kind, head, extra: told.append(100 + head), None)
    worker.own(RING, None, None)
    say(worker, (layout.TODO_CHAIN, 1, 0))
    say(worker, (layout.TODO_CHAIN, 2, 0), ring=RING + 1)
    worker.serve()
    assert told == [102]


def test_who_leaves_is_asked_until_it_has_gone(worker: DiskWorker) -> None:
    left = 3
    asked = 0

    def stays() -> bool:
        nonlocal asked
        asked += 1
        return asked < left

    worker.see_off(stays)
    for _ in range(5):
        worker.serve()
    assert asked == left


def test_the_control_thread_is_woken_as_long_as_there_is_a_worker() -> None:
    Plane.prepare()
    fds = open_fds()
    told: list[int] = []
    with Poller() as poller:
        worker = make()
        worker.own(RING, lambda kind, head, extra: told.append(head), poller)
        worker.own(RING + 1, lambda kind, head, extra: told.append(head), poller)
        say(worker, (layout.TODO_CHAIN, 9, 0))
        os.eventfd_write(worker.python_fd, 1)
        poller.run_once(10)
        assert told == [9]
        worker.close()
    assert open_fds() == fds


# Operations under way


def begin(worker: DiskWorker, number: int, queue: int, tag: int, *pieces: tuple[int, int]) -> int:
    """An operation as the loop leaves it; its address."""
    op = worker.ops + number * layout.OP_BYTES
    words = {
        layout.OP_STATE: 1,
        layout.OP_QUEUE: queue,
        layout.OP_UNIT: 0x1000,
        layout.OP_TAG: tag,
        layout.OP_SERIAL: 500 + number,
        layout.OP_PIECES: len(pieces),
    }
    for word, value in words.items():
        store64(op + word, value)
    for at, (address, size) in enumerate(pieces):
        store64(op + layout.OP_PIECE + 16 * at, address)
        store64(op + layout.OP_PIECE + 16 * at + 8, size)
    return op


@pytest.fixture
def ops(worker: DiskWorker) -> list[int]:
    found = [
        begin(worker, 0, 1, 10, (0x1000, 108), (0x8000, 4096)),
        begin(worker, 5, 1, -1, (0x2000, 108)),
        begin(worker, layout.OPS - 1, 2, 12, (0x3000, 108), (0x9000, 512)),
    ]
    begin(worker, 7, 1, 13, (0x1000, 108))
    store64(worker.ops + 7 * layout.OP_BYTES + layout.OP_STATE, 0)
    return found


def test_operations_are_found_by_queue_unit_and_tag(worker: DiskWorker, ops: list[int]) -> None:
    assert list(worker.operations({1, 2}, lambda unit, tag: True)) == ops
    assert list(worker.operations({2}, lambda unit, tag: True)) == ops[2:]
    assert list(worker.operations({1}, lambda unit, tag: tag == (1 << 64) - 1)) == [ops[1]]
    assert list(worker.operations({1, 2}, lambda unit, tag: unit != 0x1000)) == []


def test_operations_that_are_aborted(worker: DiskWorker, ops: list[int]) -> None:
    assert worker.watch_operations({1}, lambda unit, tag: True) == [500, 505]
    assert [load64(op + layout.OP_WATCHED) for op in ops] == [1, 1, 0]
    assert [load64(op + layout.OP_ABORT) for op in ops] == [0, 0, 0], "only watched"
    worker.watch_operations({1}, lambda unit, tag: tag == 10, 5)
    worker.watch_operations({1, 2}, lambda unit, tag: True, 6)
    assert [load64(op + layout.OP_ABORT) for op in ops] == [5, 6, 6], "the first to abort says how it ends"


def test_operations_by_where_they_write(worker: DiskWorker, ops: list[int]) -> None:
    def within(start: int, end: int) -> list[int]:
        return worker.watch_writing({1, 2}, lambda at, size: at < end and start < at + size)

    assert within(0x8FFF, 0x9000) == [500]
    assert within(0x9000, 0x9001) == [500 + layout.OPS - 1]
    assert within(0, 0x2001) == [500, 505]
    assert within(0x9200, 1 << 40) == []


# The host, the process


def test_a_host_without_io_uring(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(entries: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(plane, "Uring", refuse)
    fds = open_fds()
    worker = make()
    assert not worker.has_uring
    assert load64(worker.disks + layout.DISKS_FREE) < 0, "the loop finds no free operation"
    assert "Operation not permitted" in caplog.text
    worker.close()
    assert open_fds() == fds


def test_a_process_has_one_plane_whose_workers_are_taken_in_turn() -> None:
    assert Plane.get() is Plane.get()
    made = Plane(workers=2)
    taken = [made.workers.take() for _ in range(3)]
    assert taken[0] is taken[2]
    assert taken[0] is not taken[1]
    assert made.in_process.take() not in taken, "it tells another control thread"
    for worker in {*taken, made.in_process.take()}:
        worker.close()
