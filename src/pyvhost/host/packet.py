"""Packet sockets: an interface of the host, frame by frame, without the host's own protocols (packet(7)).

Promises: what is returned is bound, non-blocking, closed on exec, hears every address (promiscuous) and never
what leaves through the interface; of several sockets of one call the first gets all, until `spread` says more.
Never: reads or writes a frame.

The kernel takes a VLAN tag out of a received frame and tells of it elsewhere: where guests use VLANs on the
interface, turn that off (`ethtool -K IFNAME rxvlan off`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct

from pyvhost.host import fanout, interface
from pyvhost.host.fds import close_all

# linux/if_packet.h
PACKET_ADD_MEMBERSHIP = 1
PACKET_STATISTICS = 6
PACKET_VNET_HDR = 15
PACKET_FANOUT = 18
PACKET_QDISC_BYPASS = 20
PACKET_FANOUT_DATA = 22
PACKET_IGNORE_OUTGOING = 23
PACKET_VNET_HDR_SZ = 24

PACKET_FANOUT_CBPF = 6
PACKET_FANOUT_FLAG_UNIQUEID = 0x2000
PACKET_MR_PROMISC = 1

ETH_P_ALL = 0x0003
SOL_PACKET = 263
# Only Python 3.13's socket has these names.
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33

#: Most sockets that can share an interface's traffic (PACKET_FANOUT_MAX in Linux before 5.12).
MAX_QUEUES = 256

#: Room for frames on their way, each direction, in bytes: a 64 KiB super-frame counts for more than itself.
BUFFER = 4 << 20


def open_packet(
    name: str, queues: int = 1, *, qdisc_bypass: bool = True, promiscuous: bool = True
) -> list[int]:
    """A socket for each of `queues` queues on interface `name`, with a virtio_net_hdr of 10 bytes a frame.

    With `qdisc_bypass` frames go straight to the driver, past any shaping. OSError: ENODEV no such interface;
    EPERM needs CAP_NET_RAW; EAFNOSUPPORT the interface is not Ethernet.
    """
    if not 1 <= queues <= MAX_QUEUES:
        raise ValueError(f"an interface can be shared by 1 to {MAX_QUEUES} sockets, not {queues}")
    number = interface.index(name)
    interface.mac(name)
    fds: list[int] = []
    group = -1
    try:
        for _ in range(queues):
            with _open(name, number, qdisc_bypass) as sock:
                if promiscuous:
                    mreq = struct.pack("iHH8x", number, PACKET_MR_PROMISC, 0)
                    sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, mreq)
                if queues > 1:
                    group = _join(sock, group)
                fds.append(sock.detach())
    except BaseException:
        close_all(fds)
        raise
    return fds


def set_vnet_hdr_size(fd: int, size: int) -> int:
    """Have a header of `size` bytes (10 or 12) before each frame; what is in force then (12: since Linux 6.6)."""
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR_SZ, size)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EINVAL):
            raise
        return 10
    else:
        return size
    finally:
        sock.detach()


def spread(fd: int, sockets: int) -> None:
    """Spread what comes in over the first `sockets` of those that were opened together, a flow staying with one."""
    program, keep = fanout.fprog(fanout.flow_program(sockets))
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(SOL_PACKET, PACKET_FANOUT_DATA, program)
    finally:
        sock.detach()
        del keep


def statistics(fd: int) -> tuple[int, int]:
    """Frames that came for this socket, and how many of them found no room, since it was last asked."""
    sock = socket.socket(fileno=fd)
    try:
        seen, dropped = struct.unpack("II", sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    finally:
        sock.detach()
    return seen, dropped


def _open(name: str, number: int, qdisc_bypass: bool) -> socket.socket:
    try:
        # Protocol 0 hears nothing: not a frame of another interface gets in before bind.
        sock = socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0
        )
    except PermissionError:
        raise OSError(
            errno.EPERM,
            f"a raw socket on {name!r} needs CAP_NET_RAW: be root, or setcap cap_net_raw+ep on a copy of python3",
        ) from None
    try:
        sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sock.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, int(qdisc_bypass))
        # The host's own frames through this interface are not the guest's, nor are the guest's its own.
        sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        for forced, option in ((SO_RCVBUFFORCE, socket.SO_RCVBUF), (SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)  # as much as net.core.*mem_max allows
        sock.bind((name, ETH_P_ALL))
    except OSError as error:
        sock.close()
        code = error.errno or 0
        raise OSError(code, f"a raw socket on {name!r}, interface {number}: {os.strerror(code)}") from None
    return sock


def _join(sock: socket.socket, group: int) -> int:
    """Have the socket share its interface's frames with those of `group` (-1: a new one); the group's number."""
    if group >= 0:
        sock.setsockopt(SOL_PACKET, PACKET_FANOUT, group | PACKET_FANOUT_CBPF << 16)
        return group
    try:
        sock.setsockopt(SOL_PACKET, PACKET_FANOUT, (PACKET_FANOUT_CBPF | PACKET_FANOUT_FLAG_UNIQUEID) << 16)
    except OSError as error:
        raise OSError(error.errno or 0, f"sharing the interface's frames: {error.strerror}") from None
    return sock.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF
