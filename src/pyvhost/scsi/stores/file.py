"""A store that is a file or a block device.

Promises: O_DIRECT where the file system can and its alignment is no larger than a block, unless told otherwise;
nobody else who asks has the file open for writing meanwhile (a lock of the open file, which QEMU honours as well),
unless both sides said that they share it; its size is looked up every second; a device that went away is opened
again when it is back, under the same descriptor. Never: makes a file, or changes the size of one.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import time
from typing import Final

from pyvhost.host.poller import Poller
from pyvhost.scsi.stores import system
from pyvhost.scsi.stores.descriptor import DescriptorStore

#: How long a lock is asked for, seconds: what a process that was killed had under way may hold it a little longer.
_LOCK_PATIENCE: Final = 0.2
#: Alignments that are tried where the kernel doesn't tell.
_LIKELY: Final = (512, 4096)

_log = logging.getLogger(__name__)


class FileStore(DescriptorStore):
    """The file or block device at `path`. `direct`: None has O_DIRECT used where it can be."""

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        shared: bool = False,
        direct: bool | None = None,
        block_size: int | None = None,
        spec: str = "",
    ) -> None:
        super().__init__()
        self.path = path
        self.spec = spec or path
        self.read_only = read_only
        self.wce = True
        #: Whether the page cache is passed by. True from `open` on.
        self.direct = False
        self._shared = shared
        self._direct = direct
        self._block_size = block_size
        self._device = False
        self._gone = False

    def open(self, poller: Poller) -> None:
        """Open and lock it.

        OSError: ENOENT: there is none; EBUSY: somebody else has it; EINVAL: it can't be a disk, or not this way.
        """
        try:
            fd = self._open()
        except FileNotFoundError as error:
            hint = f"{error.strerror} (`truncate -s 10G FILE` makes an empty disk)"
            raise FileNotFoundError(error.errno, hint, self.path) from None
        try:
            self._learn(fd)
        except BaseException:
            os.close(fd)
            raise
        self.fd = fd
        self._gone, self.online = False, True
        self._start(poller, os.path.basename(self.path) or "file")

    def _open(self) -> int:
        """A descriptor, locked. May wait for as long as the file system does."""
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        kind = os.stat(self.path).st_mode
        if stat.S_ISBLK(kind):
            # Of a block device it means: not while it is mounted, or otherwise in use by the kernel.
            flags |= 0 if self._shared or self.read_only else os.O_EXCL
        elif not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "neither a file nor a block device", self.path)
        fd = os.open(self.path, flags)
        try:
            os.set_blocking(fd, True)
            self._lock(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _lock(self, fd: int) -> None:
        until = time.monotonic() + _LOCK_PATIENCE
        try:
            while not system.try_lock(fd, exclusive=not (self._shared or self.read_only)):
                if time.monotonic() > until:
                    raise OSError(
                        errno.EBUSY,
                        "another disk or program has it open and doesn't share it (all who open it may say ,shared)",
                        self.path,
                    )
                time.sleep(0.02)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise
            _log.warning(
                "%s: its file system has no locks, so nothing keeps others away: %s", self.path, error
            )

    def _learn(self, fd: int) -> None:
        found = os.fstat(fd)
        self._device = stat.S_ISBLK(found.st_mode)
        least = system.sector_size(fd) if self._device else 512
        self.block_size = self._block_size or min(max(least, 512), 4096)
        if self._device and not self.physical_block_size:
            self.physical_block_size = system.physical_sector_size(fd)
        if self.block_size < least:
            raise OSError(errno.EINVAL, f"its sectors have {least} bytes: ,block={least}", self.path)
        if self._device and not self.read_only and system.device_read_only(fd):
            raise OSError(errno.EROFS, "the device takes no writes: ,readonly", self.path)
        self._choose_direct(fd)
        size = self._measure(fd)
        self.size = size - size % self.block_size
        if size % self.block_size:
            _log.warning("%s: its last %d bytes are no whole block", self.path, size % self.block_size)
        self._punches = self._ranges = True
        self._learn_to_free(fd, found)

    def _choose_direct(self, fd: int) -> None:
        self.direct, self.memory_alignment, self.offset_alignment = False, 1, 1
        if self._direct is False:
            return
        why = _set_direct(fd, True)
        alignment = _alignment(fd) if why is None else None
        if alignment is not None and 0 < alignment[1] <= self.block_size:
            self.direct = True
            self.memory_alignment, self.offset_alignment = max(2, alignment[0]), alignment[1]
            return
        _set_direct(fd, False)
        if alignment is not None:
            why = f"direct I/O is for multiples of {alignment[1]} bytes here, not of {self.block_size}"
        if self._direct:
            raise OSError(errno.EINVAL, why or "no direct I/O here", self.path)
        _log.info("%s: through the page cache: %s", self.path, why)

    def _learn_to_free(self, fd: int, found: os.stat_result) -> None:
        if self._device:
            self.unmap_granularity = system.discard_granularity(found.st_rdev)
            self.can_write_zeroes = True
            self.can_unmap = bool(self.unmap_granularity) and not self.read_only
            return
        self.unmap_granularity = found.st_blksize
        self.can_unmap = self.can_write_zeroes = False
        if self.read_only:
            return
        try:
            # Behind the end of the file, where there is nothing to lose.
            beyond = (found.st_size // found.st_blksize + 1) * found.st_blksize
            system.fallocate(fd, system.PUNCH_HOLE | system.KEEP_SIZE, beyond, found.st_blksize)
            self.can_unmap = self.can_write_zeroes = True
        except OSError as error:
            _log.info("%s: no space can be given back: %s", self.path, error)

    def _measure(self, fd: int) -> int:
        return os.lseek(fd, 0, os.SEEK_END) if self._device else os.fstat(fd).st_size

    def _allocate(self, fd: int, offset: int, length: int, unmap: bool) -> bool:
        if super()._allocate(fd, offset, length, unmap):
            return True
        if self._device:
            system.zero_out(fd, offset, length)
        return self._device

    # --- devices that go and come ------------------------------------------------------------------

    def _failed(self, number: int) -> None:
        if number == errno.ENODEV and not self._gone:
            self._gone, self.online = True, False
            _log.error("%s is gone", self.path)
            if self.on_state is not None:
                self.on_state(False)

    def _look(self) -> None:
        if not self._gone:
            return
        system.unlock(self.fd)  # or the new one would stand before the old one's lock
        new = self._open()
        try:
            if os.lseek(new, 0, os.SEEK_END) < self.block_size:
                raise OSError(errno.ENODEV, "there is nothing in it", self.path)
            _set_direct(new, self.direct)
            os.dup2(new, self.fd, inheritable=False)
        finally:
            os.close(new)
        self.call_soon(self._came_back)

    def _came_back(self) -> None:
        self._gone, self.online = False, True
        _log.info("%s is back", self.path)
        if self._pool is not None and self.on_state is not None:
            self.on_state(True)


def _set_direct(fd: int, on: bool) -> str | None:
    """Set or clear O_DIRECT; why it can't be."""
    flags = system.get_flags(fd)
    try:
        system.set_flags(fd, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as error:
        return f"no direct I/O: {error.strerror}"
    return None


def _alignment(fd: int) -> tuple[int, int] | None:
    """What addresses, and offsets and lengths, must be multiples of; None: nothing that could be found."""
    told = system.direct_alignment(fd)
    if told is not None:
        return told if told[1] else None
    with mmap.mmap(-1, mmap.PAGESIZE) as page, memoryview(page) as whole:
        for likely in _LIKELY:
            try:
                with whole[:likely] as piece:
                    os.preadv(fd, [piece], 0)
            except OSError:
                continue
            # Addresses as offsets: more than is needed, perhaps, but never less.
            return likely, likely
    return None
