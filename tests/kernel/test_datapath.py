"""The recorded experiments with packets, done again with `pyvhost.open`: the same facts, but for those named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvhost
from kernel import differences, experiment, meant, receive, transmit
from netns import network_namespace
from requirements import need

#: They put their experiments on the list.
EXPERIMENTS = (transmit, receive)
RECORDED = experiment.recorded()


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """Taps and raw sockets, in a network of our own."""
    need(Path("/dev/net/tun").exists(), "modprobe tun, or give the container /dev/net/tun")
    with network_namespace():
        yield


@pytest.mark.parametrize("name", RECORDED)
def test_what_goes_through_and_what_is_told_of_it(name: str) -> None:
    expected = meant.meant(name, RECORDED[name])
    assert experiment.run(name, pyvhost.open, expected) == expected


def test_every_change_is_a_named_difference_in_an_experiment() -> None:
    names = {difference.name for difference in differences.DIFFERENCES}
    for name, where, places in meant.CHANGES:
        assert name in names, name
        assert max(places) < len(RECORDED[where]), where


def test_all_that_was_recorded_of_net_is_done_again() -> None:
    """But for what is a matter of time alone."""
    assert experiment.names("vhost-net") - set(RECORDED) == {"net/busyloop"}
