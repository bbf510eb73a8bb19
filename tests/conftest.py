"""What holds for all tests."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from xdist.scheduler import LoadScopeScheduling

# A shell that runs the tests in the background has them ignore SIGINT, and every program that they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """What a command that was run here has set is the next test's no more."""
    log = logging.getLogger("pyvhost")
    level = log.level
    yield
    log.setLevel(level)


class Halves(LoadScopeScheduling):  # type: ignore[misc]
    """What boots guests in one process (`pytest -n 2`), all else in another: the first waits most of its time."""

    def _split_scope(self, nodeid: str) -> str:
        return "guests" if nodeid.startswith(("tests/interop/", "tests/kernel/")) else "the rest"


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Halves:
    return Halves(config, log)
