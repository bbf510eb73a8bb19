"""What a process costs the machine, read from /proc: processor time and memory.

Promises: reads only. Never: needs the process's help.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class CpuTime:
    """Seconds of processor time, over all threads (proc(5), /proc/PID/stat fields 14 and 15)."""

    user: float
    system: float

    def since(self, before: CpuTime) -> CpuTime:
        """What was used after `before` was read."""
        return CpuTime(self.user - before.user, self.system - before.system)

    @property
    def total(self) -> float:
        """Both together."""
        return self.user + self.system


def parse_cpu_time(stat: str) -> CpuTime:
    """Reads the text of /proc/PID/stat. The command's name may hold blanks and parentheses."""
    fields = stat.rpartition(")")[2].split()
    return CpuTime(int(fields[11]) / _TICKS, int(fields[12]) / _TICKS)


def cpu_time(pid: int) -> CpuTime:
    """Of the process, all threads. Raises FileNotFoundError when it is gone."""
    return parse_cpu_time(Path(f"/proc/{pid}/stat").read_text())


def cpu_seconds_exact(pid: int) -> float:
    """Processor time of all living threads in seconds, exact to the ns (/proc/PID/task/TID/schedstat)."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


@dataclass(frozen=True)
class Memory:
    """In kB: resident; resident with shared pages divided by their sharers; and private alone."""

    rss: int
    pss: int
    private: int


def parse_memory(rollup: str) -> Memory:
    """Reads the text of /proc/PID/smaps_rollup."""
    values: dict[str, int] = {}
    for line in rollup.splitlines():
        name, colon, rest = line.partition(":")
        words = rest.split()
        if colon and len(words) == 2 and words[1] == "kB":
            values[name] = int(words[0])
    return Memory(values["Rss"], values["Pss"], values["Private_Clean"] + values["Private_Dirty"])


def memory(pid: int) -> Memory:
    """Of the process now."""
    return parse_memory(Path(f"/proc/{pid}/smaps_rollup").read_text())
