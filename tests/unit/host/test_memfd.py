"""Memory files: their size stays what it was promised to be."""

from __future__ import annotations

import os
import tempfile

import pytest

from pyvhost.host import memfd


def test_a_sealed_file_can_neither_shrink_nor_grow() -> None:
    fd = memfd.create("sealed", 8192)
    try:
        assert os.fstat(fd).st_size == 8192
        assert not os.get_inheritable(fd)
        assert not memfd.can_shrink(fd)
        for size in (0, 4096, 16384):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
    finally:
        os.close(fd)


def test_an_unsealed_file_can_shrink_and_says_so() -> None:
    fd = memfd.create("unsealed", 8192, seals=0)
    try:
        assert memfd.can_shrink(fd)
        os.ftruncate(fd, 4096)
    finally:
        os.close(fd)


def test_a_plain_file_has_no_seals(tmp_path: object) -> None:
    with tempfile.TemporaryFile(dir=str(tmp_path)) as file:
        assert memfd.can_shrink(file.fileno())


def test_a_file_that_can_not_be_made_leaves_no_descriptor_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Invalid argument"):
        memfd.create("negative", -1)
    assert set(os.listdir("/proc/self/fd")) == before
