"""What the stores that are a descriptor have in common: threads that read, write, allocate and sync it.

Promises: a call that may wait is made by one of the store's own threads; a request that a descriptor opened with
O_DIRECT could not take as it stands goes through aligned memory of this process, never around O_DIRECT: the page
cache and direct writes to one page would undo each other. A flush that failed makes all later ones fail, where the
page cache is used: Linux forgets what it could not write. Never: changes the size of anything.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Final, TypeVar

from pyvhost.host.poller import Poller, Timer
from pyvhost.scsi.stores import system
from pyvhost.scsi.stores.base import Done, Extent, ExtentsDone, ExtentState, Store
from pyvhost.scsi.stores.failures import told
from pyvhost.scsi.stores.pool import Pool
from pyvhost.scsi.stores.views import advance, aligned, flat, gather, scatter, take, total

T = TypeVar("T")

#: How often the size of what is open is looked up, seconds. No notice comes from a file that grows.
LOOK_EVERY: Final = 1.0
#: How long `close` waits for calls that are under way, seconds. What hangs longer is left to its thread: the others
#: whose thread of control this is have waited long enough.
CLOSE_WAITS: Final = 1.0
#: Views in one system call (IOV_MAX).
_VIEWS: Final = 1024
#: Bytes that are copied, or written as zeroes, at a time.
_CHUNK: Final = 1 << 20
#: Extents that one answer holds at most.
_EXTENTS: Final = 512

_log = logging.getLogger(__name__)
_zeroes = memoryview(mmap.mmap(-1, _CHUNK))


class DescriptorStore(Store):
    """A store over `fd`. A subclass opens the descriptor in `open`, then calls `_start`."""

    def __init__(self, *, threads: int = 8) -> None:
        super().__init__()
        #: What addresses, and offsets and lengths, of I/O on `fd` must be multiples of (O_DIRECT); 1: anything goes.
        self.memory_alignment = 1
        self.offset_alignment = 1
        self._threads = threads
        self._poller: Poller | None = None
        self._pool: Pool | None = None
        self._timer: Timer | None = None
        self._looking = False
        self._lost_writes = False
        self._punches = self._ranges = True

    # --- for subclasses ----------------------------------------------------------------------------

    @abstractmethod
    def _measure(self, fd: int) -> int:
        """How many bytes there are. Any thread; may wait."""

    def _start(self, poller: Poller, name: str) -> None:
        """`fd` is open, and all that is known of it set."""
        self._poller = poller
        self._pool = Pool(name, self._threads)
        self._lost_writes = False
        self._look_later()

    def _failed(self, number: int) -> None:
        """An operation ended with `number`."""

    def _look(self) -> None:
        """Once in a while, on a thread of the pool."""

    # --- the store ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back, when the calls under way have ended; what they end with is still told."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        fd, self.fd = self.fd, -1
        if not pool.close(CLOSE_WAITS, lambda: os.close(fd)):
            _log.warning(
                "%s: a call on it hasn't come back; its descriptor stays open until it does", self.spec
            )

    def read(self, offset: int, views: list[memoryview], done: Done) -> None:
        """Fill `views`, one after the other, from `offset` on."""
        views = flat(views)
        self._begin(offset, total(views), done, lambda fd: self._read(fd, offset, views))

    def write(self, offset: int, views: list[memoryview], done: Done, fua: bool = False) -> None:
        """Keep what `views` hold, from `offset` on; with `fua`, `done` comes when it is on stable storage."""
        views = flat(views)
        work: Callable[[int], object] = lambda fd: self._write(fd, offset, views, fua)  # noqa: E731
        self._begin(offset, total(views), done, work, changes=True)

    def flush(self, done: Done) -> None:
        """All writes that were done when this was called are on stable storage at `done`."""
        self._begin(0, 0, done, self._flush)

    def zero(self, offset: int, length: int, done: Done, unmap: bool = False) -> None:
        """Have the range read as zeroes; with `unmap`, by giving its space back where that can be done."""
        self._begin(offset, length, done, lambda fd: self._zero(fd, offset, length, unmap), changes=True)

    def discard(self, offset: int, length: int, done: Done) -> None:
        """The range reads as zeroes, and its space is given back where that can be done."""
        self.zero(offset, length, done, unmap=True)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Which parts of the range hold data, as SEEK_DATA and SEEK_HOLE say."""
        nothing: list[Extent] = []
        self._submit(offset, length, lambda fd: self._extents(fd, offset, length), done, nothing)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the control thread call `function()` later. RuntimeError: it was never open."""
        if self._poller is None:
            raise RuntimeError(f"{self.spec} isn't open")
        self._poller.call_soon_threadsafe(function)

    def check_size(self) -> None:
        """Look the size up now, rather than at the next second. It is told as ever, by `on_resize`."""
        pool = self._pool
        if pool is None or self._looking:
            return
        self._looking = True
        pool.submit(self._look_up)

    # --- beginning and ending, on the control thread -----------------------------------------------

    def _begin(
        self, offset: int, length: int, done: Done, work: Callable[[int], object], *, changes: bool = False
    ) -> None:
        if changes and self.read_only:
            self.call_soon(lambda: done(errno.EROFS))
            return
        self._submit(offset, length, work, lambda number, _: done(number), None)

    def _submit(
        self, offset: int, length: int, work: Callable[[int], T], done: Callable[[int, T], object], nothing: T
    ) -> None:
        pool, fd = self._pool, self.fd
        if pool is None:
            self.call_soon(lambda: done(errno.ECANCELED, nothing))
            return
        if offset < 0 or length < 0 or offset + length > self.size:
            self.call_soon(lambda: done(errno.EIO, nothing))
            return

        def job() -> None:
            number, answer = 0, nothing
            try:
                answer = work(fd)
            except OSError as error:
                number = told(error.errno)
                _log.debug("%s: %d bytes at %d: %s", self.spec, length, offset, error)
            except Exception:
                number = errno.EIO
                _log.exception("%s: %d bytes at %d", self.spec, length, offset)
            self.call_soon(lambda: self._end(number, lambda: done(number, answer)))

        pool.submit(job)

    def _end(self, number: int, done: Callable[[], object]) -> None:
        try:
            if number:
                self._failed(number)
        finally:
            done()

    def _look_later(self) -> None:
        assert self._poller is not None
        self._timer = self._poller.call_later(LOOK_EVERY, self._look_again)

    def _look_again(self) -> None:
        self.check_size()
        if self._pool is not None:
            self._look_later()

    def _look_up(self) -> None:
        try:
            self._look()
            size = self._measure(self.fd)
        except OSError as error:
            number = told(error.errno)
            self.call_soon(lambda: self._looked(None, number))
        else:
            self.call_soon(lambda: self._looked(size, 0))

    def _looked(self, size: int | None, number: int) -> None:
        self._looking = False
        if self._pool is None:
            return
        if size is None:
            self._failed(number)
            return
        size -= size % self.block_size
        if size != self.size:
            _log.info("%s: %d bytes, no longer %d", self.spec, size, self.size)
            self.size = size
            if self.on_resize is not None:
                self.on_resize(size)

    # --- the work, on a thread of the pool ---------------------------------------------------------

    def _read(self, fd: int, offset: int, views: list[memoryview]) -> None:
        if self._fits(offset, views):
            _whole(lambda some, at: os.preadv(fd, some, at), views, offset)
            return
        bounce = memoryview(mmap.mmap(-1, _CHUNK))
        while views:
            some = take(views, _CHUNK)
            count = total(some)
            _whole(lambda run, at: os.preadv(fd, run, at), [bounce[:count]], offset)
            scatter(bounce, some)
            views, offset = advance(views, count), offset + count

    def _write(self, fd: int, offset: int, views: list[memoryview], fua: bool) -> None:
        flags = os.RWF_DSYNC if fua else 0
        if self._fits(offset, views):
            _whole(lambda some, at: os.pwritev(fd, some, at, flags), views, offset)
            return
        bounce = memoryview(mmap.mmap(-1, _CHUNK))
        while views:
            some = take(views, _CHUNK)
            count = total(some)
            gather(some, bounce)
            _whole(lambda run, at: os.pwritev(fd, run, at, flags), [bounce[:count]], offset)
            views, offset = advance(views, count), offset + count

    def _fits(self, offset: int, views: list[memoryview]) -> bool:
        return self.memory_alignment == 1 or aligned(views, self.memory_alignment, self.offset_alignment)

    def _flush(self, fd: int) -> None:
        if self._lost_writes:
            raise OSError(errno.EIO, "an earlier flush failed, and with it writes were lost")
        try:
            os.fdatasync(fd)
        except OSError:
            self._lost_writes = self.memory_alignment == 1
            raise

    def _zero(self, fd: int, offset: int, length: int, unmap: bool) -> None:
        if length and not self._allocate(fd, offset, length, unmap):
            for at in range(offset, offset + length, _CHUNK):
                piece = _zeroes[: min(_CHUNK, offset + length - at)]
                _whole(lambda some, here: os.pwritev(fd, some, here), [piece], at)

    def _allocate(self, fd: int, offset: int, length: int, unmap: bool) -> bool:
        """Zero the range without writing zeroes; whether that can be done."""
        try:
            if unmap and self._punches:
                system.fallocate(fd, system.PUNCH_HOLE | system.KEEP_SIZE, offset, length)
                return True
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._punches = False
        try:
            if self._ranges:
                system.fallocate(fd, system.ZERO_RANGE | system.KEEP_SIZE, offset, length)
                return True
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._ranges = False
        return False

    def _extents(self, fd: int, offset: int, length: int) -> list[Extent]:
        end, at = offset + length, offset
        found: list[Extent] = []
        while at < end and len(found) < _EXTENTS:
            data = _seek(fd, at, os.SEEK_DATA, end)
            # A file system's blocks may be larger than ours: part of one of ours that holds data is data.
            data -= data % self.block_size
            if data > at:
                found.append((at, min(data, end) - at, ExtentState.DEALLOCATED))
            if data < end:
                hole = _seek(fd, max(at, data), os.SEEK_HOLE, end)
                hole = min(-(-hole // self.block_size) * self.block_size, end)
                found.append((data, hole - data, ExtentState.MAPPED))
                data = hole
            at = data
        return found


def _seek(fd: int, at: int, whence: int, end: int) -> int:
    try:
        return os.lseek(fd, at, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end  # no data, or no file, from there on
        if error.errno == errno.EINVAL:  # the file system knows no holes
            return at if whence == os.SEEK_DATA else end
        raise


def _whole(call: Callable[[list[memoryview], int], int], views: list[memoryview], offset: int) -> None:
    """Have `call` move all of `views`, however many calls that takes."""
    while views:
        count = call(views[:_VIEWS], offset)
        if count == 0:
            raise OSError(errno.EIO, f"the file ends before {offset + total(views)}")
        views, offset = advance(views, count), offset + count
