"""A loop device, a guest's memory and its driver, all in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from in_process import PATIENCE, SPANS, FrontEnd, served
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.net.device import NetDevice


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(SPANS) as memory:
        yield memory


@pytest.fixture
def front() -> Iterator[FrontEnd]:
    with served(NetDevice("loop", name="dev")) as front:
        yield front


@pytest.fixture
def driver(front: FrontEnd, memory: GuestMemory) -> Iterator[NetDriver]:
    with NetDriver(front, memory, timeout=PATIENCE) as driver:
        driver.start()
        yield driver
