"""What the backends' tests need of the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netns import network_namespace
from pyvhost.host import tap
from requirements import need


@pytest.fixture
def ip() -> Iterator[Callable[[str], str]]:
    """ip(8) in a network namespace of the test's own."""
    need(Path(tap.DEVICE).exists(), "modprobe tun")
    with network_namespace() as ip:
        yield ip
