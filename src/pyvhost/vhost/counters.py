"""The counters' file, its writing side: rows that kernels count in and that anyone else only reads.

Promises: a row's address stays what it is until the process ends, `close` or not; memory under a row is there
before the row is given out (no SIGBUS on a full file system); the file goes when the process ends, and if it
could not (SIGKILL), whoever starts next clears it away. Without a place for it the counters are counted all the
same, unseen.
Never: follows a symbolic link, or writes into a folder that others may write to; reads what it has written.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import json
import logging
import mmap
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from pyvhost.abi import counters_file as layout
from pyvhost.dataplane import blocks

#: Rows in a file; memory that is not used is not touched.
CAPACITY = 8192
#: Rows whose memory is asked for in one go.
_STEP = 64

Row = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


def _rounded(number: int, to: int) -> int:
    return -(-number // to) * to


def places() -> Iterator[Path]:
    """The folders a file may lie in, best first."""
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        yield Path(runtime) / layout.RUNTIME_NAME
    yield Path(layout.SHARED_DIRECTORY.format(uid=uid))
    if uid == 0:
        yield Path(layout.ROOT_DIRECTORY)
    yield Path(layout.LAST_DIRECTORY.format(uid=uid))


def _open_directory(path: Path) -> int:
    """A descriptor of the folder, made if absent. OSError EPERM: others can write to it, or it is theirs."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    about = os.fstat(fd)
    if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise PermissionError(
            errno.EPERM, "is another user's, or others may write to it: not a place for counters", str(path)
        )
    return fd


def _sweep(directory: int) -> None:
    """Removes the files of processes that are gone: nobody holds their lock."""
    for name in os.listdir(directory):
        if not name.endswith(layout.SUFFIX):
            continue
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # By now the name may be a new process' file.
            if os.path.samestat(os.fstat(fd), os.stat(name, dir_fd=directory, follow_symlinks=False)):
                os.unlink(name, dir_fd=directory)
        except OSError:
            pass
        finally:
            os.close(fd)


