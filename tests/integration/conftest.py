"""What many of these tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvhost.driver.memory import MIB, GuestMemory


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """A guest's, where it does not matter what it is like."""
    with GuestMemory(16 * MIB) as memory:
        yield memory
