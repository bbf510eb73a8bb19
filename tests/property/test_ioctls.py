"""Whatever a program asks of `pyvhost.open`, in whatever order: an answer or an OSError, and never a crash or a wait.

The numbers are drawn from what means something, so that sequences get as far as rings that run.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyvhost
from in_process import open_fds
from netns import network_namespace
from pyvhost.abi import vhost as abi
from pyvhost.abi import virtio
from pyvhost.host import tap
from pyvhost.vhost.handle import Handle

#: What Linux's vhost may answer; EIO, say, or ENOSYS would be a mistake of ours.
ERRORS = {
    errno.EPERM,
    errno.EFAULT,
    errno.EINVAL,
    errno.EBUSY,
    errno.ENOBUFS,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.E2BIG,
    errno.EBADF,
    errno.ENOTSOCK,
    errno.EAGAIN,
    errno.ENODEV,
    errno.ENOMEM,
}
SIZE = 1 << 20
FEATURES = (0, virtio.F_VERSION_1, abi.F_LOG_ALL, virtio.F_ACCESS_PLATFORM, virtio.RING_F_EVENT_IDX, 27, 15)


class World:
    """Memory, eventfds and backends that sequences name by small numbers."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SIZE)
        self.base = address_of(self.memory)
        hole = mmap.mmap(-1, SIZE)
        self.hole = address_of(hole)
        hole.close()
        self.events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.taps = tap.open_tap("prop0")
        self.packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self.packet.bind(("lo", 3))

    def close(self) -> None:
        for fd in (*self.events, *self.taps):
            os.close(fd)
        self.packet.close()
        self.memory.close()

    def address(self, choice: int) -> int:
        """0 to 255 are pages of our own; what is beyond is not memory, or is not ours."""
        if choice < 256:
            return self.base + 4096 * choice
        others = (
            0,
            self.hole,
            self.hole + 8,
            0xFFFF888000000000,
            (1 << 64) - 4096,
            (1 << 47) - 8192,
            self.base + 1,
        )
        return others[choice % len(others)]

    def fd(self, choice: int) -> int:
        return (*self.events, *self.taps, self.packet.fileno(), -1, -2, 9999, 0)[choice % 9]


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with network_namespace() as ip:
        world = World()
        ip("link set prop0 up")
        # What a process has once: all of its workers, and the guard's eventfd.
        for _ in range(9):
            with pyvhost.open("/dev/vhost-net") as handle:
                for step in running(world):
                    do(world, handle, step)
        yield world
        world.close()


pages = st.one_of(st.integers(0, 255), st.integers(0, 400))
indices = st.one_of(st.integers(0, 1), st.integers(0, 3), st.just(0xFFFFFFFF))
words = st.one_of(st.integers(0, 300), st.sampled_from([1, 2, 16, 256, 32768, 0xFFFF, 0xFFFFFFFF]))

steps = st.one_of(
    st.tuples(st.just("owner"), st.sampled_from([abi.SET_OWNER, abi.SET_OWNER, abi.RESET_OWNER])),
    st.tuples(st.just("features"), st.lists(st.sampled_from(FEATURES), max_size=4)),
    st.tuples(st.just("table"), st.lists(st.tuples(pages, st.integers(0, 1 << 21), pages), max_size=4)),
    st.tuples(
        st.just("state"),
        st.sampled_from(
            [
                abi.SET_VRING_NUM,
                abi.SET_VRING_BASE,
                abi.GET_VRING_BASE,
                abi.SET_VRING_ENDIAN,
                abi.GET_VRING_ENDIAN,
                abi.SET_VRING_BUSYLOOP_TIMEOUT,
                abi.GET_VRING_BUSYLOOP_TIMEOUT,
                abi.ATTACH_VRING_WORKER,
                abi.GET_VRING_WORKER,
            ]
        ),
        indices,
        words,
    ),
    st.tuples(st.just("addr"), indices, st.integers(0, 3), pages, pages, pages, pages),
    st.tuples(
        st.just("file"),
        st.sampled_from(
            [
                abi.SET_VRING_KICK,
                abi.SET_VRING_CALL,
                abi.SET_VRING_ERR,
                abi.NET_SET_BACKEND,
                abi.NET_SET_BACKEND,
            ]
        ),
        indices,
        st.integers(0, 8),
    ),
    st.tuples(st.just("log"), pages),
    st.tuples(st.just("kick"), st.integers(0, 2)),
    st.tuples(
        st.just("iotlb"), pages, st.integers(0, 1 << 20), pages, st.integers(0, 255), st.integers(0, 7)
    ),
    st.tuples(st.just("memory"), st.integers(0, SIZE - 64), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("raw"), st.integers(0, 0xFFFFFFFF), st.binary(max_size=80)),
    st.tuples(
        st.just("known"),
        st.sampled_from(
            sorted(
                value
                for name, value in vars(abi).items()
                if isinstance(value, int) and value & 0xFF00 == 0xAF00
            )
        ),
        st.binary(max_size=80),
    ),
    st.tuples(st.just("pointer"), st.integers(0, 0xFF), pages),
    st.tuples(st.just("write"), st.binary(max_size=80)),
    st.tuples(st.just("read"), st.integers(0, 100)),
)


