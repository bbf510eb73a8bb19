"""Real taps: how they are opened, what is set on them, and what each error says."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netns import network_namespace
from pyvhost.host import interface, tap
from pyvhost.host.fds import close_all
from requirements import need

Ip = Callable[[str], str]

FRAME = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(50)


@pytest.fixture
def ip() -> Iterator[Ip]:
    need(Path(tap.DEVICE).exists(), "modprobe tun")
    with network_namespace() as ip:
        yield ip


def readable(fd: int, milliseconds: int = 5000) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(milliseconds))


@pytest.mark.parametrize("queues", [1, 4])
def test_an_absent_tap_is_made_and_goes_with_its_last_descriptor(ip: Ip, queues: int) -> None:
    fds = tap.open_tap("made", queues)
    assert len(set(fds)) == queues
    assert not any(os.get_blocking(fd) or os.get_inheritable(fd) for fd in fds)
    assert {tap.name_of(fd) for fd in fds} == {"made"}
    close_all(fds[:-1])
    assert interface.exists("made")
    close_all(fds[-1:])
    assert not interface.exists("made")


@pytest.mark.parametrize("multi_queue", ["", "multi_queue"])
def test_a_tap_that_is_there_is_opened_and_stays(ip: Ip, multi_queue: str) -> None:
    ip(f"tuntap add there mode tap {multi_queue}")
    close_all(tap.open_tap("there"))
    assert interface.exists("there")


def test_frames_go_through_with_their_header(ip: Ip) -> None:
    """The host's end of one tap is bridged to the other's."""
    left = tap.open_tap("left")[0]
    right = tap.open_tap("right")[0]
    ip("link add name br type bridge")
    for name in ("left", "right"):
        ip(f"link set {name} master br")
    for name in ("br", "left", "right"):
        interface.set_up(name)
    tap.set_vnet_hdr_size(left, 12)
    assert (tap.vnet_hdr_size(left), tap.vnet_hdr_size(right)) == (12, 10)

    os.write(left, bytes(12) + FRAME)
    while True:
        assert readable(right)
        got = os.read(right, 2000)
        if got[10 + 12 : 10 + 14] == b"\x88\xb5":  # among what the host itself says (IPv6)
            break
    assert got == bytes(10) + FRAME
    close_all([left, right])


def test_offloads_are_what_the_kernel_takes_and_never_more_than_asked(ip: Ip) -> None:
    (fd,) = tap.open_tap("offloads")
    everything = 0x7F
    taken = tap.set_offload(fd, everything)
    assert taken & 0xF == 0xF
    assert taken & ~everything == 0
    # Impossible combinations lose what they can't have, and are no error.
    assert tap.set_offload(fd, tap.TUN_F_TSO4 | tap.TUN_F_UFO) == 0
    assert tap.set_offload(fd, tap.TUN_F_CSUM | tap.TUN_F_TSO_ECN) == tap.TUN_F_CSUM
    assert tap.set_offload(fd, tap.TUN_F_CSUM | tap.TUN_F_USO4) == tap.TUN_F_CSUM
    assert tap.set_offload(fd, 0) == 0
    os.close(fd)


def test_a_tap_hands_over_unfinished_checksums_only_when_it_was_told_that_it_may(ip: Ip) -> None:
    (fd,) = tap.open_tap("csum")
    ip("addr add 10.9.0.1/24 dev csum")
    interface.set_up("csum")
    ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev csum")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for offload, expected in ((0, 0), (tap.TUN_F_CSUM, 1)):
            tap.set_offload(fd, offload)
            sock.sendto(b"question", ("10.9.0.2", 1234))
            while True:
                assert readable(fd)
                frame = os.read(fd, 2000)
                if frame.endswith(b"question"):
                    break
            assert frame[0] == expected, "VIRTIO_NET_HDR_F_NEEDS_CSUM"
    os.close(fd)


def drain(fd: int) -> int:
    frames = 0
    while True:
        try:
            os.read(fd, 70000)
        except BlockingIOError:
            return frames
        frames += 1


def test_a_detached_queue_gets_no_frame_until_it_is_attached_again(ip: Ip) -> None:
    fds = tap.open_tap("queues", 2)
    ip("addr add 10.9.0.1/24 dev queues")
    interface.set_up("queues")
    ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev queues")

    def flows() -> None:
        """From 64 ports, which the tap spreads over the queues it has."""
        for _ in range(64):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"question", ("10.9.0.2", 1234))

    for attached in (False, False, True, True):  # a repetition changes nothing
        tap.set_queue(fds[1], attached)
        drain(fds[0])
        drain(fds[1])
        flows()
        assert readable(fds[0])
        assert readable(fds[1], 5000 if attached else 0) == attached
    close_all(fds)


def test_the_send_buffer_can_be_bounded(ip: Ip) -> None:
    (fd,) = tap.open_tap("sndbuf")
    assert tap.sndbuf(fd) == 2**31 - 1
    tap.set_sndbuf(fd, 1 << 20)
    assert tap.sndbuf(fd) == 1 << 20
    os.close(fd)


def test_mtu_address_and_state_by_name(ip: Ip) -> None:
    (fd,) = tap.open_tap("settings")
    interface.set_mtu("settings", 9000)
    assert interface.mtu("settings") == 9000
    interface.set_mac("settings", bytes.fromhex("020000abcdef"))
    assert interface.mac("settings") == bytes.fromhex("020000abcdef")
    assert not interface.is_up("settings")
    interface.set_up("settings")
    assert interface.is_up("settings")
    interface.set_up("settings", False)
    assert not interface.is_up("settings")
    assert interface.driver("settings") == ("tun", "tap")
    with pytest.raises(OSError, match="'settings': setting its MTU to 5"):
        interface.set_mtu("settings", 5)
    with pytest.raises(OSError, match="no interface 'absent'") as caught:
        interface.index("absent")
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(OSError, match="not Ethernet"):
        interface.mac(make_tun(ip))
    os.close(fd)


def make_tun(ip: Ip) -> str:
    ip("tuntap add layer3 mode tun")
    return "layer3"


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a:b", ".", "sixteen.bytes.xx", "a\0b"])
def test_names_no_interface_can_have(name: str) -> None:
    with pytest.raises(ValueError, match="is no name for an interface"):
        tap.open_tap(name)


def test_a_name_of_fifteen_bytes_is_fine(ip: Ip) -> None:
    close_all(tap.open_tap("fifteen.bytes.x"))


def refused(name: str, queues: int = 1) -> OSError:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the caller looks at it
        tap.open_tap(name, queues)
    assert set(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"
    return caught.value


def test_a_tap_in_use_is_busy(ip: Ip) -> None:
    (fd,) = tap.open_tap("busy")
    error = refused("busy")
    assert error.errno == errno.EBUSY
    assert "in use" in str(error)
    os.close(fd)


def test_a_tap_that_another_uses_in_another_way_is_busy(ip: Ip) -> None:
    """Frames would come without the header, or with one that nobody expects, and no error says so."""
    fds = tap.open_tap("shared", 2, vnet_hdr=False)
    error = refused("shared", 2)
    assert error.errno == errno.EBUSY
    close_all(fds)
    fds = tap.open_tap("shared", 2)
    close_all(tap.open_tap("shared", 2))
    with pytest.raises(OSError, match="in use"):
        tap.open_tap("shared", 2, vnet_hdr=False)
    close_all(fds)


def test_more_queues_than_a_tap_has(ip: Ip) -> None:
    ip("tuntap add single mode tap")
    error = refused("single", 2)
    assert error.errno == errno.EINVAL
    assert "ip tuntap add single mode tap multi_queue" in str(error)
    with pytest.raises(ValueError, match="1 to 256 queues"):
        tap.open_tap("single", 257)


@pytest.mark.parametrize(
    ("kind", "driver"),
    [("link add name other type veth peer name peer", "veth"), ("tuntap add other mode tun", "tun")],
)
@pytest.mark.parametrize("queues", [1, 2])
def test_an_interface_of_another_kind(ip: Ip, kind: str, driver: str, queues: int) -> None:
    ip(kind)
    error = refused("other", queues)
    assert error.errno == errno.EEXIST
    assert f"no tap (its driver: {driver})" in str(error)


def as_nobody(check: Callable[[], None]) -> None:
    """Runs `check` in a child that has given up root."""
    need(os.stat(tap.DEVICE).st_mode & 0o006 == 0o006, f"chmod 666 {tap.DEVICE}")
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_the_right_the_error_says_what_to_do(ip: Ip) -> None:
    ip("tuntap add roots mode tap user 0")

    def check() -> None:
        error = refused("fresh", 2)
        assert error.errno == errno.EPERM
        assert "ip tuntap add fresh mode tap user 65534 multi_queue" in str(error)
        assert "belongs to another user" in str(refused("roots"))

    as_nobody(check)


def test_a_tap_made_for_the_user_needs_no_right(ip: Ip) -> None:
    ip("tuntap add mine mode tap user 65534 multi_queue")

    def check() -> None:
        fds = tap.open_tap("mine", 2)
        tap.set_vnet_hdr_size(fds[0], 12)
        tap.set_offload(fds[0], tap.TUN_F_CSUM)
        tap.set_queue(fds[1], False)

    as_nobody(check)


def test_a_deleted_tap_is_noticed(ip: Ip) -> None:
    (fd,) = tap.open_tap("doomed")
    ip("link del doomed")
    with pytest.raises(OSError, match="bad state") as caught:
        tap.name_of(fd)
    assert caught.value.errno == errno.EBADFD
    os.close(fd)


def test_the_header_is_little_endian(ip: Ip) -> None:
    (fd,) = tap.open_tap("endian")
    assert struct.unpack("i", fcntl.ioctl(fd, tap.TUNGETVNETLE, bytes(4)))[0] in (0, 1)
    tap.set_vnet_le(fd, False)
    tap.set_vnet_le(fd)
    os.close(fd)
