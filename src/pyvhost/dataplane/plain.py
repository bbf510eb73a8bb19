"""The plain half of `access`: the same functions by ctypes, for ``NUMBA_DISABLE_JIT=1`` and for Python itself.

Promises: the same results as the compiled half. An aligned ctypes access of 16, 32 or 64 bits is one move,
and every call between two of them keeps the compiler from joining or moving them; `fence` takes and frees a
mutex, whose locked instruction is a full barrier. Never: fast.
"""

from __future__ import annotations

import ctypes
import time

_libc = ctypes.CDLL(None, use_errno=True)
_mutex = ctypes.create_string_buffer(64)


def load8(address: int) -> int:
    return ctypes.c_uint8.from_address(int(address)).value


def load16(address: int) -> int:
    return ctypes.c_uint16.from_address(int(address)).value


def load32(address: int) -> int:
    return ctypes.c_uint32.from_address(int(address)).value


def load64(address: int) -> int:
    return ctypes.c_int64.from_address(int(address)).value


load8_acquire = load8
load16_acquire = load16
load32_acquire = load32
load64_acquire = load64


def store8(address: int, value: int) -> None:
    ctypes.c_uint8.from_address(int(address)).value = int(value) & 0xFF


def store16(address: int, value: int) -> None:
    ctypes.c_uint16.from_address(int(address)).value = int(value) & 0xFFFF


def store32(address: int, value: int) -> None:
    ctypes.c_uint32.from_address(int(address)).value = int(value) & 0xFFFFFFFF


def store64(address: int, value: int) -> None:
    ctypes.c_int64.from_address(int(address)).value = int(value)


store16_release = store16
store32_release = store32
store64_release = store64


def fence() -> None:
    _libc.pthread_mutex_lock(_mutex)
    _libc.pthread_mutex_unlock(_mutex)


def relax() -> None:
    time.sleep(0)


def below(a: int, b: int) -> bool:
    return (int(a) & 0xFFFFFFFFFFFFFFFF) < (int(b) & 0xFFFFFFFFFFFFFFFF)


def prefetch(address: int) -> None:
    """Nothing: plain Python gains nothing from it."""


def fetch_or8(address: int, value: int) -> int:
    # Under the GIL, and alone: the plain half never shares a log with a compiled writer.
    old = load8(address)
    store8(address, old | int(value))
    return old


def fetch_add64(address: int, value: int) -> int:
    old = load64(address)
    store64(address, old + int(value))
    return old


def copy(to: int, source: int, length: int) -> None:
    ctypes.memmove(int(to), int(source), int(length))


def move(to: int, source: int, length: int) -> None:
    ctypes.memmove(int(to), int(source), int(length))


def fill(to: int, value: int, length: int) -> None:
    ctypes.memset(int(to), int(value), int(length))


def errno() -> int:
    return ctypes.get_errno()


def clock_ns(scratch: int) -> int:
    return time.monotonic_ns()


prefetch_write = prefetch


def _result(done: int) -> int:
    return done if done >= 0 else -ctypes.get_errno()


for _name in ("read", "write", "send", "readv", "writev", "preadv2", "pwritev2", "syscall"):
    getattr(_libc, _name).restype = ctypes.c_ssize_t


def signal(fd: int) -> None:
    _libc.eventfd_write(int(fd), ctypes.c_uint64(1))


def sys_read(fd: int, address: int, length: int) -> int:
    return _result(_libc.read(int(fd), ctypes.c_void_p(int(address)), ctypes.c_size_t(int(length))))


def sys_write(fd: int, address: int, length: int) -> int:
    return _result(_libc.write(int(fd), ctypes.c_void_p(int(address)), ctypes.c_size_t(int(length))))


def sys_readv(fd: int, iov: int, count: int) -> int:
    return _result(_libc.readv(int(fd), ctypes.c_void_p(int(iov)), int(count)))


def sys_recvmsg(fd: int, message: int) -> int:
    return _result(_libc.recvmsg(int(fd), ctypes.c_void_p(int(message)), 0))


def sys_writev(fd: int, iov: int, count: int) -> int:
    return _result(_libc.writev(int(fd), ctypes.c_void_p(int(iov)), int(count)))


def sys_send(fd: int, address: int, length: int) -> int:
    return _result(_libc.send(int(fd), ctypes.c_void_p(int(address)), ctypes.c_size_t(int(length)), 0))


def sys_preadv2(fd: int, iov: int, count: int, offset: int, flags: int) -> int:
    return _result(
        _libc.preadv2(int(fd), ctypes.c_void_p(int(iov)), int(count), ctypes.c_long(int(offset)), int(flags))
    )


def sys_pwritev2(fd: int, iov: int, count: int, offset: int, flags: int) -> int:
    return _result(
        _libc.pwritev2(int(fd), ctypes.c_void_p(int(iov)), int(count), ctypes.c_long(int(offset)), int(flags))
    )


def sys_uring_enter(fd: int, submit: int, wait: int, flags: int) -> int:
    return _result(_libc.syscall(426, int(fd), int(submit), int(wait), int(flags), None, 0))


def sys_epoll_wait(epoll: int, events: int, count: int, timeout_ms: int) -> int:
    return _result(_libc.epoll_wait(int(epoll), ctypes.c_void_p(int(events)), int(count), int(timeout_ms)))


def sys_epoll_modify(epoll: int, fd: int, event: int) -> int:
    """epoll_ctl(2), EPOLL_CTL_MOD."""
    return _result(_libc.epoll_ctl(int(epoll), 3, int(fd), ctypes.c_void_p(int(event))))
