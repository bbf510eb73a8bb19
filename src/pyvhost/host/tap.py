"""Taps: Ethernet interfaces of the host whose other end is a descriptor (Linux's tuntap.rst, linux/if_tun.h).

Promises: every descriptor is a queue of the one interface, non-blocking, closed on exec; a tap that was absent
is made and goes away with its last descriptor, one that was there stays; an error says what to do about it.
Never: reads or writes a frame; makes a tap persistent.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from ctypes import c_int, c_uint

from pyvhost.abi._ioctl import _IOR, _IOW
from pyvhost.host import interface
from pyvhost.host.fds import close_all

TUNSETIFF = _IOW(ord("T"), 202, c_int)
TUNGETFEATURES = _IOR(ord("T"), 207, c_uint)
TUNSETOFFLOAD = _IOW(ord("T"), 208, c_uint)
TUNGETIFF = _IOR(ord("T"), 210, c_uint)
TUNGETSNDBUF = _IOR(ord("T"), 211, c_int)
TUNSETSNDBUF = _IOW(ord("T"), 212, c_int)
TUNGETVNETHDRSZ = _IOR(ord("T"), 215, c_int)
TUNSETVNETHDRSZ = _IOW(ord("T"), 216, c_int)
TUNSETQUEUE = _IOW(ord("T"), 217, c_int)
TUNSETVNETLE = _IOW(ord("T"), 220, c_int)
TUNGETVNETLE = _IOR(ord("T"), 221, c_int)

IFF_TAP = 0x0002
IFF_MULTI_QUEUE = 0x0100
IFF_ATTACH_QUEUE = 0x0200
IFF_DETACH_QUEUE = 0x0400
IFF_PERSIST = 0x0800
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

#: What may be handed to the reader of the tap (TUNSETOFFLOAD). All but CSUM need CSUM; ECN needs a TSO.
TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08
TUN_F_UFO = 0x10
TUN_F_USO4 = 0x20
TUN_F_USO6 = 0x40

#: Most queues a tap can have (MAX_TAP_QUEUES in drivers/net/tun.c).
MAX_QUEUES = 256

DEVICE = "/dev/net/tun"

_IFREQ = struct.Struct(f"{interface.IFNAMSIZ}sH22x")


def open_tap(name: str, queues: int = 1, *, vnet_hdr: bool = True) -> list[int]:
    """A descriptor for each of `queues` queues of the tap `name`, which is made if it is absent.

    With `vnet_hdr` a virtio_net_hdr goes before each frame: 10 bytes, little endian, no offloads at first.
    ValueError: no such name can be. OSError: ENOENT no tun driver; EPERM no right to it; EBUSY another process
    has it; EEXIST an interface of another kind has the name; EINVAL it has fewer queues than asked for.
    """
    interface.check_name(name)
    if not 1 <= queues <= MAX_QUEUES:
        raise ValueError(f"a tap has 1 to {MAX_QUEUES} queues, not {queues}")
    there = interface.exists(name)
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_hdr else 0)
    fds: list[int] = []
    try:
        if queues == 1:
            try:
                fds.append(_attach(name, flags))
            except OSError as error:
                # A tap that was made with multi_queue has to be opened with it, be it for one queue.
                if error.errno != errno.EINVAL or not there:
                    raise
        if not fds:
            fds.append(_attach(name, flags | IFF_MULTI_QUEUE))
        while len(fds) < queues:
            fds.append(_attach(name, flags | IFF_MULTI_QUEUE))
        # The one who attaches first says how frames travel; whoever joins later is not heard, nor told.
        if _iff(fds[0])[1] & IFF_VNET_HDR != flags & IFF_VNET_HDR:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if vnet_hdr:
            set_vnet_hdr_size(fds[0], 10)
            set_vnet_le(fds[0])
            set_offload(fds[0], 0)
    except OSError as error:
        close_all(fds)
        raise _explain(name, queues, there, error) from None
    except BaseException:
        close_all(fds)
        raise
    return fds


def set_vnet_hdr_size(fd: int, size: int) -> None:
    """How many bytes of virtio_net_hdr go before each frame of the whole tap: 10, or 12 with num_buffers."""
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", size))


def vnet_hdr_size(fd: int) -> int:
    """What `set_vnet_hdr_size` set."""
    return _get_int(fd, TUNGETVNETHDRSZ)


def set_vnet_le(fd: int, little: bool = True) -> None:
    """Whether the header's numbers are little endian, as virtio 1 has them, or the host's."""
    if little and sys.byteorder == "little":
        return  # it is so already, and no kernel is too old for it
    fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", little))


def set_offload(fd: int, offload: int) -> int:
    """Let the tap hand over frames of these kinds (TUN_F_*) as they are; what it agreed to is returned.

    The kernel says EINVAL to the whole if it knows not one bit of it: USO came with Linux 6.2, UFO went in
    4.14 and came back. Those are left out then, and what a reader never gets needs no telling.
    """
    if not offload & TUN_F_CSUM:
        offload = 0
    if not offload & (TUN_F_TSO4 | TUN_F_TSO6):
        offload &= ~TUN_F_TSO_ECN
    if offload & (TUN_F_USO4 | TUN_F_USO6) != TUN_F_USO4 | TUN_F_USO6:
        offload &= ~(TUN_F_USO4 | TUN_F_USO6)  # the kernel has one switch for the two
    without_uso = offload & ~(TUN_F_USO4 | TUN_F_USO6)
    for attempt in (offload, without_uso, without_uso & ~TUN_F_UFO):
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, attempt)
        except OSError as error:
            if error.errno != errno.EINVAL or attempt == without_uso & ~TUN_F_UFO:
                raise
        else:
            return attempt
    raise AssertionError("the last attempt returns or raises")


def set_queue(fd: int, attached: bool) -> None:
    """Have the tap use this queue, or not: no frame is put into a detached one.

    No error when it is so already. OSError EINVAL: not a queue of a multi-queue tap.
    """
    flags = IFF_ATTACH_QUEUE if attached else IFF_DETACH_QUEUE
    if bool(_iff(fd)[1] & IFF_DETACH_QUEUE) == (not attached):
        return
    fcntl.ioctl(fd, TUNSETQUEUE, _IFREQ.pack(b"", flags))


def set_sndbuf(fd: int, size: int) -> None:
    """How many bytes may be on their way from the tap into the host before a write says EAGAIN."""
    fcntl.ioctl(fd, TUNSETSNDBUF, struct.pack("i", size))


def sndbuf(fd: int) -> int:
    """What `set_sndbuf` set; 2**31 - 1 at first: a write never waits."""
    return _get_int(fd, TUNGETSNDBUF)


def name_of(fd: int) -> str:
    """The interface's name now: it may have been renamed. OSError EBADFD: it was deleted."""
    return _iff(fd)[0]


