"""What holds for all tests."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest

# A shell that runs the tests in the background has them ignore SIGINT, and every program that they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """What a command that was run here has set is the next test's no more."""
    log = logging.getLogger("pyvhost")
    level = log.level
    yield
    log.setLevel(level)
