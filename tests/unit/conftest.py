"""What many of these tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvhost.host.poller import Poller


@pytest.fixture
def poller() -> Iterator[Poller]:
    with Poller() as poller:
        yield poller
