"""A store that an NBD server keeps: qemu-nbd's images, nbdkit's plugins. libnbd speaks to it.

Promises: blocks go between the server and a guest's memory without a copy, unless the server's blocks are larger
than the pieces of that memory. A connection that is lost is made again, with growing pauses; what was under way is
asked for again on the new one. A request without progress for `timeout` seconds ends: with ETIMEDOUT where the
server is connected and says nothing (the connection is dropped first, so that the memory is the caller's again),
with ENODEV where there is no connection. `on_state(False)` tells that the store was gone for a quarter of that.
Never: waits on the control thread. `open` returns before there is a connection: `online` says whether there is.

What can't be promised: a server that loses writes it has acknowledged, because it was killed and kept them in its
own memory, loses them also if a flush succeeds after the reconnection. Most leave them to the host's page cache.
"""

from __future__ import annotations

import errno
import logging
import mmap
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from pyvhost.host.poller import Poller, Timer
from pyvhost.scsi.stores import libnbd
from pyvhost.scsi.stores.base import Done, ExtentsDone, Store
from pyvhost.scsi.stores.failures import told
from pyvhost.scsi.stores.pool import Pool
from pyvhost.scsi.stores.requests import Kind, Piece, Request, ranges, transfer, understood
from pyvhost.scsi.stores.views import address, flat, total

#: Seconds without progress after which a request ends.
TIMEOUT: Final = 20.0
#: The pauses before another attempt to connect, seconds: the first, and the longest.
_PAUSES: Final = (0.1, 5.0)
#: Commands on their way at a time.
_FLYING: Final = 128
#: Bytes of a READ or WRITE at most where the server doesn't say, and of zeroing, which must show progress.
_MOST: Final = 32 << 20
_MOST_ZEROED: Final = 64 << 20
_MOST_TOLD: Final = 1 << 30

_log = logging.getLogger(__name__)
_zeroes = memoryview(mmap.mmap(-1, 1 << 20))


