"""What a store is to a logical unit, and how to write one.

A store keeps blocks: bytes at offsets. It knows no SCSI. Everything is called on the control thread, and nothing
here may block it: each operation is begun by its method and ends with a call of its `done`.

The life of one, as the logical unit leads it:

1. it is made from its spec, which touches nothing;
2. `open(poller)`, by which `size`, `block_size` and what it can become true;
3. operations, several at a time, in whatever order they finish;
4. `close()`, after which `open` may come again.

Promises, which a store of your own must keep: `done(errno)` is called exactly once for every operation that was
begun, later (never from within the method itself), on the control thread, with 0 for success; after it the store
touches the views no more. `close` ends what is under way with ECANCELED, or waits for it.

What errno is told apart: EIO (the medium can't be read or written there), ENOSPC (nothing left to allocate),
ENODEV (the store is gone, perhaps for a while), EROFS (it doesn't take writes), ETIMEDOUT (no answer in time),
ECANCELED (closed). Anything else is taken as EIO.

Never: imports a device, a transport or a SCSI command.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable

from pyvhost.host.poller import Poller

#: How an operation ends: with an errno, 0 for success.
Done = Callable[[int], object]


class ExtentState(enum.IntEnum):
    """What a store has for a range of bytes; the values are those of GET LBA STATUS (SBC-3, 5.5.2)."""

    #: It holds data, or nobody can tell.
    MAPPED = 0
    #: Nothing is allocated: it reads as zeroes.
    DEALLOCATED = 1
    #: Space is set aside: it reads as zeroes.
    ANCHORED = 2


#: Offset and length in bytes, and the state of that range.
Extent = tuple[int, int, ExtentState]
#: How `extents` ends: an errno and the extents, none where the errno isn't 0.
ExtentsDone = Callable[[int, list[Extent]], object]


class Store(ABC):
    """Blocks that are kept somewhere. Offsets and lengths are bytes and multiples of `block_size`."""

    def __init__(self) -> None:
        #: Bytes. True from `open` on.
        self.size = 0
        #: 512 or 4096: what a logical block is to be unless somebody says otherwise.
        self.block_size = 512
        #: What is written in one piece underneath, for a guest to align to; 0: not known, or no more than a block.
        self.physical_block_size = 0
        #: Whether it is there. A store behind a network may not be yet when `open` returns: `on_state(True)` then
        #: tells when it is, and only then `size` and the rest of what follows are true.
        self.online = True
        #: No operation that changes anything is taken: EROFS.
        self.read_only = False
        #: There is a volatile cache: what was written is safe only after `flush`, or with `fua`.
        self.wce = False
        #: A descriptor on which the compiled loop may preadv2, pwritev2 and fdatasync at the same offsets; -1: none.
        self.fd = -1
        #: As it was written, for a human.
        self.spec = ""
        #: What the unit serial number says, where the store knows one.
        self.serial: str | None = None
        #: The file in which persistent reservations are to be kept that outlive power loss, if that was asked for.
        self.aptpl: str | None = None
        #: `discard` works, in units of `unmap_granularity` bytes (others are left as they are).
        self.can_unmap = False
        self.unmap_granularity = 0
        #: `zero` does better than writing zeroes.
        self.can_write_zeroes = False
        #: The most bytes that one `write` keeps together, all of it or none, whatever happens; 0: no such promise.
        self.atomic_max = 0
        #: Set by the logical unit: told the new size when it has changed.
        self.on_resize: Callable[[int], object] | None = None
        #: Set by the logical unit: told False when the store has gone away, True when it is back.
        self.on_state: Callable[[bool], object] | None = None

    @abstractmethod
    def open(self, poller: Poller) -> None:
        """Make it ready; `poller` is the control thread's. OSError: whatever the host says, and what to do."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Nothing happens if it is closed."""

    @abstractmethod
    def read(self, offset: int, views: list[memoryview], done: Done) -> None:
        """Fill `views`, one after the other, from `offset` on. They are writable and stay valid until `done`."""

    @abstractmethod
    def write(self, offset: int, views: list[memoryview], done: Done, fua: bool = False) -> None:
        """Keep what `views` hold, from `offset` on; with `fua`, `done` comes when it is on stable storage."""

    @abstractmethod
    def flush(self, done: Done) -> None:
        """All writes that were done when this was called are on stable storage at `done`."""

    @abstractmethod
    def zero(self, offset: int, length: int, done: Done, unmap: bool = False) -> None:
        """Have the range read as zeroes; with `unmap`, by giving its space back where that can be done."""

    @abstractmethod
    def discard(self, offset: int, length: int, done: Done) -> None:
        """The range's contents are needed no more. It reads as zeroes afterwards (LBPRZ), whole granules or not.

        Only asked of a store whose `can_unmap` is True.
        """

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Which parts of the range hold data: extents in order, without gaps, that cover it from `offset` on.

        They may end before the range does, but hold one extent at least. As it stands, an answer for a store that
        can't tell; such a store needs a `call_soon` of its own.
        """
        self.call_soon(lambda: done(0, [(offset, length, ExtentState.MAPPED)]))

    @abstractmethod
    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the control thread call `function()` later: `poller.call_soon_threadsafe`, once it is open."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec}>"
