"""Reservations between three initiators (SPC-4, 5.13), and what outlives the target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.reservations import Reservations, Type
from pyvhost.scsi.sense import Asc, Key
from pyvhost.scsi.task import Status, Task
from pyvhost.scsi.unit import Fast
from scsi_scene import Scene, data, told

READ, WRITE = "28 00 00000000 00 0001 00", "2a 00 00000000 00 0001 00"


class Cluster(Scene):
    """Three initiators: `a` and `b` have registered keys 0xa and 0xb, `c` hasn't."""

    def __init__(self, aptpl: Path | None = None) -> None:
        super().__init__(aptpl=aptpl)
        self.a, self.b, self.c = self.initiator("a"), self.initiator("b"), self.initiator("c")
        self.register(self.a, 0xA)
        self.register(self.b, 0xB)

    def out(self, nexus: Nexus, action: int, key: int, new: int = 0, kind: int = 0, flags: int = 0) -> Task:
        parameters = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes([0, 0, 0, 0, flags, 0, 0, 0])
        task = self.begin(bytes([0x5F, action, kind, 0, 0, 0, 0, 0, 24, 0]), out=parameters, nexus=nexus)
        while not task.ended:
            self.store.settle()
        return task

    def register(self, nexus: Nexus, key: int, flags: int = 0) -> None:
        assert self.out(nexus, 6, 0, key, flags=flags).status is Status.GOOD

    def may(self, nexus: Nexus) -> str:
        """What a nexus may do, r or w; unit attentions are taken first."""
        while self.unit.attentions.take(nexus) is not None:
            pass
        answer = ""
        if self.do(READ, nexus=nexus).status is Status.GOOD:
            answer += "r"
        if self.do(WRITE, out=bytes(512), nexus=nexus).status is Status.GOOD:
            answer += "w"
        fast = self.unit.fast(nexus)
        assert answer == ("r" if fast & Fast.READ else "") + ("w" if fast & Fast.WRITE else "")
        return answer


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("kind", "registered", "stranger"),
    [(1, "r", "r"), (3, "", ""), (5, "rw", "r"), (6, "rw", ""), (7, "rw", "r"), (8, "rw", "")],
)
def test_what_each_type_lets_others_do(cluster: Cluster, kind: int, registered: str, stranger: str) -> None:
    assert cluster.out(cluster.a, 1, 0xA, kind=kind).status is Status.GOOD
    assert cluster.may(cluster.a) == "rw"
    assert cluster.may(cluster.b) == registered
    assert cluster.may(cluster.c) == stranger
    assert cluster.out(cluster.a, 2, 0xA, kind=kind).status is Status.GOOD
    assert cluster.may(cluster.c) == "rw"


@pytest.mark.parametrize(
    ("cdb", "who"),
    [
        ("12 00 00 00ff 00", "everybody"),
        ("00 00000000 00", "everybody"),
        ("25 00 00000000 0000 00 00", "everybody"),
        ("4d 00 2f 00 00 0000 00ff 00", "everybody"),
        ("a3 0c 00 00 0000 00001000 00 00", "everybody"),
        ("a3 0d 00 00 0000 00000010 00 00", "everybody"),
        ("84 03 00 00000000000000 00000100 00 00", "everybody"),
        ("1e 00 00 00 00 00", "everybody"),
        ("1a 00 3f 00 ff 00", "readers"),
        ("3c 03 00 000000 000004 00", "readers"),
        ("37 00 00 00000000 00ff 00", "readers"),
        ("2f 00 00000000 00 0001 00", "readers"),
        ("1e 00 00 00 01 00", "nobody"),
        ("35 00 00000000 00 0000 00", "nobody"),
        ("1d 04 00 0000 00", "nobody"),
    ],
)
def test_what_a_stranger_may_ask(cluster: Cluster, cdb: str, who: str) -> None:
    """SPC-4, table 68, and SBC-3, table 12: at a write exclusive reservation, and at one of exclusive access."""
    for kind, allowed in ((1, who != "nobody"), (3, who == "everybody")):
        assert cluster.out(cluster.a, 1, 0xA, kind=kind).status is Status.GOOD
        status = cluster.do(cdb, nexus=cluster.c).status
        assert status is (Status.GOOD if allowed else Status.RESERVATION_CONFLICT), kind
        assert cluster.out(cluster.a, 2, 0xA, kind=kind).status is Status.GOOD


def test_preempt_and_abort_lets_the_medium_go(cluster: Cluster) -> None:
    assert cluster.out(cluster.b, 1, 0xB, kind=1).status is Status.GOOD
    assert cluster.do("1e 00 00 00 01 00", nexus=cluster.b).status is Status.GOOD
    assert cluster.unit.preventing == {cluster.b}
    assert cluster.out(cluster.a, 5, 0xA, 0xB, kind=1).status is Status.GOOD
    assert cluster.unit.preventing == set()


def test_who_may_reserve_and_release(cluster: Cluster) -> None:
    assert cluster.out(cluster.c, 1, 0, kind=3).status is Status.RESERVATION_CONFLICT
    assert cluster.out(cluster.a, 1, 0xB, kind=3).status is Status.RESERVATION_CONFLICT
    assert cluster.out(cluster.a, 1, 0xA, kind=3).status is Status.GOOD
    assert cluster.out(cluster.a, 1, 0xA, kind=3).status is Status.GOOD
    assert cluster.out(cluster.a, 1, 0xA, kind=1).status is Status.RESERVATION_CONFLICT
    assert cluster.out(cluster.b, 1, 0xB, kind=3).status is Status.RESERVATION_CONFLICT
    assert cluster.out(cluster.b, 2, 0xB, kind=3).status is Status.GOOD  # does nothing
    wrong = cluster.out(cluster.a, 2, 0xA, kind=1)
    assert told(wrong) == (Key.ILLEGAL_REQUEST, Asc.INVALID_RELEASE_OF_PERSISTENT_RESERVATION)
    assert told(cluster.out(cluster.a, 1, 0xA, kind=2))[1] == Asc.INVALID_FIELD_IN_CDB


def test_preempt(cluster: Cluster) -> None:
    cluster.out(cluster.a, 1, 0xA, kind=3)
    assert cluster.out(cluster.b, 4, 0xB, new=0xA, kind=1).status is Status.GOOD
    task = cluster.do("00 00000000 00", nexus=cluster.a)
    assert told(task) == (Key.UNIT_ATTENTION, Asc.REGISTRATIONS_PREEMPTED)
    assert cluster.unit.reservations.holder == cluster.b.wwn
    assert cluster.unit.reservations.type is Type.WRITE_EXCLUSIVE
    keys = data(cluster.do("5e 00 0000000000 0400 00", nexus=cluster.b))
    assert keys.hex() == "00000003" + "00000008" + "000000000000000b"
    assert cluster.out(cluster.b, 4, 0xB, new=0x77, kind=1).status is Status.RESERVATION_CONFLICT


def test_preempt_and_abort_stops_tasks(cluster: Cluster) -> None:
    cluster.out(cluster.a, 1, 0xA, kind=3)
    running = cluster.begin(READ, into=512, nexus=cluster.a)
    task = cluster.out(cluster.b, 5, 0xB, new=0xA, kind=3)
    assert task.status is Status.GOOD
    assert running.ended
    assert running.status is Status.TASK_ABORTED


def test_others_hear_of_a_release(cluster: Cluster) -> None:
    cluster.out(cluster.a, 1, 0xA, kind=5)
    cluster.out(cluster.a, 0, 0xA, new=0)  # the holder takes its registration away
    task = cluster.do("00 00000000 00", nexus=cluster.b)
    assert told(task) == (Key.UNIT_ATTENTION, Asc.RESERVATIONS_RELEASED)
    assert cluster.unit.reservations.type is None


def test_clear(cluster: Cluster) -> None:
    cluster.out(cluster.a, 1, 0xA, kind=8)
    assert cluster.out(cluster.b, 3, 0xB).status is Status.GOOD
    assert told(cluster.do("00 00000000 00", nexus=cluster.a))[1] == Asc.RESERVATIONS_PREEMPTED
    assert not cluster.unit.reservations.keys


def test_move(cluster: Cluster) -> None:
    cluster.out(cluster.a, 1, 0xA, kind=3)
    parameters = (0xA).to_bytes(8, "big") + (0xC).to_bytes(8, "big") + bytes([0, 2, 0, 1, 0, 0, 0, 24])
    cdb = bytes([0x5F, 7, 0, 0, 0, 0, 0, 0, 48, 0])
    task = cluster.do(cdb, out=parameters + cluster.c.transport_id, nexus=cluster.a)
    assert task.status is Status.GOOD
    assert cluster.may(cluster.c) == "rw"
    assert cluster.may(cluster.a) == ""
    full = data(cluster.do("5e 03 0000000000 0400 00", nexus=cluster.c))
    assert full.count(cluster.c.transport_id) == 1


@pytest.mark.parametrize(
    ("reserve", "release"),
    [("16 00000000 00", "17 00000000 00"), ("56 0000000000000000 00", "57 0000000000000000 00")],
)
def test_reserve(reserve: str, release: str) -> None:
    scene = Scene()
    other = scene.initiator("other")
    assert scene.do(reserve).status is Status.GOOD
    assert scene.do("00 00000000 00", nexus=other).status is Status.RESERVATION_CONFLICT
    assert scene.do(release, nexus=other).status is Status.GOOD
    assert scene.unit.fast(other) is Fast.NONE
    scene.target.detach(scene.nexus)
    assert scene.do("00 00000000 00", nexus=other).status is Status.GOOD
    scene.close()


def test_what_aptpl_keeps(tmp_path: Path) -> None:
    path = tmp_path / "reservations"
    first = Cluster(path)
    first.register(first.a, 0xA, flags=1)
    assert first.out(first.a, 1, 0xA, kind=6).status is Status.GOOD
    first.close()
    kept = Reservations(lambda wwn, asc: None, path)
    assert kept.type is Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY
    assert kept.keys == {first.a.wwn: 0xA, first.b.wwn: 0xB}
    assert kept.holder == first.a.wwn
    second = Cluster(path)
    second.register(second.a, 0xA)  # without APTPL: nothing is to be kept any more
    second.close()
    assert not path.exists()


def test_a_file_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "absent" / "reservations")
    task = cluster.out(cluster.c, 6, 0, 0xC, flags=1)
    assert told(task) == (Key.ILLEGAL_REQUEST, Asc.INSUFFICIENT_REGISTRATION_RESOURCES)
    assert cluster.c.wwn not in cluster.unit.reservations.keys
    cluster.close()


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', '{"format": 1, "registrations": {"x": "y"}}'])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "reservations"
    path.write_text(content)
    with pytest.raises(ValueError, match="persistent reservations"):
        Reservations(lambda wwn, asc: None, path)


def test_without_a_file_aptpl_is_refused(cluster: Cluster) -> None:
    task = cluster.out(cluster.a, 6, 0, 0xA, flags=1)
    assert told(task) == (Key.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_PARAMETER_LIST)
