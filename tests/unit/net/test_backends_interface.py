"""tap and packet on real interfaces: what they open, what they set, and what becomes of them when those change."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable

import pytest

from backend_user import Device, readable
from pyvhost.abi import virtio_net
from pyvhost.host import interface, tap
from pyvhost.host.fds import close_all
from pyvhost.host.poller import Poller
from pyvhost.net.backends import registry
from pyvhost.net.backends.generate import udp_frame
from pyvhost.net.backends.packet import PacketBackend
from pyvhost.net.backends.tap import TapBackend

Ip = Callable[[str], str]


# tap


def test_a_tap_is_made_set_up_and_taken_away(ip: Ip, poller: Poller) -> None:
    backend = registry.make("tap:vm0,mtu=9000")
    fds = backend.open(2, poller)
    assert len(fds) == 2
    assert backend.fds == fds
    assert interface.is_up("vm0")
    assert (backend.mtu, backend.link_up(), backend.header_size) == (9000, True, 10)
    backend.close()
    assert not interface.exists("vm0")
    assert backend.mtu is None
    backend.close()


def test_a_tap_that_was_there_keeps_its_state_and_stays(
    ip: Ip, poller: Poller, caplog: pytest.LogCaptureFixture
) -> None:
    ip("tuntap add vm0 mode tap")
    backend = registry.make("tap:vm0")
    backend.open(1, poller)
    assert not interface.is_up("vm0")
    assert not backend.link_up()
    assert "ip link set vm0 up" in caplog.text
    backend.close()
    assert interface.exists("vm0")


def test_what_was_negotiated_is_what_the_tap_hands_over(ip: Ip) -> None:
    """A checksum is left undone only for a driver that took GUEST_CSUM."""
    backend = registry.make("tap:vm0")
    (fd,) = backend.open(1)
    ip("addr add 10.9.0.1/24 dev vm0")
    ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev vm0")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for features, header, needs_csum in (
            (0, 10, 0),
            (1 << virtio_net.F_GUEST_CSUM, 12, 1),
            (1 << virtio_net.F_GUEST_TSO4, 12, 0),  # without GUEST_CSUM it means nothing
            (0, 10, 0),
        ):
            backend.set_vnet_hdr_size(header)
            backend.set_offloads(features)
            assert backend.header_size == header
            sock.sendto(b"question", ("10.9.0.2", 1234))
            while True:
                assert readable(fd)
                got = os.read(fd, 2000)
                if got.endswith(b"question"):
                    break
            assert got[0] == needs_csum
            assert len(got) == header + 14 + 20 + 8 + 8
    backend.close()


def test_offloads_are_passed_on_bit_by_bit(ip: Ip, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = registry.make("tap:vm0")
    backend.open(1)
    asked: list[int] = []
    monkeypatch.setattr(tap, "set_offload", lambda fd, offload: asked.append(offload))
    pairs = [
        (virtio_net.F_GUEST_CSUM, tap.TUN_F_CSUM),
        (virtio_net.F_GUEST_TSO4, tap.TUN_F_TSO4),
        (virtio_net.F_GUEST_TSO6, tap.TUN_F_TSO6),
        (virtio_net.F_GUEST_ECN, tap.TUN_F_TSO_ECN),
        (virtio_net.F_GUEST_UFO, tap.TUN_F_UFO),
        (virtio_net.F_GUEST_USO4, tap.TUN_F_USO4),
        (virtio_net.F_GUEST_USO6, tap.TUN_F_USO6),
    ]
    for bit, _ in pairs:
        backend.set_offloads(1 << bit)
    assert asked == [flag for _, flag in pairs]
    backend.set_offloads((1 << 64) - 1)
    assert asked[-1] == 0x7F
    # What the driver can do for us is none of the tap's business.
    backend.set_offloads(1 << virtio_net.F_CSUM | 1 << virtio_net.F_HOST_TSO4)
    assert asked[-1] == 0
    backend.close()


def sources(number: int) -> None:
    """UDP from that many ports to 10.9.0.2 over vm0."""
    for _ in range(number):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"question", ("10.9.0.2", 1234))


def test_only_the_pairs_in_use_get_frames(ip: Ip) -> None:
    backend = registry.make("tap:vm0")
    fds = backend.open(3)
    ip("addr add 10.9.0.1/24 dev vm0")
    ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev vm0")
    for pairs in (0, 3, 3, 2, 1):
        if pairs:
            backend.set_pairs(pairs)
        drain(fds)
        sources(64)
        # It opens with one.
        assert [readable(fd, 0) for fd in fds] == [i < (pairs or 1) for i in range(3)]
    backend.close()


def drain(fds: list[int]) -> None:
    for fd in fds:
        try:
            while True:
                os.read(fd, 70000)
        except BlockingIOError:
            pass


def test_a_tap_can_join_a_bridge(ip: Ip) -> None:
    ip("link add name br0 type bridge")
    backend = registry.make("tap:vm0,bridge=br0")
    backend.open(1)
    assert "master br0" in ip("link show vm0")
    backend.close()
    with pytest.raises(OSError, match="'br1'"):
        registry.make("tap:vm1,bridge=br1").open(1)
    assert not interface.exists("vm1"), "a tap was left behind"


def test_the_send_buffer_is_bounded_on_demand(ip: Ip) -> None:
    backend = registry.make("tap:vm0,sndbuf=100000")
    (fd,) = backend.open(1)
    assert tap.sndbuf(fd) == 100000
    backend.close()


def test_setting_the_tap_down_pulls_the_cable(ip: Ip, poller: Poller) -> None:
    backend = registry.make("tap:vm0")
    device = Device(backend, poller)
    fds = backend.open(1, poller)
    ip("link set vm0 down")
    assert device.next() == (fds, False)
    ip("link set vm0 up")
    assert device.next() == (fds, True)
    # Another interface's changes are not told.
    ip("link set lo down")
    poller.call_later(0.05, poller.stop)
    poller.run()
    assert len(device.seen) == 2
    backend.close()


def test_a_renamed_tap_is_still_ours(ip: Ip, poller: Poller) -> None:
    backend = registry.make("tap:vm0")
    assert isinstance(backend, TapBackend)
    device = Device(backend, poller)
    fds = backend.open(1, poller)
    ip("link set vm0 down")
    device.next()
    ip("link set vm0 name vm1")
    ip("link set vm1 up")
    assert device.next() == (fds, True)
    assert backend.name == "vm1"
    backend.close()


def test_a_deleted_tap_is_opened_again_when_it_is_there_again(ip: Ip, poller: Poller) -> None:
    backend = registry.make("tap:vm0,sndbuf=100000")
    device = Device(backend, poller)
    (former,) = backend.open(1, poller)
    backend.set_vnet_hdr_size(12)

    open_then: list[bool] = []
    note = backend.on_change
    assert note is not None

    def check() -> None:
        open_then.append(is_open(former))
        note()

    backend.on_change = check
    ip("link del vm0")
    assert device.next() == ([-1], False)
    assert open_then == [True], "closed while the loop may still use it"
    assert not is_open(former)
    assert not interface.exists("vm0"), "what somebody took away came back by itself"
    # Settings that come meanwhile are kept for later.
    backend.set_pairs(1)
    backend.set_offloads(0)

    ip("tuntap add vm0 mode tap")
    (fd,), _ = device.next()
    assert fd >= 0
    assert (tap.vnet_hdr_size(fd), tap.sndbuf(fd)) == (12, 100000)
    ip("link set vm0 up")
    while not device.seen[-1][1]:
        device.next()
    backend.close()


def test_a_tap_whose_maker_still_holds_it_is_opened_when_it_lets_go(
    ip: Ip, poller: Poller, caplog: pytest.LogCaptureFixture
) -> None:
    """A queue of another's, without the header, decides how frames travel on all of them."""
    backend = registry.make("tap:vm0")
    device = Device(backend, poller)
    backend.open(2, poller)
    ip("link del vm0")
    device.next()
    fds = tap.open_tap("vm0", 2, vnet_hdr=False)
    ip("link set vm0 up")
    while "can't be opened again yet" not in caplog.text:
        poller.run_once()
    assert backend.fds == [-1, -1]
    tap_persist(fds[0])
    close_all(fds)
    while backend.fds[0] < 0:
        device.next()
    assert caplog.text.count("can't be opened again yet") == 1
    backend.close()
    ip("link del vm0")


