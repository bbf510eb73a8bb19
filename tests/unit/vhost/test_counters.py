"""The counters' file as its writer makes it: rows, labels, where it lies, when it goes."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyvhost.abi import counters_file as layout
from pyvhost.vhost import counters
from pyvhost.vhost.counters import CounterFile

FIELDS = ("packets", "bytes", "drops")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "counters"


def header_of(path: Path) -> layout.Header:
    return layout.Header.from_buffer_copy(path.read_bytes())


def row_bytes(path: Path, index: int) -> bytes:
    header = header_of(path)
    start = header.rows_offset + index * header.row_bytes
    return path.read_bytes()[start : start + header.row_bytes]


def test_file_says_what_it_is(place: Path) -> None:
    with CounterFile(FIELDS, place) as file:
        assert file.path == place / f"{os.getpid()}.counters"
        data = file.path.read_bytes()
        header = header_of(file.path)
        assert data[:8] == b"pyvhost\x01"
        assert (header.version, header.pid, header.field_count) == (1, os.getpid(), 3)
        assert json.loads(data[64 : 64 + header.info_bytes]) == {"fields": list(FIELDS)}
        assert header.rows_offset % 64 == 0
        assert header.row_bytes % 64 == 0
        assert len(data) == header.rows_offset + header.row_capacity * header.row_bytes


def test_what_is_counted_by_address_is_in_the_file(place: Path) -> None:
    with CounterFile(FIELDS, place) as file:
        assert file.path is not None
        file.row({"queue": "other"})
        row = file.row({"device": "vm0", "queue": "rx0"})
        assert row.dtype == np.int64
        assert row.shape == (3,)
        assert row.flags.c_contiguous
        assert row.ctypes.data % 64 == 0, "two queues must not share a cache line"
        ctypes.c_int64.from_address(row.ctypes.data + 8).value = -5
        row[2] = 2**62
        data = row_bytes(file.path, 1)
        assert json.loads(data[:256].rstrip(b"\0")) == {"device": "vm0", "queue": "rx0"}
        assert int.from_bytes(data[256:264], sys.byteorder) == 1
        values = np.frombuffer(data, np.int64, 3, offset=layout.VALUES_OFFSET)
        assert values.tolist() == [0, -5, 2**62]


def test_released_row_is_used_again_and_starts_from_nothing(place: Path) -> None:
    with CounterFile(FIELDS, place, capacity=2) as file:
        assert file.path is not None
        first, second = file.row({"queue": "a"}), file.row({"queue": "b"})
        first[:] = 7
        second[:] = 8
        file.release(first)
        assert int.from_bytes(row_bytes(file.path, 0)[256:264], sys.byteorder) == 2, "even: nobody's"
        again = file.row({"queue": "c"})
        assert again.ctypes.data == first.ctypes.data
        assert again.tolist() == [0, 0, 0]
        assert second.tolist() == [8, 8, 8]
        assert int.from_bytes(row_bytes(file.path, 0)[256:264], sys.byteorder) == 3
        assert header_of(file.path).rows_used == 2


def test_no_row_left(place: Path) -> None:
    with CounterFile(FIELDS, place, capacity=1) as file:
        file.row({})
        with pytest.raises(OSError, match="all 1 rows of counters are in use"):
            file.row({})


def test_release_of_what_is_no_row(place: Path) -> None:
    with CounterFile(FIELDS, place) as file:
        row = file.row({})
        with pytest.raises(ValueError, match="not a row"):
            file.release(row[1:])
        with pytest.raises(ValueError, match="not a row"):
            file.release(np.zeros(3, np.int64))
        file.release(row)
        with pytest.raises(ValueError, match="released already"):
            file.release(row)


def test_every_row_has_memory_before_it_is_given_out(place: Path) -> None:
    with CounterFile(FIELDS, place, capacity=500) as file:
        assert file.path is not None
        header = header_of(file.path)
        for number in range(1, 501):
            file.row({"queue": str(number)})
            held = os.stat(file.path).st_blocks * 512
            assert held >= number * header.row_bytes
        # ... and not all at once: an idle process holds little.
    with CounterFile(FIELDS, place) as file:
        assert file.path is not None
        file.row({})
        about = os.stat(file.path)
        assert about.st_size > 2**20
        assert about.st_blocks * 512 < 2**16


def test_long_labels_lose_their_middle(place: Path) -> None:
    path = "stream:/run/" + "x" * 500 + "/vm0.sock"
    with CounterFile(FIELDS, place) as file:
        assert file.path is not None
        file.row({"device": "vm0", "backend": path})
        label = json.loads(row_bytes(file.path, 0)[:256].rstrip(b"\0"))
        assert label["device"] == "vm0"
        assert label["backend"].startswith("stream:/run/x")
        assert label["backend"].endswith("x/vm0.sock")
        with pytest.raises(ValueError, match="do not fit"):
            file.row({f"key{i}": "value" for i in range(100)})


def test_labels_that_are_no_text(place: Path) -> None:
    with CounterFile(FIELDS, place) as file:
        assert file.path is not None
        file.row({"device": "vm\udcff\0"})
        raw, _, rest = row_bytes(file.path, 0)[:256].partition(b"\0")
        assert json.loads(raw) == {"device": "vm?\0"}
        assert not rest.strip(b"\0")


def test_two_files_of_one_process(place: Path) -> None:
    with CounterFile(FIELDS, place) as one, CounterFile(FIELDS, place) as two:
        assert one.path is not None
        assert two.path is not None
        assert one.path != two.path
        assert {one.path, two.path} == set(place.iterdir())


def test_closed_file_is_gone_and_its_rows_still_count(place: Path) -> None:
    file = CounterFile(FIELDS, place)
    row = file.row({})
    file.close()
    file.close()
    assert list(place.iterdir()) == []
    row[0] += 1
    assert row[0] == 1
    with pytest.raises(ValueError, match="closed"):
        file.row({})


def test_only_its_owner_reads_and_writes(place: Path) -> None:
    with CounterFile(FIELDS, place) as file:
        assert file.path is not None
        assert stat.S_IMODE(os.stat(place).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o600


def test_folder_that_others_may_write_to_is_refused(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(PermissionError, match="not a place for counters"):
        CounterFile(FIELDS, place)


def test_folder_that_is_a_link_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError):
        CounterFile(FIELDS, place)


def test_link_in_the_folder_is_not_followed(place: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    place.mkdir(mode=0o700)
    (place / f"{os.getpid()}.counters").symlink_to(victim)
    with CounterFile(FIELDS, place) as file:
        assert file.path == place / f"{os.getpid()}.1.counters"
    assert victim.read_text() == "precious"


def test_runtime_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with CounterFile(FIELDS) as file:
        assert file.path == tmp_path / "pyvhost" / f"{os.getpid()}.counters"


def test_relative_runtime_directory_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "run")
    assert all(path.is_absolute() for path in counters.places())


def test_without_a_place_it_counts_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = [tmp_path / "absent" / "a", tmp_path / "absent" / "b"]
    monkeypatch.setattr(counters, "places", lambda: iter(nowhere))
    with CounterFile(FIELDS) as file:
        assert file.path is None
        row = file.row({"queue": "rx0"})
        row[0] = 3
        assert row[0] == 3
    assert "nobody can watch" in caplog.text
    assert str(nowhere[1]) in caplog.text


DIES = """
import os, sys
from pyvhost.vhost.counters import CounterFile
file = CounterFile(["packets"], sys.argv[1])
file.row({})
print(file.path, flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
elif sys.argv[2] == "fork":
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    print(os.path.exists(file.path), flush=True)
"""


def start(place: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DIES, str(place), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_file_goes_with_its_process(place: Path) -> None:
    with start(place, "end") as process:
        out, _ = process.communicate()
    assert out.startswith(str(place))
    assert list(place.iterdir()) == []


def test_forked_child_that_ends_leaves_the_file(place: Path) -> None:
    with start(place, "fork") as process:
        out, _ = process.communicate()
    assert out.splitlines()[-1] == "True"
    assert list(place.iterdir()) == []


def test_what_a_killed_process_left_is_swept_by_the_next(place: Path) -> None:
    with start(place, "wait") as killed, start(place, "wait") as living:
        assert killed.stdout is not None
        assert living.stdout is not None
        left, kept = (Path(p.stdout.readline().strip()) for p in (killed, living) if p.stdout)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.exists()
        (place / "other.txt").touch()
        with CounterFile(FIELDS, place) as file:
            assert file.path is not None
            assert {p.name for p in place.iterdir()} == {kept.name, file.path.name, "other.txt"}
        living.communicate("")


def test_its_file_is_locked_while_it_lives(place: Path) -> None:
    with CounterFile(FIELDS, place) as file:
        assert file.path is not None
        with open(file.path, "rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("fields", "capacity", "complaint"),
    [
        ((), 1, "0 fields"),
        ([f"f{i}" for i in range(257)], 1, "257 fields"),
        (["a"], 0, "capacity is 0"),
        (["a"], 16385, "capacity is 16385"),
    ],
)
def test_impossible_shapes(place: Path, fields: list[str], capacity: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CounterFile(fields, place, capacity=capacity)
