"""The counters' file: what a serving process writes in place, and anyone may read. pyvhost fixes it, for others.

A file is a `Header`, the header's JSON right behind it (`info_bytes` of `{"fields": [...]}`), and from
`rows_offset` on `row_capacity` rows of `row_bytes`. A row:

    0                label: JSON, ends at its first NUL or at STATE_OFFSET
    STATE_OFFSET     int64: 0 never used, odd in use, even free again; each use has another number
    VALUES_OFFSET    one int64 a field, in the order of `fields`

All in the machine's byte order. Rows from `rows_used` on were never used. A reader that copies a row reads the
state before and after: the row is whole if both are the same odd number. A process that lives holds flock(2)
LOCK_EX on its file: what can be locked is stale.

Promises: every offset is a multiple of 64 but the label's end. Never changes without VERSION.
"""

from __future__ import annotations

import ctypes
from typing import Final

from pyvhost.abi._check import sized

MAGIC: Final = b"pyvhost\x01"
VERSION: Final = 1
#: Names end so; a process' first file is PID.counters, further ones PID.N.counters.
SUFFIX: Final = ".counters"

LABEL_BYTES: Final = 256
STATE_OFFSET: Final = LABEL_BYTES
VALUES_OFFSET: Final = LABEL_BYTES + 64

#: What a reader takes for possible; more is no counters' file.
MAX_FIELDS: Final = 256
MAX_ROWS: Final = 16384
MAX_INFO_BYTES: Final = 16384

#: Where files lie, in this order: in $XDG_RUNTIME_DIR, then here; each folder is its user's alone (0700).
#: Memory first: on a disk the kernel's writeback would hold up the threads that count.
RUNTIME_NAME: Final = "pyvhost"
SHARED_DIRECTORY: Final = "/dev/shm/pyvhost-{uid}"
ROOT_DIRECTORY: Final = "/run/pyvhost"
LAST_DIRECTORY: Final = "/tmp/pyvhost-{uid}"


@sized(64)
class Header(ctypes.Structure):
    """The file's first bytes; `magic` is written last."""

    _fields_ = (
        ("magic", ctypes.c_char * 8),
        ("version", ctypes.c_uint32),
        ("info_bytes", ctypes.c_uint32),
        ("pid", ctypes.c_int64),
        # CLOCK_REALTIME in nanoseconds
        ("started_ns", ctypes.c_int64),
        ("rows_offset", ctypes.c_uint32),
        ("row_bytes", ctypes.c_uint32),
        ("row_capacity", ctypes.c_uint32),
        ("field_count", ctypes.c_uint32),
        ("rows_used", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
    )
