"""Threads for calls that may block: a few of them, one set a store, so that a store that stalls holds only its own.

Promises: `submit` never waits; jobs begin in their order; a thread is started when there is work for it; one that
hangs in the kernel doesn't keep the process from ending. Never: swallows a job.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Pool:
    """Up to `threads` threads that do what they are given."""

    def __init__(self, name: str, threads: int = 8) -> None:
        self._name = name
        self._most = threads
        self._state = threading.Condition()
        self._jobs: deque[Callable[[], object]] = deque()
        self._threads = 0
        self._idle = 0
        self._busy = 0
        self._closed = False
        self._last: Callable[[], object] | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Have a thread call `job`. RuntimeError: closed."""
        with self._state:
            if self._closed:
                raise RuntimeError(f"{self._name}: no more work is taken")
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._state.notify()
            elif self._threads < self._most:
                self._threads += 1
                name = f"{self._name}-{self._threads}"
                threading.Thread(target=self._work, name=name, daemon=True).start()

    def close(self, seconds: float, last: Callable[[], object] = lambda: None) -> bool:
        """Take no more, and wait `seconds` at most for what was taken; whether all of it is done.

        What isn't goes on. `last` is called when all is done, by whichever thread is the last.
        """
        with self._state:
            self._last = last
            self._closed = True
            self._state.notify_all()
            self._finish()
            return self._state.wait_for(lambda: self._last is None, seconds)

    def _finish(self) -> None:
        """With the lock held: if all is done, and nothing can come, do what comes last."""
        if self._closed and not self._jobs and not self._busy and self._last is not None:
            last, self._last = self._last, None
            last()
            self._state.notify_all()

    def _work(self) -> None:
        while True:
            with self._state:
                self._idle += 1
                self._state.wait_for(lambda: self._jobs or self._closed)
                self._idle -= 1
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy += 1
            try:
                job()
            except Exception:
                _log.exception("a job of %s failed: %r", self._name, job)
            finally:
                # It may hold views of a guest's memory, which must not outlive it until the next job comes.
                del job
                with self._state:
                    self._busy -= 1
                    self._finish()
