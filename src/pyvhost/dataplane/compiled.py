"""The compiled half of `access`: Numba intrinsics that become single instructions, and libc's calls.

Promises: no reference counting, no exception, no GIL; what is called ordered is ordered for other threads
and for the guest. Never: used directly; `access` chooses.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyvhost.dataplane.policy import inline

_I64 = ir.IntType(64)


def _loader(bits: int, order: str | None) -> Callable[..., int]:
    width = ir.IntType(bits)

    @intrinsic
    def load(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], width.as_pointer())
            if order is None:
                value = builder.load(pointer, align=1)
            else:
                value = builder.load_atomic(pointer, order, bits // 8)
            return value if bits == 64 else builder.zext(value, _I64)

        return types.int64(types.int64), codegen

    return load


def _storer(bits: int, order: str | None) -> Callable[..., None]:
    width = ir.IntType(bits)

    @intrinsic
    def store(typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], width.as_pointer())
            value = arguments[1] if bits == 64 else builder.trunc(arguments[1], width)
            if order is None:
                builder.store(value, pointer, align=1)
            else:
                builder.store_atomic(value, pointer, order, bits // 8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return store


load8 = _loader(8, None)
load16 = _loader(16, None)
load32 = _loader(32, None)
load64 = _loader(64, None)
load8_acquire = _loader(8, "acquire")
load16_acquire = _loader(16, "acquire")
load32_acquire = _loader(32, "acquire")
load64_acquire = _loader(64, "acquire")
store8 = _storer(8, None)
store16 = _storer(16, None)
store32 = _storer(32, None)
store64 = _storer(64, None)
store16_release = _storer(16, "release")
store32_release = _storer(32, "release")
store64_release = _storer(64, "release")


@intrinsic
def fence(typing_context: Any) -> Any:
    """A full barrier: stores before it are seen before loads after it are done."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def below(typing_context: Any, a: Any, b: Any) -> Any:
    """Whether a < b, both read as unsigned 64 bit."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.icmp_unsigned("<", arguments[0], arguments[1])

    return types.boolean(types.int64, types.int64), codegen


@intrinsic
def relax(typing_context: Any) -> Any:
    """Waits for a moment as a spinning processor should, leaving its sibling what it does not use."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Elsewhere than on x86 it is nothing: the loop around it looks at the clock.
        if platform.machine() == "x86_64":
            name = "llvm.x86.sse2.pause"
            function = builder.module.globals.get(name)
            if function is None:
                function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), codegen


def _prefetcher(for_write: int) -> Callable[..., None]:
    @intrinsic
    def prefetch(typing_context: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer_type = ir.IntType(8).as_pointer()
            flag = ir.IntType(32)
            function_type = ir.FunctionType(ir.VoidType(), [pointer_type, flag, flag, flag])
            function = builder.module.globals.get("llvm.prefetch.p0")
            if function is None:
                function = ir.Function(builder.module, function_type, "llvm.prefetch.p0")
            pointer = builder.inttoptr(arguments[0], pointer_type)
            builder.call(function, [pointer, flag(for_write), flag(3), flag(1)])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return prefetch


#: Asks for the cache line at an address, to be read soon; or to be written, so that nobody else keeps it.
prefetch = _prefetcher(0)
prefetch_write = _prefetcher(1)


def _fetcher(bits: int, operation: str) -> Callable[..., int]:
    width = ir.IntType(bits)

    @intrinsic
    def fetch(typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], width.as_pointer())
            operand = arguments[1] if bits == 64 else builder.trunc(arguments[1], width)
            old = builder.atomic_rmw(operation, pointer, operand, "seq_cst")
            return old if bits == 64 else builder.zext(old, _I64)

        return types.int64(types.int64, types.int64), codegen

    return fetch


fetch_or8 = _fetcher(8, "or")
fetch_add64 = _fetcher(64, "add")


def _external(name: str, *arguments: Any, result: Any = types.int64) -> Any:
    return types.ExternalFunction(name, result(*arguments))


_memcpy = _external("memcpy", types.int64, types.int64, types.int64)
_memmove = _external("memmove", types.int64, types.int64, types.int64)
_memset = _external("memset", types.int64, types.int32, types.int64)
_errno_location = _external("__errno_location")
_clock_gettime = _external("clock_gettime", types.int32, types.int64, result=types.int32)
_read = _external("read", types.int32, types.int64, types.int64)
_write = _external("write", types.int32, types.int64, types.int64)
_readv = _external("readv", types.int32, types.int64, types.int32)
_recvmsg = _external("recvmsg", types.int32, types.int64, types.int32)
_writev = _external("writev", types.int32, types.int64, types.int32)
_send = _external("send", types.int32, types.int64, types.int64, types.int32)
_eventfd_write = _external("eventfd_write", types.int32, types.int64, result=types.int32)
_preadv2 = _external("preadv2", types.int32, types.int64, types.int32, types.int64, types.int32)
_pwritev2 = _external("pwritev2", types.int32, types.int64, types.int32, types.int64, types.int32)
_syscall6 = _external("syscall", *[types.int64] * 7)
_epoll_ctl = _external("epoll_ctl", types.int32, types.int32, types.int32, types.int64, result=types.int32)
_epoll_wait = _external("epoll_wait", types.int32, types.int64, types.int32, types.int32, result=types.int32)


@inline
def copy(to: int, source: int, length: int) -> None:
    """Copies `length` bytes; the ranges do not overlap."""
    _memcpy(to, source, length)


@inline
def move(to: int, source: int, length: int) -> None:
    """Copies `length` bytes; the ranges may overlap."""
    _memmove(to, source, length)


@inline
def fill(to: int, value: int, length: int) -> None:
    """Sets `length` bytes to `value`."""
    _memset(to, value, length)


@inline
def errno() -> int:
    """The calling thread's errno."""
    return load32(_errno_location())


@inline
def clock_ns(scratch: int) -> int:
    """CLOCK_MONOTONIC in nanoseconds; `scratch`: 16 bytes to have it written to."""
    _clock_gettime(1, scratch)
    return load64(scratch) * 1_000_000_000 + load64(scratch + 8)


@inline
def signal(fd: int) -> None:
    """Adds one to an eventfd, or writes eight bytes to a pipe; one that is full has been signalled already."""
    _eventfd_write(fd, 1)


@inline
def sys_read(fd: int, address: int, length: int) -> int:
    """read(2); -errno on failure."""
    done = _read(fd, address, length)
    return done if done >= 0 else -errno()


@inline
def sys_write(fd: int, address: int, length: int) -> int:
    """write(2); -errno on failure."""
    done = _write(fd, address, length)
    return done if done >= 0 else -errno()


@inline
def sys_readv(fd: int, iov: int, count: int) -> int:
    """readv(2); `iov`: address of `count` struct iovec; -errno on failure."""
    done = _readv(fd, iov, count)
    return done if done >= 0 else -errno()


@inline
def sys_recvmsg(fd: int, message: int) -> int:
    """recvmsg(2) by the struct msghdr at `message`; -errno on failure."""
    done = _recvmsg(fd, message, 0)
    return done if done >= 0 else -errno()


@inline
def sys_writev(fd: int, iov: int, count: int) -> int:
    """writev(2); `iov`: address of `count` struct iovec; -errno on failure."""
    done = _writev(fd, iov, count)
    return done if done >= 0 else -errno()


@inline
def sys_send(fd: int, address: int, length: int) -> int:
    """send(2), which sends an empty message where write(2) does nothing; -errno on failure."""
    done = _send(fd, address, length, 0)
    return done if done >= 0 else -errno()


@inline
def sys_preadv2(fd: int, iov: int, count: int, offset: int, flags: int) -> int:
    """preadv2(2); -errno on failure."""
    done = _preadv2(fd, iov, count, offset, flags)
    return done if done >= 0 else -errno()


@inline
def sys_pwritev2(fd: int, iov: int, count: int, offset: int, flags: int) -> int:
    """pwritev2(2); -errno on failure."""
    done = _pwritev2(fd, iov, count, offset, flags)
    return done if done >= 0 else -errno()


@inline
def sys_uring_enter(fd: int, submit: int, wait: int, flags: int) -> int:
    """io_uring_enter(2); -errno on failure."""
    done = _syscall6(426, fd, submit, wait, flags, 0, 0)
    return done if done >= 0 else -errno()


@inline
def sys_epoll_wait(epoll: int, events: int, count: int, timeout_ms: int) -> int:
    """epoll_wait(2) into `count` packed struct epoll_event at `events`; -errno on failure."""
    ready = _epoll_wait(epoll, events, count, timeout_ms)
    return ready if ready >= 0 else -errno()


@inline
def sys_epoll_modify(epoll: int, fd: int, event: int) -> int:
    """epoll_ctl(2), EPOLL_CTL_MOD, with the packed struct epoll_event at `event`; -errno on failure."""
    done = _epoll_ctl(epoll, 3, fd, event)
    return done if done >= 0 else -errno()
