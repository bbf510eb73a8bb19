"""How Linux puts an ioctl's number together (asm-generic/ioctl.h; x86, Arm and RISC-V use it as it is).

Promises: the macros of the C header under their own names. Never calls ioctl.
"""

from __future__ import annotations

import ctypes

NRSHIFT = 0
TYPESHIFT = 8
SIZESHIFT = 16
DIRSHIFT = 30

NRBITS = 8
TYPEBITS = 8
SIZEBITS = 14

NONE = 0
WRITE = 1
READ = 2

CType = type[ctypes._SimpleCData] | type[ctypes.Structure]  # type: ignore[type-arg]


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    if kind >> TYPEBITS or number >> NRBITS or size >> SIZEBITS:
        raise ValueError(f"no such ioctl number: type {kind:#x}, number {number:#x}, size {size}")
    return direction << DIRSHIFT | size << SIZESHIFT | kind << TYPESHIFT | number << NRSHIFT


def _IO(kind: int, number: int) -> int:  # noqa: N802 - the header's name
    """An ioctl without an argument."""
    return _ioc(NONE, kind, number, 0)


def _IOR(kind: int, number: int, argument: CType) -> int:  # noqa: N802 - the header's name
    """An ioctl whose argument the kernel writes and the caller reads."""
    return _ioc(READ, kind, number, ctypes.sizeof(argument))


def _IOW(kind: int, number: int, argument: CType) -> int:  # noqa: N802 - the header's name
    """An ioctl whose argument the caller writes and the kernel reads."""
    return _ioc(WRITE, kind, number, ctypes.sizeof(argument))


def _IOWR(kind: int, number: int, argument: CType) -> int:  # noqa: N802 - the header's name
    """An ioctl whose argument goes both ways."""
    return _ioc(READ | WRITE, kind, number, ctypes.sizeof(argument))
