"""The kernel's lab, for the tests of this folder that compare with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel.lab import KernelLab
from pyvhost.cli.guests import KernelError, find_kernel
from requirements import need, need_program


@pytest.fixture(scope="module")
def lab() -> Iterator[KernelLab]:
    """Debian's kernel in QEMU, fetched if it is not here."""
    need_program("qemu-system-x86_64", package="qemu-system-x86")
    need_program("busybox", package="busybox-static")
    try:
        kernel = find_kernel()
    except KernelError as problem:
        need(False, str(problem))
        raise
    with KernelLab(kernel=kernel) as found:
        yield found
