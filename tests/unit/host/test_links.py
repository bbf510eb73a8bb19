"""Changes of interfaces are heard, however many there are."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from netns import network_namespace
from pyvhost.host import tap
from pyvhost.host.fds import close_all
from pyvhost.host.links import LinkMonitor
from pyvhost.host.poller import Poller
from requirements import need


@pytest.fixture
def poller() -> Poller:
    need(Path(tap.DEVICE).exists(), "modprobe tun")
    return Poller()


def heard(poller: Poller, calls: list[None]) -> bool:
    """Whether anything was heard of what happened until now: the messages are there when a change returns."""
    calls.clear()
    for _ in range(100):
        poller.run_once(0)
    return bool(calls)


def test_what_happens_to_interfaces_is_heard(poller: Poller) -> None:
    calls: list[None] = []
    with network_namespace() as ip, poller:
        monitor = LinkMonitor(poller, lambda: calls.append(None))
        assert not heard(poller, calls)
        fds = tap.open_tap("vm0")
        assert heard(poller, calls)
        for words in (
            "link set vm0 up",
            "link set vm0 down",
            "link set vm0 name vm1",
            "link set vm1 mtu 9000",
        ):
            ip(words)
            assert heard(poller, calls), words
        assert not heard(poller, calls)
        close_all(fds)
        assert heard(poller, calls)
        monitor.close()
        monitor.close()
        ip("link set lo down")
        assert not heard(poller, calls)


def test_more_than_it_can_hold_is_heard_all_the_same(poller: Poller) -> None:
    calls: list[None] = []
    with network_namespace(), poller:
        monitor = LinkMonitor(poller, lambda: calls.append(None))
        monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        for _ in range(10):
            close_all(tap.open_tap("vm0"))
        assert heard(poller, calls)
        assert not heard(poller, calls)
        fds = tap.open_tap("vm0")
        assert heard(poller, calls)
        close_all(fds)
        monitor.close()
