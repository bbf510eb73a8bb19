"""Who waits for what has been begun to end: operations of the compiled loop, chains of Python's.

Promises: `done` is called once, when the last of what it waits for has ended, or at once if that is nothing.
Never: finds out by itself that something has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable


class Endings:
    """Waits on whatever has a name of its own; names are used once."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[Callable[[], None]]] = {}

    def __len__(self) -> int:
        """How many things are waited for."""
        return len(self._waiting)

    def wait(self, names: Iterable[Hashable], done: Callable[[], object]) -> None:
        """Calls `done` when all of these have ended."""
        left = 1

        def one() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                done()

        for name in set(names):
            left += 1
            self._waiting.setdefault(name, []).append(one)
        one()

    def ended(self, name: Hashable) -> None:
        """One of them, or one that nobody waits for, has ended."""
        for one in self._waiting.pop(name, ()):
            one()
