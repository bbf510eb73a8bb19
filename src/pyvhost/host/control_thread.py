"""The process's own control thread: a poller in the background, for devices that nobody serves on a socket.

Promises: made when first needed; what it is asked to do is done in order, one thing at a time; it ends with the
process. A forked child has one of its own. Never: knows a device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ClassVar, TypeVar

from pyvhost.host.poller import Poller

T = TypeVar("T")


class ControlThread:
    """A thread that does nothing but run `poller`."""

    _the: ClassVar[ControlThread | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self.poller = Poller()
        #: Called after each round of the loop, on its thread.
        self.after_round: list[Callable[[], object]] = []
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="pyvhost-control", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.poller.run_once()
            for function in self.after_round:
                function()

    @classmethod
    def get(cls) -> ControlThread:
        """The process's."""
        with cls._lock:
            if cls._the is None or cls._the._process != os.getpid():
                cls._the = cls()
            return cls._the

    def call(self, function: Callable[[], T]) -> T:
        """Has `function()` called on that thread, and waits for what comes of it. Any thread, that one as well."""
        if threading.current_thread() is self._thread:
            return function()
        answer: Future[T] = Future()

        def do() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        self.post(do)
        return answer.result()

    def post(self, function: Callable[[], object]) -> None:
        """Has `function()` called on that thread some time. Any thread, a collector's finalizer as well."""
        self.poller.call_soon_threadsafe(function)


def _in_child() -> None:
    # Whoever held it has not come along.
    ControlThread._lock = threading.Lock()


os.register_at_fork(after_in_child=_in_child)
