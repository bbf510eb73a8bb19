"""Every store, and stores in wrappers, against a bytearray: random writes, zeroes and discards, and what is read."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvhost.host.poller import Poller
from pyvhost.scsi.stores import libnbd
from pyvhost.scsi.stores.base import ExtentState, Store
from pyvhost.scsi.stores.file import FileStore
from pyvhost.scsi.stores.memory import MemoryStore
from pyvhost.scsi.stores.nbd import NbdStore
from pyvhost.scsi.stores.spec import parse
from pyvhost.scsi.stores.wrappers import innermost
from requirements import need
from stores import Disk, make_qcow2, nbdkit, qemu_nbd

BLOCKS = 512
SIZE = BLOCKS * 512

Opened = contextlib.AbstractContextManager[Store]


def file(directory: Path) -> Path:
    path = directory / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@contextlib.contextmanager
def by_nbdkit(directory: Path) -> Iterator[Store]:
    with nbdkit(directory, "memory", str(SIZE)) as server:
        yield NbdStore(server.uri)


@contextlib.contextmanager
def by_qemu(directory: Path) -> Iterator[Store]:
    with qemu_nbd(make_qcow2(directory / "disk.qcow2", SIZE), "qcow2") as server:
        yield NbdStore(server.uri)


STORES: dict[str, Callable[[Path], Opened]] = {
    "memory": lambda _: contextlib.nullcontext(MemoryStore(SIZE)),
    "file": lambda path: contextlib.nullcontext(FileStore(str(file(path)))),
    "buffered file": lambda path: contextlib.nullcontext(FileStore(str(file(path)), direct=False)),
    "file that waits": lambda path: contextlib.nullcontext(
        parse(f"{file(path)},delay=0.1,limit=1000000iops")
    ),
    "memory that fails": lambda _: contextlib.nullcontext(parse(f"memory:{SIZE},error-rate=0.2,delay=0")),
    "nbdkit": by_nbdkit,
    "qemu-nbd, qcow2": by_qemu,
}

places = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 64)).map(
    lambda place: (place[0] * 512, min(place[1], BLOCKS - place[0]) * 512)
)
steps = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["write", "fua"]),
            places,
            st.integers(1, 255),
            st.lists(st.integers(0, 32768), max_size=4),
        ),
        st.tuples(st.just("read"), places, st.just(0), st.lists(st.integers(0, 32768), max_size=4)),
        st.tuples(
            st.sampled_from(["zero", "unmap", "discard", "extents", "flush"]), places, st.just(0), st.just([])
        ),
    ),
    min_size=5,
    max_size=30,
)


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_a_run_of_bytes(name: str, tmp_path: Path) -> None:
    if "nbd" in name:
        try:
            libnbd.library()
        except libnbd.NbdError:
            need(False, "apt-get install libnbd0")
    with Poller() as poller, STORES[name](tmp_path) as store, Disk(store, poller) as disk:
        model = bytearray(SIZE)

        @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
        @given(steps)
        def run(script: list[tuple[str, tuple[int, int], int, list[int]]]) -> None:
            for what, (offset, length), value, cuts in script:
                step(disk, model, what, offset, length, value, [cut for cut in cuts if cut < length])

        run()
        # Under all wrappers: what is left of it in the end.
        if isinstance(innermost(store), FileStore):
            assert disk.flush() == 0
            assert (tmp_path / "disk.img").read_bytes() == model


def step(
    disk: Disk, model: bytearray, what: str, offset: int, length: int, value: int, cuts: list[int]
) -> None:
    """One operation, on the store and on the model."""
    if what == "read":
        memory = memoryview(bytearray(length))
        views = [memory[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), length], strict=True)]
        number = disk.call(lambda done: disk.store.read(offset, views, done))
        assert number == errno.EIO or memory == model[offset : offset + length]
    elif what == "extents":
        with contextlib.suppress(AssertionError) if failing(disk) else contextlib.nullcontext():
            for start, count, state in disk.extents(offset, length):
                if state is not ExtentState.MAPPED:
                    assert not any(model[start : start + count])
        return
    elif what == "flush":
        number = disk.flush()
    else:
        data = bytes([value]) * length
        if what in ("write", "fua"):
            number = disk.write(offset, data, cuts, fua=what == "fua")
        elif what == "discard":
            number = disk.discard(offset, length)
        else:
            number = disk.zero(offset, length, unmap=what == "unmap")
        if number == 0:
            model[offset : offset + length] = data
    assert number == 0 or (failing(disk) and number == errno.EIO)


def failing(disk: Disk) -> bool:
    return "error-rate" in disk.store.spec