def tap_persist(fd: int) -> None:
    fcntl.ioctl(fd, 0x400454CB, 1)  # TUNSETPERSIST


def is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def test_the_loop_may_find_the_end_before_the_kernel_tells_of_it(ip: Ip) -> None:
    """Without a poller there is nobody else to find it."""
    backend = registry.make("tap:vm0")
    seen: list[list[int]] = []
    backend.on_change = lambda: seen.append(list(backend.fds))
    backend.open(1)
    backend.reopen()
    assert seen == []
    ip("link del vm0")
    backend.reopen()
    assert seen == [[-1]]
    backend.close()


# packet


@pytest.fixture
def veth(ip: Ip) -> Ip:
    ip("link add name left type veth peer name right")
    for name in ("left", "right"):
        ip(f"link set {name} addrgenmode none arp off up")
    # Linux finds out later that a link runs (linkwatch): up to a second where many change.
    end = time.monotonic() + 10
    while not all(interface.flags(name) & interface.IFF_RUNNING for name in ("left", "right")):
        assert time.monotonic() < end, "the links do not run"
        time.sleep(0.01)
    return ip


def next_frame(fd: int, header: int) -> bytes:
    while True:
        assert readable(fd)
        got = os.read(fd, 70000)
        if got[header + 12 : header + 14] == b"\x08\x00":
            return got[header:]


