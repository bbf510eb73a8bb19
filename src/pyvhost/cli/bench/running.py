"""What the benchmarks of several parts have in common while they run: one part's failure, and how far they are.

Never: hides a fault of its own: what is passed over is written down.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pyvhost.cli.bench.backend import BackEndError
from pyvhost.cli.bench.counting import CannotCountError
from pyvhost.driver.errors import DriverError


@contextlib.contextmanager
def lenient(skipped: list[str], what: str, *others: type[Exception]) -> Iterator[None]:
    """Notes in `skipped` what failed and why, and lets the rest go on.

    `others`: what else than the host's, a program's or a device's failure is one, of this benchmark.
    """
    failures = (BackEndError, CannotCountError, DriverError, OSError, ValueError, subprocess.SubprocessError)
    try:
        yield
    except failures + others as error:
        skipped.append(f"{what}: {error}")


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A bar for each task, gone at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        yield shown
