"""What a recorded case stands on: memory at symbolic addresses, and descriptors by name.

Promises: the standard library alone, so that it runs where nothing else is; everything is given back by `close`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct

MEM_SIZE = 4 << 20
LOG_SIZE = 64 << 10
KERNEL = 0xFFFF888000000000
TASK_SIZE_MAX = (1 << 47) - 4096

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_TAP, IFF_NAPI, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR = 1, 2, 0x10, 0x100, 0x1000, 0x4000
EFD_SEMAPHORE = 1

#: Taps by the name that a case has for them.
_TAPS = {
    "tap0": IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
    "tapA": IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
    "tapB": IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
    "tap vnet_hdr": IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
    "tap without vnet_hdr": IFF_TAP | IFF_NO_PI,
    "tap with packet information": IFF_TAP,
    "tun": IFF_TUN | IFF_NO_PI,
    "tap multi_queue": IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE,
    "tap napi": IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_NAPI,
}


class Area:
    """Private memory with a page behind it that can't be touched."""

    def __init__(self, size: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(view)
        del view
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for start, length, rights in ((self.address, size, protection), (self.address + size, 4096, 0)):
            if libc.mprotect(start, length, rights):
                raise OSError(ctypes.get_errno(), "mprotect")

    def at_the_end(self, data: bytes) -> int:
        """Puts `data` so that the byte behind it can't be read; where it begins."""
        self.put(self.size - len(data), data)
        return self.address + self.size - len(data)

    def put(self, offset: int, data: bytes) -> None:
        self._map[offset : offset + len(data)] = data

    def get(self, offset: int, size: int) -> bytes:
        return self._map[offset : offset + size]

    def close(self) -> None:
        self._map.close()


class Scene:
    """Memory and descriptors of one case."""

    def __init__(self) -> None:
        self.mem = Area(MEM_SIZE)
        self.log = Area(LOG_SIZE)
        self.argument = Area(64 << 10)
        # Kept, so that nothing comes to lie there: to whoever reads or writes it is as if nothing did.
        self._hole = Area(1 << 20, protection=0)
        self.unmapped = self._hole.address
        self._fds: dict[str, int] = {}

    # --- addresses ------------------------------------------------------------------------------------

    def address(self, name: int | str) -> int:
        """What a symbolic address or a number means here."""
        if isinstance(name, int):
            return name
        base, _, more = name.partition("+")
        offset = int(more, 0) if more else 0
        if base in ("mem", "log", "unmapped", "kernel"):
            where = {
                "mem": self.mem.address,
                "log": self.log.address,
                "unmapped": self.unmapped,
                "kernel": KERNEL,
            }
            return where[base] + offset
        for top, value in (("2^64", 1 << 64), ("TASK_SIZE_MAX", TASK_SIZE_MAX)):
            if base.startswith(top):
                below = base[len(top) + 1 :]
                return value - (4096 if below == "4K" else int(below, 0))
        return int(name, 0)

    # --- descriptors ----------------------------------------------------------------------------------

    def fd(self, name: int | str) -> int:
        """The descriptor of a name, opened when it is first asked for; a number is itself."""
        if isinstance(name, int):
            return name
        if name == "closed":
            return self._closed_fd()
        if name not in self._fds:
            self._fds[name] = self._open(name)
        return self._fds[name]

    def _open(self, name: str) -> int:
        if name in _TAPS:
            return self._tap(_TAPS[name])
        if name.startswith("eventfd") or name in ("kick", "call", "err"):
            start = 3 if name == "eventfd-nonzero" else 0
            flags = EFD_SEMAPHORE if name == "eventfd-semaphore" else 0
            return os.eventfd(start, flags | os.EFD_NONBLOCK)
        if name in ("pipe", "pipe-write"):
            self._fds["pipe"], self._fds["pipe-write"] = os.pipe()
            return self._fds[name]
        if name == "/dev/null":
            return os.open(name, os.O_RDWR)
        if name == "/dev/net/tun without TUNSETIFF":
            return os.open("/dev/net/tun", os.O_RDWR)
        if name == "epoll":
            with select.epoll() as epoll:
                return os.dup(epoll.fileno())
        return self._socket(name)

    def _tap(self, flags: int) -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"rec%d", flags))
        return fd

    def _socket(self, name: str) -> int:
        family, kind, protocol = {
            "socket": (socket.AF_UNIX, socket.SOCK_STREAM, 0),
            "unix": (socket.AF_UNIX, socket.SOCK_STREAM, 0),
            "udp": (socket.AF_INET, socket.SOCK_DGRAM, 0),
            "tcp": (socket.AF_INET, socket.SOCK_STREAM, 0),
            "raw-ip": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
            "packet-dgram": (socket.AF_PACKET, socket.SOCK_DGRAM, 0),
            "packet-raw-unbound": (socket.AF_PACKET, socket.SOCK_RAW, 0),
            "packet-raw bound to lo": (socket.AF_PACKET, socket.SOCK_RAW, 0),
        }[name]
        sock = socket.socket(family, kind, protocol)
        if name == "packet-raw bound to lo":
            sock.bind(("lo", 3))
        return sock.detach()

    def _closed_fd(self) -> int:
        """A number that no file has now."""
        fd = os.open("/dev/null", os.O_RDONLY)
        high = fcntl.fcntl(fd, fcntl.F_DUPFD, 700)
        os.close(fd)
        os.close(high)
        return high

    def wait_readable(self, fd: int, seconds: float = 20) -> None:
        """Waits until there is something; in vain it returns, and what is compared next will tell."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(seconds * 1000)

    def close(self) -> None:
        for fd in self._fds.values():
            try:
                os.close(fd)
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
        for area in (self.mem, self.log, self.argument, self._hole):
            area.close()
