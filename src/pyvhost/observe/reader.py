"""The counters' files of the processes that serve now, read into dataclasses.

Promises: a file is believed only if its owner alone could have written it, it is of a process that lives, and
all that it says of itself is in bounds; a row is whole, or left out; reading is by pread(2), so that a file
that shrinks meanwhile is an error and no SIGBUS.
Never: writes, follows a symbolic link, or waits.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from pyvhost.abi import counters_file as layout

#: Values a row's label may have, and files in a folder: more is not ours.
_MAX_LABELS = 16
_MAX_FILES = 4096

_STATE = Struct("=q")


class CountersFileError(ValueError):
    """What claims to be a counters' file and is none; the message names file, field and number."""


@dataclass(frozen=True)
class Row:
    """One counted thing, a queue as a rule, at one moment."""

    labels: dict[str, str]
    #: Which use of its row this is: another one is another queue, counted from 0 again.
    generation: int
    #: By field name, as the file has them.
    values: dict[str, int]

    def label(self, name: str) -> str:
        """The label's value, empty if it has none."""
        return self.labels.get(name, "")

    def get(self, name: str) -> int:
        """The field's value, 0 if the file has no such field."""
        return self.values.get(name, 0)


@dataclass(frozen=True)
class Process:
    """A serving process and its rows."""

    pid: int
    #: Seconds since the epoch.
    started: float
    path: Path
    fields: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Snapshot:
    """All processes at one moment."""

    #: Seconds: of the clock that never jumps (for rates), and since the epoch.
    monotonic: float
    time: float
    processes: tuple[Process, ...] = ()
    #: What was found and not believed, to be told to the user.
    problems: tuple[str, ...] = ()


def directories() -> Iterator[Path]:
    """Where this user's processes leave their files; for root, everybody's."""
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        yield Path(runtime) / layout.RUNTIME_NAME
    shared = (layout.SHARED_DIRECTORY, layout.LAST_DIRECTORY)
    if uid != 0:
        yield from (Path(place.format(uid=uid)) for place in shared)
        return
    yield Path(layout.ROOT_DIRECTORY)
    yield from sorted(Path("/run/user").glob(f"*/{layout.RUNTIME_NAME}"))
    for place in shared:
        path = Path(place)
        yield from sorted(path.parent.glob(path.name.format(uid="*")))


def snapshot(where: Iterable[str | os.PathLike[str]] | None = None) -> Snapshot:
    """Every live process' rows, from the folders `where` (by default all of `directories`). Never raises."""
    processes: list[Process] = []
    problems: list[str] = []
    seen: set[tuple[int, int]] = set()
    for place in directories() if where is None else map(Path, where):
        try:
            about = os.stat(place)
        except OSError:
            continue
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        try:
            _read_directory(place, processes, problems)
        except OSError as error:
            problems.append(str(error))
    processes.sort(key=lambda process: (process.started, process.pid))
    return Snapshot(time.monotonic(), time.time(), tuple(processes), tuple(problems))


def _read_directory(place: Path, processes: list[Process], problems: list[str]) -> None:
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = os.fstat(directory)
        trusted = (os.geteuid(), 0) if os.geteuid() else (about.st_uid,)
        if about.st_uid not in trusted or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            problems.append(f"{place}: another user may write to it, so nothing in it is believed")
            return
        names = sorted(name for name in os.listdir(directory) if name.endswith(layout.SUFFIX))
        if len(names) > _MAX_FILES:
            problems.append(f"{place}: {len(names)} files, {_MAX_FILES} are looked at")
        for name in names[:_MAX_FILES]:
            try:
                process = _read_file(directory, place / name, about.st_uid)
            except FileNotFoundError:
                continue  # its process ended just now
            except (CountersFileError, OSError) as error:
                problems.append(
                    str(error) if isinstance(error, CountersFileError) else f"{place / name}: {error}"
                )
                continue
            if process is not None:
                processes.append(process)
    finally:
        os.close(directory)


