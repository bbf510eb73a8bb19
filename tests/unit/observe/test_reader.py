"""Reading counters' files: what a writer wrote, and what no writer ever would."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pyvhost.abi import counters_file as layout
from pyvhost.observe import reader
from pyvhost.vhost.counters import CounterFile
from requirements import need_root

FIELDS = ("packets", "bytes", "drops")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "counters"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def written(place: Path) -> Iterator[CounterFile]:
    with CounterFile(FIELDS, place, capacity=8) as file:
        file.row({"device": "vm0", "kind": "net", "queue": "rx0", "backend": "tap:vm0"})[:] = 1, 2, 3
        file.row({"device": "vm0", "kind": "net", "queue": "tx0", "backend": "tap:vm0"})[:] = 4, 5, 6
        yield file


def content(file: CounterFile) -> bytearray:
    assert file.path is not None
    return bytearray(file.path.read_bytes())


def put(place: Path, data: bytes | bytearray) -> int:
    """A file of these bytes, as a living process holds it; the descriptor that holds it."""
    fd = os.open(place / "1.counters", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(fd, data)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def read_back(place: Path, data: bytes | bytearray) -> reader.Snapshot:
    fd = put(place, data)
    try:
        return reader.snapshot([place])
    finally:
        os.close(fd)


def test_rows_with_their_labels(place: Path, written: CounterFile) -> None:
    snapshot = reader.snapshot([place])
    assert snapshot.problems == ()
    (process,) = snapshot.processes
    assert process.pid == os.getpid()
    assert process.path == written.path
    assert process.fields == FIELDS
    assert [row.label("queue") for row in process.rows] == ["rx0", "tx0"]
    assert process.rows[0].values == {"packets": 1, "bytes": 2, "drops": 3}
    assert process.rows[1].get("bytes") == 5
    assert process.rows[1].get("no such") == 0
    assert process.rows[1].label("no such") == ""


def test_it_sees_what_is_counted_meanwhile(place: Path, written: CounterFile) -> None:
    row = written.row({"queue": "rx1"})
    seen = []
    for _ in range(3):
        row[0] += 1
        seen.append(reader.snapshot([place]).processes[0].rows[2].get("packets"))
    assert seen == [1, 2, 3]


def test_released_rows_are_left_out(place: Path, written: CounterFile) -> None:
    row = written.row({"queue": "gone"})
    written.release(row)
    assert [r.label("queue") for r in reader.snapshot([place]).processes[0].rows] == ["rx0", "tx0"]
    written.row({"queue": "new"})
    last = reader.snapshot([place]).processes[0].rows[-1]
    assert (last.label("queue"), last.generation) == ("new", 3)


def test_row_that_changes_hands_while_it_is_read_is_left_out(
    place: Path, written: CounterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = written.row({"queue": "mine"})
    true_pread = os.pread
    reads = []

    def pread(fd: int, size: int, offset: int) -> bytes:
        data = true_pread(fd, size, offset)
        if size > 512:
            reads.append(size)
            if len(reads) == 2:
                written.release(mine)
                written.row({"queue": "another"})
        return data

    monkeypatch.setattr(os, "pread", pread)
    assert [r.label("queue") for r in reader.snapshot([place]).processes[0].rows] == ["rx0", "tx0"]
    assert len(reads) == 3


def test_no_folder_is_nothing_to_see(tmp_path: Path) -> None:
    snapshot = reader.snapshot([tmp_path / "absent"])
    assert (snapshot.processes, snapshot.problems) == ((), ())


def test_a_process_that_is_gone_is_not_shown(place: Path, written: CounterFile) -> None:
    os.close(put(place, content(written)))
    assert [p.path.name for p in reader.snapshot([place]).processes] == [f"{os.getpid()}.counters"]


def test_reading_changes_nothing(place: Path, written: CounterFile) -> None:
    (place / "2.counters").write_bytes(b"left by someone who was killed")
    before = content(written)
    reader.snapshot([place])
    assert content(written) == before
    assert (place / "2.counters").exists()


def test_a_file_that_is_being_made_is_not_shown_yet(place: Path) -> None:
    for data in (b"", bytes(64), bytes(8) + b"\1" + bytes(4096)):
        snapshot = read_back(place, data)
        assert (snapshot.processes, snapshot.problems) == ((), ())


def test_folder_that_others_may_write_to_is_not_believed(place: Path, written: CounterFile) -> None:
    place.chmod(0o770)
    snapshot = reader.snapshot([place])
    assert snapshot.processes == ()
    assert "another user may write" in snapshot.problems[0]


def test_links_and_other_things_are_not_opened(place: Path, written: CounterFile, tmp_path: Path) -> None:
    assert written.path is not None
    (tmp_path / "elsewhere").write_bytes(content(written))
    (place / "3.counters").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(place / "4.counters")
    (place / "5.counters").mkdir()
    snapshot = reader.snapshot([place])
    assert [p.path for p in snapshot.processes] == [written.path]
    assert sorted(problem.split(":")[0].rpartition("/")[2] for problem in snapshot.problems) == [
        "3.counters",
        "4.counters",
        "5.counters",
    ]


def test_files_of_others_in_ones_folder(place: Path, written: CounterFile) -> None:
    need_root()
    assert written.path is not None
    os.chown(written.path, 12345, -1)
    snapshot = reader.snapshot([place])
    assert snapshot.processes == ()
    assert "is of user 12345, its folder of user 0" in snapshot.problems[0]


def test_file_that_shrinks_is_an_error_and_no_sigbus(place: Path, written: CounterFile) -> None:
    data = content(written)
    for size in (10, 63, 70, 200, 500, 895):
        (problem,) = [p for p in read_back(place, data[:size]).problems if "1.counters" in p]
        assert "ends in its" in problem, size


OFFSETS = {
    name: (getattr(layout.Header, name).offset, "<Q" if getattr(layout.Header, name).size == 8 else "<I")
    for name in ("version", "info_bytes", "pid", "rows_offset", "row_bytes", "row_capacity", "rows_used")
}


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("version", 2, "is of version 2, this program reads 1"),
        ("info_bytes", 0, "info_bytes is 0"),
        ("info_bytes", 2**32 - 1, "info_bytes is 4294967295"),
        ("info_bytes", 5, "is not JSON"),
        ("pid", 0, "pid is 0"),
        ("rows_offset", 64, "rows_offset is 64"),
        ("rows_offset", 2**32 - 64, "rows_offset is"),
        ("row_bytes", 0, "row_bytes is 0"),
        ("row_bytes", 2**31, "row_bytes is"),
        ("row_capacity", 2**31, "row_capacity is"),
        ("rows_used", 9, "rows_used is 9, must be from 0 to 8"),
        ("rows_used", 2**64 - 1, "rows_used is -1"),
    ],
)
def test_header_out_of_bounds(
    place: Path, written: CounterFile, name: str, value: int, complaint: str
) -> None:
    data = content(written)
    offset, form = OFFSETS[name]
    struct.pack_into(form, data, offset, value)
    snapshot = read_back(place, data)
    assert len(snapshot.processes) == 1, "the good one is still shown"
    (problem,) = snapshot.problems
    assert "1.counters" in problem
    assert complaint in problem


def with_info(data: bytearray, info: bytes) -> bytearray:
    size = struct.unpack_from("<I", data, OFFSETS["info_bytes"][0])[0]
    data[64 : 64 + size] = info.ljust(size)
    return data


@pytest.mark.parametrize(
    ("info", "complaint"),
    [
        (b"[]", "not JSON with fields"),
        (b"{}", "not JSON with fields"),
        (b'{"fields": 3}', "must be names"),
        (b'{"fields": ["a", "b"]}', "field_count is 3"),
        (b'{"fields": ["a", "a", "a"]}', "field_count is 3"),
        (b'{"fields": ["a", "b", 3]}', "must be names"),
        (b'{"fields": ["a", "b", "c{}"]}', "must be names"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_info_that_makes_no_sense(place: Path, written: CounterFile, info: bytes, complaint: str) -> None:
    (problem,) = read_back(place, with_info(content(written), info)).problems
    assert complaint in problem


@pytest.mark.parametrize(
    "label", [b"[]", b"{", b'{"a": 1}', b"x" * 256, b"[" * 250, b'{"\xff": ""}', b'{"a": {}}']
)
def test_label_that_makes_no_sense(place: Path, written: CounterFile, label: bytes) -> None:
    data = content(written)
    start = struct.unpack_from("<I", data, OFFSETS["rows_offset"][0])[0]
    data[start : start + 256] = label.ljust(256, b"\0")
    (problem,) = read_back(place, data).problems
    assert "row 0: the label" in problem


def test_what_a_terminal_would_obey_is_taken_out(place: Path, written: CounterFile) -> None:
    written.row({"device": "\x1b]0;owned\x07\n\u202etxt"})
    (process,) = reader.snapshot([place]).processes
    assert process.rows[2].label("device") == "�]0;owned���txt"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 1500), st.binary(min_size=1, max_size=9)), max_size=6),
    st.integers(0, 4000),
)
@example([], 4000)
def test_no_damage_does_harm(
    place: Path, written: CounterFile, damage: list[tuple[int, bytes]], size: int
) -> None:
    data = content(written)
    for offset, value in damage:
        data[offset : offset + len(value)] = value
    snapshot = read_back(place, data[:size])
    assert written.path in [process.path for process in snapshot.processes]
    assert len(snapshot.processes) + len(snapshot.problems) <= 2


def test_where_a_user_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert list(reader.directories()) == [
        tmp_path / "pyvhost",
        Path("/dev/shm/pyvhost-1234"),
        Path("/tmp/pyvhost-1234"),
    ]


def test_reader_and_writer_look_in_the_same_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with CounterFile(FIELDS) as file:
        # Devices of other tests may have made this process a file elsewhere.
        found = [process.path for process in reader.snapshot().processes if process.pid == os.getpid()]
        assert file.path in found


def test_it_is_quick_to_import() -> None:
    code = (
        "import sys, pyvhost.observe.reader; print({'numpy', 'numba', 'rich', 'ctypes'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "{'ctypes'}"
