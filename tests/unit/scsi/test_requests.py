"""Requests and responses as bytes: any layout, and what a task's end looks like to a driver."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver.scsi_command import Format, Pending, address
from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.requests import HEADER_BYTES, RESPONSE_BYTES, Address, Request, parse_lun, skip
from pyvhost.scsi.task import Attribute, Outcome, Status, Task
from pyvhost.vhost.chains import Chain

COMMAND = bytes([0x28, 0, 0, 0, 1, 2, 0, 0, 3, 0])


def chain(readable: bytes, room: int, cuts: Sequence[int] = (), byteorder: str = "little") -> Chain:
    """A chain whose two parts are cut at the same places."""

    def pieces(data: bytearray) -> list[memoryview]:
        view = memoryview(data)
        ends = [cut for cut in sorted(cuts) if 0 < cut < len(data)]
        return [view[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True) if a < b]

    order = "big" if byteorder == "big" else "little"
    return Chain(3, pieces(bytearray(readable)), pieces(bytearray(room)), order)  # type: ignore[arg-type]


def written(chain: Chain) -> bytes:
    return b"".join(chain.writable)


def task_of(request: Request, **fields: object) -> Task:
    task = Task(
        request.cdb, Nexus("n"), lambda task: None, data_in=request.data_in, data_out=request.data_out
    )
    for name, value in fields.items():
        setattr(task, name, value)
    return task


@given(
    cuts=st.lists(st.integers(1, 400), max_size=8),
    data_out=st.binary(max_size=100),
    data_in=st.integers(0, 100),
    byteorder=st.sampled_from(["little", "big"]),
)
def test_any_layout_is_one_request(cuts: list[int], data_out: bytes, data_in: int, byteorder: str) -> None:
    form = Format(byteorder)  # type: ignore[arg-type]
    head = form.command(address(5, 300), 0x1122334455667788, COMMAND, attribute=2, priority=7, crn=9)
    one = chain(head + data_out, RESPONSE_BYTES + data_in, cuts, byteorder)
    request = Request.parse(one)
    assert request is not None
    assert parse_lun(request.lun) == Address(5, 300)
    assert (request.tag, request.priority, request.crn) == (0x1122334455667788, 7, 9)
    assert request.task_attribute is Attribute.HEAD_OF_QUEUE
    assert request.cdb == COMMAND.ljust(32, b"\0")
    assert b"".join(request.data_out) == data_out
    assert sum(map(len, request.data_in)) == data_in

    for view in request.data_in:
        view[:] = b"d" * len(view)
    task = task_of(request)
    task.wanted_in = data_in
    task.finish(Status.CHECK_CONDITION, b"s" * 18, None)
    task.transferred_in = data_in
    assert request.complete(task) == RESPONSE_BYTES + data_in
    pending = Pending("", command=True, data_in=data_in, data_out=len(data_out), raw=written(one))
    pending.written = RESPONSE_BYTES + data_in
    response = form.response(pending)
    assert (response.response, response.status, response.sense) == (abi.S_OK, 2, b"s" * 18)
    assert response.residual == len(data_out)


@pytest.mark.parametrize(
    ("readable", "room"),
    [
        (HEADER_BYTES - 1, RESPONSE_BYTES),
        (HEADER_BYTES, RESPONSE_BYTES - 1),
        (0, RESPONSE_BYTES),
        (HEADER_BYTES, 0),
    ],
)
def test_too_short_is_none(readable: int, room: int) -> None:
    assert Request.parse(chain(bytes(readable), room, [20, 30])) is None


ENDS = {
    "good": ({"outcome": Outcome.STATUS}, abi.S_OK, 40),
    "moved in part": ({"outcome": Outcome.STATUS, "wanted_in": 30, "transferred_in": 30}, abi.S_OK, 10),
    "more than there was room": (
        {"outcome": Outcome.STATUS, "wanted_in": 50, "transferred_in": 40},
        abi.S_OVERRUN,
        10,
    ),
    "refused, because there was not enough": (
        {"outcome": Outcome.STATUS, "status": Status.CHECK_CONDITION, "wanted_in": 50},
        abi.S_OK,
        40,
    ),
    "aborted": ({"outcome": Outcome.ABORTED, "transferred_in": 20}, abi.S_ABORTED, 0),
    "reset": ({"outcome": Outcome.RESET}, abi.S_RESET, 0),
}


@pytest.mark.parametrize(("fields", "code", "residual"), ENDS.values(), ids=ENDS.keys())
def test_how_a_task_ended(fields: dict[str, object], code: int, residual: int) -> None:
    one = chain(bytes(HEADER_BYTES), RESPONSE_BYTES + 40)
    request = Request.parse(one)
    assert request is not None
    task = task_of(request, **fields)
    moved = request.complete(task)
    raw = written(one)
    assert raw[11] == code
    assert int.from_bytes(raw[4:8], "little") == residual
    assert moved == RESPONSE_BYTES + (task.transferred_in if task.outcome is Outcome.STATUS else 0)


def test_long_sense_is_cut() -> None:
    one = chain(bytes(HEADER_BYTES), RESPONSE_BYTES)
    request = Request.parse(one)
    assert request is not None
    request.complete(task_of(request, outcome=Outcome.STATUS, sense=b"x" * 252))
    assert int.from_bytes(written(one)[:4], "little") == abi.SENSE_SIZE


def test_unknown_attributes_are_simple() -> None:
    head = bytearray(HEADER_BYTES)
    for number in (4, 5, 255):
        head[16] = number
        request = Request.parse(chain(bytes(head), RESPONSE_BYTES))
        assert request is not None
        assert request.task_attribute is Attribute.SIMPLE


@given(st.lists(st.integers(0, 9), max_size=9), st.integers(0, 100))
def test_skip(sizes: list[int], count: int) -> None:
    data = random.Random(1).randbytes(sum(sizes))
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(data)[at : at + size])
        at += size
    assert b"".join(skip(views, count)) == data[count:]
