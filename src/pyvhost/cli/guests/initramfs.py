"""An initramfs made here: busybox, kernel modules, a few of the host's programs with their libraries.

Promises: the `newc` cpio format of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst,
written without root and without cpio(1). Never: copies anything that it was not told to.
"""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

PACKAGE = "busybox-static"


class InitramfsError(RuntimeError):
    """Something that must go in is not there."""


class Initramfs:
    """A tree of folders, files and symbolic links, all of them root's, to be given to a kernel."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}

    def add_file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """A file at `path`, in folders made as needed."""
        self._put(path, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def add_link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._put(path, stat.S_IFLNK | 0o777, target.encode())

    def add_folder(self, path: str) -> None:
        """An empty folder."""
        self._put(path, stat.S_IFDIR | 0o755, b"")

    def add_busybox(self) -> None:
        """A static busybox in /bin under all of its names. InitramfsError: it is not installed."""
        program = shutil.which("busybox")
        if program is None or not _static(program):
            raise InitramfsError(f"no static busybox here: apt-get install {PACKAGE}")
        self.add_file("bin/busybox", Path(program).read_bytes(), executable=True)
        names = subprocess.run(
            [program, "--list"], text=True, stdout=subprocess.PIPE, check=True
        ).stdout.split()
        for name in names:
            if name != "busybox":
                self.add_link(f"bin/{name}", "busybox")

    def add_program(self, program: str, *, into: str = "bin") -> None:
        """A program of the host and the libraries that ldd(1) says it is linked with, where it looks for them."""
        path = Path(program)
        self.add_file(f"{into}/{path.name}", path.read_bytes(), executable=True)
        self.add_libraries(program)

    def add_libraries(self, program: str) -> None:
        """What a program or a shared library is linked with."""
        for library in _libraries(program):
            self.add_file(str(library), library.read_bytes(), executable=True)

    def packed(self) -> bytes:
        """The archive."""
        out = bytearray()
        for number, (name, (mode, content)) in enumerate(sorted(self._entries.items()), start=1):
            _add(out, name, number, mode, content)
        _add(out, "TRAILER!!!", 0, 0, b"")
        return bytes(out)

    def _put(self, path: str, mode: int, content: bytes) -> None:
        name = path.strip("/")
        for parent in PurePosixPath(name).parents:
            if str(parent) != ".":
                self._entries.setdefault(str(parent), (stat.S_IFDIR | 0o755, b""))
        self._entries[name] = (mode, content)


def _add(out: bytearray, name: str, inode: int, mode: int, content: bytes) -> None:
    encoded = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, device (2), rdevice (2), namesize, check
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    out += b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    out += bytes(-len(out) % 4)
    out += content
    out += bytes(-len(out) % 4)


def _libraries(program: str) -> Iterable[Path]:
    done = subprocess.run(["ldd", program], text=True, capture_output=True, check=False)
    if done.returncode:
        if "not a dynamic executable" in done.stderr + done.stdout:
            return []
        raise InitramfsError(f"ldd {program}: {done.stderr or done.stdout}")
    if missing := re.findall(r"(\S+) => not found", done.stdout):
        raise InitramfsError(f"{program} needs {', '.join(missing)}, which is not here")
    return [Path(found) for found in re.findall(r"(/\S+) \(0x", done.stdout)]


def _static(program: str) -> bool:
    """Whether an ELF file asks for no interpreter."""
    done = subprocess.run(["ldd", program], text=True, capture_output=True, check=False)
    said = done.stdout + done.stderr
    return "not a dynamic executable" in said or "statically linked" in said
