"""A network interface of the host, by name: its index, MTU, address, state, and which driver made it.

Promises: one ioctl a question (netdevice(7)), in the network namespace of the calling thread; an error names the
interface. Never: waits; remembers an answer.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct

#: Longest name, its closing zero included (linux/if.h).
IFNAMSIZ = 16

IFF_UP = 0x1
IFF_RUNNING = 0x40

# linux/sockios.h
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCGIFMTU = 0x8921
SIOCSIFMTU = 0x8922
SIOCSIFHWADDR = 0x8924
SIOCGIFHWADDR = 0x8927
SIOCETHTOOL = 0x8946
SIOCBRADDIF = 0x89A2

_ARPHRD_ETHER = 1
_ETHTOOL_GDRVINFO = 3
# struct ethtool_drvinfo: cmd, driver[32], version[32], fw_version[32], bus_info[32], erom_version[32],
# reserved2[12], then five 32-bit numbers.
_DRVINFO = struct.Struct("I32s32s32s32s32s12s5I")


def check_name(name: str) -> bytes:
    """The name as the kernel wants it. ValueError: no interface can be called so (dev_valid_name)."""
    raw = name.encode()
    if not raw or raw in (b".", b"..") or len(raw) >= IFNAMSIZ or any(c in b"/:\0" or c <= 32 for c in raw):
        raise ValueError(
            f"{name!r} is no name for an interface: 1 to {IFNAMSIZ - 1} bytes, no '/', ':' or space"
        )
    return raw


def valid_name(name: str) -> str:
    """The name itself. ValueError: as `check_name`."""
    check_name(name)
    return name


def exists(name: str) -> bool:
    """Whether there is an interface of that name."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def index(name: str) -> int:
    """Its number. OSError ENODEV: there is none of that name."""
    check_name(name)
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, f"there is no interface {name!r}; `ip link` lists them") from None


def mtu(name: str) -> int:
    """Its MTU in bytes, without the Ethernet header."""
    return int(struct.unpack_from("i", _ask(name, SIOCGIFMTU), IFNAMSIZ)[0])


def set_mtu(name: str, value: int) -> None:
    """Give it an MTU. OSError EINVAL: the driver can't; EPERM: needs CAP_NET_ADMIN."""
    _ask(name, SIOCSIFMTU, struct.pack("i", value), f"its MTU to {value}")


def mac(name: str) -> bytes:
    """Its address, 6 bytes. OSError EAFNOSUPPORT: it is no Ethernet interface."""
    family, address = struct.unpack_from("H6s", _ask(name, SIOCGIFHWADDR), IFNAMSIZ)
    if family != _ARPHRD_ETHER:
        raise OSError(errno.EAFNOSUPPORT, f"interface {name!r} is not Ethernet (its type is {family})")
    return bytes(address)


def set_mac(name: str, address: bytes) -> None:
    """Give it an address, 6 bytes. OSError EBUSY: it is up and the driver can't do it then; EPERM."""
    if len(address) != 6:
        raise ValueError(f"an Ethernet address is 6 bytes, not {len(address)}")
    _ask(
        name, SIOCSIFHWADDR, struct.pack("H6s", _ARPHRD_ETHER, address), f"its address to {address.hex(':')}"
    )


def flags(name: str) -> int:
    """IFF_UP, IFF_RUNNING..."""
    return int(struct.unpack_from("H", _ask(name, SIOCGIFFLAGS), IFNAMSIZ)[0])


def is_up(name: str) -> bool:
    """Whether it was set up (IFF_UP), whatever its carrier says."""
    return bool(flags(name) & IFF_UP)


def set_up(name: str, up: bool = True) -> None:
    """`ip link set NAME up` (or down). OSError EPERM: needs CAP_NET_ADMIN."""
    now = flags(name)
    wanted = now | IFF_UP if up else now & ~IFF_UP
    if wanted != now:
        _ask(name, SIOCSIFFLAGS, struct.pack("H", wanted), "it up" if up else "it down")


def add_to_bridge(name: str, bridge: str) -> None:
    """`ip link set NAME master BRIDGE`. OSError: EBUSY it is in another; EOPNOTSUPP, no bridge; EPERM."""
    _ask(bridge, SIOCBRADDIF, struct.pack("i", index(name)), f"{name!r} as a port of it")


def bridge_of(name: str) -> str | None:
    """The bridge it is a port of. None: of none, or /sys is another network namespace's."""
    try:
        return os.path.basename(os.readlink(f"/sys/class/net/{name}/brport/bridge"))
    except OSError:
        return None


def driver(name: str) -> tuple[str, str]:
    """The driver's name and what bus it is on: ("tun", "tap") for a tap. ("", "") where it doesn't say."""
    raw = check_name(name)
    answer = array.array("B", _DRVINFO.pack(_ETHTOOL_GDRVINFO, b"", b"", b"", b"", b"", b"", 0, 0, 0, 0, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            fcntl.ioctl(sock, SIOCETHTOOL, struct.pack(f"{IFNAMSIZ}sP16x", raw, answer.buffer_info()[0]))
        except OSError:
            return "", ""
    fields = _DRVINFO.unpack(answer)
    return _string(fields[1]), _string(fields[4])


def _string(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="replace")


def _ask(name: str, request: int, value: bytes = b"", what: str = "") -> bytes:
    raw = check_name(name)
    ifreq = struct.pack(f"{IFNAMSIZ}s24s", raw, value)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            return bytes(fcntl.ioctl(sock, request, ifreq))
        except OSError as error:
            code = error.errno or 0
            doing = f"setting {what}" if what else "asking for it"
            hint = " (it needs CAP_NET_ADMIN)" if code in (errno.EPERM, errno.EACCES) else ""
            raise OSError(code, f"interface {name!r}: {doing}: {os.strerror(code)}{hint}") from None
