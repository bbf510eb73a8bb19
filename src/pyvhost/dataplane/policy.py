"""The one owner of how kernels are compiled, where their machine code is kept, and what is said meanwhile.

Promises: every kernel is compiled with the same options; the cache on disk belongs to exactly these sources,
this Numba, this Python and this processor, so that a changed helper never leaves an old caller behind; a
damaged cache is thrown away and made again; the first compilation says that it is under way.
Never: decides what a kernel does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
from llvmlite import binding as llvm
from numba import types

#: True under ``NUMBA_DISABLE_JIT=1``: kernels then run as plain Python, for coverage and as an oracle.
PLAIN: bool = bool(numba.config.DISABLE_JIT)

_ROOM = Path(__file__).parent
_KEEP_UNUSED_SECONDS = 30 * 86400


def _key() -> str:
    """Names this very set of kernels: their sources and everything else that shapes the machine code."""
    digest = hashlib.sha256()
    for path in sorted(_ROOM.glob("*.py")) + sorted((_ROOM.parent / "abi").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    host = (
        numba.__version__,
        llvmlite.__version__,
        sys.version,
        platform.machine(),
        llvm.get_host_cpu_name(),
    )
    digest.update(repr(host).encode())
    return digest.hexdigest()[:20]


def cache_directory() -> Path:
    """Where this version's machine code is kept: ``$XDG_CACHE_HOME/pyvhost/kernels-KEY``."""
    base = os.environ.get("PYVHOST_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pyvhost"
    )
    return Path(base) / f"kernels-{_key()}"


def _claim_cache() -> Path | None:
    """Makes the cache's folder and retires those of other versions; None where nothing can be written."""
    here = cache_directory()
    try:
        here.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.utime(here)
        for other in here.parent.glob("kernels-*"):
            if other != here and time.time() - other.stat().st_mtime > _KEEP_UNUSED_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    except OSError:
        return None
    if not os.access(here, os.W_OK):
        return None
    numba.config.CACHE_DIR = str(here)
    return here


CACHE: Path | None = None if PLAIN else _claim_cache()


F = TypeVar("F", bound=Callable[..., Any])


def _compiled(function: F, **options: Any) -> F:
    dispatcher = numba.njit(
        nogil=True,
        cache=CACHE is not None,
        boundscheck=False,
        error_model="numpy",
        no_cfunc_wrapper=True,
        # Nothing is allocated, so nothing needs counting: arrays that are passed on would cost a locked add each.
        _nrt=False,
        **options,
    )(function)
    if not PLAIN:
        resolve = dispatcher.get_call_template

        # A literal argument would make a version of its own: 157 to compile where 65 do, and no faster ones.
        def resolve_plainly(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            plain = {name: types.unliteral(kind) for name, kind in keywords.items()}
            return resolve(tuple(types.unliteral(kind) for kind in arguments), plain)

        dispatcher.get_call_template = resolve_plainly
    return dispatcher


def kernel(function: F) -> F:
    """Compiles a function of the data plane, on its first call or by `prepare`."""
    return _compiled(function)


def inline(function: F) -> F:
    """Like `kernel`, for small helpers: LLVM is told to put them into their callers."""
    return _compiled(function, forceinline=True)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Says on standard error that a compilation is under way, and how long it took."""
    started = time.monotonic()
    print(f"pyvhost: compiling {what} for this machine, once ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f" {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process compiles, the others wait and load; where a file can't be locked, each for itself."""
    with contextlib.ExitStack() as closing:
        with contextlib.suppress(OSError):
            fcntl.flock(closing.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield


def prepare(what: str, loops: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
    """Compiles `loops`, or loads them from the cache: pairs of a kernel and example arguments.

    Nothing is called: the arguments only give the types. `what` names the set in the progress line.
    """
    if PLAIN:
        return
    missing = [(loop, tuple(numba.typeof(a) for a in arguments)) for loop, arguments in loops]
    missing = [(loop, types) for loop, types in missing if types not in loop.overloads]
    if not missing:
        return
    stamp = CACHE / f"{what.replace(' ', '-')}.ready" if CACHE else None
    with contextlib.ExitStack() as compiling:
        if stamp is not None and not stamp.exists():
            compiling.enter_context(_turn(stamp.with_suffix(".lock")))
        if stamp is None or not stamp.exists():
            compiling.enter_context(_progress(what))
        try:
            _compile(missing)
        except Exception:
            # A truncated or foreign cache file surfaces as any of several errors: start afresh, once.
            if CACHE is None:
                raise
            shutil.rmtree(CACHE, ignore_errors=True)
            CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(missing)
            # What came from the old cache before is not in the new one: the next process completes it.
            stamp = None
        if stamp is not None:
            with contextlib.suppress(OSError):
                stamp.touch()


def _compile(loops: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
    for loop, kinds in loops:
        loop.compile(kinds)
