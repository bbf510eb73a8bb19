"""The recorded experiments with SCSI, done again with `pyvhost.open`: the same facts, but for those named."""

from __future__ import annotations

import pytest

from kernel import differences, scsi

RECORDED = scsi.recorded()


@pytest.mark.parametrize("name", RECORDED)
def test_what_becomes_of_requests_and_what_is_told_of_it(name: str) -> None:
    expected = scsi.meant(name, RECORDED[name])
    assert scsi.run(name, expected) == expected


def test_every_change_is_a_named_difference_in_an_experiment() -> None:
    names = {difference.name for difference in differences.DIFFERENCES}
    for name, where, places in scsi.CHANGES:
        assert name in names, name
        assert max(places) < len(RECORDED[where]), where


def test_all_that_was_recorded_of_scsi_is_done_again() -> None:
    assert scsi.EXPERIMENTS.keys() == RECORDED.keys()
