"""What abi itself is made of: the size check, ioctl numbers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from ctypes import Structure, c_uint8, c_uint32

import pytest

from pyvhost.abi import _ioctl, vhost
from pyvhost.abi._check import sized


def test_a_structure_of_another_size_is_not_importable() -> None:
    class Four(Structure):
        _fields_ = (("word", c_uint32),)

    assert sized(4)(Four) is Four
    with pytest.raises(AssertionError, match=r"Four is 4 bytes here, its standard says 5"):
        sized(5)(Four)


def test_ioctl_numbers_of_the_kernels_answers() -> None:
    # As strace shows them of a program that uses /dev/vhost-net
    assert vhost.SET_OWNER == 0xAF01
    assert vhost.GET_FEATURES == 0x8008AF00
    assert vhost.SET_MEM_TABLE == 0x4008AF03
    assert vhost.GET_VRING_BASE == 0xC008AF12


@pytest.mark.parametrize(
    ("kind", "number", "argument"),
    [(256, 0, c_uint8), (0, 256, c_uint8), (-1, 0, c_uint8), (0, 0, c_uint8 * (1 << 14))],
    ids=["type", "number", "negative", "size"],
)
def test_what_does_not_fit_is_no_ioctl_number(kind: int, number: int, argument: type[c_uint8]) -> None:
    with pytest.raises(ValueError, match="no such ioctl number"):
        _ioctl._IOW(kind, number, argument)


def test_importing_it_imports_nothing_beyond_the_standard_library() -> None:
    script = """
import sys
import pyvhost.abi
roots = {name.partition(".")[0] for name in sys.modules}
print(*sorted(roots - set(sys.stdlib_module_names) - {"__main__", "pyvhost"}))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == []
