"""Access by raw address: compiled and plain Python do the same, and what is ordered is ordered."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import threading
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from guarded import Guarded
from pyvhost.dataplane import access, plain, policy
from pyvhost.dataplane.access import (
    below,
    clock_ns,
    copy,
    fence,
    fetch_add64,
    fetch_or8,
    fill,
    load8,
    load8_acquire,
    load16,
    load16_acquire,
    load32,
    load64,
    load64_acquire,
    move,
    prefetch,
    prefetch_write,
    relax,
    signal,
    store8,
    store16,
    store16_release,
    store32,
    store64,
    store64_release,
    sys_epoll_wait,
    sys_read,
    sys_readv,
    sys_write,
    sys_writev,
)

# Python can't call an intrinsic; a kernel can.


@policy.kernel
def _load(kind: int, address: int) -> int:
    if kind == 8:
        return load8(address)
    if kind == 16:
        return load16(address)
    if kind == 32:
        return load32(address)
    if kind == 64:
        return load64(address)
    if kind == -8:
        return load8_acquire(address)
    if kind == -16:
        return load16_acquire(address)
    return load64_acquire(address)


@policy.kernel
def _store(kind: int, address: int, value: int) -> None:
    if kind == 8:
        store8(address, value)
    elif kind == 16:
        store16(address, value)
    elif kind == 32:
        store32(address, value)
    elif kind == 64:
        store64(address, value)
    elif kind == -16:
        store16_release(address, value)
    else:
        store64_release(address, value)


@policy.kernel
def _below(a: int, b: int) -> int:
    return 1 if below(a, b) else 0


@policy.kernel
def _or8(address: int, value: int) -> int:
    return fetch_or8(address, value)


@policy.kernel
def _add64(address: int, value: int) -> int:
    return fetch_add64(address, value)


@policy.kernel
def _bulk(kind: int, to: int, source: int, length: int) -> None:
    if kind == 0:
        copy(to, source, length)
    elif kind == 1:
        move(to, source, length)
    else:
        fill(to, source, length)


@policy.kernel
def _call(kind: int, fd: int, address: int, length: int) -> int:
    if kind == 0:
        return sys_read(fd, address, length)
    if kind == 1:
        return sys_write(fd, address, length)
    if kind == 2:
        return sys_readv(fd, address, length)
    if kind == 3:
        return sys_writev(fd, address, length)
    return sys_epoll_wait(fd, address, length, 0)


@policy.kernel
def _signal(fd: int) -> None:
    signal(fd)


@policy.kernel
def _clock(scratch: int) -> int:
    return clock_ns(scratch)


@policy.kernel
def _hints(address: int) -> None:
    prefetch(address)
    prefetch_write(address)
    relax()
    fence()


compiled = SimpleNamespace(
    load=_load,
    store=_store,
    below=_below,
    or8=_or8,
    add64=_add64,
    bulk=_bulk,
    call=_call,
    signal=_signal,
    clock=_clock,
    hints=_hints,
)


def _twin(function: Callable[..., object]) -> Callable[..., object]:
    """The same kernel on the plain half."""
    python: Any = getattr(function, "py_func", function)
    names = {**python.__globals__, **{name: getattr(plain, name) for name in access.__all__}}
    return FunctionType(python.__code__, names, python.__name__)


twins = SimpleNamespace(**{name: _twin(function) for name, function in vars(compiled).items()})

both = pytest.mark.parametrize("half", [compiled, twins], ids=["as imported", "plain"])


def test_the_halves_have_the_same_names() -> None:
    assert set(access.__all__) == {name for name in vars(access) if name in access.__all__}
    assert all(hasattr(plain, name) for name in access.__all__)
    if not policy.PLAIN:
        from pyvhost.dataplane import compiled as other

        assert all(hasattr(other, name) for name in access.__all__)


BYTES = bytes([0xF1, 0xE2, 0xD3, 0xC4, 0xB5, 0xA6, 0x97, 0x88, 0x79])


@both
@pytest.mark.parametrize("bits", [8, 16, 32, 64, -8, -16, -64])
def test_loads_extend_with_zeros_and_keep_64_bits(half: SimpleNamespace, bits: int) -> None:
    memory = Guarded(16)
    size = abs(bits) // 8
    # The last bytes before a page that can't be touched, and odd places for what need not be aligned.
    for at in (16 - size, 0) if bits < 0 else (16 - size, 0, 1, 3):
        memory.put(at, BYTES[:size])
        assert half.load(bits, memory.address + at) == int.from_bytes(
            BYTES[:size], "little", signed=size == 8
        )


@both
@pytest.mark.parametrize("bits", [8, 16, 32, 64, -16, -64])
def test_stores_write_their_bytes_alone(half: SimpleNamespace, bits: int) -> None:
    memory = Guarded(24)
    size = abs(bits) // 8
    for at in (24 - size, 8):
        for value in (0, 1, -1, 0x7856341278563412, -(1 << 63), (1 << 63) - 1):
            memory.put(0, b"\xee" * 24)
            half.store(bits, memory.address + at, value)
            written = (value & ((1 << abs(bits)) - 1)).to_bytes(size, "little")
            assert memory.get() == b"\xee" * at + written + b"\xee" * (24 - at - size)
    assert memory.intact()


@both
def test_below_compares_as_unsigned(half: SimpleNamespace) -> None:
    numbers = [0, 1, 5, (1 << 63) - 1, -(1 << 63), -2, -1]
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            assert bool(half.below(a, b)) == (i < j)


@both
def test_fetch_gives_what_was_there(half: SimpleNamespace) -> None:
    memory = Guarded.of(b"\xee" * 7 + b"\x05" + b"\xee" * 8)
    assert half.or8(memory.address + 7, 0x1F0) == 5
    assert memory.get() == b"\xee" * 7 + b"\xf5" + b"\xee" * 8
    memory.put(0, struct.pack("<q", (1 << 63) - 1))
    assert half.add64(memory.address, 2) == (1 << 63) - 1
    # Modulo 2**64 where it is compiled; nothing that counts comes near it.
    memory.put(0, struct.pack("<q", 40))
    assert half.add64(memory.address, -42) == 40
    assert memory.get(0, 8) == struct.pack("<q", -2)
    assert memory.get(8) == b"\xee" * 8


@both
@pytest.mark.parametrize("length", [0, 1, 7, 8, 63, 64, 65, 1500, 65_600])
def test_bulk_moves_what_it_should(half: SimpleNamespace, length: int) -> None:
    source, to = Guarded.of(os.urandom(length)), Guarded(length)
    half.bulk(0, to.address, source.address, length)
    assert to.get() == source.get()
    half.bulk(2, to.address, 0xA7, length)
    assert to.get() == b"\xa7" * length
    assert to.intact()
    # Ranges that overlap, both ways.
    memory = Guarded.of(os.urandom(length + 40))
    before = memory.get()
    half.bulk(1, memory.address, memory.address + 40, length)
    assert memory.get() == before[40:] + before[length : length + 40]
    before = memory.get()
    half.bulk(1, memory.address + 40, memory.address, length)
    assert memory.get() == before[:40] + before[:length]


@both
def test_hints_may_name_any_address(half: SimpleNamespace) -> None:
    for address in (0, 1, -1, -(1 << 63), 1 << 47, 12345):
        half.hints(address)


@both
def test_the_clock_goes_on(half: SimpleNamespace) -> None:
    scratch = np.zeros(2, np.int64)
    before = half.clock(scratch.ctypes.data)
    after = half.clock(scratch.ctypes.data)
    assert before <= after
    assert abs(after - plain.clock_ns(0)) < 60 * 10**9


# System calls


def _iov(*pieces: Guarded) -> np.ndarray:
    return np.array([(piece.address, piece.size) for piece in pieces], np.int64).reshape(-1)


@both
def test_reads_and_writes_say_how_much(half: SimpleNamespace) -> None:
    out, into = os.pipe2(os.O_NONBLOCK)
    one, two = Guarded.of(b"abcde"), Guarded.of(b"fgh")
    assert half.call(1, into, one.address, 5) == 5
    iov = _iov(one, two)
    assert half.call(3, into, iov.ctypes.data, 2) == 8
    assert half.call(0, out, two.address, 3) == 3
    assert two.get() == b"abc"
    assert half.call(2, out, iov.ctypes.data, 2) == 8
    assert (one.get(), two.get()) == (b"deabc", b"def")
    assert half.call(0, out, two.address, 3) == 2
    assert two.get() == b"ghf"
    assert half.call(0, out, two.address, 3) == -errno.EAGAIN
    os.close(into)
    assert half.call(0, out, two.address, 3) == 0
    os.close(out)


@both
def test_failures_are_negative_errnos(half: SimpleNamespace) -> None:
    out, into = os.pipe2(os.O_NONBLOCK)
    memory = Guarded(8)
    iov = np.array([memory.address + 8, 8], np.int64)
    for kind in (0, 1):
        assert half.call(kind, -1, memory.address, 8) == -errno.EBADF
    for kind in (2, 3):
        assert half.call(kind, -1, iov.ctypes.data, 1) == -errno.EBADF
    assert half.call(1, into, memory.address + 8, 8) == -errno.EFAULT
    assert half.call(3, into, iov.ctypes.data, 1) == -errno.EFAULT
    os.write(into, b"12345678")
    assert half.call(2, out, iov.ctypes.data, 1) == -errno.EFAULT
    os.close(out)
    assert half.call(1, into, memory.address, 8) == -errno.EPIPE
    assert half.call(4, into, memory.address, 1) == -errno.EINVAL
    os.close(into)


@both
def test_epoll_events_are_packed(half: SimpleNamespace) -> None:
    epoll, event = select.epoll(), os.eventfd(1)
    epoll.register(event, select.EPOLLIN)
    memory = Guarded(24)
    assert half.call(4, epoll.fileno(), memory.address, 2) == 1
    # Python puts the descriptor in the low half of the event's data.
    assert struct.unpack("<Ii", memory.get(0, 8)) == (select.EPOLLIN, event)
    os.eventfd_read(event)
    assert half.call(4, epoll.fileno(), memory.address, 2) == 0
    epoll.close()
    os.close(event)


@both
def test_signal_adds_one_and_never_fails(half: SimpleNamespace) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    for _ in range(3):
        half.signal(event)
    assert os.eventfd_read(event) == 3
    os.eventfd_write(event, (1 << 64) - 2)
    half.signal(event)
    assert os.eventfd_read(event) == (1 << 64) - 2
    os.close(event)
    out, into = os.pipe2(os.O_NONBLOCK)
    half.signal(into)
    assert os.read(out, 100) == struct.pack("<Q", 1)
    os.close(out)
    half.signal(into)
    os.close(into)
    half.signal(-1)


# Order


@policy.kernel
def _dekker(mine: int, other: int, seen: int, rounds: int, patience: int) -> int:
    """Raises its flag and looks at the other's, each round in step with it; rounds played."""
    for i in range(1, rounds + 1):
        left = patience
        # In step: the other is where we are, or just behind.
        while load64_acquire(other + 64) < i - 1:
            left -= 1
            if left == 0:
                return i
        store64_release(mine + 64, i)
        left = patience
        while load64_acquire(other + 64) < i:
            left -= 1
            if left == 0:
                return i
        store64(mine, i)
        fence()
        store64(seen + 8 * i, load64(other))
    return rounds


