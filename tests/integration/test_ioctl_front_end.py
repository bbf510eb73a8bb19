"""The driver by ioctls on `pyvhost.open("/dev/vhost-net")`, with a tap: the cases that a kernel's device runs too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pyvhost
from kernel.driver_cases import CASES, Tapped
from netns import network_namespace


@pytest.fixture
def tapped() -> Iterator[Tapped]:
    with network_namespace(), Tapped("t0") as tapped:
        yield tapped


@pytest.mark.parametrize("name", CASES)
def test_by_ioctls(name: str, tapped: Tapped) -> None:
    CASES[name](lambda: pyvhost.open("/dev/vhost-net"), tapped)
