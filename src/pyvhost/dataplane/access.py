"""Memory and system calls for kernels, by raw address: plain, ordered, and in bulk.

Addresses, lengths and results are int64 everywhere: a load of 8, 16 or 32 bits extends with zeros, one of 64
bits keeps the bits (an address above 2**63 is negative: compare it with `below`). An ``_acquire`` load and a
``_release`` store are single accesses that the compiler neither repeats nor moves across; their pair is named
where they are used.

Promises: compiled and plain Python (``NUMBA_DISABLE_JIT=1``) give the same results.
Never: checks an address. The caller has.
"""

from pyvhost.dataplane.policy import PLAIN

if PLAIN:
    from pyvhost.dataplane.plain import (
        below,
        clock_ns,
        copy,
        errno,
        fence,
        fetch_add64,
        fetch_or8,
        fill,
        load8,
        load8_acquire,
        load16,
        load16_acquire,
        load32,
        load64,
        load64_acquire,
        move,
        prefetch,
        prefetch_write,
        signal,
        store8,
        store16,
        store16_release,
        store32,
        store64,
        store64_release,
        sys_epoll_wait,
        sys_read,
        sys_readv,
        sys_write,
        sys_writev,
    )
else:
    from pyvhost.dataplane.compiled import (
        below,
        clock_ns,
        copy,
        errno,
        fence,
        fetch_add64,
        fetch_or8,
        fill,
        load8,
        load8_acquire,
        load16,
        load16_acquire,
        load32,
        load64,
        load64_acquire,
        move,
        prefetch,
        prefetch_write,
        signal,
        store8,
        store16,
        store16_release,
        store32,
        store64,
        store64_release,
        sys_epoll_wait,
        sys_read,
        sys_readv,
        sys_write,
        sys_writev,
    )

__all__ = [
    "below",
    "clock_ns",
    "copy",
    "errno",
    "fence",
    "fetch_add64",
    "fetch_or8",
    "fill",
    "load8",
    "load8_acquire",
    "load16",
    "load16_acquire",
    "load32",
    "load64",
    "load64_acquire",
    "move",
    "prefetch",
    "prefetch_write",
    "signal",
    "store8",
    "store16",
    "store16_release",
    "store32",
    "store64",
    "store64_release",
    "sys_epoll_wait",
    "sys_read",
    "sys_readv",
    "sys_write",
    "sys_writev",
]