def _attach(name: str, flags: int) -> int:
    fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _iff(fd: int) -> tuple[str, int]:
    raw, flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
    return raw.split(b"\0", 1)[0].decode(), flags


def _get_int(fd: int, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def _explain(name: str, queues: int, there: bool, error: OSError) -> OSError:
    code = error.errno or 0
    several = " multi_queue" if queues > 1 else ""
    kind = interface.driver(name) if there else ("tun", "tap")
    if error.filename == DEVICE:
        if code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            text = f"no {DEVICE}: `modprobe tun`, or give the container that device"
        else:
            text = f"{DEVICE}: {os.strerror(code)}"
    elif there and kind != ("tun", "tap"):
        code, text = (
            errno.EEXIST,
            f"{name!r} is an interface, but no tap (its driver: {kind[0] or 'unknown'})",
        )
    elif code in (errno.EPERM, errno.EACCES):
        if there:
            text = f"tap {name!r} belongs to another user: be that one, or have CAP_NET_ADMIN"
        else:
            text = (
                f"making tap {name!r} needs CAP_NET_ADMIN; or have it made for this user: "
                f"ip tuntap add {name} mode tap user {os.geteuid()}{several}"
            )
    elif code == errno.EBUSY:
        text = f"tap {name!r} is in use by another process"
    elif code == errno.EINVAL and there and queues > 1:
        text = (
            f"tap {name!r} has one queue, {queues} are wanted: serve one queue pair, or make it anew: "
            f"ip tuntap add {name} mode tap multi_queue"
        )
    elif code == errno.E2BIG:
        text = f"tap {name!r} has no {queues} queues left: {MAX_QUEUES} is the most, others' included"
    else:
        text = f"tap {name!r}: {os.strerror(code)}"
    return OSError(code, text)
