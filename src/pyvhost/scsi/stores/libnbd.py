"""libnbd's C library, as much of it as a store needs: one handle is one connection to an NBD server.

Promises: a call that fails is a NbdError with libnbd's words and an errno; buffers are addresses, and nothing is
copied. Whoever gives an address keeps what lies there until the command is retired or the handle closed.
Never: waits, but in `connect` (it looks names up).
"""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Callable
from typing import Any, Final

#: What `direction` answers, and `command`'s flags.
READ: Final = 1
WRITE: Final = 2
FUA: Final = 0x01
NO_HOLE: Final = 0x02
#: Flags of an extent of base:allocation.
HOLE: Final = 1
ZERO: Final = 2
TLS_MODES: Final = {"off": 0, "allow": 1, "require": 2}
_ALLOCATION: Final = b"base:allocation"

_EXTENT_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_int),
)


class _Completion(ctypes.Structure):
    """nbd_completion_callback: always empty here, retired commands are asked for."""

    _fields_ = (("callback", ctypes.c_void_p), ("user_data", ctypes.c_void_p), ("free", ctypes.c_void_p))


class _Extent(ctypes.Structure):
    """nbd_extent_callback."""

    _fields_ = (("callback", _EXTENT_FUNCTION), ("user_data", ctypes.c_void_p), ("free", ctypes.c_void_p))


_NONE = _Completion(None, None, None)
_H, _P, _INT, _U32, _U64, _I64 = (
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_int64,
)
_CALLS: Final[dict[str, tuple[Any, list[Any]]]] = {
    "create": (_P, []),
    "close": (None, [_H]),
    "get_version": (ctypes.c_char_p, [_H]),
    "get_error": (ctypes.c_char_p, []),
    "get_errno": (_INT, []),
    "add_meta_context": (_INT, [_H, ctypes.c_char_p]),
    "set_pread_initialize": (_INT, [_H, ctypes.c_bool]),
    "set_uri_allow_local_file": (_INT, [_H, ctypes.c_bool]),
    "set_tls": (_INT, [_H, _INT]),
    "aio_connect_uri": (_INT, [_H, ctypes.c_char_p]),
    "aio_get_fd": (_INT, [_H]),
    "aio_get_direction": (ctypes.c_uint, [_H]),
    "aio_notify_read": (_INT, [_H]),
    "aio_notify_write": (_INT, [_H]),
    "aio_is_connecting": (_INT, [_H]),
    "aio_is_ready": (_INT, [_H]),
    "aio_is_dead": (_INT, [_H]),
    "aio_is_closed": (_INT, [_H]),
    "aio_pread": (_I64, [_H, _P, ctypes.c_size_t, _U64, _Completion, _U32]),
    "aio_pwrite": (_I64, [_H, _P, ctypes.c_size_t, _U64, _Completion, _U32]),
    "aio_flush": (_I64, [_H, _Completion, _U32]),
    "aio_trim": (_I64, [_H, _U64, _U64, _Completion, _U32]),
    "aio_zero": (_I64, [_H, _U64, _U64, _Completion, _U32]),
    "aio_block_status": (_I64, [_H, _U64, _U64, _Extent, _Completion, _U32]),
    "aio_disconnect": (_INT, [_H, _U32]),
    "aio_peek_command_completed": (_I64, [_H]),
    "aio_command_completed": (_INT, [_H, _U64]),
    "get_size": (_I64, [_H]),
    "get_block_size": (_I64, [_H, _INT]),
    "is_read_only": (_INT, [_H]),
    "can_flush": (_INT, [_H]),
    "can_fua": (_INT, [_H]),
    "can_trim": (_INT, [_H]),
    "can_zero": (_INT, [_H]),
    "can_meta_context": (_INT, [_H, ctypes.c_char_p]),
}


class NbdError(OSError):
    """What libnbd refused, or could not do."""

    @property
    def words(self) -> str:
        """What libnbd said about it."""
        return str(self.strerror)


@functools.cache
def library() -> Any:
    """The library. NbdError ENOENT: it isn't installed."""
    try:
        found = ctypes.CDLL("libnbd.so.0")
    except OSError as error:
        raise NbdError(
            errno.ENOENT, f"libnbd is missing (Debian: apt-get install libnbd0): {error}"
        ) from None
    for name, (result, arguments) in _CALLS.items():
        call = getattr(found, f"nbd_{name}")
        call.restype, call.argtypes = result, arguments
    return found


def version() -> str:
    """The library's version. NbdError ENOENT: it isn't installed."""
    called = library()
    handle = called.nbd_create()
    if not handle:
        raise NbdError(errno.ENOMEM, "libnbd has no handle to give")
    try:
        return str(called.nbd_get_version(handle).decode())
    finally:
        called.nbd_close(handle)