class NbdStore(Store):
    """The export that `uri` names (nbd://, nbds://, nbd+unix://, ... as libnbd has them).

    `tls`: off, allow or require, for a URI that doesn't say it. `block_size` is what the logical blocks are to
    have; a server whose smallest block is larger is not used. `timeout` in seconds.
    """

    def __init__(
        self,
        uri: str,
        *,
        tls: str | None = None,
        block_size: int = 512,
        read_only: bool = False,
        timeout: float = TIMEOUT,
        spec: str = "",
    ) -> None:
        super().__init__()
        self.uri = uri
        self.spec = spec or f"nbd:{uri}"
        self.block_size = block_size
        self.read_only = self._asked_read_only = read_only
        self.online = False
        #: Why there is no connection, for a human.
        self.trouble = "not open"
        self._tls = tls
        self._timeout = timeout
        self._poller: Poller | None = None
        self._pool: Pool | None = None
        self._attempt: libnbd.Handle | None = None
        self._handle: libnbd.Handle | None = None
        self._watched = -1
        self._connected = False
        self._can_fua = self._can_tell = self._can_zero = False
        self._most = _MOST
        self._least = 1
        self._pause = 0.0
        self._again: Timer | None = None
        self._patience: Timer | None = None
        self._clock: Timer | None = None
        self._requests: set[Request] = set()
        self._queue: deque[Piece] = deque()
        self._flying: dict[int, Piece] = {}
        self._ended: list[tuple[Request, int]] = []

    # --- the store ---------------------------------------------------------------------------------

    def open(self, poller: Poller) -> None:
        """Begin to connect. OSError ENOENT: libnbd is missing; EINVAL: it knows no such URI, as far as that shows."""
        libnbd.library()
        self._poller = poller
        self._pool = Pool("nbd", 1)
        self._pause = 0.0
        self.trouble = "connecting"
        self._connect()

    def close(self) -> None:
        """Say goodbye. What is under way ends with ECANCELED."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        for timer in (self._again, self._patience, self._clock):
            if timer is not None:
                timer.cancel()
        self._again = self._patience = self._clock = None
        self._attempt = None  # whoever is connecting closes its handle when it is through
        handle = self._handle
        if handle is not None and self._connected and not self._flying:
            try:
                handle.disconnect()
            except libnbd.NbdError as error:
                _log.debug("%s: %s", self.spec, error.words)
        self._drop()
        self.online = False
        self.trouble = "not open"
        self._queue.clear()
        for request in list(self._requests):
            self._end(request, errno.ECANCELED)
        pool.close(0)

    def read(self, offset: int, views: list[memoryview], done: Done) -> None:
        """Fill `views`, one after the other, from `offset` on."""
        request = self._request(offset, total(views), done)
        if request is not None:
            self._ask(request, self._transfer(request, Kind.READ, offset, views))

    def write(self, offset: int, views: list[memoryview], done: Done, fua: bool = False) -> None:
        """Keep what `views` hold, from `offset` on; with `fua`, `done` comes when it is on stable storage."""
        flags = 0
        if fua and self._can_fua:
            flags = libnbd.FUA
        elif fua and self.wce:
            done = self._then_flush(done)
        request = self._request(offset, total(views), done, changes=True)
        if request is not None:
            self._ask(request, self._transfer(request, Kind.WRITE, offset, views, flags))

    def flush(self, done: Done) -> None:
        """All writes that were done when this was called are on stable storage at `done`."""
        request = self._request(0, 0, done)
        if request is not None:
            self._ask(request, [Piece(request, Kind.FLUSH)] if self.wce else [])

    def zero(self, offset: int, length: int, done: Done, unmap: bool = False) -> None:
        """Have the range read as zeroes; with `unmap`, by giving its space back where that can be done."""
        request = self._request(offset, length, done, changes=True)
        if request is None:
            return
        if self._can_zero:
            flags = 0 if unmap else libnbd.NO_HOLE
            self._ask(request, ranges(request, Kind.ZERO, offset, length, most=_MOST_ZEROED, flags=flags))
            return
        pieces = ranges(request, Kind.WRITE, offset, length, most=_zeroes.nbytes)
        for piece in pieces:
            piece.address, piece.holds = address(_zeroes), (_zeroes,)
        self._ask(request, pieces)

    def discard(self, offset: int, length: int, done: Done) -> None:
        """The range reads as zeroes, and its space is given back if the server does that: a trim promises neither."""
        self.zero(offset, length, done, unmap=True)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Which parts of the range hold data, as the server's base:allocation says."""
        if self._pool is not None and self._connected and not self._can_tell:
            super().extents(offset, length, done)
            return
        pieces: list[Piece] = []

        def finished(number: int) -> None:
            done(number, [] if number else understood(offset, length, pieces[0].answer, self.block_size))

        request = self._request(offset, length, finished)
        if request is not None:
            pieces += ranges(request, Kind.STATUS, offset, min(length, _MOST_TOLD), most=_MOST_TOLD)
            self._ask(request, pieces)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the control thread call `function()` later. RuntimeError: it was never open."""
        if self._poller is None:
            raise RuntimeError(f"{self.spec} isn't open")
        self._poller.call_soon_threadsafe(function)

    # --- requests ----------------------------------------------------------------------------------

    def _request(self, offset: int, length: int, done: Done, *, changes: bool = False) -> Request | None:
        number = 0
        if self._pool is None:
            number = errno.ECANCELED
        elif not self.size:
            number = errno.ENODEV  # there never was a connection: nobody knows what could be asked
        elif changes and self.read_only:
            number = errno.EROFS
        elif offset < 0 or length < 0 or offset + length > self.size:
            number = errno.EIO
        request = Request(done, time.monotonic() + self._timeout)
        self._requests.add(request)
        if number:
            self._end(request, number)
            return None
        return request

    def _transfer(
        self, request: Request, kind: Kind, offset: int, views: list[memoryview], flags: int = 0
    ) -> list[Piece]:
        return transfer(request, kind, offset, flat(views), block=self._least, most=self._most, flags=flags)

    def _ask(self, request: Request, pieces: list[Piece]) -> None:
        if not pieces:
            self._end(request, 0)
            return
        request.left = len(pieces)
        self._queue.extend(pieces)
        if self._clock is None:
            self._wind_clock(self._timeout)
        self._go_on()

    def _then_flush(self, done: Done) -> Done:
        def written(number: int) -> None:
            if number:
                done(number)
            else:
                self.flush(done)

        return written

    def _piece_ended(self, piece: Piece, number: int) -> None:
        request = piece.request
        piece.holds = ()
        request.left -= 1
        request.deadline = time.monotonic() + self._timeout
        request.error = request.error or number
        if not request.left:
            self._end(request, request.error)

    def _end(self, request: Request, number: int) -> None:
        if request not in self._requests:
            return
        self._requests.discard(request)
        if not self._ended:
            self.call_soon(self._tell)
        self._ended.append((request, number))

    def _tell(self) -> None:
        ended, self._ended = self._ended, []
        for request, number in ended:
            try:
                if not number and request.finish is not None:
                    request.finish()
                request.done(told(number) if number else 0)
            except Exception:
                _log.exception("%s: the end of a request", self.spec)

    # --- the clock ---------------------------------------------------------------------------------

    def _wind_clock(self, seconds: float) -> None:
        assert self._poller is not None
        self._clock = self._poller.call_later(seconds, self._time)

    def _time(self) -> None:
        self._clock = None
        now = time.monotonic()
        late = {request for request in self._requests if request.deadline <= now}
        if late:
            number = errno.ETIMEDOUT if self._connected else errno.ENODEV
            if any(piece.request in late for piece in self._flying.values()):
                # The library may still write to its memory: not once the connection is gone.
                self._lost("the server hasn't answered in time")
            self._queue = deque(piece for piece in self._queue if piece.request not in late)
            for request in late:
                self._end(request, number)
        if self._requests:
            self._wind_clock(max(0.01, min(request.deadline for request in self._requests) - now))

    # --- the connection ----------------------------------------------------------------------------

    def _connect(self) -> None:
        self._again = None
        if self._pool is None or self._poller is None:
            return
        try:
            handle = libnbd.Handle(tls=self._tls)
        except libnbd.NbdError as error:
            self._lost(error.words)
            return
        self._attempt = handle
        self._again = self._poller.call_later(
            max(1.0, self._timeout / 2), lambda: self._lost("no connection in time")
        )

        def job() -> None:  # it looks names up, which may take its time
            why = None
            try:
                handle.connect(self.uri)
            except libnbd.NbdError as error:
                why = error.words
            self.call_soon(lambda: self._begun(handle, why))

        self._pool.submit(job)

    def _begun(self, handle: libnbd.Handle, why: str | None) -> None:
        if handle is not self._attempt:
            handle.close()
            return
        self._attempt, self._handle = None, handle
        if why is not None:
            self._lost(why)
            return
        self._go_on()

    def _event(self, mask: int) -> None:
        handle = self._handle
        if handle is None:
            return
        if not self._connected:
            # It may try one address after the other, each with a socket of its own under the same number.
            self._unwatch()
        over = mask & (select.EPOLLHUP | select.EPOLLERR)
        why = ""
        try:
            handle.notify(bool(over or mask & select.EPOLLIN), bool(over or mask & select.EPOLLOUT))
        except libnbd.NbdError as error:
            why = error.words
        self._go_on(why)

    def _go_on(self, why: str = "") -> None:
        """Whatever can be done now: take what has ended, ask for more, and wait for the right thing."""
        handle = self._handle
        if handle is None:
            return
        shutting_down = self._retire(handle)
        if shutting_down or handle.dead:
            self._lost(why or "the server ended the connection")
            return
        if not self._connected and handle.ready:
            refusal = self._negotiated(handle)
            if refusal:
                self._lost(refusal)
                return
        try:
            self._issue(handle)
        except libnbd.NbdError as error:
            why = error.words
        # Sending may find out as well, and then no event would come: the socket is closed already.
        if handle.dead:
            self._lost(why or "the server ended the connection")
            return
        self._watch(handle)

    def _retire(self, handle: libnbd.Handle) -> bool:
        """Take what has ended; whether the server is going away."""
        going = False
        while (retired := handle.retire()) is not None:
            cookie, number = retired
            if number == errno.ESHUTDOWN or (number == errno.ENOTCONN and handle.dead):
                going = True  # to be asked for again: it stays in flight until that is decided
                continue
            piece = self._flying.pop(cookie, None)
            if piece is not None:
                self._piece_ended(piece, number)
        return going

    def _issue(self, handle: libnbd.Handle) -> None:
        while self._connected and self._queue and len(self._flying) < _FLYING:
            piece = self._queue[0]
            if piece.request.error:
                self._queue.popleft()
                self._piece_ended(piece, 0)
                continue
            try:
                cookie = _send(handle, piece)
            except libnbd.NbdError as error:
                if handle.dead:
                    raise
                self._queue.popleft()
                _log.warning("%s: %s", self.spec, error.words)
                self._piece_ended(piece, errno.EIO)
                continue
            self._queue.popleft()
            self._flying[cookie] = piece

    def _watch(self, handle: libnbd.Handle) -> None:
        assert self._poller is not None
        fd, direction = handle.fd, handle.direction
        events = select.EPOLLIN if direction & libnbd.READ else 0
        events |= select.EPOLLOUT if direction & libnbd.WRITE else 0
        if fd == self._watched:
            self._poller.modify(fd, events)
            return
        self._unwatch()
        if fd >= 0:
            self._poller.register(fd, events, self._event, inner=True)
            self._watched = fd

    def _unwatch(self) -> None:
        fd, self._watched = self._watched, -1
        if fd >= 0 and self._poller is not None:
            self._poller.unregister(fd)

    def _drop(self) -> None:
        """End the connection. From here on the library touches no memory."""
        self._unwatch()
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()
        self._connected = False
        for _, piece in sorted(self._flying.items(), reverse=True):
            piece.answer.clear()
            self._queue.appendleft(piece)
        self._flying.clear()

    def _lost(self, why: str) -> None:
        """There is no connection, or none any more; try again later."""
        if self._poller is None or self._pool is None:
            return
        level = logging.WARNING if self.trouble != why else logging.DEBUG
        _log.log(level, "%s: %s", self.spec, why)
        self.trouble = why
        self._attempt = None
        self._drop()
        if self._again is not None:
            self._again.cancel()
        self._again = self._poller.call_later(self._pause, self._connect)
        self._pause = min(max(_PAUSES[0], 2 * self._pause), _PAUSES[1])
        if self.online and self._patience is None:
            self._patience = self._poller.call_later(self._timeout / 4, self._gone)

    def _gone(self) -> None:
        self._patience = None
        self.online = False
        _log.error("%s is gone: %s", self.spec, self.trouble)
        if self.on_state is not None:
            self.on_state(False)

    def _negotiated(self, handle: libnbd.Handle) -> str:
        """The handshake is over: learn what there is; why it can't be used, or nothing."""
        least = max(1, handle.block_size(0))
        if least > self.block_size:
            return f"the server's smallest block has {least} bytes, ours {self.block_size}: ,block={least}"
        size = handle.size - handle.size % self.block_size
        if size <= 0:
            return f"the export has {handle.size} bytes, not a block of {self.block_size}"
        for timer in (self._again, self._patience):
            if timer is not None:
                timer.cancel()
        self._again = self._patience = None
        self._connected = True
        self._pause = 0.0
        self._least = least
        most = min(handle.block_size(2) or _MOST, _MOST)
        self._most = max(most - most % self.block_size, self.block_size)
        self.read_only = self._asked_read_only or handle.read_only
        self.wce = handle.can("flush")
        self._can_fua = handle.can("fua")
        self._can_tell = handle.can_tell_extents
        self._can_zero = self.can_write_zeroes = handle.can("zero")
        self.can_unmap = self._can_zero and handle.can("trim") and not self.read_only
        self.unmap_granularity = max(handle.block_size(1), least, self.block_size) if self.can_unmap else 0
        self.trouble = ""
        _log.info("%s: connected: %d bytes", self.spec, size)
        if size != self.size:
            self.size = size
            if self.on_resize is not None:
                self.call_soon(lambda: self.on_resize and self.on_resize(size))
        if not self.online:
            self.online = True
            if self.on_state is not None:
                self.call_soon(lambda: self.on_state and self.on_state(True))
        return ""


def _send(handle: libnbd.Handle, piece: Piece) -> int:
    if piece.kind is Kind.READ:
        return handle.pread(piece.address, piece.length, piece.offset)
    if piece.kind is Kind.WRITE:
        return handle.pwrite(piece.address, piece.length, piece.offset, piece.flags)
    if piece.kind is Kind.ZERO:
        return handle.zero(piece.offset, piece.length, piece.flags)
    if piece.kind is Kind.STATUS:
        return handle.block_status(piece.offset, piece.length, piece.answer.extend)
    return handle.flush()
