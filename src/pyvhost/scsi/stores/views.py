"""Lists of memoryviews as one run of bytes: where they lie, and how to copy from them and into them.

Promises: empty views are no trouble. Never: keeps a view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def flat(views: Sequence[memoryview]) -> list[memoryview]:
    """The same bytes as views of single bytes, without those that are empty."""
    return [
        view if view.format == "B" and view.ndim == 1 else view.cast("B") for view in views if view.nbytes
    ]


def total(views: Sequence[memoryview]) -> int:
    """How many bytes they are together."""
    return sum(view.nbytes for view in views)


def address(view: memoryview) -> int:
    """Where the first byte of a view that isn't empty lies in this process."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def aligned(views: Sequence[memoryview], memory: int, length: int) -> bool:
    """Whether every view begins at a multiple of `memory` and is a multiple of `length` long."""
    return all(view.nbytes % length == 0 and address(view) % memory == 0 for view in views)


def advance(views: list[memoryview], count: int) -> list[memoryview]:
    """What follows the first `count` bytes."""
    for index, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[index + 1 :]] if count else views[index:]
        count -= view.nbytes
    return []


def take(views: list[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes, or all there are."""
    taken = []
    for view in views:
        if count <= 0:
            break
        taken.append(view[:count])
        count -= view.nbytes
    return taken


def gather(views: Sequence[memoryview], into: memoryview) -> None:
    """Copy all bytes of `views` into the beginning of `into`."""
    at = 0
    for view in views:
        into[at : at + view.nbytes] = view
        at += view.nbytes


def scatter(data: memoryview, views: Sequence[memoryview]) -> None:
    """Fill `views` from the beginning of `data`."""
    at = 0
    for view in views:
        view[:] = data[at : at + view.nbytes]
        at += view.nbytes
