"""The monitor's client, against a script of what QEMU says."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from pyvhost.cli.guests.qmp import Qmp, QmpError

GREETING = {"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}


class FakeQemu:
    """QEMU's end: what it says is sent ahead, what it is told is read afterwards."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def say(self, *messages: object) -> None:
        for message in messages:
            self.sock.sendall(json.dumps(message).encode() + b"\r\n")

    def told(self) -> list[dict[str, Any]]:
        self.sock.setblocking(False)
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return []
        return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, FakeQemu]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, FakeQemu(theirs)


@pytest.fixture
def monitor(ends: tuple[socket.socket, FakeQemu]) -> tuple[Qmp, FakeQemu]:
    ours, qemu = ends
    qemu.say(GREETING, {"return": {}})
    client = Qmp(ours, timeout=5)
    assert qemu.told() == [{"execute": "qmp_capabilities", "arguments": {}}]
    return client, qemu


def test_a_command_and_what_it_returns(monitor: tuple[Qmp, FakeQemu]) -> None:
    client, qemu = monitor
    qemu.say({"return": {"running": True}})
    assert client.execute("set_link", name="nic0", up=False, max_size=3) == {"running": True}
    arguments = {"name": "nic0", "up": False, "max-size": 3}
    assert qemu.told() == [{"execute": "set_link", "arguments": arguments}]


def test_a_refusal(monitor: tuple[Qmp, FakeQemu]) -> None:
    client, qemu = monitor
    qemu.say({"error": {"class": "GenericError", "desc": "Device 'nic9' not found"}})
    with pytest.raises(QmpError, match="device_del: Device 'nic9' not found"):
        client.execute("device_del", id="nic9")


def test_events_wait_for_whoever_asks(monitor: tuple[Qmp, FakeQemu]) -> None:
    client, qemu = monitor
    qemu.say({"event": "RESET", "data": {"guest": True}})
    qemu.say({"event": "DEVICE_DELETED", "data": {"device": "nic1"}}, {"return": {}})
    qemu.say({"event": "DEVICE_DELETED", "data": {"device": "nic0"}})
    client.execute("query-status")
    deleted = client.wait_event("DEVICE_DELETED", matching=lambda data: data.get("device") == "nic0")
    assert deleted == {"device": "nic0"}
    assert client.wait_event("DEVICE_DELETED") == {"device": "nic1"}
    assert client.wait_event("RESET") == {"guest": True}


def test_events_of_yesterday_are_forgotten(monitor: tuple[Qmp, FakeQemu]) -> None:
    client, qemu = monitor
    qemu.say({"event": "MIGRATION", "data": {"status": "cancelled"}}, {"event": "STOP"}, {"return": {}})
    client.execute("query-status")
    client.forget_events("MIGRATION", "RESUME")
    qemu.say({"event": "MIGRATION", "data": {"status": "completed"}})
    assert client.wait_event("MIGRATION") == {"status": "completed"}
    assert client.wait_event("STOP") == {}


def test_a_monitor_that_is_silent(monitor: tuple[Qmp, FakeQemu]) -> None:
    client, _ = monitor
    with pytest.raises(QmpError, match="did not send event RESET in time"):
        client.wait_event("RESET", timeout=0.01)


def test_a_qemu_that_goes_away(monitor: tuple[Qmp, FakeQemu]) -> None:
    client, qemu = monitor
    qemu.sock.shutdown(socket.SHUT_RDWR)
    with pytest.raises(QmpError):
        client.execute("quit")


@pytest.mark.parametrize("said", [b"garbage\n", b"[1]\n", b'"QMP"\n'])
def test_what_is_no_qmp(ends: tuple[socket.socket, FakeQemu], said: bytes) -> None:
    ours, qemu = ends
    qemu.sock.sendall(said)
    with pytest.raises(QmpError, match="from QEMU's monitor"):
        Qmp(ours, timeout=5)
