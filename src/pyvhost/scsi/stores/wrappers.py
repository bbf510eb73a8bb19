"""Stores around a store: what can't be written, what is slow, what fails, what is rationed. They stack.

Promises: what isn't changed by a wrapper is the inner store's: size, blocks, state and its changes. A wrapper that
has to see every request has no descriptor, so that none passes it by. Never: keeps data.
"""

from __future__ import annotations

import errno
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pyvhost.host.poller import Poller, Timer
from pyvhost.scsi.stores.base import Done, ExtentsDone, Store
from pyvhost.scsi.stores.views import total


class Wrapper(Store):
    """Passes everything on. A subclass changes what it is about: `_pass` has every request that reaches it."""

    #: Whether the compiled loop may use the inner store's descriptor.
    transparent = False

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self._poller: Poller | None = None
        super().__init__()
        self.spec = inner.spec
        self.serial, self.aptpl = inner.serial, inner.aptpl
        self._follow()

    def _follow(self) -> None:
        """Become what the inner store is."""
        inner = self.inner
        self.size, self.block_size, self.online = inner.size, inner.block_size, inner.online
        self.physical_block_size = inner.physical_block_size
        self.read_only, self.wce, self.atomic_max = inner.read_only, inner.wce, inner.atomic_max
        self.can_unmap, self.unmap_granularity = inner.can_unmap, inner.unmap_granularity
        self.can_write_zeroes = inner.can_write_zeroes
        self.fd = inner.fd if self.transparent else -1

    def _resized(self, size: int) -> None:
        self._follow()
        if self.on_resize is not None:
            self.on_resize(size)

    def _stated(self, there: bool) -> None:
        self._follow()
        if self.on_state is not None:
            self.on_state(there)

    def open(self, poller: Poller) -> None:
        """Open the inner store."""
        self._poller = poller
        self.inner.on_resize, self.inner.on_state = self._resized, self._stated
        self.inner.open(poller)
        self._follow()

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()
        self.fd = -1

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the control thread call `function()` later."""
        self.inner.call_soon(function)

    def read(self, offset: int, views: list[memoryview], done: Done) -> None:
        """As the inner store."""
        self._pass(lambda: self.inner.read(offset, views, done), done, total(views))

    def write(self, offset: int, views: list[memoryview], done: Done, fua: bool = False) -> None:
        """As the inner store."""
        self._pass(lambda: self.inner.write(offset, views, done, fua), done, total(views), changes=True)

    def flush(self, done: Done) -> None:
        """As the inner store."""
        self._pass(lambda: self.inner.flush(done), done, 0)

    def zero(self, offset: int, length: int, done: Done, unmap: bool = False) -> None:
        """As the inner store."""
        self._pass(lambda: self.inner.zero(offset, length, done, unmap), done, 0, changes=True)

    def discard(self, offset: int, length: int, done: Done) -> None:
        """As the inner store."""
        self._pass(lambda: self.inner.discard(offset, length, done), done, 0, changes=True)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """As the inner store."""
        self._pass(lambda: self.inner.extents(offset, length, done), lambda number: done(number, []), 0)

    def _pass(self, go: Callable[[], object], fail: Done, count: int, *, changes: bool = False) -> None:
        """A request: `go()` asks the inner store, `fail(errno)` ends it; `count` bytes of data go with it."""
        go()


class ReadOnly(Wrapper):
    """Takes nothing that would change the store."""

    transparent = True

    def _follow(self) -> None:
        super()._follow()
        self.read_only = True
        self.can_unmap = self.can_write_zeroes = False

    def _pass(self, go: Callable[[], object], fail: Done, count: int, *, changes: bool = False) -> None:
        if changes:
            self.call_soon(lambda: fail(errno.EROFS))
        else:
            go()


class ErrorRate(Wrapper):
    """Fails each request with `rate` (0 to 1) for its probability, before the inner store has seen it."""

    def __init__(self, inner: Store, rate: float, number: int = errno.EIO, seed: object = None) -> None:
        super().__init__(inner)
        if not 0 <= rate <= 1:
            raise ValueError(f"an error rate is from 0 to 1, not {rate}")
        self.rate = rate
        self.number = number
        # Not for secrets, but for tests that can be repeated.
        self._random = random.Random(str(seed) if seed is not None else None)

    def _pass(self, go: Callable[[], object], fail: Done, count: int, *, changes: bool = False) -> None:
        if self._random.random() < self.rate:
            number = self.number
            self.call_soon(lambda: fail(number))
        else:
            go()


class _Waiting(Wrapper):
    """What holds requests back for a while. `close` ends those that wait with ECANCELED."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._held: deque[tuple[float, Callable[[], object], Done, int]] = deque()
        self._timer: Timer | None = None

    def close(self) -> None:
        """End what waits, and close the inner store."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        held, self._held = self._held, deque()
        for _, _, fail, _ in held:
            self.call_soon(lambda fail=fail: fail(errno.ECANCELED))  # type: ignore[misc]
        super().close()

    def _hold(self, until: float, go: Callable[[], object], fail: Done, count: int) -> None:
        self._held.append((until, go, fail, count))
        if self._timer is None:
            self._wait(until)

    def _wait(self, until: float) -> None:
        assert self._poller is not None
        self._timer = self._poller.call_later(max(0.0, until - time.monotonic()), self._release)

    def _release(self) -> None:
        raise NotImplementedError


class Delay(_Waiting):
    """Has every request wait for `seconds` before the inner store sees it; many wait at the same time."""

    def __init__(self, inner: Store, seconds: float) -> None:
        super().__init__(inner)
        if seconds < 0:
            raise ValueError(f"a delay is not negative: {seconds}")
        self.seconds = seconds

    def _pass(self, go: Callable[[], object], fail: Done, count: int, *, changes: bool = False) -> None:
        if self._poller is None:
            go()  # never open: the inner store says so
        else:
            self._hold(time.monotonic() + self.seconds, go, fail, count)

    def _release(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._held and self._held[0][0] <= now:
            self._held.popleft()[1]()
        if self._held:
            self._wait(self._held[0][0])


class Limit(_Waiting):
    """Lets `operations` requests and `data` bytes a second through (0: any number), in their order.

    What wasn't used is kept for a tenth of a second. A request larger than that still goes, and is paid for after.
    """

    def __init__(self, inner: Store, *, operations: float = 0, data: float = 0) -> None:
        super().__init__(inner)
        if operations < 0 or data < 0:
            raise ValueError("a limit is not negative")
        self.operations = operations
        self.data = data
        #: When what has been let through is paid for, by time.monotonic().
        self._paid = 0.0

    def _pass(self, go: Callable[[], object], fail: Done, count: int, *, changes: bool = False) -> None:
        if self._poller is None or (not self._held and self._paid <= time.monotonic()):
            self._go(go, count)
        else:
            self._hold(self._paid, go, fail, count)

    def _go(self, go: Callable[[], object], count: int) -> None:
        price = max(1 / self.operations if self.operations else 0.0, count / self.data if self.data else 0.0)
        self._paid = max(self._paid, time.monotonic() - 0.1) + price
        go()

    def _release(self) -> None:
        self._timer = None
        while self._held and self._paid <= time.monotonic():
            _, go, _, count = self._held.popleft()
            self._go(go, count)
        if self._held:
            self._wait(self._paid)


def innermost(store: Store) -> Any:
    """The store that keeps the data, under all wrappers."""
    while isinstance(store, Wrapper):
        store = store.inner
    return store
