"""Kernel modules: what a driver needs loaded before it, in order.

Promises: reads what each module says of itself (`depends=` in its `.modinfo`), so that a kernel that was only
unpacked, with no `modules.dep`, will do. Never: loads one.
"""

from __future__ import annotations

import lzma
import re
import subprocess
from pathlib import Path

_DEPENDS = re.compile(rb"\0?depends=([^\0]*)\0")


class ModuleError(RuntimeError):
    """A module is not there or cannot be read."""


def load_order(folder: Path, names: list[str]) -> list[Path]:
    """The files to load, dependencies first, for the named modules of the kernel whose modules lie in `folder`.

    What is built in needs no loading, and is left out. ModuleError: neither a file nor built in.
    """
    files = {_name(path): path for path in sorted(folder.rglob("*.ko*"))}
    builtin = {_name(Path(line)) for line in _lines(folder / "modules.builtin")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name)
        if path is None:
            if name in builtin:
                return
            raise ModuleError(f"no module {name} below {folder}")
        if path in order:
            return
        for needed in depends(path):
            add(needed)
        order.append(path)

    for name in names:
        add(name.replace("-", "_"))
    return order


def depends(path: Path) -> list[str]:
    """The names of the modules that this one needs."""
    found = _DEPENDS.search(content(path))
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []


def content(path: Path) -> bytes:
    """The module itself, unpacked. ModuleError: packed in a way that nothing here unpacks."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        try:
            return subprocess.run(["zstd", "-dc"], input=data, check=True, stdout=subprocess.PIPE).stdout
        except (OSError, subprocess.CalledProcessError) as problem:
            raise ModuleError(f"{path} needs zstd to be unpacked: {problem}") from problem
    if path.suffix != ".ko":
        raise ModuleError(f"{path}: how is this packed?")
    return data


def _name(path: Path) -> str:
    return path.name.split(".")[0].replace("-", "_")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