def _create(directory: int) -> tuple[int, str]:
    """A new, empty, locked file in the folder: its descriptor and name."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    number = 0
    while True:
        name = f"{os.getpid()}.{number}" if number else f"{os.getpid()}"
        name += layout.SUFFIX
        try:
            fd = os.open(name, flags, 0o600, dir_fd=directory)
        except FileExistsError:
            number += 1
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd, name
        os.close(fd)  # swept away before it was locked


def _label(labels: Mapping[str, str]) -> bytes:
    """The labels as JSON that fits: long values lose their middle."""
    values = {key: str(value) for key, value in labels.items()}
    while True:
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        if len(text) < layout.LABEL_BYTES:
            return text
        longest = max(values, key=lambda key: len(values[key]), default="")
        value = values.get(longest, "")
        if len(value) < 8:
            raise ValueError(f"labels of {len(text)} bytes do not fit {layout.LABEL_BYTES - 1}: {labels!r}")
        keep = (len(value) - 2) // 2
        values[longest] = value[:keep] + "…" + value[-keep:]


class CounterFile:
    """One process' counters: a row of int64 `fields` for whatever counts, in a file that others can map.

    `directory`: where the file is to lie; then an OSError says why it can't. By default the first of `places`
    that will do, and if none will, there is no file: `path` is None. `capacity`: rows at most.
    """

    def __init__(
        self,
        fields: Sequence[str],
        directory: str | os.PathLike[str] | None = None,
        *,
        capacity: int = CAPACITY,
    ) -> None:
        self.fields: tuple[str, ...] = tuple(fields)
        self.path: Path | None = None
        info = json.dumps({"fields": self.fields}).encode()
        if not 0 < len(self.fields) <= layout.MAX_FIELDS or len(info) > layout.MAX_INFO_BYTES:
            raise ValueError(
                f"{len(self.fields)} fields, {len(info)} bytes of names: more than a file may have"
            )
        if not 0 < capacity <= layout.MAX_ROWS:
            raise ValueError(f"capacity is {capacity}, a file may have {layout.MAX_ROWS} rows")
        self._header_bytes = ctypes.sizeof(layout.Header)
        self._rows_offset = _rounded(self._header_bytes + len(info), 64)
        self._row_bytes = _rounded(layout.VALUES_OFFSET + 8 * len(self.fields), 64)
        self._capacity = capacity
        self._used = 0
        self._backed = 0
        self._free: list[int] = []
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._directory = -1
        self._name = ""
        self._fd = -1
        self._open(directory)
        # Never unmapped: a thread may still count when everything else has been closed.
        self._map = mmap.mmap(self._fd, self._rows_offset + capacity * self._row_bytes)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._header = layout.Header.from_buffer(self._map)
        self._write_header(info)
        atexit.register(self.close)

    def _open(self, directory: str | os.PathLike[str] | None) -> None:
        size = self._rows_offset + self._capacity * self._row_bytes
        refusals = []
        for place in places() if directory is None else (Path(directory),):
            try:
                self._directory = _open_directory(place)
                _sweep(self._directory)
                self._fd, self._name = _create(self._directory)
                self.path = place / self._name
                os.ftruncate(self._fd, size)
                self._back(1)
                return
            except OSError as error:
                self._give_back()
                if directory is not None:
                    raise
                refusals.append(str(error))
        _log.warning("counters are kept, but nobody can watch them: %s", "; ".join(refusals))
        self._fd = os.memfd_create("pyvhost-counters", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self._back(1)

    def _back(self, rows: int) -> None:
        """Has the file system hold memory for the first `rows` rows. OSError ENOSPC: it is full."""
        if self._fd < 0:
            raise ValueError("the counters are closed")
        if rows <= self._backed:
            return
        upto = min(_rounded(rows, _STEP), self._capacity)
        start = self._backed and self._rows_offset + self._backed * self._row_bytes
        # In whole pages that nothing has been counted in: where fallocate is emulated it writes.
        start = _rounded(start, mmap.PAGESIZE)
        end = _rounded(self._rows_offset + upto * self._row_bytes, mmap.PAGESIZE)
        end = min(end, self._rows_offset + self._capacity * self._row_bytes)
        if end > start:
            os.posix_fallocate(self._fd, start, end - start)
        self._backed = upto

    def _write_header(self, info: bytes) -> None:
        self._map[self._header_bytes : self._header_bytes + len(info)] = info
        header = self._header
        header.version = layout.VERSION
        header.info_bytes = len(info)
        header.pid = self._pid
        header.started_ns = time.time_ns()
        header.rows_offset = self._rows_offset
        header.row_bytes = self._row_bytes
        header.row_capacity = self._capacity
        header.field_count = len(self.fields)
        header.magic = layout.MAGIC

    def row(self, labels: Mapping[str, str]) -> Row:
        """A row of its own, all zero, to be counted in: one int64 a field, contiguous, never moved.

        `labels` say whose it is (``device``, ``kind``, ``queue``, ``backend``). OSError ENOSPC: no row is
        free, or the file system is full. ValueError: more labels than fit, or closed.
        """
        label = _label(labels)
        with self._lock:
            index = self._free[-1] if self._free else self._used
            if index >= self._capacity:
                raise OSError(errno.ENOSPC, f"all {self._capacity} rows of counters are in use")
            self._back(index + 1)
            if self._free:
                self._free.pop()
            else:
                self._used = index + 1
            start = self._rows_offset + index * self._row_bytes
            values = np.frombuffer(self._map, np.int64, len(self.fields), offset=start + layout.VALUES_OFFSET)
            values[:] = 0
            self._map[start : start + layout.LABEL_BYTES] = label.ljust(layout.LABEL_BYTES, b"\0")
            # Last, so that who sees it odd sees the rest.
            self._state(index).value += 1
            self._header.rows_used = self._used
        return values

    def release(self, row: Row) -> None:
        """Gives a row back: it is shown no more, and another may have it. ValueError: no row of this file."""
        offset = row.ctypes.data - self._base - layout.VALUES_OFFSET - self._rows_offset
        index, rest = divmod(offset, self._row_bytes)
        with self._lock:
            if rest or not 0 <= index < self._used or not self._state(index).value & 1:
                raise ValueError("not a row of these counters, or released already")
            self._state(index).value += 1
            self._free.append(index)

    def _state(self, index: int) -> ctypes.c_int64:
        offset = self._rows_offset + index * self._row_bytes + layout.STATE_OFFSET
        return ctypes.c_int64.from_buffer(self._map, offset)

    def _give_back(self) -> None:
        if self._name:
            try:
                os.unlink(self._name, dir_fd=self._directory)
            except OSError:
                pass
        for fd in (self._fd, self._directory):
            if fd >= 0:
                os.close(fd)
        self._fd = self._directory = -1
        self._name = ""
        self.path = None
        self._backed = 0

    def close(self) -> None:
        """Removes the file. Its rows stay what they are, unseen. A forked child's call does nothing."""
        atexit.unregister(self.close)
        if os.getpid() == self._pid:
            self._give_back()

    def __enter__(self) -> CounterFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_process_file: CounterFile | None = None
_process_lock = threading.Lock()


def of_process() -> CounterFile:
    """The one file of this process, for devices of all kinds."""
    global _process_file
    with _process_lock:
        if _process_file is None:
            _process_file = CounterFile(blocks.COUNTERS)
        return _process_file
