"""Real packet sockets on a veth pair."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from netns import network_namespace
from pyvhost.host import interface, packet
from pyvhost.host.fds import close_all

Ip = Callable[[str], str]


def frame(number: int) -> bytes:
    """UDP to somebody else's address, from port `number`."""
    ethernet = bytes.fromhex("02000000bbbb 02000000aaaa 0800")
    udp = struct.pack(">HHHH", number, 9, 8 + 18, 0) + b"eighteen bytes now"
    ip = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
    )
    return ethernet + ip + udp


@pytest.fixture
def ip() -> Iterator[Ip]:
    with network_namespace() as ip:
        ip("link add name left type veth peer name right")
        for name in ("left", "right"):
            # The host is to say nothing of its own here.
            ip(f"link set {name} addrgenmode none arp off")
            interface.set_up(name)
        yield ip


def frames_of(fd: int, header: int, number: int) -> list[bytes]:
    """The next `number` UDP frames."""
    found: list[bytes] = []
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while len(found) < number:
        assert poll.poll(5000), f"{len(found)} of {number} frames came"
        got = os.read(fd, 70000)
        if got[header + 12 : header + 14] == b"\x08\x00":
            found.append(got)
    return found


def test_frames_go_through_with_their_header_and_none_comes_back(ip: Ip) -> None:
    (left,) = packet.open_packet("left")
    (right,) = packet.open_packet("right")
    assert not os.get_blocking(left)
    assert not os.get_inheritable(left)

    os.write(left, bytes(10) + frame(1))
    assert frames_of(right, 10, 1) == [bytes(10) + frame(1)]
    # It has gone the whole way: had the sender heard itself, it would be here by now.
    with pytest.raises(BlockingIOError):
        os.read(left, 2000)
    close_all([left, right])


def test_what_the_host_sends_there_is_not_heard(ip: Ip) -> None:
    (left,) = packet.open_packet("left")
    (right,) = packet.open_packet("right")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        ip("addr add 10.9.0.1/24 dev left")
        sock.sendto(b"from the host", ("10.9.0.255", 1234))
    assert frames_of(right, 10, 1)[0].endswith(b"from the host")
    with pytest.raises(BlockingIOError):
        os.read(left, 2000)
    close_all([left, right])


def test_it_hears_what_is_for_others(ip: Ip) -> None:
    """`frame` is addressed to nobody here; without being promiscuous the driver is not asked for it."""
    assert b"promiscuity 0" in ip("-d link show right").encode()
    (right,) = packet.open_packet("right")
    assert b"promiscuity 1" in ip("-d link show right").encode()
    os.close(right)
    assert b"promiscuity 0" in ip("-d link show right").encode()


def test_the_header_can_be_twelve_bytes_where_the_kernel_has_that(ip: Ip) -> None:
    (left,) = packet.open_packet("left")
    (right,) = packet.open_packet("right")
    size = packet.set_vnet_hdr_size(right, 12)
    assert size in (10, 12)
    os.write(left, bytes(10) + frame(1))
    assert frames_of(right, size, 1) == [bytes(size) + frame(1)]
    assert packet.set_vnet_hdr_size(right, 10) == 10
    close_all([left, right])


def ports_of(fds: list[int], number: int) -> list[list[int]]:
    """The source ports of the next `number` UDP frames, a list for each socket."""
    found: dict[int, list[int]] = {fd: [] for fd in fds}
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    while sum(map(len, found.values())) < number:
        events = poll.poll(5000)
        assert events, f"of {number} frames came: {found}"
        for fd, _ in events:
            got = os.read(fd, 2000)
            if got[10 + 12 : 10 + 14] == b"\x08\x00":
                found[fd] += struct.unpack_from(">H", got, 10 + 34)
    return list(found.values())


def test_several_sockets_share_the_frames_and_a_flow_stays_with_one(ip: Ip) -> None:
    (left,) = packet.open_packet("left")
    rights = packet.open_packet("right", 4)
    packet.spread(rights[0], 4)
    for number in [*range(1, 65)] * 2:
        os.write(left, bytes(10) + frame(number))
    ports = ports_of(rights, 128)
    assert sorted(port for mine in ports for port in mine) == sorted([*range(1, 65)] * 2)
    assert sum(bool(mine) for mine in ports) > 1, "one socket got it all"
    assert sum(len(set(mine)) for mine in ports) == 64, "a flow was split"
    close_all([left, *rights])


def test_two_groups_on_one_interface_each_hear_everything(ip: Ip) -> None:
    (left,) = packet.open_packet("left")
    groups = [packet.open_packet("right", 2), packet.open_packet("right", 2)]
    os.write(left, bytes(10) + frame(7))
    for group in groups:
        assert sorted(ports_of(group, 1)) == [[], [7]]
        assert sum(packet.statistics(fd)[0] for fd in group) == 1
    close_all([left, *groups[0], *groups[1]])


def test_a_super_frame_passes_whole(ip: Ip) -> None:
    """GSO: 40,000 bytes of TCP under one header, which veth hands over as they are."""
    (left,) = packet.open_packet("left")
    (right,) = packet.open_packet("right")
    payload = bytes(40000)
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 5 << 4, 0x10, 65535, 0, 0) + payload
    addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + addresses
    gso = struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16)
    sent = gso + frame(1)[:14] + header + tcp
    assert os.write(left, sent) == len(sent)
    (got,) = frames_of(right, 10, 1)
    assert struct.unpack_from("<BBHH", got)[:2] == (1, 1)
    assert got[10:] == sent[10:]
    close_all([left, right])


def test_the_errors_say_what_is_wrong(ip: Ip) -> None:
    with pytest.raises(OSError, match="no interface 'absent'") as caught:
        packet.open_packet("absent")
    assert caught.value.errno == errno.ENODEV
    ip("tuntap add layer3 mode tun")
    with pytest.raises(OSError, match="not Ethernet"):
        packet.open_packet("layer3")
    with pytest.raises(ValueError, match="1 to 256"):
        packet.open_packet("left", 0)


def test_without_the_right_the_error_names_it(ip: Ip) -> None:
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setresuid(65534, 65534, 65534)
            try:
                packet.open_packet("left")
            except PermissionError as error:
                code = 0 if "CAP_NET_RAW" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nothing_of_another_interface_gets_in(ip: Ip) -> None:
    (right,) = packet.open_packet("right")
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
    ):
        two.bind(("127.0.0.1", 0))
        one.sendto(b"over loopback", two.getsockname())
        assert two.recv(100) == b"over loopback"
    with pytest.raises(BlockingIOError):
        os.read(right, 2000)
    os.close(right)
