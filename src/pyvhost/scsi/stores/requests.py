"""What is asked of a store over a connection, in the pieces in which it travels.

Promises: a request ends once, when none of its pieces is under way. Never: talks to anybody.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pyvhost.scsi.stores import libnbd
from pyvhost.scsi.stores.base import Extent, ExtentState
from pyvhost.scsi.stores.views import address, advance, flat, gather, scatter, take, total

#: Extents that one answer holds at most.
_EXTENTS: Final = 512


class Kind(enum.Enum):
    """What a piece does."""

    READ = enum.auto()
    WRITE = enum.auto()
    FLUSH = enum.auto()
    ZERO = enum.auto()
    STATUS = enum.auto()


@dataclass(slots=True, eq=False)
class Request:
    """One operation: it ends with `done(errno)`."""

    done: Callable[[int], object]
    #: When it must have made progress, by time.monotonic().
    deadline: float
    #: Pieces that aren't done.
    left: int = 0
    error: int = 0
    #: What comes before `done` if all went well.
    finish: Callable[[], object] | None = None


@dataclass(slots=True, eq=False)
class Piece:
    """One command of a connection. It holds the memory it names."""

    request: Request
    kind: Kind
    offset: int = 0
    length: int = 0
    address: int = 0
    flags: int = 0
    holds: Sequence[memoryview] = ()
    #: What a STATUS piece was answered: (length, flags).
    answer: list[tuple[int, int]] = field(default_factory=list)


def runs(views: list[memoryview], most: int) -> list[tuple[int, int, list[memoryview]]]:
    """`views` as (address, length, the views) of memory without gaps, none longer than `most` bytes."""
    found: list[tuple[int, int, list[memoryview]]] = []
    for view in flat(views):
        for at in range(0, view.nbytes, most):
            part = view[at : at + most]
            here = address(part)
            if found:
                start, length, held = found[-1]
                if start + length == here and length + part.nbytes <= most:
                    found[-1] = (start, length + part.nbytes, [*held, part])
                    continue
            found.append((here, part.nbytes, [part]))
    return found


def transfer(
    request: Request,
    kind: Kind,
    offset: int,
    views: list[memoryview],
    *,
    block: int,
    most: int,
    flags: int = 0,
) -> list[Piece]:
    """The pieces that read or write `views`, each a multiple of `block` bytes and no longer than `most`.

    Memory whose parts don't fit into blocks goes through a copy.
    """
    parts = runs(views, most)
    if any(length % block for _, length, _ in parts):
        parts = []
        copies: list[tuple[memoryview, list[memoryview]]] = []
        rest = flat(views)
        while rest:
            some = take(rest, most)
            copy = memoryview(bytearray(total(some)))
            if kind is Kind.WRITE:
                gather(some, copy)
            copies.append((copy, some))
            parts.append((address(copy), copy.nbytes, [copy]))
            rest = advance(rest, copy.nbytes)
        if kind is Kind.READ:

            def finish() -> None:
                for copy, some in copies:
                    scatter(copy, some)

            request.finish = finish
    pieces = []
    for where, length, held in parts:
        pieces.append(Piece(request, kind, offset, length, where, flags, held))
        offset += length
    return pieces


def ranges(
    request: Request, kind: Kind, offset: int, length: int, *, most: int, flags: int = 0
) -> list[Piece]:
    """The pieces that do something to a range, none longer than `most` bytes."""
    end = offset + length
    return [Piece(request, kind, at, min(most, end - at), 0, flags) for at in range(offset, end, most)]


def understood(offset: int, length: int, answer: list[tuple[int, int]], block: int) -> list[Extent]:
    """The extents that a STATUS piece was told, as far as they lie in the range."""
    found: list[Extent] = []
    end = offset + length
    for count, flags in answer:
        count = min(count, end - offset)
        # Only whole blocks are free, and only what reads as zeroes.
        free = flags & libnbd.HOLE and flags & libnbd.ZERO and not (offset | count) % block
        state = ExtentState.DEALLOCATED if free else ExtentState.MAPPED
        if found and found[-1][2] is state:
            found[-1] = (found[-1][0], found[-1][1] + count, state)
        elif count > 0 and len(found) < _EXTENTS:
            found.append((offset, count, state))
        elif count > 0:
            break
        offset += count
    return found or [(offset, length, ExtentState.MAPPED)]
