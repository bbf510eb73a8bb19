"""Every recorded case of the kernel's vhost devices, against `pyvhost.open`: the same answers, but for
those named.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvhost
from kernel import differences, replay, transposed
from netns import network_namespace
from pyvhost.scsi import endpoints
from pyvhost.vhost.opening import registered
from requirements import need

CASES = (
    replay.cases("vhost-net")
    + transposed.for_net()
    + replay.cases("vhost-scsi")
    + replay.cases("vhost-vsock")
)
#: The target that the cases were recorded with.
ENDPOINT = "naa.600140554cf3a18e"
TABLE = Path(__file__).parents[2] / "docs" / "reference" / "ioctls.md"


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """Taps and raw sockets, in a network of our own."""
    need(Path("/dev/net/tun").exists(), "modprobe tun, or give the container /dev/net/tun")
    with network_namespace():
        yield


@pytest.fixture(scope="module", autouse=True)
def _endpoint() -> Iterator[None]:
    """What a case sets, if it is one of scsi's."""
    endpoint = endpoints.register(ENDPOINT, ["1:0=memory:4M"])
    yield
    endpoint.unregister()


@functools.cache
def found_in(name: str) -> list[replay.Difference]:
    (case,) = [case for case in CASES if case["case"] == name]
    return replay.replay(case, pyvhost.open, children=False, patience=5.0)


@pytest.mark.parametrize("name", [case["case"] for case in CASES])
def test_it_answers_as_the_kernel(name: str) -> None:
    assert [str(one) for one in found_in(name) if differences.named(one) is None] == []


def test_any_order_is_answered_as_by_the_kernel() -> None:
    """Sequences that were drawn by lot: states that nobody thought of."""
    found = [one for case in replay.sequences() for one in replay.replay(case, pyvhost.open, children=False)]
    assert [str(one) for one in found if differences.named(one) is None] == []


def test_which_devices_are_compared() -> None:
    """A device that can be opened has its cases run: who adds one adds it above."""
    assert callable(pyvhost.open), "which registers them"
    assert registered() == ["/dev/vhost-net", "/dev/vhost-scsi", "/dev/vhost-vsock"]
    assert {f"/dev/{case['device']}" for case in CASES} == set(registered())


def test_every_difference_that_covers_steps_is_found_in_some() -> None:
    """A name that excuses nothing is to go."""
    found = [one for case in CASES for one in found_in(case["case"])]
    used = {difference.name for difference in map(differences.named, found) if difference is not None}
    covering = {one.name for one in differences.DIFFERENCES if one.covers is not differences._nothing}
    assert used == covering


def test_the_documentation_has_the_same_names() -> None:
    rows = re.findall(r"^\| `([a-z_-]+)` \|", TABLE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(one.name for one in differences.DIFFERENCES)