def running(world: World) -> list[tuple[object, ...]]:
    """What most sequences begin with: both rings bound."""
    begun: list[tuple[object, ...]] = [
        ("owner", abi.SET_OWNER),
        ("features", [virtio.F_VERSION_1]),
        ("table", [(0, SIZE, 0)]),
    ]
    for index in (0, 1):
        begun += [
            ("state", abi.SET_VRING_NUM, index, 16),
            ("addr", index, 0, 8 * index, 8 * index + 2, 8 * index + 1, 0),
            ("file", abi.SET_VRING_KICK, index, 0),
            ("file", abi.NET_SET_BACKEND, index, 3),
        ]
    return begun


def do(world: World, handle: Handle, step: tuple) -> None:  # type: ignore[type-arg]
    what, *rest = step
    if what == "owner":
        handle.ioctl(rest[0])
    elif what == "features":
        handle.ioctl(abi.SET_FEATURES, sum(1 << bit for bit in set(rest[0])).to_bytes(8, "little"))
    elif what == "table":
        rows = [abi.MemoryRegion(4096 * guest, size, world.address(user)) for guest, size, user in rest[0]]
        handle.ioctl(abi.SET_MEM_TABLE, bytes(abi.Memory(len(rows))) + b"".join(map(bytes, rows)))
    elif what == "state":
        handle.ioctl(rest[0], abi.VringState(rest[1], rest[2]))
    elif what == "addr":
        index, flags, *parts = rest
        handle.ioctl(abi.SET_VRING_ADDR, abi.VringAddr(index, flags, *map(world.address, parts)))
    elif what == "file":
        handle.ioctl(rest[0], abi.VringFile(rest[1], world.fd(rest[2])))
    elif what == "log":
        handle.ioctl(abi.SET_LOG_BASE, world.address(rest[0]).to_bytes(8, "little"))
    elif what == "kick":
        os.eventfd_write(world.events[rest[0]], 1)
    elif what == "iotlb":
        iova, size, uaddr, perm, kind = rest
        message = abi.IotlbMsg(4096 * iova, size, world.address(uaddr), perm, kind)
        handle.write(bytes(abi.Msg(abi.IOTLB_MSG, iotlb=message)))
    elif what == "memory":
        world.memory[rest[0] : rest[0] + len(rest[1])] = rest[1]
    elif what in ("raw", "known"):
        handle.ioctl(rest[0], rest[1])
    elif what == "pointer":
        handle.ioctl(0x4008AF00 | rest[0], world.address(rest[1]))
    elif what == "write":
        handle.write(rest[0])
    else:
        handle.read(rest[0])


@pytest.mark.parametrize("begun", [False, True], ids=["as new", "running"])
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(sequence=st.lists(steps, max_size=25))
def test_any_sequence_is_answered(world: World, begun: bool, sequence: list[tuple[object, ...]]) -> None:
    world.memory[:SIZE] = bytes(SIZE)
    before = open_fds()
    answers = []
    with pyvhost.open("/dev/vhost-net", os.O_RDWR | os.O_NONBLOCK) as handle:
        for step in (running(world) if begun else []) + sequence:
            try:
                do(world, handle, step)
            except OSError as error:
                answers.append((step, error))
        assert [
            (step, error) for step, error in answers if error.errno not in ERRORS or not error.strerror
        ] == []
        # It still answers, and what it has to say can be had.
        assert handle.ioctl(abi.GET_FEATURES, bytes(8)) == 0x33D008000.to_bytes(8, "little")
        for _ in range(5000):
            with suppress(BlockingIOError):
                if len(handle.read(72)) == 72:
                    continue
            break
        else:
            raise AssertionError("more misses than there can be")
        assert not select.select([handle], [], [], 0)[0]
    # Others of this process may go meanwhile.
    assert open_fds() <= before
