"""The order of tasks, ACA, and what aborting really stops (SAM-5, clauses 5.10, 7 and 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pyvhost.scsi.sense import Asc, Key
from pyvhost.scsi.target import Response
from pyvhost.scsi.task import Attribute, Outcome, Status, Task
from pyvhost.scsi.unit import Fast
from scsi_scene import Scene, told

READ = "28 00 00000000 00 0001 00"
FAILING = "28 00 ffffffff 00 0001 04"  # NACA


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.close()


def test_an_ordered_task_stands_between(scene: Scene) -> None:
    ended: list[int] = []

    def note(task: Task) -> None:
        ended.append(task.tag)

    for tag, attribute in enumerate(
        [Attribute.SIMPLE, Attribute.SIMPLE, Attribute.ORDERED, Attribute.SIMPLE]
    ):
        scene.begin(READ, into=512, attribute=attribute, tag=tag, ended=note)
    assert len(scene.store.pending) == 2
    assert scene.unit.fast(scene.nexus) is Fast.NONE
    scene.store.step()
    assert len(scene.store.pending) == 1
    scene.store.step()
    assert len(scene.store.pending) == 1  # the ordered one, alone
    scene.store.settle()
    assert ended == [0, 1, 2, 3]
    assert scene.unit.fast(scene.nexus) == Fast.READ | Fast.WRITE


def test_the_head_of_the_queue_does_not_wait(scene: Scene) -> None:
    first = scene.begin(READ, into=512, attribute=Attribute.ORDERED)
    waiting = scene.begin(READ, into=512, attribute=Attribute.ORDERED)
    head = scene.begin(READ, into=512, attribute=Attribute.HEAD_OF_QUEUE)
    assert (first.started, waiting.started, head.started) == (True, False, True)
    scene.store.settle()
    assert waiting.ended


def test_an_ordered_task_waits_for_the_compiled_loop(scene: Scene) -> None:
    asked: list[Callable[[], object]] = []
    scene.unit.drain = asked.append
    task = scene.begin(READ, into=512, attribute=Attribute.ORDERED)
    assert not task.started
    asked.pop()()
    assert task.started
    scene.store.settle()
    scene.unit.drain = None


def test_aca(scene: Scene) -> None:
    waiting_behind = scene.begin(READ, into=512, attribute=Attribute.ORDERED)
    blocked = scene.begin(READ, into=512, attribute=Attribute.ORDERED)
    failed = scene.begin(FAILING, attribute=Attribute.HEAD_OF_QUEUE)
    assert told(failed)[1] == Asc.LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE
    scene.store.settle()
    assert waiting_behind.ended
    assert not blocked.started
    other = scene.initiator("other")
    assert scene.begin(READ, into=512).status is Status.ACA_ACTIVE
    assert scene.begin(READ, into=512, nexus=other).status is Status.BUSY
    assert scene.begin(FAILING, nexus=other).status is Status.ACA_ACTIVE
    aca = scene.begin(READ, into=512, attribute=Attribute.ACA)
    scene.store.settle()
    assert aca.status is Status.GOOD
    answers: list[Response] = []
    scene.target.clear_aca(other, 0, answers.append)
    assert scene.unit.tasks.faulted is scene.nexus
    scene.target.clear_aca(scene.nexus, 0, answers.append)
    scene.store.settle()
    assert blocked.status is Status.GOOD
    assert answers == [Response.FUNCTION_COMPLETE] * 2


def test_an_abort_is_complete_when_the_memory_is_free(scene: Scene) -> None:
    running = scene.begin(READ, into=512, tag=7)
    answers: list[Response] = []
    scene.target.query_task(scene.nexus, 0, 7, answers.append)
    scene.target.abort_task(scene.nexus, 0, 7, answers.append)
    assert answers == [Response.FUNCTION_SUCCEEDED]
    assert not running.ended
    scene.store.settle()
    assert running.outcome is Outcome.ABORTED
    assert answers == [Response.FUNCTION_SUCCEEDED, Response.FUNCTION_COMPLETE]
    scene.target.query_task(scene.nexus, 0, 7, answers.append)
    scene.target.abort_task(scene.nexus, 9, 7, answers.append)
    assert answers[2:] == [Response.FUNCTION_COMPLETE, Response.INCORRECT_LOGICAL_UNIT_NUMBER]


def test_a_task_that_only_waits_is_aborted_at_once(scene: Scene) -> None:
    scene.begin(READ, into=512)
    waiting = scene.begin(READ, into=512, attribute=Attribute.ORDERED, tag=5)
    answers: list[Response] = []
    scene.target.abort_task(scene.nexus, 0, 5, answers.append)
    assert waiting.outcome is Outcome.ABORTED
    assert answers == [Response.FUNCTION_COMPLETE]


def test_whose_tasks_another_cleared_is_told(scene: Scene) -> None:
    other = scene.initiator("other")
    theirs = scene.begin(READ, into=512, nexus=other)
    answers: list[Response] = []
    scene.target.clear_task_set(scene.nexus, 0, answers.append)
    scene.store.settle()
    assert theirs.outcome is Outcome.ABORTED
    task = scene.begin("00 00000000 00", nexus=other)
    assert told(task) == (Key.UNIT_ATTENTION, Asc.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR)


def test_with_tas_a_status_says_so(scene: Scene) -> None:
    page = bytes.fromhex("0a0a 02 10 00 40 0000 ffff 0000")
    assert scene.do("15 10 0000 10 00", out=bytes(4) + page).status is Status.GOOD
    other = scene.initiator("other")
    theirs = scene.begin(READ, into=512, nexus=other)
    scene.target.clear_task_set(scene.nexus, 0, lambda response: None)
    scene.store.settle()
    assert (theirs.outcome, theirs.status) == (Outcome.STATUS, Status.TASK_ABORTED)
    assert scene.begin("00 00000000 00", nexus=other).status is Status.GOOD


def test_a_reset_of_the_unit(scene: Scene) -> None:
    running = scene.begin(READ, into=512)
    answers: list[Response] = []
    scene.target.lun_reset(0, answers.append)
    assert answers == []
    scene.store.settle()
    assert running.outcome is Outcome.RESET
    assert answers == [Response.FUNCTION_COMPLETE]
    task = scene.begin("00 00000000 00")
    assert told(task) == (Key.UNIT_ATTENTION, Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED)


def test_qerr_aborts_the_rest(scene: Scene) -> None:
    page = bytes.fromhex("0a0a 02 12 00 00 0000 ffff 0000")
    assert scene.do("15 10 0000 10 00", out=bytes(4) + page).status is Status.GOOD
    running = scene.begin(READ, into=512)
    scene.begin("28 00 ffffffff 00 0001 00")
    scene.store.settle()
    assert running.outcome is Outcome.ABORTED