class Handle:
    """One connection, from its making to `close`."""

    def __init__(self, *, tls: str | None = None) -> None:
        self._library = library()
        self._handle: int | None = self._library.nbd_create()
        if not self._handle:
            raise self._error()
        #: What block_status commands call, to be kept until they are retired.
        self._callbacks: dict[int, object] = {}
        self._call("add_meta_context", _ALLOCATION)
        # The memory is a guest's, and whether a read filled it is told: no need to clear it before.
        self._call("set_pread_initialize", False)
        # Whoever writes the URI may name any file anyhow: keys and certificates in it are no news.
        self._call("set_uri_allow_local_file", True)
        if tls is not None:
            self._call("set_tls", TLS_MODES[tls])

    def close(self) -> None:
        """Drop the connection, and forget all commands: no memory is touched any more."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.nbd_close(handle)
            self._callbacks.clear()

    def connect(self, uri: str) -> None:
        """Begin to connect. Waits where a name has to be looked up."""
        self._call("aio_connect_uri", uri.encode())

    def disconnect(self) -> None:
        """Say goodbye to the server, as far as that goes without waiting."""
        self._call("aio_disconnect", 0)

    @property
    def fd(self) -> int:
        """The socket; -1 without one."""
        return int(self._library.nbd_aio_get_fd(self._handle))

    @property
    def direction(self) -> int:
        """What the socket is to be waited for: READ, WRITE, or both."""
        return int(self._library.nbd_aio_get_direction(self._handle))

    def notify(self, readable: bool, writable: bool) -> None:
        """Go on, the socket being what it was waited for."""
        direction = self.direction
        if readable and direction & READ:
            self._call("aio_notify_read")
        elif writable and direction & WRITE:
            self._call("aio_notify_write")

    @property
    def ready(self) -> bool:
        """Whether commands are taken and none is being sent or received."""
        return bool(self._library.nbd_aio_is_ready(self._handle) == 1)

    @property
    def connecting(self) -> bool:
        """Whether the handshake is under way."""
        return bool(self._library.nbd_aio_is_connecting(self._handle) == 1)

    @property
    def dead(self) -> bool:
        """Whether the connection is at an end."""
        library, handle = self._library, self._handle
        return bool(library.nbd_aio_is_dead(handle) == 1 or library.nbd_aio_is_closed(handle) == 1)

    # --- what was negotiated -----------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes of the export."""
        return self._call("get_size")

    def block_size(self, kind: int) -> int:
        """The server's minimum (0), preferred (1) or maximum (2) block; 0: it didn't say."""
        return self._call("get_block_size", kind)

    def can(self, what: str) -> bool:
        """Whether the server can `flush`, `fua`, `trim`, `zero`."""
        return self._call(f"can_{what}") == 1

    @property
    def can_tell_extents(self) -> bool:
        """Whether `block_status` works."""
        return self._call("can_meta_context", _ALLOCATION) == 1

    @property
    def read_only(self) -> bool:
        """Whether the export takes no writes."""
        return self._call("is_read_only") == 1

    # --- commands: each returns its cookie ---------------------------------------------------------

    def pread(self, address: int, length: int, offset: int) -> int:
        """Read into memory."""
        return self._call("aio_pread", address, length, offset, _NONE, 0)

    def pwrite(self, address: int, length: int, offset: int, flags: int = 0) -> int:
        """Write from memory."""
        return self._call("aio_pwrite", address, length, offset, _NONE, flags)

    def flush(self) -> int:
        """Have what was written be safe."""
        return self._call("aio_flush", _NONE, 0)

    def trim(self, offset: int, length: int) -> int:
        """Forget a range."""
        return self._call("aio_trim", length, offset, _NONE, 0)

    def zero(self, offset: int, length: int, flags: int = 0) -> int:
        """Have a range read as zeroes."""
        return self._call("aio_zero", length, offset, _NONE, flags)

    def block_status(self, offset: int, length: int, tell: Callable[[list[tuple[int, int]]], None]) -> int:
        """Have `tell` called with (length, flags) of the extents from `offset` on."""

        def callback(
            _data: int, context: bytes, _offset: int, entries: Any, count: int, _error: object
        ) -> int:
            if context == _ALLOCATION:
                tell([(entries[i], entries[i + 1]) for i in range(0, count - 1, 2)])
            return 0

        function = _EXTENT_FUNCTION(callback)
        cookie = self._call("aio_block_status", length, offset, _Extent(function, None, None), _NONE, 0)
        self._callbacks[cookie] = function
        return cookie

    def retire(self) -> tuple[int, int] | None:
        """The cookie of a command that has ended, and its errno, 0 for success; None: none has."""
        cookie = int(self._library.nbd_aio_peek_command_completed(self._handle))
        if cookie <= 0:
            return None
        number = 0
        if self._library.nbd_aio_command_completed(self._handle, cookie) < 0:
            number = int(self._library.nbd_get_errno()) or errno.EIO
        self._callbacks.pop(cookie, None)
        return cookie, number

    def _call(self, name: str, *arguments: object) -> int:
        if self._handle is None:
            raise NbdError(errno.ENOTCONN, f"{name}: the connection is closed")
        answer = getattr(self._library, f"nbd_{name}")(self._handle, *arguments)
        if answer < 0:
            raise self._error()
        return int(answer)

    def _error(self) -> NbdError:
        words = self._library.nbd_get_error()
        return NbdError(
            self._library.nbd_get_errno() or errno.EIO, (words or b"no reason given").decode(errors="replace")
        )
