"""What a descriptor is that somebody gives a network device as its other end: a tap, a packet socket, or neither.

Promises: the kernel's own judgement, vhost-net's order of it included. Never: reads or writes a frame, or keeps a
descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import stat
import struct
from typing import Final

from pyvhost.host import packet, tap

_KCMP: Final = {"x86_64": 312, "aarch64": 272, "riscv64": 272}.get(platform.machine())
_libc = ctypes.CDLL(None, use_errno=True)


def require(fd: int) -> None:
    """OSError ENOTSOCK: it is neither a tap nor an AF_PACKET socket of type RAW; one that is not open is neither."""
    try:
        mode = os.fstat(fd).st_mode if fd >= 0 else 0
    except OSError:
        mode = 0
    if not (stat.S_ISSOCK(mode) and _is_packet(fd)) and not (stat.S_ISCHR(mode) and _is_tap(fd)):
        raise OSError(errno.ENOTSOCK, f"descriptor {fd} is neither a tap nor a packet socket of type RAW")


def poll(fd: int) -> int:
    """What poll(2) says of it now."""
    poller = select.poll()
    poller.register(fd, select.POLLIN | select.POLLOUT)
    return dict(poller.poll(0)).get(fd, 0)


def ready(fd: int) -> None:
    """OSError EINVAL: poll(2) says that it is of no use, as it does of a tap without an interface."""
    if poll(fd) & select.POLLERR:
        raise OSError(errno.EINVAL, f"descriptor {fd} has an error waiting, or is a tap without an interface")


def header_size(fd: int) -> int:
    """Bytes of virtio_net_hdr that go before each frame on it; 0: none."""
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            return _packet_header(fd)
        flags = struct.unpack("16sH22x", fcntl.ioctl(fd, tap.TUNGETIFF, bytes(40)))[1]
        return tap.vnet_hdr_size(fd) if flags & tap.IFF_VNET_HDR else 0
    except OSError:
        return 0  # its interface has just gone


def same(one: int, other: int) -> bool:
    """Whether two descriptors are of the same open file; False where the host does not say."""
    if _KCMP is None:
        return False
    pid = os.getpid()
    return bool(_libc.syscall(_KCMP, pid, pid, 0, ctypes.c_ulong(one), ctypes.c_ulong(other)) == 0)


def _is_packet(fd: int) -> bool:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.family == socket.AF_PACKET and sock.type == socket.SOCK_RAW


def _packet_header(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as sock:
        for option in (packet.PACKET_VNET_HDR_SZ, packet.PACKET_VNET_HDR):
            try:
                size = sock.getsockopt(packet.SOL_PACKET, option)
            except OSError:
                continue  # PACKET_VNET_HDR_SZ came with Linux 6.6
            return size if option == packet.PACKET_VNET_HDR_SZ else 10 * size
    return 0


def _is_tap(fd: int) -> bool:
    try:
        fcntl.ioctl(fd, tap.TUNGETFEATURES, bytes(4))
    except OSError:
        return False
    return True
