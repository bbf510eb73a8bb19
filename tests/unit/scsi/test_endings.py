"""Waiting for what has been begun: each wait ends once, with the last."""

from __future__ import annotations

from pyvhost.scsi.endings import Endings


def test_waits_end_with_the_last() -> None:
    endings, told = Endings(), []
    endings.wait([1, 2, 2], lambda: told.append("both"))
    endings.wait([2], lambda: told.append("second"))
    endings.ended(3)
    endings.ended(2)
    assert told == ["second"]
    assert len(endings) == 1
    endings.ended(2)
    endings.ended(1)
    assert told == ["second", "both"]
    assert len(endings) == 0


def test_nothing_to_wait_for() -> None:
    told: list[int] = []
    Endings().wait([], lambda: told.append(1))
    assert told == [1]


def test_a_wait_that_begins_another() -> None:
    endings, told = Endings(), []
    endings.wait([1], lambda: endings.wait([1, 2], lambda: told.append("again")))
    endings.ended(1)
    endings.ended(2)
    assert told == []
    endings.ended(1)
    assert told == ["again"]
