"""Unit attention conditions: what a nexus is told, in which order, and what it isn't told."""

from __future__ import annotations

import pytest

from pyvhost.scsi.attention import Attentions
from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.sense import Asc

NEXUS = Nexus("the initiator", 1)
POWER_ON = Asc.POWER_ON_RESET_OR_BUS_DEVICE_RESET_OCCURRED
NEWS = (Asc.CAPACITY_DATA_HAS_CHANGED, Asc.MODE_PARAMETERS_CHANGED, Asc.NOT_READY_TO_READY_CHANGE)


@pytest.fixture
def attentions() -> Attentions:
    found = Attentions()
    found.attach(NEXUS)
    return found


def told(attentions: Attentions) -> list[int]:
    """All that waits, in the order in which it is told."""
    asked = iter(lambda: attentions.take(NEXUS), None)
    return [sense.asc for sense in asked if sense is not None]


def test_who_is_to_hear_of_power_on_needs_no_news_of_before(attentions: Attentions) -> None:
    for asc in NEWS:
        attentions.establish_all(asc)
    assert told(attentions) == [POWER_ON]


def test_after_that_it_does(attentions: Attentions) -> None:
    assert told(attentions) == [POWER_ON]
    for asc in NEWS * 2:
        attentions.establish_all(asc)
    assert told(attentions) == list(NEWS)


def test_a_reset_covers_what_waits_and_what_comes(attentions: Attentions) -> None:
    told(attentions)
    attentions.establish_all(Asc.CAPACITY_DATA_HAS_CHANGED)
    attentions.establish_all(Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED)
    attentions.establish_all(Asc.MODE_PARAMETERS_CHANGED)
    assert told(attentions) == [Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED]


def test_reservations_outlive_a_power_cycle_and_so_does_their_news(attentions: Attentions) -> None:
    attentions.establish_all(Asc.RESERVATIONS_PREEMPTED)
    assert told(attentions) == [POWER_ON, Asc.RESERVATIONS_PREEMPTED]