def _read_file(directory: int, path: Path, owner: int) -> Process | None:
    """The process behind the file; None if it is gone, or not ready yet. CountersFileError, OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path.name, flags, dir_fd=directory)
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise CountersFileError(f"{path}: is no plain file")
        if about.st_uid not in (owner, 0):
            raise CountersFileError(f"{path}: is of user {about.st_uid}, its folder of user {owner}")
        return parse(fd, path) if _locked(fd) else None
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _exactly(fd: int, size: int, offset: int, path: Path, what: str) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise CountersFileError(f"{path}: ends in its {what}, {len(data)} of {size} bytes at {offset}")
    return data


def parse(fd: int, path: Path) -> Process | None:
    """What an open counters' file says; None while its process is still writing the header. CountersFileError."""
    header = layout.Header()
    first = os.pread(fd, ctypes.sizeof(header), 0)
    if not first.strip(b"\0"):
        return None
    if len(first) < ctypes.sizeof(header):
        raise CountersFileError(f"{path}: ends in its header, {len(first)} of {ctypes.sizeof(header)} bytes")
    ctypes.memmove(ctypes.byref(header), first, len(first))
    if header.magic == b"":
        return None
    fields = _check(fd, header, path)
    rows = tuple(_rows(fd, header, fields, path))
    return Process(header.pid, header.started_ns / 1e9, path, fields, rows)


def _bounded(path: Path, name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise CountersFileError(f"{path}: {name} is {value}, must be from {low} to {high}")


def _check(fd: int, header: layout.Header, path: Path) -> tuple[str, ...]:
    """The names of the fields, once everything else in the header has proved possible."""
    if bytes(header)[:8] != layout.MAGIC:
        raise CountersFileError(f"{path}: starts with {bytes(header)[:8]!r}: no counters' file")
    if header.version != layout.VERSION:
        raise CountersFileError(
            f"{path}: is of version {header.version}, this program reads {layout.VERSION}"
        )
    size = ctypes.sizeof(header)
    _bounded(path, "info_bytes", header.info_bytes, 2, layout.MAX_INFO_BYTES)
    _bounded(path, "pid", header.pid, 1, 2**31)
    _bounded(path, "started_ns", header.started_ns, 0, 2**63 - 1)
    _bounded(path, "field_count", header.field_count, 1, layout.MAX_FIELDS)
    _bounded(path, "row_capacity", header.row_capacity, 1, layout.MAX_ROWS)
    _bounded(path, "rows_used", header.rows_used, 0, header.row_capacity)
    longest = layout.VALUES_OFFSET + 8 * layout.MAX_FIELDS
    _bounded(path, "row_bytes", header.row_bytes, layout.VALUES_OFFSET + 8 * header.field_count, longest)
    _bounded(path, "rows_offset", header.rows_offset, size + header.info_bytes, 2 * layout.MAX_INFO_BYTES)
    info = _exactly(fd, header.info_bytes, size, path, "info")
    try:
        fields = json.loads(info)["fields"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CountersFileError(f"{path}: its info is not JSON with fields: {error!r}") from None
    if not isinstance(fields, list) or not all(
        isinstance(name, str) and name.isidentifier() for name in fields
    ):
        raise CountersFileError(f"{path}: fields are {fields!r}, must be names")
    if len(fields) != header.field_count or len(set(fields)) != len(fields):
        raise CountersFileError(f"{path}: field_count is {header.field_count}, the fields are {fields!r}")
    return tuple(fields)


def _rows(fd: int, header: layout.Header, fields: tuple[str, ...], path: Path) -> Iterator[Row]:
    values = Struct(f"={len(fields)}q")
    at = header.rows_offset
    size = header.rows_used * header.row_bytes
    # Three looks at all rows: a row whose state is the same before and after is of one use alone.
    before, data, after = (_exactly(fd, size, at, path, "rows") for _ in range(3))
    for start in range(0, size, header.row_bytes):
        (state,) = _STATE.unpack_from(before, start + layout.STATE_OFFSET)
        (still,) = _STATE.unpack_from(after, start + layout.STATE_OFFSET)
        if not state & 1 or still != state:
            continue
        labels = _labels(data[start : start + layout.LABEL_BYTES], path, start // header.row_bytes)
        numbers = values.unpack_from(data, start + layout.VALUES_OFFSET)
        yield Row(labels, state, dict(zip(fields, numbers, strict=True)))


def _labels(data: bytes, path: Path, index: int) -> dict[str, str]:
    text, end, _ = data.partition(b"\0")
    try:
        labels = json.loads(text) if end else None
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, dict) or len(labels) > _MAX_LABELS:
        raise CountersFileError(f"{path}: row {index}: the label is not a JSON object: {text!r}")
    if not all(isinstance(value, str) for value in labels.values()):
        raise CountersFileError(f"{path}: row {index}: the label has values that are no strings: {text!r}")
    return {_printable(key): _printable(value) for key, value in labels.items()}


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in text)