def test_packet_sends_and_hears(veth: Ip, poller: Poller) -> None:
    left, right = registry.make("packet:left"), registry.make("packet:right,qdisc")
    left.open(1, poller)
    right.open(1, poller)
    for size in (12, 10):
        for backend in (left, right):
            backend.set_vnet_hdr_size(size)
            backend.set_offloads(0)
            assert backend.header_size in (10, size)
        os.write(left.fds[0], bytes(left.header_size) + udp_frame(100))
        assert next_frame(right.fds[0], right.header_size) == udp_frame(100)
    assert left.mtu == 1500
    assert left.link_up()
    left.close()
    right.close()


def test_packet_spreads_flows_over_the_pairs_in_use(veth: Ip) -> None:
    left, right = registry.make("packet:left"), registry.make("packet:right")
    (sender,) = left.open(1)
    fds = right.open(4)

    def flow(number: int) -> bytes:
        frame = bytearray(udp_frame(100))
        struct.pack_into(">H", frame, 34, number)
        return bytes(frame)

    def flow6(number: int) -> bytes:
        addresses = bytes(15) + b"\x01" + bytes(15) + b"\x02"
        udp = struct.pack(">HHHH", number, 9, 8 + 20, 0) + bytes(20)
        return (
            udp_frame(100)[:12]
            + b"\x86\xdd"
            + struct.pack(">IHBB", 6 << 28, len(udp), 17, 64)
            + addresses
            + udp
        )

    for pairs in (1, 4, 2, 3):
        if pairs > 1:  # 1 is what it opens with
            right.set_pairs(pairs)
        for make, kind, port in ((flow, b"\x08\x00", 34), (flow6, b"\x86\xdd", 54)):
            got: list[list[int]] = [[] for _ in fds]
            for number in [*range(1000, 1100)] * 2:
                os.write(sender, bytes(10) + make(number))
            while sum(map(len, got)) < 200:
                ready = select.select(fds, [], [], 5)[0]
                assert ready, f"of 200 frames came: {got}"
                for fd in ready:
                    frame = os.read(fd, 2000)[10:]
                    if frame[12:14] == kind:
                        got[fds.index(fd)] += struct.unpack_from(">H", frame, port)
            assert [bool(mine) for mine in got] == [i < pairs for i in range(4)]
            assert sum(len(set(mine)) for mine in got) == 100, "a flow was split"
    left.close()
    right.close()


def test_frames_in_fragments_stay_together_and_short_ones_are_not_lost(veth: Ip) -> None:
    """The second fragment has no ports; a frame of an unknown kind has nothing to go by."""
    left, right = registry.make("packet:left"), registry.make("packet:right")
    (sender,) = left.open(1)
    fds = right.open(4)
    right.set_pairs(4)
    first, second = bytearray(udp_frame(100)), bytearray(udp_frame(100))
    struct.pack_into(">H", first, 20, 0x2000)
    struct.pack_into(">H", second, 20, 5)
    struct.pack_into(">I", second, 34, 0xDEADBEEF)  # not ports: payload
    tiny = udp_frame(100)[:12] + b"\x08\x00" + b"\x45"
    for frame in (first, second, tiny):
        os.write(sender, bytes(10) + frame)
    found: dict[bytes, int] = {}
    while len(found) < 3:
        ready = select.select(fds, [], [], 5)[0]
        assert ready, f"only {len(found)} of 3 came"
        for fd in ready:
            frame = os.read(fd, 2000)[10:]
            if frame[12:14] == b"\x08\x00":
                found[frame] = fds.index(fd)
    assert found[bytes(first)] == found[bytes(second)]
    left.close()
    right.close()


def test_the_carrier_is_the_cable(veth: Ip, poller: Poller) -> None:
    backend = registry.make("packet:right")
    device = Device(backend, poller)
    fds = backend.open(1, poller)
    veth("link set left down")
    assert device.next() == (fds, False)
    veth("link set left up")
    assert device.next() == (fds, True)
    backend.close()


def test_an_interface_that_is_replaced_is_opened_again(veth: Ip, poller: Poller) -> None:
    backend = registry.make("packet:right")
    assert isinstance(backend, PacketBackend)
    device = Device(backend, poller)
    backend.open(2, poller)
    backend.set_pairs(2)
    veth("link del left")
    assert device.next() == ([-1, -1], False)
    veth("link add name left type veth peer name right")
    fds, up = device.next()
    assert all(fd >= 0 for fd in fds)
    assert not up
    for name in ("left", "right"):
        veth(f"link set {name} addrgenmode none arp off up")
    while not device.seen[-1][1]:
        device.next()
    left = registry.make("packet:left")
    left.open(1)
    os.write(left.fds[0], bytes(10) + udp_frame(64))
    assert select.select(fds, [], [], 5)[0]
    left.close()
    backend.close()