@pytest.mark.skipif(policy.PLAIN, reason="two threads of plain Python never run at the same time")
def test_a_fence_keeps_a_store_before_a_load() -> None:
    """Dekker's: each raises a flag, then looks at the other's. Without the fence both may find it down."""
    rounds = 20_000
    room = np.zeros(64, np.int64)
    base = -(-room.ctypes.data // 128) * 128
    flags = [base, base + 128]
    seen = [np.zeros(rounds + 1, np.int64) for _ in flags]
    played = [0, 0]

    def play(side: int) -> None:
        played[side] = _dekker(flags[side], flags[1 - side], seen[side].ctypes.data, rounds, 1 << 30)

    _dekker(base, base, seen[0].ctypes.data, 0, 1)
    players = [threading.Thread(target=play, args=(side,)) for side in (0, 1)]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert played == [rounds, rounds]
    wanted = np.arange(rounds + 1)
    missed = (seen[0] < wanted) & (seen[1] < wanted)
    assert not missed.any(), f"in {missed.sum()} of {rounds} rounds neither saw the other"


@policy.kernel
def _spin(word: int, patience: int) -> int:
    for _ in range(patience):
        if load64_acquire(word):
            return 1
    return 0


def test_a_loop_sees_what_another_thread_stores() -> None:
    """An ordinary load would be taken out of the loop."""
    word = ctypes.c_int64(0)
    _spin(ctypes.addressof(word), 1)
    answer: list[int] = []
    patience = 10**6 if policy.PLAIN else 1 << 40
    watcher = threading.Thread(target=lambda: answer.append(_spin(ctypes.addressof(word), patience)))
    watcher.start()
    word.value = 1
    watcher.join()
    assert answer == [1]
