"""Commands as coroutines: something that takes time, and what drives the coroutine that waits for it.

A command is an `async def`. Where it needs a store, it awaits an `Operation`: a function that begins the thing
and is given what to call when it has ended. There is no event loop behind it: the store's own callback, on the
control thread, takes the coroutine on.

Promises: `ended` is called exactly once; a coroutine that is stopped while an operation is under way is closed
only when that operation has ended (its memory is in use until then), at once if the operation can be cancelled.
Never: starts a thread, nor blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: What a command is.
Work = Coroutine["Operation[Any]", Any, None]

_log = logging.getLogger(__name__)


class Stopped(Exception):  # noqa: N818
    """The coroutine was stopped before it came to its end."""


class Operation(Generic[T]):
    """Something to be awaited. `begin(done)` starts it; `done(result)` is to be called once, later.

    `cancel`, if there is one, takes it back at once: `done` isn't called then.
    """

    __slots__ = ("begin", "cancel")

    def __init__(
        self, begin: Callable[[Callable[[T], None]], object], cancel: Callable[[], object] | None = None
    ) -> None:
        self.begin = begin
        self.cancel = cancel

    def __await__(self) -> Generator[Operation[T], T, T]:
        return (yield self)


class Runner:
    """Drives one coroutine."""

    __slots__ = ("_current", "_ended", "_stopping", "_turn", "_work")

    def __init__(self, work: Work, ended: Callable[[BaseException | None], object]) -> None:
        self._work: Work | None = work
        self._ended = ended
        self._current: Operation[Any] | None = None
        self._stopping = False
        #: Counts the operations, so that a `done` that is called twice reaches nobody.
        self._turn = 0

    def start(self) -> None:
        """Run up to the first operation that is waited for, or to the end."""
        self._advance(None)

    @property
    def running(self) -> bool:
        """Whether `ended` is still to come."""
        return self._work is not None

    def stop(self) -> None:
        """Have it end with `Stopped` as soon as nothing that it began is under way."""
        if self._work is None or self._stopping:
            return
        self._stopping = True
        if self._current is not None and self._current.cancel is not None:
            self._current.cancel()
            self._turn += 1
            self._close()

    def _advance(self, value: object) -> None:
        work = self._work
        if work is None:
            return
        self._current = None
        if self._stopping:
            self._close()
            return
        try:
            operation = work.send(value)
        except StopIteration:
            self._end(None)
        except Exception as error:
            self._end(error)
        else:
            self._turn += 1
            self._current = operation
            turn = self._turn
            operation.begin(lambda result: self._done(turn, result))

    def _done(self, turn: int, result: object) -> None:
        if turn != self._turn or self._current is None:
            _log.error("an operation of %r told twice that it has ended, or too late", self._work)
            return
        self._advance(result)

    def _close(self) -> None:
        work = self._work
        if work is not None:
            try:
                work.close()
            except Exception as error:
                _log.exception("a stopped command failed: %r", error)
        self._end(Stopped())

    def _end(self, error: BaseException | None) -> None:
        self._work = None
        self._current = None
        self._ended(error)
