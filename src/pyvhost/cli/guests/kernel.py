"""Debian's stock kernel, for QEMU: found where it is, or unpacked into a cache; never installed.

Promises: looks in the cache, then among the host's own kernels, then asks apt for the cloud kernel as the archive
has it, and unpacks that. Needs no root. Never: installs a package, or writes anywhere but the cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

METAPACKAGE = "linux-image-cloud-amd64"
_DOWNLOAD_SECONDS = 300


class KernelError(RuntimeError):
    """There is no kernel to boot, and the message says what to do about it."""


@dataclass(frozen=True)
class Kernel:
    """A kernel image and the folder with its modules."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        """What `uname -r` says in it."""
        return self.modules.name


def cache_folder() -> Path:
    """Where kernels are kept: `$XDG_CACHE_HOME/pyvhost`, else `~/.cache/pyvhost`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pyvhost"


def find_kernel(work: Path | None = None, *, download: bool = True) -> Kernel:
    """A kernel for a guest, kept in `work` (default: `cache_folder()`).

    KernelError: there is none, and none is to be had.
    """
    folder = (work or cache_folder()) / "linux"
    found = _newest(folder) or _host()
    if found is None and download:
        _download(folder)
        found = _newest(folder)
    if found is None:
        raise KernelError(f"no kernel below {folder} nor in /boot: apt-get install {METAPACKAGE}")
    return found


def _newest(folder: Path) -> Kernel | None:
    found = [kernel for tree in folder.glob("linux-image-*") if (kernel := _in_tree(tree)) is not None]
    return max(found, key=lambda kernel: _version(kernel.release), default=None)


def _host() -> Kernel | None:
    """One that the host has installed, if this user may read it and it is of the kind that Debian ships."""
    kernels = []
    for image in Path("/boot").glob("vmlinuz-*-amd64"):
        modules = Path("/lib/modules") / image.name.removeprefix("vmlinuz-")
        if os.access(image, os.R_OK) and modules.is_dir():
            kernels.append(Kernel(image, modules))
    return max(kernels, key=lambda kernel: _version(kernel.release), default=None)


def _in_tree(tree: Path) -> Kernel | None:
    for image in tree.glob("boot/vmlinuz-*"):
        release = image.name.removeprefix("vmlinuz-")
        for modules in (tree / "lib/modules" / release, tree / "usr/lib/modules" / release):
            if modules.is_dir():
                return Kernel(image, modules)
    return None


def _download(folder: Path) -> None:
    for program in ("apt-cache", "apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise KernelError(f"no {program} here to fetch Debian's {METAPACKAGE} with")
    depends = _said("apt-cache", "depends", METAPACKAGE)
    packages = re.findall(r"Depends: (linux-image-[0-9]\S*)", depends)
    if not packages:
        raise KernelError(f"apt knows no {METAPACKAGE}: as root, apt-get update")
    package = packages[0]
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
        # As root, apt would download as its own user, who may not write here.
        _said("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", package, cwd=scratch)
        (deb,) = Path(scratch).glob("*.deb")
        tree = Path(scratch) / "tree"
        _said("dpkg-deb", "-x", str(deb), str(tree))
        target = folder / package
        shutil.rmtree(target, ignore_errors=True)
        tree.rename(target)


def _said(*argv: str, cwd: str | None = None) -> str:
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as problem:
        raise KernelError(f"{' '.join(argv)} took longer than {_DOWNLOAD_SECONDS} s") from problem
    if done.returncode:
        raise KernelError(
            f"{' '.join(argv)} failed (if apt's lists are old: as root, apt-get update):\n{done.stdout}"
        )
    return done.stdout


def _version(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]
