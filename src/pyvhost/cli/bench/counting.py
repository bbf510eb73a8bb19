"""Counting a process's system calls over a span, from outside: by perf's tracepoints, else by strace.

perf counts without slowing the process; strace stops it at every call, which changes how much it gets done but
not what a packet costs where each packet costs a call.

Promises: every call of every thread that lives when the span begins is counted, nothing before or after it.
Never: guesses. A host where neither works gets an error that says what to install.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: The calls that get a column of their own with perf; all others are counted as `other`.
NAMED = (
    *("read", "write", "readv", "writev", "recvfrom", "sendto", "recvmsg", "sendmsg", "recvmmsg", "sendmmsg"),
    *("epoll_wait", "epoll_pwait", "poll", "ppoll", "ioctl", "futex", "clock_nanosleep", "sched_yield"),
    *("io_uring_enter", "pread64", "pwrite64"),
)
_TOTAL = "raw_syscalls:sys_enter"


class CannotCountError(RuntimeError):
    """Neither perf nor strace can be used here."""


@dataclass
class Count:
    """Filled when the span is over."""

    by: str
    calls: dict[str, int] = field(default_factory=dict)
    total: int = 0


def parse_perf_stat(text: str) -> tuple[dict[str, int], int]:
    """Reads `perf stat -x,`: calls by name and their sum, which the raw tracepoint counts."""
    calls: dict[str, int] = {}
    total = 0
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) < 3 or not fields[0].isdigit():
            continue
        number, event = int(fields[0]), fields[2]
        if event.startswith(_TOTAL):
            total = number
        elif event.startswith("syscalls:sys_enter_"):
            calls[event.removeprefix("syscalls:sys_enter_").partition(":")[0]] = number
    other = total - sum(calls.values())
    if other > 0:
        calls["other"] = other
    return {name: number for name, number in calls.items() if number}, total


_STRACE_LINE = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)\s*$")


def parse_strace_summary(text: str) -> tuple[dict[str, int], int]:
    """Reads `strace -c`'s table: calls by name and their sum."""
    calls: dict[str, int] = {}
    for line in text.splitlines():
        found = _STRACE_LINE.match(line)
        if found and found[2] != "total":
            calls[found[2]] = calls.get(found[2], 0) + int(found[1])
    return calls, sum(calls.values())


def _perf_usable() -> bool:
    if shutil.which("perf") is None:
        return False
    tried = subprocess.run(["perf", "stat", "-e", _TOTAL, "--", "true"], capture_output=True, check=False)
    return tried.returncode == 0


@contextlib.contextmanager
def system_calls(pid: int) -> Iterator[Count]:
    """Counts while the block runs; the count is complete behind the block.

    Raises CannotCountError where no counter works.
    """
    with tempfile.TemporaryDirectory(prefix="pyvhost-count-") as folder:
        output = Path(folder) / "count"
        if _perf_usable():
            counting, parse, by = _perf(pid, output), parse_perf_stat, "perf (tracepoints)"
        elif shutil.which("strace"):
            counting, parse, by = _strace(pid, output), parse_strace_summary, "strace -c -f"
        else:
            raise CannotCountError("install linux-perf or strace to count system calls")
        count = Count(by)
        with counting:
            yield count
        count.calls, count.total = parse(output.read_text())


def wrapper(name: str, output: Path) -> list[str]:
    """Words that go before a command, to have its calls of one name counted; `wrapped` reads `output` then.

    Raises CannotCountError where no counter works.
    """
    if _perf_usable():
        return ["perf", "stat", "-x,", "-o", str(output), "-e", f"syscalls:sys_enter_{name}", "--"]
    if shutil.which("strace"):
        return ["strace", "-c", "-f", "-e", f"trace={name}", "-o", str(output)]
    raise CannotCountError("install linux-perf or strace to count system calls")


def wrapped(output: Path) -> int:
    """How many calls a command behind `wrapper` made."""
    text = output.read_text()
    calls, _ = parse_perf_stat(text) if "," in text else parse_strace_summary(text)
    return sum(calls.values())


@contextlib.contextmanager
def _perf(pid: int, output: Path) -> Iterator[None]:
    events = ",".join([_TOTAL, *(f"syscalls:sys_enter_{name}" for name in NAMED)])
    control_read, control_write = os.pipe()
    ack_read, ack_write = os.pipe()
    try:
        counter = subprocess.Popen(
            [
                *("perf", "stat", "-x,", "-o", str(output), "-D", "-1", "-e", events),
                *("--control", f"fd:{control_read},{ack_write}", "-p", str(pid)),
            ],
            pass_fds=(control_read, ack_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _command(control_write, ack_read, b"enable\n")
            yield
            _command(control_write, ack_read, b"disable\n")
        finally:
            counter.send_signal(signal.SIGINT)
            counter.wait()
    finally:
        for fd in (control_read, control_write, ack_read, ack_write):
            os.close(fd)


def _command(control: int, ack: int, text: bytes) -> None:
    os.write(control, text)
    if not select.select([ack], [], [], 20)[0]:
        raise CannotCountError("perf stat does not answer")
    os.read(ack, 16)


@contextlib.contextmanager
def _strace(pid: int, output: Path) -> Iterator[None]:
    counter = subprocess.Popen(
        ["strace", "-c", "-f", "-p", str(pid), "-o", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert counter.stderr is not None
        first = counter.stderr.readline()
        if "attached" not in first:
            raise CannotCountError(f"strace can't attach: {first.strip()}")
        yield
    finally:
        counter.send_signal(signal.SIGINT)
        counter.communicate()
