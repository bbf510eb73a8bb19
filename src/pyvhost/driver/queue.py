"""A ring and its three eventfds: kick (driver to device), call (device to driver), err (the ring is broken).

Promises: waits end on an event or the time given, never by looking again and again; a ring whose err was
signalled ends every wait with DeviceError. Never: talks to a front end.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Protocol, Self

from pyvhost.driver.errors import BackendGoneError, DeviceError
from pyvhost.driver.split_ring import SplitRing
from pyvhost.host import eventfd


class Queue:
    """`ring` with eventfds of its own, which a front end hands to the back end. `name` is for messages."""

    def __init__(self, ring: SplitRing, name: str = "queue") -> None:
        self.ring = ring
        self.name = name
        self.kick_fd = eventfd.create()
        self.call_fd = eventfd.create()
        self.err_fd = eventfd.create()
        self.kicks = 0
        self.kicks_spared = 0
        self.calls = 0
        self.errors = 0

    def kick(self) -> None:
        """Kick, asked for or not."""
        self.kicks += 1
        eventfd.signal(self.kick_fd)

    def publish(self) -> int:
        """Publish what was added, and kick if the device asked for it; returns how many chains."""
        count = self.ring.publish()
        if count:
            if self.ring.needs_kick():
                self.kick()
            else:
                self.kicks_spared += 1
        return count

    def take_calls(self) -> int:
        """How many calls came since this was last asked."""
        calls = eventfd.drain(self.call_fd)
        self.calls += calls
        return calls

    def take_errors(self) -> int:
        """How often err was signalled since this was last asked."""
        errors = eventfd.drain(self.err_fd)
        self.errors += errors
        return errors

    def wait_error(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for err; whether it came. Takes it."""
        return _readable(self.err_fd, timeout) and self.take_errors() > 0

    def wait_call(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for a call; whether it came. Takes it. Does not look at the ring."""
        return _readable(self.call_fd, timeout) and self.take_calls() > 0

    def wait_used(self, timeout: float, count: int = 1) -> None:
        """Wait until at least `count` chains are used and not popped; TimeoutError after `timeout`
        seconds.
        """
        ring = self.ring
        wait(lambda: ring.used_pending() >= count, [self], timeout, f"{count} used chains", after=count - 1)

    def close(self) -> None:
        """Close the eventfds. The ring stays the caller's."""
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            if fd >= 0:
                os.close(fd)
        self.kick_fd = self.call_fd = self.err_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Service(Protocol):
    """Something else that has its turn while a driver waits: an IOMMU that is asked for an address."""

    def fileno(self) -> int:
        """A descriptor that is readable while there is something to do."""
        ...

    def service(self) -> object:
        """Do it."""
        ...


def wait(
    ready: Callable[[], bool],
    queues: Sequence[Queue],
    timeout: float,
    what: str,
    *,
    after: int = 0,
    peer: int = -1,
    services: Iterable[Service] = (),
) -> None:
    """Return once `ready()`; asks each of `queues` for a call when more than `after` further chains are used.

    `services` have their turns meanwhile. `ready` must take, or be content with, anything more than `after`
    used chains. `peer` is a connection to the back end. Raises TimeoutError after `timeout` seconds without
    `what`, DeviceError when a ring's err is signalled, BackendGoneError when `peer` hangs up.
    """
    deadline = time.monotonic() + timeout
    poller = select.poll()
    by_call = {queue.call_fd: queue for queue in queues}
    by_err = {queue.err_fd: queue for queue in queues}
    for fd in (*by_call, *by_err):
        poller.register(fd, select.POLLIN)
    by_service = {service.fileno(): service for service in services if service.fileno() >= 0}
    for fd in by_service:
        poller.register(fd, select.POLLIN)
    if peer >= 0:
        poller.register(peer, select.POLLRDHUP)
    while not ready():
        if not all(queue.ring.enable_calls(after) for queue in queues):
            continue
        events = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if not events:
            rings = ", ".join(f"{q.name}: {q.ring.outstanding} out, {q.calls} calls" for q in queues)
            raise TimeoutError(f"no {what} within {timeout} s ({rings})")
        for fd, _ in events:
            if fd in by_call:
                by_call[fd].take_calls()
            elif fd in by_service:
                by_service[fd].service()
            elif ready():
                return
            elif fd in by_err:
                raise DeviceError(f"{by_err[fd].name}: the device signalled err")
            else:
                raise BackendGoneError(f"the back end closed the connection; there was no {what}")


def _readable(fd: int, timeout: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout * 1000))
