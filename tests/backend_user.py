"""What a device is to a backend, for tests: it is told of changes, and looks what they are."""

from __future__ import annotations

import select

from pyvhost.host.poller import Poller
from pyvhost.net.backends.base import Backend


class Device:
    """What a device is to a backend: it notes what it finds at each change."""

    def __init__(self, backend: Backend, poller: Poller) -> None:
        self.backend = backend
        self.poller = poller
        self.seen: list[tuple[list[int], bool]] = []
        backend.on_change = self.note

    def note(self) -> None:
        self.seen.append((list(self.backend.fds), self.backend.link_up()))
        self.poller.stop()

    def next(self) -> tuple[list[int], bool]:
        """What it finds at the next change."""
        before = len(self.seen)
        guard = self.poller.call_later(30, self.poller.stop)
        self.poller.run()
        guard.cancel()
        assert len(self.seen) > before, "it was told of no change"
        return self.seen[-1]


def readable(fd: int, milliseconds: int = 5000) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(milliseconds))
