"""Where a process spends its time, as perf's samples tell it, sorted into a few words a reader knows.

Promises: samples only (cpu-clock, no hardware counters needed), never traces; says None where perf is absent
or may not look.
Never: runs while a ratio is being measured.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

_LINE = re.compile(r"^\s*(?P<ip>[0-9a-f]+)\s+(?P<symbol>.*?)\s+\((?P<dso>.*)\)\s*$")

COMPILED = "compiled loop"
COPIES = "memory copies"
KERNEL = "kernel"
PYTHON = "Python"
CLOCK = "clock"


def kind_of(symbol: str, dso: str) -> str:
    """What a sample in this function of this file stands for."""
    if re.search(r"mem(move|cpy|set)", symbol):
        return COPIES
    if dso.startswith(("[JIT]", "[anon", "//anon", "/tmp/perf-")):
        return COMPILED
    if dso.startswith(("[kernel", "[guest.kernel")) or dso.endswith(".ko"):
        return KERNEL
    if dso == "[vdso]":
        return CLOCK
    name = dso.rpartition("/")[2]
    if name.startswith(("libpython", "python")):
        return PYTHON
    return re.sub(r"\.so(\.\d+)*$", "", name)


def parse_samples(script: str) -> dict[str, float]:
    """Shares (0 to 1) of the kinds in `perf script -F ip,sym,dso`'s output, greatest first."""
    kinds: Counter[str] = Counter()
    for line in script.splitlines():
        found = _LINE.match(line)
        if found:
            kinds[kind_of(found["symbol"], found["dso"])] += 1
    total = sum(kinds.values())
    return {kind: number / total for kind, number in kinds.most_common()}


def samples(pid: int, seconds: float) -> dict[str, float] | None:
    """Looks at the process for a while. None when perf is absent or fails."""
    if shutil.which("perf") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="pyvhost-perf-") as folder:
        data = str(Path(folder) / "perf.data")
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "1999", "-p", str(pid), "-o", data]
        try:
            subprocess.run(
                [*record, "--", "sleep", f"{seconds:g}"],
                check=True,
                capture_output=True,
                timeout=seconds + 30,
            )
            script = subprocess.run(
                ["perf", "script", "-i", data, "-F", "ip,sym,dso"],
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            )
        except (OSError, subprocess.SubprocessError):
            return None
    return parse_samples(script.stdout) or None
