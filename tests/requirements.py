"""What a test needs of its host, and what becomes of the test where the host has it not.

Promises: an absent program or privilege skips the test with what to install or do; with REQUIRE_ALL=1 in the
environment, as CI has it, the same fails. Never installs anything.

    from requirements import need, need_program, need_root

    def test_something():
        passt = need_program("passt", package="passt")
        need_root()
        need(Path("/dev/net/tun").exists(), "modprobe tun")

At a module's head they skip, or fail, the whole module.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# An ordinary user's PATH has them not, and `ip` or `tcpdump` may lie there.
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def required() -> bool:
    """Is an absence a failure? Yes with REQUIRE_ALL set to anything but nothing or 0."""
    return os.environ.get("REQUIRE_ALL", "") not in ("", "0")


def need(condition: object, what_to_do: str) -> None:
    """Goes on if the condition holds; else skips the test, or fails it where everything is required.

    `what_to_do` is for the reader of the report: what to install, load or be.
    """
    __tracebackhide__ = True
    if condition:
        return
    if required():
        pytest.fail(f"REQUIRE_ALL is set, and this host lacks something: {what_to_do}", pytrace=False)
    pytest.skip(what_to_do, allow_module_level=True)


def need_program(name: str, *, package: str | None = None) -> str:
    """The program's path. `package` is Debian's, if it is called otherwise."""
    __tracebackhide__ = True
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = shutil.which(name, path=os.pathsep.join((*directories, *SYSTEM_DIRECTORIES)))
    need(path, f"apt-get install {package or name}")
    assert path is not None
    return path


def need_file(path: str, *, package: str) -> Path:
    """The file's path; `package` is the Debian package that brings it."""
    __tracebackhide__ = True
    need(Path(path).exists(), f"apt-get install {package} (for {path})")
    return Path(path)


def need_root() -> None:
    """Goes on as root only."""
    __tracebackhide__ = True
    need(os.geteuid() == 0, "run as root")
