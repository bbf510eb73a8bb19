"""A file as a disk: what is kept, what is given back, who else may have it, and what becomes of errors."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvhost.host.poller import Poller
from pyvhost.scsi.stores import system
from pyvhost.scsi.stores.base import ExtentState
from pyvhost.scsi.stores.file import FileStore
from requirements import need, need_program, need_root
from stores import Disk

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


@pytest.fixture(params=[None, False], ids=["direct where it can", "buffered"])
def direct(request: pytest.FixtureRequest) -> bool | None:
    value: bool | None = request.param
    return value


def test_what_is_written_is_in_the_file(image: Path, poller: Poller, direct: bool | None) -> None:
    with Disk(FileStore(str(image), direct=direct), poller) as disk:
        assert disk.store.size == 16 * MIB
        assert disk.write(4096, b"a" * 8192) == 0
        assert disk.flush() == 0
        assert disk.read(4096, 8192) == b"a" * 8192
        assert disk.read(8192, 8192) == b"a" * 4096 + bytes(4096)
    data = image.read_bytes()
    assert data[4096:12288] == b"a" * 8192
    assert len(data) == 16 * MIB


def test_a_file_that_is_not_there_is_named_with_what_makes_one(tmp_path: Path, poller: Poller) -> None:
    path = tmp_path / "absent.img"
    with pytest.raises(FileNotFoundError, match="truncate -s 10G FILE") as caught:
        FileStore(str(path)).open(poller)
    assert caught.value.filename == str(path)
    assert not path.exists()


def test_memory_that_direct_io_cannot_take_is_taken_all_the_same(
    image: Path, poller: Poller, direct: bool | None
) -> None:
    data = os.urandom(3 * MIB + 512)
    with Disk(FileStore(str(image), direct=direct), poller) as disk:
        assert disk.write(512, data, cuts=[1, 513, 4097, 2 * MIB + 3]) == 0
        assert disk.read(512, len(data), cuts=[7, 7, 600, MIB + 1]) == data
        assert disk.write(0, b"x" * 512, cuts=[100], fua=True) == 0
        assert disk.read(0, 1024) == b"x" * 512 + data[:512]


def test_more_views_than_one_system_call_takes(image: Path, poller: Poller, direct: bool | None) -> None:
    data = os.urandom(3000 * 512)
    with Disk(FileStore(str(image), direct=direct), poller) as disk:
        assert disk.write(0, data, cuts=list(range(512, len(data), 512))) == 0
        assert disk.read(0, len(data), cuts=list(range(512, len(data), 512))) == data


def test_direct_io_is_used_where_the_file_system_has_it(image: Path, poller: Poller) -> None:
    fd = os.open(image, os.O_RDWR)
    alignment = system.direct_alignment(fd)
    os.close(fd)
    need(
        alignment is not None and 0 < alignment[1] <= 512,
        "a file system with direct I/O, for the temporary files",
    )
    with Disk(FileStore(str(image)), poller) as disk:
        assert isinstance(disk.store, FileStore)
        assert disk.store.direct
        assert system.get_flags(disk.store.fd) & os.O_DIRECT
    with Disk(FileStore(str(image), direct=False), poller) as disk:
        assert not system.get_flags(disk.store.fd) & os.O_DIRECT


def test_zeroes_and_holes(image: Path, poller: Poller, direct: bool | None) -> None:
    with Disk(FileStore(str(image), direct=direct), poller) as disk:
        need(disk.store.can_unmap, "a file system with holes, for the temporary files")
        assert disk.write(0, b"z" * (4 * MIB)) == 0
        assert disk.flush() == 0
        before = image.stat().st_blocks
        assert disk.zero(MIB, MIB) == 0
        assert disk.read(MIB - 512, MIB + 1024) == b"z" * 512 + bytes(MIB) + b"z" * 512
        assert image.stat().st_blocks >= before, "it gave space back that nobody asked it for"
        assert disk.discard(2 * MIB, MIB) == 0
        assert disk.zero(3 * MIB, MIB, unmap=True) == 0
        assert disk.read(2 * MIB, 2 * MIB) == bytes(2 * MIB)
        assert image.stat().st_blocks <= before - 2 * MIB // 512
        assert disk.discard(512, 512) == 0
        assert disk.read(0, 1536) == b"z" * 512 + bytes(512) + b"z" * 512
        assert image.stat().st_size == 16 * MIB


def test_extents_tell_data_from_holes(image: Path, poller: Poller) -> None:
    with Disk(FileStore(str(image)), poller) as disk:
        need(disk.store.can_unmap, "a file system with holes, for the temporary files")
        assert disk.extents(0, 16 * MIB) == [(0, 16 * MIB, ExtentState.DEALLOCATED)]
        assert disk.write(4 * MIB, b"d" * MIB) == 0
        assert disk.extents(0, 16 * MIB) == [
            (0, 4 * MIB, ExtentState.DEALLOCATED),
            (4 * MIB, MIB, ExtentState.MAPPED),
            (5 * MIB, 11 * MIB, ExtentState.DEALLOCATED),
        ]
        assert disk.extents(4 * MIB + 512, 512) == [(4 * MIB + 512, 512, ExtentState.MAPPED)]
        assert disk.extents(16 * MIB - 512, 512) == [(16 * MIB - 512, 512, ExtentState.DEALLOCATED)]


def test_two_writers_do_not_open_one_image(image: Path, poller: Poller) -> None:
    with Disk(FileStore(str(image)), poller):
        for other in (
            FileStore(str(image)),
            FileStore(str(image), shared=True),
            FileStore(str(image), read_only=True),
        ):
            with pytest.raises(OSError, match="shared") as refused:
                other.open(poller)
            assert refused.value.errno == errno.EBUSY
    with Disk(FileStore(str(image)), poller) as again:
        assert again.store.size == 16 * MIB


def test_those_who_share_may(image: Path, poller: Poller) -> None:
    with (
        Disk(FileStore(str(image), shared=True), poller) as one,
        Disk(FileStore(str(image), shared=True), poller) as two,
    ):
        assert one.write(0, b"1" * 512) == 0
        assert two.read(0, 512) == b"1" * 512
    readers = [FileStore(str(image), read_only=True) for _ in range(2)]
    with Disk(readers[0], poller), Disk(readers[1], poller):
        pass


def test_qemu_honours_the_lock(image: Path, poller: Poller) -> None:
    qemu_io = need_program("qemu-io", package="qemu-utils")
    command = [qemu_io, "-f", "raw", "-c", "write 0 512", str(image)]
    with Disk(FileStore(str(image)), poller):
        refused = subprocess.run(command, check=False, capture_output=True, text=True)
        assert "lock" in refused.stderr + refused.stdout
        assert refused.returncode != 0
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_a_file_that_grows_or_shrinks_is_told(image: Path, poller: Poller) -> None:
    with Disk(FileStore(str(image)), poller) as disk:
        os.truncate(image, 32 * MIB + 100)
        disk.until(lambda: disk.sizes)
        assert disk.sizes == [32 * MIB]
        assert disk.store.size == 32 * MIB
        assert disk.write(32 * MIB - 512, b"e" * 512) == 0
        os.truncate(image, MIB)
        disk.until(lambda: len(disk.sizes) == 2)
        assert disk.sizes[1] == MIB
        assert disk.call(lambda done: disk.store.read(MIB, [memoryview(bytearray(512))], done)) == errno.EIO


def test_a_read_behind_an_end_that_nobody_has_seen_yet_fails(image: Path, poller: Poller) -> None:
    with Disk(FileStore(str(image)), poller) as disk:
        os.truncate(image, MIB)
        assert disk.call(lambda done: disk.store.read(MIB, [memoryview(bytearray(512))], done)) == errno.EIO


def test_what_is_read_only_stays_as_it_is(image: Path, poller: Poller) -> None:
    with Disk(FileStore(str(image), read_only=True), poller) as disk:
        assert disk.store.read_only
        assert not disk.store.can_unmap
        assert disk.write(0, b"w" * 512) == errno.EROFS
        assert disk.zero(0, 512) == errno.EROFS
        assert disk.discard(0, 512) == errno.EROFS
        assert disk.flush() == 0
        assert disk.read(0, 512) == bytes(512)


def test_a_store_that_is_closed_says_so(image: Path, poller: Poller) -> None:
    store = FileStore(str(image))
    with Disk(store, poller) as disk:
        ended: list[int] = []
        for number in range(20):
            store.write(number * MIB // 2, [memoryview(b"c" * 65536)], ended.append)
    # What was under way was waited for, and is told.
    disk.until(lambda: len(ended) == 20)
    assert ended == [0] * 20
    assert image.read_bytes().count(b"c") == 20 * 65536
    assert disk.flush() == errno.ECANCELED
    store.close()
    with Disk(store, poller):
        assert disk.read(0, 512) == b"c" * 512


@pytest.mark.parametrize("kind", ["nothing", "directory", "fifo"])
def test_what_is_no_disk_is_refused(tmp_path: Path, poller: Poller, kind: str) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(OSError, match=kind):
        FileStore(str(path)).open(poller)


def test_a_file_system_that_is_full(poller: Poller, tmp_path: Path) -> None:
    need_root()
    mounted = tmp_path / "full"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mounted)]
    need(subprocess.run(command, check=False, capture_output=True).returncode == 0, "be allowed to mount")
    try:
        image = mounted / "disk.img"
        with image.open("wb") as file:
            file.truncate(8 * MIB)
        with Disk(FileStore(str(image)), poller) as disk:
            assert disk.write(0, b"f" * (2 * MIB)) == errno.ENOSPC
            assert disk.read(4 * MIB, 512) == bytes(512)
            assert disk.discard(0, 2 * MIB) == 0
            assert disk.write(0, b"f" * 4096) == 0
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_a_flush_that_failed_is_not_forgotten(
    image: Path, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Disk(FileStore(str(image), direct=False), poller) as disk:
        assert disk.write(0, b"f" * 512) == 0

        def fail(_fd: int) -> None:
            raise OSError(errno.EIO, "as a disk does that is worn")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            assert disk.flush() == errno.EIO
        assert disk.flush() == errno.EIO, "the page cache has dropped what it could not write"


def test_a_device_that_went_away_and_came_back(
    image: Path, poller: Poller, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Disk(FileStore(str(image)), poller) as disk:
        fd = disk.store.fd

        def fail(*_: object) -> int:
            raise OSError(errno.ENXIO, "as a device does that was pulled out")

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            patch.setattr(FileStore, "_open", fail)
            assert (
                disk.call(lambda done: disk.store.read(0, [memoryview(bytearray(512))], done)) == errno.ENODEV
            )
            assert disk.states == [False]
            assert not disk.store.online
        disk.until(lambda: disk.states == [False, True])
        assert disk.store.fd == fd
        assert disk.store.online
        assert disk.read(0, 512) == bytes(512)
        with pytest.raises(OSError, match="shared"):
            FileStore(str(image)).open(poller)


def test_a_limit_on_file_sizes_is_no_signal(image: Path, poller: Poller) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Disk(FileStore(str(image)), poller) as disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
        try:
            assert disk.write(2 * MIB, b"l" * 512) == errno.ENOSPC
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)


# --- block devices -------------------------------------------------------------------------------------------


@pytest.fixture
def device(image: Path) -> Iterator[Path]:
    need_root()
    losetup = need_program("losetup", package="mount")
    made = subprocess.run(
        [losetup, "--find", "--show", str(image)], check=False, capture_output=True, text=True
    )
    need(made.returncode == 0, "modprobe loop")
    path = Path(made.stdout.strip())
    try:
        yield path
    finally:
        subprocess.run([losetup, "--detach", str(path)], check=True)


def test_a_block_device(device: Path, image: Path, poller: Poller, direct: bool | None) -> None:
    with Disk(FileStore(str(device), direct=direct), poller) as disk:
        assert disk.store.size == 16 * MIB
        assert disk.write(MIB, b"b" * MIB, cuts=[5]) == 0
        assert disk.flush() == 0
        assert image.read_bytes()[MIB : 2 * MIB] == b"b" * MIB
        assert disk.zero(MIB, 4096) == 0
        assert disk.read(MIB, 8192) == bytes(4096) + b"b" * 4096
        assert disk.store.can_unmap
        before = image.stat().st_blocks
        assert disk.discard(MIB, MIB // 2) == 0
        assert disk.read(MIB, MIB) == bytes(MIB // 2) + b"b" * (MIB // 2)
        assert disk.flush() == 0
        assert image.stat().st_blocks < before
        assert disk.extents(0, MIB) == [(0, MIB, ExtentState.MAPPED)], "a device doesn't tell"
        with pytest.raises(OSError, match=r"busy|shared"):
            FileStore(str(device)).open(poller)


def test_a_block_device_that_grows(device: Path, image: Path, poller: Poller) -> None:
    with Disk(FileStore(str(device)), poller) as disk:
        os.truncate(image, 24 * MIB)
        subprocess.run([need_program("losetup", package="mount"), "--set-capacity", str(device)], check=True)
        disk.until(lambda: disk.sizes)
        assert disk.sizes == [24 * MIB]
