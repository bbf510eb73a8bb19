"""Recordings: every frame of a device in a pcapng file that Wireshark and tcpdump read (`--pcap FILE`).

The worker's loop makes the file's blocks itself, in a ring (`dataplane.tap_ring`); a thread writes them out as
they are. Each queue pair is an interface of the file, each frame has its time in nanoseconds and its direction
as the guest's card sees it, and the end of the file says how many frames each interface lost.

Promises: never slows a guest down more than a copy does: what the file can't take in time is lost and counted;
the file is whole blocks at any time; it is its user's alone. Devices of one process may share a file.
Never: waits for a file or a reader on the control thread.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import select
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from pyvhost.dataplane import policy, tap_ring
from pyvhost.host import eventfd

#: Bytes of a frame that are kept, by default: all, super-frames too.
SNAPLEN: Final = 262144
#: Bytes of a ring. What is not used is not touched.
RING_SIZE: Final = 1 << 22

# pcapng's numbers (draft-ietf-opsawg-pcapng).
_SECTION: Final = 0x0A0D0D0A
_INTERFACE: Final = 1
_STATISTICS: Final = 5
_BYTE_ORDER: Final = 0x1A2B3C4D
_LINKTYPE_ETHERNET: Final = 1
_SHB_USERAPPL: Final = 4
_IF_NAME: Final = 2
_IF_TSRESOL: Final = 9
_ISB_IFRECV: Final = 4
_ISB_IFDROP: Final = 5

#: Milliseconds that frames may gather before they are written, while there are some ...
_GATHER: Final = 5
#: ... and fewer than fill this part of a ring.
_HURRIED: Final = 1 / 8
#: Seconds that a recording's end may take: the reader of a pipe need not come back.
_PATIENCE: Final = 1.0

_log = logging.getLogger(__name__)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + value.ljust(-(-len(value) // 4) * 4, b"\0")


def _block(kind: int, body: bytes, *options: bytes) -> bytes:
    inner = body + b"".join(options) + (bytes(4) if options else b"")
    total = 12 + len(inner)
    return struct.pack("=II", kind, total) + inner + struct.pack("=I", total)


def section_header() -> bytes:
    """The Section Header Block (4.1)."""
    body = struct.pack("=IHHq", _BYTE_ORDER, 1, 0, -1)
    return _block(_SECTION, body, _option(_SHB_USERAPPL, b"pyvhost"))


def interface_description(name: str, snaplen: int) -> bytes:
    """The Interface Description Block (4.2): Ethernet, times in nanoseconds."""
    label = name.encode("utf-8", "replace")[:1024]
    body = struct.pack("=HHI", _LINKTYPE_ETHERNET, 0, snaplen)
    return _block(_INTERFACE, body, _option(_IF_NAME, label), _option(_IF_TSRESOL, b"\x09"))


def interface_statistics(interface: int, frames: int, lost: int, now_ns: int) -> bytes:
    """The Interface Statistics Block (4.6): how many frames there were, and how many of them were lost."""
    body = struct.pack("=III", interface, now_ns >> 32, now_ns & 0xFFFFFFFF)
    return _block(
        _STATISTICS,
        body,
        _option(_ISB_IFRECV, struct.pack("=Q", frames + lost)),
        _option(_ISB_IFDROP, struct.pack("=Q", lost)),
    )


class TapRing:
    """A ring for one worker's loop to record into. `address` is what its kernels take."""

    def __init__(self, name: str, *, snaplen: int = SNAPLEN, size: int = RING_SIZE) -> None:
        if size & (size - 1) or size < mmap.PAGESIZE:
            raise ValueError(f"a ring of {size} bytes: must be a power of two, and a page at least")
        if not 1 <= snaplen <= SNAPLEN:
            raise ValueError(f"snaplen is {snaplen}, expected 1 to {SNAPLEN}")
        self.name = name
        self.snaplen = snaplen
        self.size = size
        self._memory = mmap.mmap(-1, tap_ring.RING_BYTES + size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._data = memoryview(self._memory)[tap_ring.RING_BYTES :]
        self._tail = 0
        self._set(tap_ring.RING_DATA, self.address + tap_ring.RING_BYTES)
        self._set(tap_ring.RING_SIZE, size)
        self._set(tap_ring.RING_SNAPLEN, snaplen)
        self._set(tap_ring.RING_WAKE, -1)
        self.set_clock()

    def _set(self, word: int, value: int) -> None:
        ctypes.c_int64.from_address(self.address + word).value = value

    def _get(self, word: int) -> int:
        return ctypes.c_int64.from_address(self.address + word).value

    def open(self, interface: int, wake: int) -> None:
        """Has frames taken in, for the interface of this number; `wake`: the eventfd to signal."""
        self._set(tap_ring.RING_INTERFACE, interface)
        self._set(tap_ring.RING_WAKE, wake)
        self._set(tap_ring.RING_OPEN, 1)

    def shut(self) -> None:
        """From now on every frame is lost."""
        self._set(tap_ring.RING_OPEN, 0)

    def set_clock(self) -> None:
        """Takes over what the time of day is: it may have been set."""
        self._set(tap_ring.RING_EPOCH, time.time_ns() - time.monotonic_ns())

    @property
    def interface(self) -> int:
        """Its interface's number in the file."""
        return self._get(tap_ring.RING_INTERFACE)

    @property
    def frames(self) -> int:
        """Frames that were taken in."""
        return self._get(tap_ring.RING_FRAMES)

    @property
    def lost(self) -> int:
        """Frames that found no room."""
        return self._get(tap_ring.RING_LOST)

    def waiting(self) -> list[memoryview]:
        """The blocks that are there, in one piece or two."""
        have = tap_ring.filled(self.address) - self._tail
        start = self._tail % self.size
        first = min(have, self.size - start)
        pieces = [self._data[start : start + first], self._data[: have - first]]
        return [piece for piece in pieces if piece]

    def give_back(self, length: int) -> None:
        """The first `length` bytes of `waiting` have been written."""
        self._tail += length
        tap_ring.give_back(self.address, self._tail)

    def falls_asleep(self) -> bool:
        """Asks for a signal; whether there is nothing to write now."""
        return bool(tap_ring.falls_asleep(self.address))


class _File:
    """A file, the thread that writes it, and the rings that it empties."""

    _open_files: ClassVar[dict[Path, _File]] = {}
    _files_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._users = 0
        self._fd = _create(path)
        self._wake = eventfd.create()
        #: Signalled, never drained, when nobody will wait for a reader any more.
        self._hurry = eventfd.create()
        #: Guards what follows, up to the thread's own.
        self._changes = threading.Lock()
        self._interfaces = 0
        self._new: list[TapRing] = []
        self._ending: dict[TapRing, threading.Event] = {}
        self._closing = False
        # The thread's own.
        self._rings: list[TapRing] = []
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=f"pcap {path.name}", daemon=True)
        self._thread.start()

    @classmethod
    def use(cls, path: Path) -> _File:
        """The process's file of this path, made if it has none. OSError: the path is in its text."""
        with cls._files_lock:
            file = cls._open_files.get(path)
            if file is None:
                file = cls._open_files[path] = cls(path)
            file._users += 1
            return file

    def leave(self) -> None:
        """When the last one has left, the file is closed."""
        with self._files_lock:
            self._users -= 1
            if self._users:
                return
            del self._open_files[self.path]
        with self._changes:
            self._closing = True
        eventfd.signal(self._hurry)
        eventfd.signal(self._wake)
        self._thread.join()
        for fd in (self._fd, self._wake, self._hurry):
            os.close(fd)

    def add(self, rings: Sequence[TapRing]) -> None:
        """Begins an interface for each ring."""
        with self._changes:
            for ring in rings:
                ring.open(self._interfaces, self._wake)
                self._interfaces += 1
                self._new.append(ring)
        eventfd.signal(self._wake)

    def end(self, rings: Sequence[TapRing]) -> None:
        """Ends interfaces into which nobody records any more; returns when what they had has been written."""
        events = {ring: threading.Event() for ring in rings}
        with self._changes:
            self._ending.update(events)
        eventfd.signal(self._wake)
        deadline = time.monotonic() + _PATIENCE
        for event in events.values():
            event.wait(max(0.0, deadline - time.monotonic()))

    # --- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._write([memoryview(section_header())])
        woken = select.poll()
        woken.register(self._wake, select.POLLIN)
        while True:
            eventfd.drain(self._wake)
            with self._changes:
                new, self._new = self._new, []
                ending, self._ending = self._ending, {}
                closing = self._closing
            for ring in new:
                self._write([memoryview(interface_description(ring.name, ring.snaplen))])
                self._rings.append(ring)
            fullest = max((self._empty(ring) for ring in self._rings), default=0.0)
            for ring, event in ending.items():
                # What had been recorded before `end` is out by now.
                about = interface_statistics(ring.interface, ring.frames, ring.lost, time.time_ns())
                self._write([memoryview(about)])
                self._rings.remove(ring)
                event.set()
            if closing:
                return
            if fullest > _HURRIED:
                continue
            if fullest:
                woken.poll(_GATHER)
            elif all(ring.falls_asleep() for ring in self._rings):
                woken.poll()

    def _empty(self, ring: TapRing) -> float:
        """Writes what a ring has; how full it was, 0 to 1."""
        ring.set_clock()
        pieces = ring.waiting()
        length = sum(map(len, pieces))
        if length:
            self._write(pieces)
            ring.give_back(length)
        if self._failed:
            ring.shut()
        return length / ring.size

    def _write(self, pieces: list[memoryview]) -> None:
        """Writes all of it. What can't be written ends the recording, and the process goes on."""
        while pieces and not self._failed:
            try:
                done = os.writev(self._fd, pieces)
            except BlockingIOError:
                self._wait_for_reader()
                continue
            except OSError as error:
                self._fail(str(error.strerror))
                return
            while pieces and done >= len(pieces[0]):
                done -= len(pieces.pop(0))
            if done:
                pieces[0] = pieces[0][done:]

    def _wait_for_reader(self) -> None:
        ready = select.poll()
        ready.register(self._fd, select.POLLOUT)
        ready.register(self._hurry, select.POLLIN)
        if [fd for fd, _ in ready.poll()] == [self._hurry]:
            self._fail("its reader does not take the rest")

    def _fail(self, why: str) -> None:
        _log.error("%s: the recording ends here: %s", self.path, why)
        self._failed = True


