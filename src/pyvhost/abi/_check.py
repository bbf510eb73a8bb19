"""The import-time proof that a layout is as long as its standard says.

Promises: a structure whose size is not the stated one never becomes importable. Never looks at values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeVar

Layout = TypeVar("Layout", bound=type[ctypes.Structure])


def sized(size: int) -> Callable[[Layout], Layout]:
    """Class decorator: raises AssertionError unless the structure is `size` bytes long.

    An explicit raise, not an `assert` statement: `python -O` must not remove it.
    """

    def check(layout: Layout) -> Layout:
        found = ctypes.sizeof(layout)
        if found != size:
            raise AssertionError(f"{layout.__qualname__} is {found} bytes here, its standard says {size}")
        return layout

    return check
