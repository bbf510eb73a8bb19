"""Ranges of blocks that commands hold while they work on them, shared or alone.

Promises: whoever came first has a range first, so nobody waits for ever. Never: held by what the compiled loop does
(a unit isn't fast while a range is held alone).
"""

from __future__ import annotations

from collections.abc import Callable

from pyvhost.scsi.operation import Operation


class Hold:
    """A range that is held, or waited for."""

    __slots__ = ("alone", "begin", "end", "granted")

    def __init__(self, begin: int, end: int, alone: bool) -> None:
        self.begin = begin
        self.end = end
        self.alone = alone
        self.granted: Callable[[None], None] | None = None

    def excludes(self, other: Hold) -> bool:
        """Whether both can't be held at once."""
        return (self.alone or other.alone) and self.begin < other.end and other.begin < self.end


class Ranges:
    """What is held of one unit's blocks, in the order of arrival."""

    def __init__(self) -> None:
        self._holds: list[Hold] = []
        #: Called when the number of ranges that are held alone may have changed.
        self.on_change: Callable[[], object] = lambda: None

    @property
    def alone(self) -> bool:
        """Whether somebody holds, or waits for, a range alone."""
        return any(hold.alone for hold in self._holds)

    def ask(self, lba: int, blocks: int, alone: bool) -> Hold:
        """Stand in the queue for a range; `granted` says when it is held, `release` gives it up in either case."""
        hold = Hold(lba, lba + blocks, alone)
        self._holds.append(hold)
        if alone:
            self.on_change()
        return hold

    async def granted(self, hold: Hold) -> None:
        """Wait until `hold` is held."""
        if self._blocked(hold):

            def begin(done: Callable[[None], None]) -> None:
                hold.granted = done

            def cancel() -> None:
                hold.granted = None

            await Operation(begin, cancel)

    def release(self, hold: Hold) -> None:
        """Give a range up."""
        self._holds.remove(hold)
        for other in list(self._holds):
            if other.granted is not None and not self._blocked(other):
                granted, other.granted = other.granted, None
                granted(None)
        if hold.alone:
            self.on_change()

    def _blocked(self, hold: Hold) -> bool:
        for other in self._holds:
            if other is hold:
                return False
            if other.excludes(hold):
                return True
        return False
