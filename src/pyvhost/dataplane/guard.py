"""The guard against memory that its owner takes away: a handler of SIGBUS and SIGSEGV in machine code.

A front end may shrink its memory file after we mapped it. Whatever thread touches the mapping then gets
SIGBUS, which would end the process and every other front end's device with it. The handler finds the address
among the guarded mappings, replaces that whole mapping by zeros, marks it lost, wakes the control thread
through an eventfd, and returns: the instruction runs again, on zeros.

A front end that is this very process lends memory of its own, by pointer, and may unmap it: SIGSEGV. A worker
says which rings its loop serves (`enter`, `leave`). Where its own thread, inside, meets an address of such a
ring's memory with nothing there, the handler maps one page of zeros, notes the page, and has the loop stop.

Promises: the handler takes no lock, not the GIL either, and is made of loads, stores and system calls alone
(mmap, munmap, write; sigaction and raise on the way out); it may run in any thread at any time, several at once;
errno survives it. A SIGBUS outside the guarded mappings ends the process as it would have without us: the
previous action (faulthandler's, say) is put back and the instruction runs again.
A SIGSEGV that any other code causes, and one that memory's rights cause, ends it so too.
Never: unmaps or replaces what somebody else has mapped. A mapping is released before it is unmapped, and after
its last user has stopped.

A system call that is handed lost memory raises no signal: it fails with EFAULT, nothing is marked lost, and
the caller touches the memory itself to find out. A thread must not block SIGBUS: the kernel kills for that.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import os
import signal
import threading
from typing import Any

import numba
from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyvhost.dataplane import blocks

# The compiled half by name: a signal handler is machine code under NUMBA_DISABLE_JIT=1 as well, because a
# Python one could run inside malloc. `numba.cfunc` compiles there too.
from pyvhost.dataplane.compiled import load32, load64, load64_acquire, store32, store64, store64_release
from pyvhost.dataplane.plain import fence
from pyvhost.dataplane.policy import CACHE

#: How many mappings can be guarded at once.
CAPACITY = 16384

# The block that the handler reads: words, two struct sigaction, then the slots.
_EVENT, _USED, _ONE, _SEATS_USED = 0, 8, 16, 24
_DEFAULT = 64
# For each of the two signals: whether it was passed on, and the action before ours.
_BUS, _SEGV = 320, 640
_CHAINED, _PREVIOUS = 0, 64
_SLOTS = 1024
_SLOT_BYTES = 32
# A slot: a sequence number (odd while the control thread writes it), start, length, whether it was lost.
_SEQUENCE, _START, _LENGTH, _LOST = 0, 8, 16, 24

#: How many workers there can be at once that lent memory is guarded for.
SEATS = 4096
# A worker's seat: its thread while it is in its loop (0: it is not), and addresses: of its rings, of its control
# words, of its list of pages.
_THREAD, _RINGS, _CONTROL, _PAGES = 0, 8, 16, 24
_SEAT_BYTES = 32
_SEATS = _SLOTS + CAPACITY * _SLOT_BYTES
#: The pages that a loop found missing: how many (an int64), then the addresses of the first `LOST_PAGES`.
LOST_PAGES = 511

# Where a ring's record has what is asked here.
_RING = {name: blocks.RING.fields[name][1] for name in blocks.RING.names}  # type: ignore[index,union-attr]
_OWN, _LOCATED, _NUM = (_RING[name] for name in ("own", "located", "num"))
_REGIONS, _COUNT = (_RING[name] for name in ("regions", "region_count"))
_DESC, _AVAIL, _USED_RING = (_RING[name] for name in ("desc", "avail", "used"))
_LOG_DATA, _LOG_USED, _LOG_BYTES = (_RING[name] for name in ("log_data", "log_used", "log_bytes"))
_RING_BYTES = blocks.RING.itemsize

_SYMBOL = "pyvhost_guard_table"
_PAGE = mmap.PAGESIZE
_SIGBUS = int(signal.SIGBUS)
_SIGSEGV = int(signal.SIGSEGV)
_MAPERR = 1  # si_code SEGV_MAPERR: nothing is mapped there
# siginfo_t of every 64 bit Linux but MIPS: si_signo, si_errno, si_code, (hole), si_addr.
_SI_CODE, _SI_ADDR = 8, 16
_FROM_USER = 0x7FFFFFFF  # si_code as unsigned: above it (or 0) somebody sent the signal, no access caused it
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_NORESERVE = 0x4000  # MAP_NORESERVE, which `mmap` names from Python 3.13 on
_FIXED = 0x10  # MAP_FIXED
_ZEROS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED
_FIXED_NOREPLACE = 0x100000  # MAP_FIXED_NOREPLACE: Linux 4.17
_ONE_PAGE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED_NOREPLACE
_EEXIST = errno.EEXIST

_SA_SIGINFO, _SA_ONSTACK, _SA_RESTART = 4, 0x08000000, 0x10000000


class _SigAction(ctypes.Structure):
    """struct sigaction as glibc and musl lay it out (<bits/sigaction.h>)."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_libc = ctypes.CDLL(None, use_errno=True)
