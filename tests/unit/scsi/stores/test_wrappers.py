"""What wrappers do to the requests that pass them."""

from __future__ import annotations

import errno
import functools
import time

import pytest

from pyvhost.host.poller import Poller
from pyvhost.scsi.stores.base import Store
from pyvhost.scsi.stores.memory import MemoryStore
from pyvhost.scsi.stores.wrappers import Delay, ErrorRate, Limit, ReadOnly
from stores import Disk

MIB = 1 << 20


def test_read_only(poller: Poller) -> None:
    memory = MemoryStore(MIB)
    with Disk(ReadOnly(memory), poller) as disk:
        assert disk.store.read_only
        assert disk.store.fd == memory.fd >= 0
        for answer in (disk.write(0, b"w" * 512), disk.zero(0, 512), disk.discard(0, 512)):
            assert answer == errno.EROFS
        assert disk.flush() == 0
        assert disk.read(0, 512) == bytes(512)


def test_what_must_see_every_request_has_no_descriptor(poller: Poller) -> None:
    for store in (
        Delay(MemoryStore(MIB), 0),
        ErrorRate(MemoryStore(MIB), 0),
        Limit(MemoryStore(MIB), operations=1),
    ):
        with Disk(store, poller) as disk:
            assert disk.store.fd == -1
            assert disk.store.size == MIB
            assert disk.store.can_unmap


def test_a_resize_reaches_the_outermost(poller: Poller) -> None:
    memory = MemoryStore(MIB)
    with Disk(Delay(ErrorRate(memory, 0), 0), poller) as disk:
        memory.resize(2 * MIB)
        disk.until(lambda: disk.sizes == [2 * MIB])
        assert disk.write(2 * MIB - 512, b"r" * 512) == 0


def test_errors_come_as_often_as_asked_and_leave_no_trace(poller: Poller) -> None:
    with Disk(ErrorRate(MemoryStore(MIB), 0.5, errno.ENOSPC, seed=1), poller) as disk:
        ends = [disk.write(number * 512, b"e" * 512) for number in range(400)]
        assert set(ends) == {0, errno.ENOSPC}
        assert 140 < ends.count(0) < 260
        store = disk.store
        assert isinstance(store, ErrorRate)
        store.rate = 0
        for number, end in enumerate(ends):
            assert disk.read(number * 512, 512) == (bytes(512) if end else b"e" * 512)
        store.rate = 1
        assert disk.flush() == errno.ENOSPC


def test_nothing_ends_before_its_delay(poller: Poller) -> None:
    with Disk(Delay(MemoryStore(MIB), 0.2), poller) as disk:
        ended: list[float] = []
        begun = time.monotonic()
        for number in range(50):
            disk.store.write(number * 512, [memoryview(b"d" * 512)], lambda _: ended.append(time.monotonic()))
        disk.until(lambda: len(ended) == 50)
        assert min(ended) - begun >= 0.2


@pytest.mark.parametrize("limit", [{"operations": 100.0}, {"data": 100.0 * 4096}])
def test_a_limit_is_kept(poller: Poller, limit: dict[str, float]) -> None:
    with Disk(Limit(MemoryStore(MIB), **limit), poller) as disk:
        order: list[int] = []

        def noted(number: int, _errno: int) -> None:
            order.append(number)

        begun = time.monotonic()
        for number in range(50):
            view = memoryview(b"l" * 4096)
            disk.store.write(number * 4096, [view], functools.partial(noted, number))
        disk.until(lambda: len(order) == 50)
        # Fifty at a hundred a second, of which the tenth of a second that was saved up lets ten through at once.
        assert time.monotonic() - begun >= 0.38
        assert sorted(order) == list(range(50))


@pytest.mark.parametrize(
    ("store", "cancelled"), [(Delay(MemoryStore(MIB), 3600), 3), (Limit(MemoryStore(MIB), data=1), 2)]
)
def test_closing_ends_what_waits(poller: Poller, store: Store, cancelled: int) -> None:
    with Disk(store, poller) as disk:
        ended: list[int] = []
        for _ in range(3):
            disk.store.write(0, [memoryview(b"c" * 4096)], ended.append)
    disk.until(lambda: len(ended) == 3)
    assert ended.count(errno.ECANCELED) == cancelled


def test_parameters_that_mean_nothing_are_refused() -> None:
    memory = MemoryStore(MIB)
    for make in (
        lambda: ErrorRate(memory, 1.5),
        lambda: Delay(memory, -1),
        lambda: Limit(memory, operations=-1),
    ):
        with pytest.raises(ValueError, match=r"negative|from 0 to 1"):
            make()
