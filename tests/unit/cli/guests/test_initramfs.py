"""The initramfs: an archive that others unpack, with what was put in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyvhost.cli.guests.initramfs import Initramfs, InitramfsError
from requirements import need_program


def unpacked(tree: Initramfs, into: Path) -> Path:
    """As busybox's cpio has it."""
    busybox = need_program("busybox", package="busybox-static")
    into.mkdir()
    subprocess.run(
        [busybox, "cpio", "-i", "-d"], input=tree.packed(), cwd=into, check=True, capture_output=True
    )
    return into


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    tree = Initramfs()
    tree.add_file("a/b/script", b"#!/bin/sh\n", executable=True)
    for size in range(5):  # every way that 4 bytes' alignment can fall
        tree.add_file(f"data{'x' * size}", bytes(range(size)))
    tree.add_link("a/link", "b/script")
    tree.add_folder("empty")
    root = unpacked(tree, tmp_path / "root")
    assert (root / "a/b/script").read_bytes() == b"#!/bin/sh\n"
    assert os.access(root / "a/b/script", os.X_OK)
    for size in range(5):
        assert (root / f"data{'x' * size}").read_bytes() == bytes(range(size))
        assert not os.access(root / f"data{'x' * size}", os.X_OK)
    assert (root / "a/link").readlink() == Path("b/script")
    assert list((root / "empty").iterdir()) == []


def test_it_ends_with_the_trailer_and_is_aligned() -> None:
    tree = Initramfs()
    tree.add_file("f", b"1")
    packed = tree.packed()
    assert packed.startswith(b"070701")
    assert len(packed) % 4 == 0
    assert packed.rindex(b"TRAILER!!!\0") > packed.index(b"f\0")


def test_a_program_brings_its_libraries(tmp_path: Path) -> None:
    program = shutil.which("ls")
    assert program is not None
    tree = Initramfs()
    tree.add_program(program)
    root = unpacked(tree, tmp_path / "root")
    assert (root / "bin/ls").read_bytes() == Path(program).read_bytes()
    libc = next(root.rglob("libc.so.6"))
    assert libc.read_bytes() == Path("/", libc.relative_to(root)).read_bytes()
    assert next(root.rglob("ld-linux-x86-64.so.2")).is_file()


def test_a_program_without_its_libraries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ldd"
    fake.write_text("#!/bin/sh\necho '\tlibgone.so.1 => not found'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InitramfsError, match=r"needs libgone\.so\.1"):
        Initramfs().add_program(sys.executable)


def test_busybox_under_all_its_names(tmp_path: Path) -> None:
    need_program("busybox", package="busybox-static")
    tree = Initramfs()
    tree.add_busybox()
    root = unpacked(tree, tmp_path / "root")
    assert subprocess.run([root / "bin/echo", "hello"], capture_output=True, check=True).stdout == b"hello\n"


def test_no_busybox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InitramfsError, match="apt-get install busybox-static"):
        Initramfs().add_busybox()