# One private mapping that lives as long as the process; slots never used cost no memory.
_table = mmap.mmap(-1, _SEATS + SEATS * _SEAT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
_base = ctypes.addressof(ctypes.c_char.from_buffer(_table))
# The handler's code comes from the cache and knows the table by this name, resolved when it is loaded.
llvm.add_symbol(_SYMBOL, _base)

_handler: Any = None
_event = -1
_free: list[int] = []
_used = 0
_starts: list[int] = []  # sorted; _ends in step
_ends: list[int] = []
_free_seats: list[int] = []
_seats_used = 0
# Front ends in process come on threads of their own; a collector may close one in the middle of another's call.
_lock = threading.RLock()


@intrinsic
def _table_address(typing_context: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table = builder.module.globals.get(_SYMBOL)
        if table is None:
            table = ir.GlobalVariable(builder.module, ir.IntType(8), _SYMBOL)
            table.linkage = "external"
        return builder.ptrtoint(table, ir.IntType(64))

    return types.int64(), codegen


_c_errno = types.ExternalFunction("__errno_location", types.int64())
_c_mmap = types.ExternalFunction(
    "mmap", types.int64(types.int64, types.int64, types.int32, types.int32, types.int32, types.int64)
)
_c_munmap = types.ExternalFunction("munmap", types.int32(types.int64, types.int64))
_c_pthread_self = types.ExternalFunction("pthread_self", types.int64())
_c_write = types.ExternalFunction("write", types.int64(types.int32, types.int64, types.int64))
_c_sigaction = types.ExternalFunction("sigaction", types.int32(types.int32, types.int64, types.int64))
_c_raise = types.ExternalFunction("raise", types.int32(types.int32))


def _on_signal(number: int, info: int, context: int) -> None:
    """The handler. Async-signal-safe: see the module's promises."""
    errno_at = _c_errno()
    saved = load32(errno_at)
    base = _table_address()
    code = load32(info + _SI_CODE)
    address = load64(info + _SI_ADDR)
    sent = code == 0 or code > _FROM_USER
    found = False
    kind = base + _SEGV
    if number == _SIGBUS:
        kind = base + _BUS
        slots = 0 if sent else load64_acquire(base + _USED)
        # Pairs with the releases in protect(): a mapping is published before anybody touches it.
        for slot in range(slots):
            row = base + _SLOTS + slot * _SLOT_BYTES
            sequence = load64_acquire(row + _SEQUENCE)
            start = load64_acquire(row + _START)
            length = load64_acquire(row + _LENGTH)
            # A slot that is being written, or was meanwhile, is not the one that is in use by this thread.
            if sequence & 1 or load64_acquire(row + _SEQUENCE) != sequence:
                continue
            if start <= address < start + length:
                found = _c_mmap(start, length, _READ_WRITE, _ZEROS, -1, 0) != -1
                if not found:
                    # A host that refuses to promise the whole: the page alone.
                    found = _c_mmap(address & -_PAGE, _PAGE, _READ_WRITE, _ZEROS, -1, 0) != -1
                if found:
                    # Pairs with the acquire in lost(): zeros first, then the mark, then the wake-up.
                    store64_release(row + _LOST, 1)
                    _c_write(load64_acquire(base + _EVENT), base + _ONE, 8)
                break
    elif code == _MAPERR:
        page = address & -_PAGE
        end = page + _PAGE
        me = _c_pthread_self()
        seat = base + _SEATS
        last = seat + load64_acquire(base + _SEATS_USED) * _SEAT_BYTES
        # What a seat says is its own thread's, which is here and nowhere else.
        while seat < last and load64_acquire(seat + _THREAD) != me:
            seat += _SEAT_BYTES
        mine = False
        if seat < last:
            ring = load64(seat + _RINGS)
            for _ in range(blocks.MAX_RINGS):
                if load64(ring + _OWN) and load64(ring + _LOCATED):
                    row = load64(ring + _REGIONS)
                    for _ in range(load64(ring + _COUNT)):
                        start = load64(row + blocks.REGION_HOST)
                        # What nothing may be done with has no address to speak of.
                        if load64(row + blocks.REGION_ACCESS) and start < end:
                            mine |= page < start + load64(row + blocks.REGION_SIZE)
                        row += blocks.REGION_BYTES
                    num = load64(ring + _NUM)
                    size = load64(ring + _LOG_BYTES)
                    start = load64(ring + _DESC)
                    mine |= start < end and page < start + 16 * num
                    start = load64(ring + _AVAIL)
                    mine |= start < end and page < start + 6 + 2 * num
                    start = load64(ring + _USED_RING)
                    mine |= start < end and page < start + 6 + 8 * num
                    start = load64(ring + _LOG_DATA)
                    mine |= start != 0 and start < end and page < start + size
                    start = load64(ring + _LOG_USED)
                    mine |= start != 0 and start < end and page < start + size
                    if mine:
                        break
                ring += _RING_BYTES
        if mine:
            there = _c_mmap(page, _PAGE, _READ_WRITE, _ONE_PAGE, -1, 0)
            # Another worker, or its owner, was faster: it is for the instruction to see what is there now.
            found = there == page or (there == -1 and load32(errno_at) == _EEXIST)
            if there != -1 and there != page:
                # A kernel that does not know the flag.
                _c_munmap(there, _PAGE)
            if found:
                pages = load64(seat + _PAGES)
                count = load64(pages)
                if count < LOST_PAGES:
                    store64(pages + 8 + 8 * count, page)
                    store64(pages, count + 1)
                store64_release(load64(seat + _CONTROL) + 8 * blocks.CONTROL_STOP, 1)
    if not found:
        if load64_acquire(kind + _CHAINED) == 0:
            store64_release(kind + _CHAINED, 1)
            _c_sigaction(number, kind + _PREVIOUS, 0)
        else:
            # The previous action led back here.
            _c_sigaction(number, base + _DEFAULT, 0)
        if sent:
            # No instruction will fault again: deliver it once more, when this handler has returned.
            _c_raise(number)
    store32(errno_at, saved)


def _compile() -> Any:
    signature = types.void(types.int32, types.int64, types.int64)
    options: dict[str, Any] = {"nopython": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.cfunc(signature, cache=CACHE is not None, **options)(_on_signal)
    except Exception:  # a damaged cache file surfaces as any of several errors
        return numba.cfunc(signature, **options)(_on_signal)


def _word(offset: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(_base + offset)


def _row(slot: int) -> int:
    return _SLOTS + slot * _SLOT_BYTES


def _sigaction(number: int, new: _SigAction | None, old: int) -> None:
    pointer = ctypes.byref(new) if new is not None else None
    if _libc.sigaction(number, pointer, ctypes.c_void_p(old)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"sigaction for signal {number}: {os.strerror(code)}")


def _put_on_top(number: int, kind: int) -> None:
    """Has our handler called, if it is not; what was there before is passed what is not ours."""
    current = _SigAction()
    _sigaction(number, None, ctypes.addressof(current))
    if current.handler != _handler.address:
        ctypes.memmove(_base + kind + _PREVIOUS, ctypes.addressof(current), ctypes.sizeof(current))
        _word(kind + _CHAINED).value = 0
        mine = _SigAction(handler=_handler.address, flags=_SA_SIGINFO | _SA_ONSTACK | _SA_RESTART)
        ctypes.memset(ctypes.addressof(mine) + _SigAction.mask.offset, 0xFF, _SigAction.mask.size)
        _sigaction(number, mine, 0)


def install(*, lent: bool = False) -> int:
    """Installs the handler for the whole process and returns its eventfd, readable when a mapping was lost.

    The eventfd (non-blocking) counts losses; whoever waits for it, edge by edge, asks `lost` of its slots. Nobody
    reads it: others wait for the same news. Calling again returns the same one, and puts the handler back on top
    if somebody else's (``faulthandler.enable()``) covers it.
    `lent`: for SIGSEGV as well, so that memory of this process's own may be lent; any thread.
    Needs: a seccomp filter that allows mmap, munmap, write, rt_sigaction, rt_sigreturn, getpid, gettid and
    tgkill. Errors: OSError.
    """
    global _handler, _event
    with _lock:
        if _handler is None:
            _handler = _compile()
            _event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            _word(_EVENT).value = _event
            _word(_ONE).value = 1
        _put_on_top(_SIGBUS, _BUS)
        if lent:
            _put_on_top(_SIGSEGV, _SEGV)
        return _event


def take_seat(rings: int, control: int, pages: int) -> int:
    """A worker's seat: addresses of its `blocks.MAX_RINGS` rings, of its control words, and of 1 + `LOST_PAGES`
    words for the pages that it finds missing. They stay where they are until `leave_seat`. Any thread.

    Errors: OSError ENOSPC beyond `SEATS`.
    """
    global _seats_used
    with _lock:
        if not _free_seats and _seats_used == SEATS:
            raise OSError(errno.ENOSPC, f"{SEATS} workers are guarded already")
        seat = _free_seats.pop() if _free_seats else _seats_used
        row = _SEATS + seat * _SEAT_BYTES
        for offset, value in ((_THREAD, 0), (_RINGS, rings), (_CONTROL, control), (_PAGES, pages)):
            _word(row + offset).value = value
        if seat == _seats_used:
            fence()
            _seats_used += 1
            _word(_SEATS_USED).value = _seats_used
        return seat


def leave_seat(seat: int) -> None:
    """Gives a seat back. Any thread, when its worker is in no loop."""
    with _lock:
        _word(_SEATS + seat * _SEAT_BYTES + _THREAD).value = 0
        _free_seats.append(seat)


def enter(seat: int) -> None:
    """The calling thread is the seat's, and goes into its loop now."""
    thread = ctypes.c_int64(threading.get_ident()).value
    _word(_SEATS + seat * _SEAT_BYTES + _THREAD).value = thread


def leave(seat: int) -> None:
    """It has come out of its loop."""
    _word(_SEATS + seat * _SEAT_BYTES + _THREAD).value = 0


def _in_child() -> None:
    # The workers are the parent's: nobody who has the number of one's thread here is it. So is who held the lock.
    global _lock
    _lock = threading.RLock()
    for seat in range(_seats_used):
        leave(seat)


os.register_at_fork(after_in_child=_in_child)


def protect(address: int, length: int) -> int:
    """Guards one whole mapping of `length` bytes at `address`, before anybody touches it; returns its slot.

    `address` is on a page boundary and `length` is rounded up to one; of a hugetlbfs mapping give the whole
    of its huge pages. Control thread only. Errors: RuntimeError before `install`; ValueError for a range that
    is empty, unaligned or overlaps a guarded one; OSError ENOSPC beyond `CAPACITY` mappings.
    """
    global _used
    if _handler is None:
        raise RuntimeError("guard.install() comes first")
    if address <= 0 or length <= 0 or address % _PAGE or address + length > 1 << 62:
        raise ValueError(f"cannot guard {length:#x} bytes at {address:#x}")
    length += -length % _PAGE
    with _lock:
        place = bisect.bisect_right(_starts, address)
        if (place and _ends[place - 1] > address) or (
            place < len(_starts) and _starts[place] < address + length
        ):
            raise ValueError(f"{length:#x} bytes at {address:#x} overlap a mapping that is guarded already")
        if _free:
            slot = _free.pop()
        elif _used < CAPACITY:
            slot = _used
        else:
            raise OSError(errno.ENOSPC, f"{CAPACITY} mappings are guarded already")
        row = _row(slot)
        # Odd while the row is not to be believed.
        _word(row + _SEQUENCE).value += 1
        fence()
        _word(row + _START).value = address
        _word(row + _LENGTH).value = length
        _word(row + _LOST).value = 0
        fence()
        _word(row + _SEQUENCE).value += 1
        if slot == _used:
            _used += 1
            fence()
            _word(_USED).value = _used
        fence()
        place = bisect.bisect_right(_starts, address)
        _starts.insert(place, address)
        _ends.insert(place, address + length)
        return slot


def release(slot: int) -> None:
    """Stops guarding a mapping: when no thread touches it any more, and before it is unmapped.

    Control thread only. Errors: KeyError for a slot that is not in use.
    """
    with _lock:
        row = _row(_check(slot))
        address = _word(row + _START).value
        _word(row + _SEQUENCE).value += 1
        fence()
        _word(row + _LENGTH).value = 0
        fence()
        _word(row + _SEQUENCE).value += 1
        place = bisect.bisect_left(_starts, address)
        del _starts[place], _ends[place]
        _free.append(slot)


def lost(slot: int) -> bool:
    """Whether the mapping was taken away and is zeros now. Errors: KeyError for a slot not in use."""
    marked = _word(_row(_check(slot)) + _LOST).value
    fence()
    return bool(marked)


def _check(slot: int) -> int:
    if not 0 <= slot < _used or _word(_row(slot) + _LENGTH).value == 0:
        raise KeyError(slot)
    return slot
