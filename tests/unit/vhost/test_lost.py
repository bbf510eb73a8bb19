"""News of memory that was taken away, and who gets it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from pyvhost.dataplane import guard
from pyvhost.dataplane.plain import load64
from pyvhost.host import memfd
from pyvhost.host.poller import Poller
from pyvhost.memory.mapped import Mapped
from pyvhost.vhost import lost
from pyvhost.vhost.device_memory import GUARD


class Loses:
    """A page of a file, and how often it was told that the page is gone."""

    def __init__(self) -> None:
        guard.install()
        self.file = memfd.create("guest", mmap.PAGESIZE, seals=0)
        self.page = Mapped.of(self.file, 0, mmap.PAGESIZE, "a page", GUARD)
        self.told = 0
        self.memory_lost: Callable[[], None] | None = self._tell

    @property
    def lost_memory(self) -> bool:
        return self.page.lost

    def _tell(self) -> None:
        self.told += 1

    def lose(self) -> None:
        os.ftruncate(self.file, 0)
        assert load64(self.page.address) == 0


@pytest.fixture
def pollers() -> Iterator[tuple[Poller, Poller]]:
    with Poller() as one, Poller() as two:
        yield one, two


@pytest.fixture
def devices() -> Iterator[tuple[Loses, Loses]]:
    two = Loses(), Loses()
    yield two
    for device in two:
        device.page.close()
        os.close(device.file)


def test_each_control_thread_hears_of_its_own(
    pollers: tuple[Poller, Poller], devices: tuple[Loses, Loses]
) -> None:
    for poller, device in zip(pollers, devices, strict=True):
        lost.watch(poller, device)
        poller.run_once(0)
    for device in devices:
        device.lose()
    for poller in pollers:
        poller.run_once(0)
    assert [device.told for device in devices] == [1, 1]


def test_what_another_has_lost_wakes_once_and_is_told_to_nobody_else(
    pollers: tuple[Poller, Poller], devices: tuple[Loses, Loses]
) -> None:
    for poller, device in zip(pollers, devices, strict=True):
        lost.watch(poller, device)
        poller.run_once(0)
    devices[0].lose()
    for _ in range(3):
        for poller in pollers:
            poller.run_once(0)
    assert [device.told for device in devices] == [1, 0]
