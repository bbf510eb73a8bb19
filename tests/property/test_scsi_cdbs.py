"""Whatever an initiator sends, its command ends with a status, and the store is only asked for what it has."""

from __future__ import annotations

import errno

from hypothesis import given, settings
from hypothesis import strategies as st

from pyvhost.scsi.commands.dispatch import FAMILIES
from pyvhost.scsi.commands.table import TABLE
from pyvhost.scsi.sense import Asc
from pyvhost.scsi.task import Attribute, Outcome
from scsi_scene import RamStore, Scene, told

assert FAMILIES
COMMANDS = list(TABLE)


@st.composite
def cdbs(draw: st.DrawFn) -> bytes:
    """CDBs that are nearly right: of a command that there is, bits where it has bits, small numbers mostly."""
    if draw(st.booleans()):
        command = draw(st.sampled_from(COMMANDS))
        cdb = bytearray(command.usage_data)
        for at in range(1, len(cdb)):
            own = 0xE0 if at == 1 and command.service_action is not None else 0xFF
            bits = draw(st.one_of(st.just(0), st.integers(0, 255)))
            cdb[at] = cdb[at] & ~own & 0xFF | bits & command.usage[at] & own
        return bytes(cdb) + bytes(draw(st.integers(0, 32 - len(cdb))))
    return draw(st.binary(max_size=32))


@settings(max_examples=400, deadline=None)
@given(
    commands=st.lists(
        st.tuples(
            cdbs(),
            st.sampled_from([0, 4, 8, 24, 512, 1024, 5000]),
            st.sampled_from([0, 1, 36, 512, 4096]),
            st.sampled_from(Attribute),
            st.integers(0, 1),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=12,
    ),
    filling=st.binary(min_size=1, max_size=64),
    failures=st.dictionaries(
        st.sampled_from(["read", "write", "flush", "zero", "discard", "extents"]),
        st.sampled_from([errno.EIO, errno.ENOSPC, errno.ENODEV, errno.ETIMEDOUT, errno.EROFS, errno.ENOMEM]),
        max_size=2,
    ),
)
def test_every_command_ends(
    commands: list[tuple[bytes, int, int, Attribute, int, int]], filling: bytes, failures: dict[str, int]
) -> None:
    scene = Scene(RamStore(64), removable=True)
    other = scene.initiator("other")
    scene.store.failures = failures
    tasks = []
    for cdb, out, into, attribute, who, lun in commands:
        content = (filling * (out // len(filling) + 1))[:out]
        nexus = other if who else scene.nexus
        tasks.append(scene.begin(cdb, out=content, into=into, nexus=nexus, attribute=attribute, lun=lun))
        if scene.store.pending and out % 3:
            scene.store.step()
    scene.store.settle()
    if scene.unit.tasks.faulted is not None:
        # What an ACA blocks is ended by whoever clears it.
        scene.unit.tasks.clear_aca()
        scene.store.settle()
    while scene.unit.tasks.faulted is not None:
        scene.unit.tasks.clear_aca()
        scene.store.settle()
    for task in tasks:
        assert task.ended, task
        assert task.outcome in (Outcome.STATUS, Outcome.ABORTED)
        assert told(task)[1] != Asc.INTERNAL_TARGET_FAILURE, task
        assert task.transferred_in <= task.in_length
        assert task.transferred_out <= task.out_length
        assert task.residual >= 0
    assert not list(scene.unit.tasks)
    scene.close()
    assert scene.store.closed


@settings(max_examples=150, deadline=None)
@given(
    commands=st.lists(st.tuples(cdbs(), st.integers(0, 3)), min_size=1, max_size=10),
    action=st.integers(0, 5),
)
def test_task_management_stops_what_is_under_way(commands: list[tuple[bytes, int]], action: int) -> None:
    scene = Scene(RamStore(64))
    tasks = [scene.begin(cdb, out=bytes(1024), into=512, attribute=Attribute(n)) for cdb, n in commands]
    answers: list[object] = []
    target, nexus = scene.target, scene.nexus
    if action == 0:
        target.abort_task_set(nexus, 0, answers.append)
    elif action == 1:
        target.clear_task_set(scene.initiator("other"), 0, answers.append)
    elif action == 2:
        target.lun_reset(0, answers.append)
    elif action == 3:
        target.nexus_reset(nexus, answers.append)
    elif action == 4:
        target.detach(nexus, lambda: answers.append(None))
    else:
        target.remove(0, lambda: answers.append(None))
    running = [task for task in tasks if not task.ended]
    assert bool(answers) == (not running)
    scene.store.settle()
    assert len(answers) == 1
    assert all(task.ended for task in tasks)
    assert all(task.outcome is not Outcome.STATUS for task in running)
    scene.close()
