"""Memory barriers for plain Python, for words that a device reads and writes at the same time.

CPython gives no barrier of its own. Its loads and stores are calls into the interpreter, so no compiler
joins or moves them; what remains is the processor. `full` calls `sem_post` and then `sem_trywait` on a
semaphore of this module's own. POSIX (XBD 4.12, "Memory Synchronization") lists both among the functions
that synchronise memory. What they are made of: on x86 each is a locked instruction, which is a full fence by
itself; on Arm and RISC-V an atomic release followed by an atomic acquire of the same word, and those two
never change places, so that no store before them is seen after a load behind them.

`release` and `acquire` cost nothing on x86, where stores stay in order, and so do loads; elsewhere they are
`full`.

Promises: thread-safe. Never blocks: each call takes back the post that it made.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Final

# PyDLL, not CDLL: the calls are too short to be worth letting the interpreter lock go.
_libc: Final = ctypes.PyDLL(None)
_post: Final = _libc.sem_post
_trywait: Final = _libc.sem_trywait
# A sem_t is 32 bytes on every 64-bit Linux; twice that, and aligned by being made of 64-bit words.
_semaphore: Final = (ctypes.c_uint64 * 8)()
_pointer: Final = ctypes.byref(_semaphore)
if _libc.sem_init(_pointer, 0, 0) != 0:
    raise ImportError("sem_init failed: there is no barrier for shared memory on this system")

_STRONGLY_ORDERED: Final = platform.machine() in ("x86_64", "i686", "AMD64")


def full() -> None:
    """No access before it is seen by the other side after one behind it."""
    _post(_pointer)
    _trywait(_pointer)


def release() -> None:
    """Earlier loads and stores are seen before later stores."""
    if not _STRONGLY_ORDERED:
        full()


def acquire() -> None:
    """Earlier loads happen before later loads and stores."""
    if not _STRONGLY_ORDERED:
        full()
