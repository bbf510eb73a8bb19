"""What the tests of vhost-user share: a device that records, a session, a server, a front end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fronts import BIT_30, Front, Talk, until_resets
from pyvhost.abi.vhost_user import Request
from pyvhost.dataplane import guard
from pyvhost.vhost_user.payloads import U64
from pyvhost.vhost_user.server import Server
from recording_device import FEATURES, RecordingDevice, no_fd_leaks


@pytest.fixture(autouse=True, scope="module")
def memory_guard() -> None:
    """Its one descriptor is the process's for good: made before descriptors are counted."""
    guard.install()


@pytest.fixture
def device() -> RecordingDevice:
    return RecordingDevice()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "vm0.sock")


@pytest.fixture
def talk(device: RecordingDevice) -> Iterator[Talk]:
    with no_fd_leaks():
        talk = Talk(device)
        yield talk
        talk.session.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with no_fd_leaks(), Server() as server:
        yield server


@pytest.fixture
def front(server: Server, device: RecordingDevice, path: str) -> Iterator[Front]:
    """One that is attached."""
    server.listen(path, device)
    front = Front.at(server, path)
    assert front.ask(Request.GET_FEATURES) == U64(FEATURES | BIT_30)
    yield front
    front.close()
    until_resets(server, device, 1)
