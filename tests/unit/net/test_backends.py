"""Backends on a real host: what they open, what they set, and what becomes of them when the host changes."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from backend_user import Device
from netns import way_out_of
from pyvhost.host import interface
from pyvhost.host.poller import Poller, Timer
from pyvhost.net.backends import registry, user
from pyvhost.net.backends.generate import udp_frame
from pyvhost.net.backends.switch import SwitchBackend, switches
from pyvhost.net.backends.user import UserBackend
from requirements import need_program

Ip = Callable[[str], str]


# Without the host


@pytest.mark.parametrize("spec", ["null", "loop", "generate"])
def test_those_without_descriptors(spec: str) -> None:
    backend = registry.make(spec)
    assert backend.open(4) == [-1] * 4
    assert backend.link_up()
    backend.set_pairs(2)
    backend.set_offloads(0)
    backend.set_vnet_hdr_size(12)
    backend.reopen()
    assert (backend.header_size, backend.mtu, backend.mac) == (0, None, None)
    backend.close()
    assert backend.fds == []
    backend.close()


@pytest.mark.parametrize("size", [42, 43, 64, 1518, 65549])
def test_a_generated_frame_is_right_in_every_field(size: int) -> None:
    scapy = pytest.importorskip("scapy.layers.inet")
    from scapy.layers.l2 import Ether

    frame = udp_frame(size, bytes.fromhex("525400123456"))
    assert len(frame) == size
    parsed = Ether(frame)
    assert (parsed.dst, parsed[scapy.UDP].dport) == ("52:54:00:12:34:56", 9)
    # Made anew by somebody else, checksums included, it is the same.
    for layer, names in ((scapy.IP, ("len", "chksum")), (scapy.UDP, ("len", "chksum"))):
        for name in names:
            delattr(parsed[layer], name)
    assert bytes(parsed) == frame


def test_generate_counts_and_addresses_as_told() -> None:
    backend = registry.make("generate:100,count=3,mac=52-54-00-12-34-56")
    assert (len(backend.template), backend.count) == (100, 3)
    assert backend.template[:6] == bytes.fromhex("525400123456")
    backend = registry.make("generate,count=0")
    assert (len(backend.template), backend.count) == (64, 0)
    assert registry.make("generate").count == -1
    for wrong in (41, 65550):
        with pytest.raises(ValueError, match="42 to 65549"):
            udp_frame(wrong)


# stream


def test_stream_tells_of_its_peer(tmp_path: Path, poller: Poller) -> None:
    backend = registry.make(f"stream:{tmp_path / 'peer'}")
    device = Device(backend, poller)
    assert backend.open(1, poller) == [-1]
    assert not backend.link_up()
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(tmp_path / "peer"))
            (fd,), up = device.next()
            assert up
            peer.send(struct.pack(">I", 60) + bytes(60))
            assert os.read(fd, 100) == struct.pack(">I", 60) + bytes(60)
        assert device.next() == ([-1], False)
    backend.close()
    assert not (tmp_path / "peer").exists()
    assert len(device.seen) == 4
    backend.close()


def test_a_peer_that_talks_nonsense_is_given_up(tmp_path: Path, poller: Poller) -> None:
    backend = registry.make(f"stream:{tmp_path / 'peer'},listen")
    device = Device(backend, poller)
    backend.open(1, poller)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(tmp_path / "peer"))
        device.next()
        backend.reopen()
        assert device.seen[-1] == ([-1], False)
        assert peer.recv(1) == b""
    backend.reopen()
    backend.close()


def test_those_that_hear_of_changes_need_a_poller(tmp_path: Path) -> None:
    for spec in (f"stream:{tmp_path / 'peer'}", "user"):
        with pytest.raises(ValueError, match="needs a poller"):
            registry.make(spec).open(1)


# user


@pytest.fixture
def way_out(ip: Ip) -> None:
    need_program("passt")
    way_out_of(ip)


@pytest.mark.usefixtures("way_out")
def test_user_runs_passt_and_starts_it_again(poller: Poller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user, "PAUSE_FIRST", 0.01)
    backend = registry.make("user,tcp=none,mtu=1500")
    assert isinstance(backend, UserBackend)
    device = Device(backend, poller)
    (first,) = backend.open(1, poller)
    assert first >= 0
    assert backend.link_up()
    assert backend._passt is not None
    os.kill(backend._passt.pid, signal.SIGKILL)
    assert device.next() == ([-1], False)
    (again,), up = device.next()
    assert up
    assert again >= 0
    # The same for one that talks nonsense: the loop says so.
    backend.reopen()
    assert device.next() == ([-1], False)
    backend.reopen()
    assert device.next()[1]
    backend.close()
    assert not backend.link_up()
    backend.reopen()


@pytest.mark.usefixtures("way_out")
def test_a_passt_that_keeps_ending_is_started_less_and_less_often(
    poller: Poller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backend = registry.make("user")
    device = Device(backend, poller)
    backend.open(1, poller)
    # From now on it is a program that ends at once.
    (tmp_path / "passt").write_text("#!/bin/false\n")
    (tmp_path / "passt").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    pauses: list[float] = []
    later = poller.call_later

    def at_once(seconds: float, function: Callable[[], object]) -> Timer:
        if function == backend._again:  # type: ignore[attr-defined]
            pauses.append(seconds)
            return later(0, function)
        return later(seconds, function)

    monkeypatch.setattr(poller, "call_later", at_once)
    backend.reopen()
    while len(pauses) < 9:
        device.next()
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    # And when it isn't there at all.
    (tmp_path / "passt").unlink()
    poller.call_later(0.1, poller.stop)
    poller.run()
    assert len(pauses) > 9
    backend.close()


@pytest.mark.usefixtures("way_out")
def test_what_passt_refuses_is_said_at_once(poller: Poller) -> None:
    backend = registry.make("user,address=nonsense")
    with pytest.raises(OSError, match="Invalid address"):
        backend.open(1, poller)
    backend.close()


# switch


def member(spec: str) -> SwitchBackend:
    backend = registry.make(spec)
    assert isinstance(backend, SwitchBackend)
    return backend


def test_members_of_a_name_share_a_switch() -> None:
    one, two, other = member("switch:lan"), member("switch:lan"), member("switch:dmz")
    for backend in (one, two, other):
        assert backend.open(2) == [-1, -1]
    assert one.group is two.group is not other.group
    assert one.group is not None
    assert one.group.members == [one, two]
    assert {switch.name for switch in switches()} == {"lan", "dmz"}
    for backend in (one, two, other):
        backend.close()
        backend.close()
    assert switches() == []
    assert one.group is None


def test_the_uplink_is_open_while_there_is_a_member(ip: Ip, poller: Poller) -> None:
    first, second = member("switch:lan"), member("switch:lan,uplink=tap:vm0")
    first.open(1, poller)
    assert first.group is not None
    assert first.group.uplink is None
    second.open(1, poller)
    group = first.group
    assert group.uplink is not None
    assert group.uplink.fds[0] >= 0

    third = member("switch:lan,uplink=tap:vm0")
    third.open(1, poller)
    with pytest.raises(ValueError, match="another uplink already: tap:vm0"):
        member("switch:lan,uplink=tap:vm1").open(1, poller)
    assert len(group.members) == 3

    second.close()
    assert interface.exists("vm0")
    first.close()
    third.close()
    assert not interface.exists("vm0")
    assert switches() == []


def test_a_switch_whose_uplink_fails_is_not_there(ip: Ip, poller: Poller) -> None:
    with pytest.raises(OSError, match="no interface 'absent'"):
        member("switch:lan,uplink=packet:absent").open(1, poller)
    assert switches() == []