def _create(path: Path) -> int:
    """A descriptor of the file, emptied. OSError: the path is in its text."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        why = "nobody reads from this pipe yet" if error.errno == errno.ENXIO else error.strerror
        raise OSError(error.errno, f"{path}: {why}") from None


class Recorder:
    """A device's recording: a ring for each of its queue pairs, for that pair's worker alone.

    `path`: a file, which is emptied first unless another device of this process records into it, or a pipe that
    somebody reads. `name`: the device's, for the file's interfaces. `snaplen`: bytes of a frame that are kept.
    OSError: the file can't be made. Not to be closed before the workers have let go of the rings.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str = "net",
        pairs: int = 1,
        *,
        snaplen: int = SNAPLEN,
        ring_size: int = RING_SIZE,
    ) -> None:
        policy.prepare(
            "recording",
            [(tap_ring.filled, (0,)), (tap_ring.give_back, (0, 0)), (tap_ring.falls_asleep, (0,))],
        )
        names = [name] if pairs == 1 else [f"{name}, queue pair {index}" for index in range(pairs)]
        self._rings = [TapRing(each, snaplen=snaplen, size=ring_size) for each in names]
        self._file: _File | None = _File.use(Path(os.path.realpath(path)))
        self._file.add(self._rings)

    @property
    def addresses(self) -> list[int]:
        """What each pair's port takes as its `record`."""
        return [ring.address for ring in self._rings]

    @property
    def address(self) -> int:
        """The first of `addresses`."""
        return self._rings[0].address

    @property
    def frames(self) -> int:
        """Frames that were recorded."""
        return sum(ring.frames for ring in self._rings)

    @property
    def lost(self) -> int:
        """Frames that came faster than the file took them."""
        return sum(ring.lost for ring in self._rings)

    def close(self) -> None:
        """Writes what is there; a second at most, where a pipe's reader has gone to sleep."""
        if self._file is None:
            return
        file, self._file = self._file, None
        for ring in self._rings:
            ring.shut()
        file.end(self._rings)
        file.leave()
        if self.lost:
            _log.warning("%s: %d of %d frames are missing", file.path, self.lost, self.lost + self.frames)
