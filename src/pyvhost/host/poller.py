"""The control thread's loop: level-triggered epoll with callbacks, timers, and a way in for other threads.

Promises: a callback that raises is logged and the loop goes on; a callback may register and unregister
anything, its own descriptor included; an event that was collected for a descriptor that has been unregistered
since, its number perhaps in use again, reaches nobody; with nothing to do the loop sleeps without a tick.
Never: closes a descriptor that was registered; catches KeyboardInterrupt or SystemExit.

Everything but `call_soon_threadsafe` and `stop` belongs to the thread that runs the loop (or to the one that
sets it up before `run`).
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from types import TracebackType

#: Events taken from the kernel in one go.
BATCH = 256

Callback = Callable[[int], object]

_log = logging.getLogger(__name__)


class Timer:
    """A call that `Poller.call_later` promised. `cancel()` may be called at any time, any number of times."""

    __slots__ = ("_function", "when")

    def __init__(self, when: float, function: Callable[[], object]) -> None:
        self.when = when
        self._function: Callable[[], object] | None = function

    @property
    def pending(self) -> bool:
        """Whether the call is still to come."""
        return self._function is not None

    def cancel(self) -> None:
        """Take the promise back; nothing happens if the call was made already."""
        self._function = None

    def _take(self) -> Callable[[], object] | None:
        function, self._function = self._function, None
        return function


@dataclass(slots=True)
class _Watch:
    events: int
    callback: Callback
    #: The round it was registered in. Events collected in that round are older than it: not for it.
    since: int
    #: Whether it is also called by `run_inner`.
    inner: bool = False


class Poller:
    """One epoll set and the callbacks of its descriptors."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watches: dict[int, _Watch] = {}
        self._round = 0
        self._soon: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_number = count()
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)

    def register(self, fd: int, events: int, callback: Callback, inner: bool = False) -> None:
        """Call `callback(mask)` while one of `events` (select.EPOLLIN, ...), EPOLLHUP or EPOLLERR holds.

        `inner`: also while a callback waits in `run_inner`.
        ValueError: already registered. OSError: EBADF, or EPERM for what can't be waited for (a plain file).
        """
        if fd in self._watches:
            raise ValueError(f"descriptor {fd} is registered already")
        self._epoll.register(fd, events)
        self._watches[fd] = _Watch(events, callback, self._round, inner)

    def modify(self, fd: int, events: int, callback: Callback | None = None) -> None:
        """Wait for other events, and with another callback if one is given. KeyError: not registered.

        With `events` 0, EPOLLHUP and EPOLLERR are still told.
        """
        watch = self._watches[fd]
        if events != watch.events:
            self._epoll.modify(fd, events)
            watch.events = events
        if callback is not None:
            watch.callback = callback

    def unregister(self, fd: int) -> None:
        """Wait for `fd` no more; to be called before it is closed. Nothing happens if it isn't registered."""
        if self._watches.pop(fd, None) is None:
            return
        try:
            self._epoll.unregister(fd)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOENT):
                raise
            # Closed before it was unregistered. If another process holds the same file, epoll goes on
            # reporting it and has no way to name it again: a new set is the only way to be rid of it.
            self._rebuild()

    def registered(self, fd: int) -> bool:
        """Whether `fd` is waited for."""
        return fd in self._watches

    def call_soon_threadsafe(self, function: Callable[[], object]) -> None:
        """Have the loop call `function()`, in the order of the calls. Any thread, or a signal handler."""
        self._soon.append(function)
        self._rouse()

    def call_later(self, seconds: float, function: Callable[[], object]) -> Timer:
        """Have `function()` called once, not before `seconds` have passed; the answer can cancel it."""
        timer = Timer(time.monotonic() + seconds, function)
        heapq.heappush(self._timers, (timer.when, next(self._timer_number), timer))
        return timer

    def run(self) -> None:
        """Serve until `stop`. A `stop` that came before makes it return at once."""
        while not self._stopping:
            self.run_once()
        self._stopping = False

    def run_once(self, timeout: float | None = None) -> None:
        """One round: wait, `timeout` seconds at most (None: no limit), then call what is due."""
        events = self._epoll.poll(self._patience(timeout), BATCH)
        self._round += 1
        for fd, mask in events:
            if self._stopping:
                return
            if fd == self._wake:
                self._wake_read()
                continue
            watch = self._watches.get(fd)
            # Registered during this round: what was collected meant another file under the same number.
            if watch is not None and watch.since != self._round:
                self._call(watch.callback, mask)
        self._run_timers()
        # What they add themselves waits for the next round, so that descriptors have their turn.
        for _ in range(len(self._soon)):
            # One that waits in `run_inner` has made others' calls.
            if self._stopping or not self._soon:
                return
            self._call(self._soon.popleft())

    def run_inner(self, until: Callable[[], bool], seconds: float) -> bool:
        """From within a callback: go on with `inner` descriptors, timers and calls until `until()`, or time is up.

        Whoever is called so must not wait for the callback that is waiting. Whether `until()` came true.
        """
        if self._wake < 0:
            return until()  # closed: nothing comes any more
        end = time.monotonic() + seconds
        inner = [fd for fd, watch in self._watches.items() if watch.inner]
        while not until():
            left = end - time.monotonic()
            if left <= 0:
                return False
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            for fd in inner:
                if fd in self._watches:
                    poll.register(fd, self._watches[fd].events)
            for fd, mask in poll.poll((self._patience(left) or 0.0) * 1000):
                if fd == self._wake:
                    self._wake_read()
                elif fd in self._watches:
                    self._call(self._watches[fd].callback, mask)
            self._run_timers()
            for _ in range(len(self._soon)):
                if self._soon:
                    self._call(self._soon.popleft())
        return True

    def stop(self) -> None:
        """Make `run` return after the callback it is in. Any thread, or a signal handler."""
        self._stopping = True
        self._rouse()

    @property
    def closed(self) -> bool:
        """Whether nothing comes any more."""
        return self._wake < 0

    def close(self) -> None:
        """Give the epoll set back. The registered descriptors stay open."""
        if not self._epoll.closed:
            self._epoll.close()
            # -1 first: a late call_soon_threadsafe must not write to whoever gets the number next.
            wake, self._wake = self._wake, -1
            os.close(wake)
            self._watches.clear()

    def __enter__(self) -> Poller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _rouse(self) -> None:
        wake = self._wake
        if wake < 0:
            return  # closed: nobody is left to be roused
        try:
            os.eventfd_write(wake, 1)
        except BlockingIOError:
            pass  # it is awake already
        except OSError as error:
            if error.errno != errno.EBADF:  # closed just now
                raise

    def _wake_read(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass

    def _patience(self, timeout: float | None) -> float | None:
        if self._soon:
            return 0.0
        while self._timers and not self._timers[0][2].pending:
            heapq.heappop(self._timers)
        if self._timers:
            due = max(0.0, self._timers[0][0] - time.monotonic())
            return due if timeout is None else min(due, timeout)
        return timeout

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now and not self._stopping:
            function = heapq.heappop(self._timers)[2]._take()
            if function is not None:
                self._call(function)

    def _call(self, function: Callable[..., object], *arguments: int) -> None:
        try:
            function(*arguments)
        except Exception:
            _log.exception("a callback of the control loop failed: %r", function)

    def _rebuild(self) -> None:
        self._epoll.close()
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        for fd, watch in list(self._watches.items()):
            try:
                self._epoll.register(fd, watch.events)
            except OSError as error:
                _log.error("descriptor %d was closed while it was waited for: %s", fd, error)
                del self._watches[fd]
