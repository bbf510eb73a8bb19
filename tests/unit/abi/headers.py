"""Asks the system's C headers what each name of pyvhost.abi is: by compiling, not by reading text.

A name that the headers lack does not compile, and its line is left out; the tests say which may be missing.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

from pyvhost.abi import _ioctl, vhost, virtio, virtio_blk, virtio_net, virtio_scsi, virtio_vsock

INCLUDES = (
    "stddef.h",
    "stdio.h",
    "sys/socket.h",
    "linux/ioctl.h",
    "linux/version.h",
    "linux/vhost.h",
    "linux/virtio_blk.h",
    "linux/virtio_config.h",
    "linux/virtio_ids.h",
    "linux/virtio_net.h",
    "linux/virtio_ring.h",
    "linux/virtio_scsi.h",
    "linux/virtio_vsock.h",
    "linux/vm_sockets.h",
)

# Each module, what its constants' names and its structures' names begin with in C
MODULES: dict[ModuleType, tuple[str, str]] = {
    _ioctl: ("_IOC_", ""),
    vhost: ("VHOST_", "vhost_"),
    virtio: ("VIRTIO_", ""),
    virtio_blk: ("VIRTIO_BLK_", "virtio_blk_"),
    virtio_net: ("VIRTIO_NET_", "virtio_"),
    virtio_scsi: ("VIRTIO_SCSI_", "virtio_"),
    virtio_vsock: ("VIRTIO_VSOCK_", "virtio_"),
}

# What the macros of these headers begin with, that all of them be looked for
COVERED = (
    *("VHOST_", "VRING_", "VMADDR_", "VIRTIO_NET_", "VIRTIO_SCSI_", "VIRTIO_VSOCK_", "VIRTIO_RING_F_"),
    *("VIRTIO_F_", "VIRTIO_ID_", "VIRTIO_TRANS_ID_", "VIRTIO_TRANSPORT_F_", "VIRTIO_CONFIG_S_"),
)

# Names that C has as they are, without the module's prefix
WHOLE = {virtio: "VRING_", virtio_vsock: "VMADDR_"}


def constant(module: ModuleType, name: str) -> str:
    """C's name of one of our constants."""
    if module in WHOLE and name.startswith(WHOLE[module]):
        return name
    return MODULES[module][0] + name


def structure(module: ModuleType, name: str) -> str:
    """C's name of one of our structures: VringState is vhost_vring_state."""
    return MODULES[module][1] + re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def members(layout: type[ctypes.Structure | ctypes.Union]) -> list[str]:
    """The names that a structure's fields have in C, where an anonymous member has none."""
    names = []
    for name, kind, *_ in layout._fields_:
        if name in getattr(layout, "_anonymous_", ()):
            names += members(kind)  # type: ignore[arg-type]
        else:
            names.append(name)
    return names


def expectations() -> dict[str, int]:
    """Every C expression that we have an opinion on, and our value of it."""
    expected: dict[str, int] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if name.startswith("_"):
                continue
            if isinstance(value, int):
                expected[constant(module, name)] = value
            elif _is_layout(value) and value.__module__ == module.__name__:
                expected |= layout_expectations(structure(module, name), value)
    return expected


def _is_layout(value: object) -> TypeGuard[type[ctypes.Structure]]:
    return isinstance(value, type) and issubclass(value, ctypes.Structure)


def layout_expectations(name: str, layout: type[ctypes.Structure]) -> dict[str, int]:
    """One structure's size, and each field's place and size."""
    expected = {f"sizeof(struct {name})": ctypes.sizeof(layout)}
    for member in members(layout):
        field = getattr(layout, member)
        expected[f"offsetof(struct {name}, {member})"] = field.offset
        if field.size:  # C gives an array of no stated length no size
            expected[f"sizeof(((struct {name} *)0)->{member})"] = field.size
    return expected


@dataclass(frozen=True)
class Answers:
    """What C said: the value of each expression that it knows, and the headers' version."""

    values: dict[str, int]
    unknown: frozenset[str]
    version: tuple[int, int]


def ask(gcc: str, directory: Path, expressions: list[str]) -> Answers:
    """Compiles and runs; raises CalledProcessError, with C's words on stderr, if even that fails."""
    unknown = _unknown(gcc, directory, expressions)
    known = [expression for expression in expressions if expression not in unknown]
    source, program = directory / "print.c", directory / "print"
    lines = [f'    printf("%lld\\n", (long long)({expression}));' for expression in known]
    lines.append('    printf("%d %d\\n", LINUX_VERSION_CODE >> 16, LINUX_VERSION_CODE >> 8 & 255);')
    source.write_text(_preamble() + "int main(void) {\n" + "\n".join(lines) + "\n    return 0;\n}\n")
    subprocess.run([gcc, "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    major, minor = map(int, printed.pop().split())
    return Answers(dict(zip(known, map(int, printed), strict=True)), frozenset(unknown), (major, minor))


def _unknown(gcc: str, directory: Path, expressions: list[str]) -> set[str]:
    """Which expressions do not compile. An #ifdef would do for macros, but not for enums and fields."""
    source = directory / "probe.c"
    preamble = _preamble()
    lines = [f"static long long probe_{i} = (long long)({each});" for i, each in enumerate(expressions)]
    source.write_text(preamble + "\n".join(lines) + "\n")
    command = [gcc, "-fsyntax-only", "-fmax-errors=0", str(source)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"}
    )
    first = preamble.count("\n") + 1
    wrong = re.findall(rf"^{re.escape(str(source))}:(\d+):\d+: error", done.stderr, re.MULTILINE)
    if done.returncode and (not wrong or min(map(int, wrong)) < first):
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return {expressions[int(line) - first] for line in wrong}


def declared(gcc: str, directory: Path) -> set[str]:
    """The macros and structures that the headers have under the prefixes that are ours to cover."""
    source = directory / "declared.c"
    source.write_text(_preamble())
    macros = subprocess.run([gcc, "-E", "-dM", source], check=True, capture_output=True, text=True).stdout
    text = subprocess.run([gcc, "-E", "-P", source], check=True, capture_output=True, text=True).stdout
    prefixes = "|".join(COVERED)
    names = set(re.findall(rf"^#define ((?:{prefixes})\w+) ", macros, re.MULTILINE))
    for body in re.findall(r"enum virtio_vsock_\w+\s*\{(.*?)\}", text, re.DOTALL):
        names |= set(re.findall(r"(VIRTIO_VSOCK_\w+)", body))
    structures = re.findall(r"struct\s+((?:vhost_|vring_|virtio_(?:net|scsi|vsock)_)\w+)\s*\{", text)
    return names | {f"sizeof(struct {name})" for name in structures}


def _preamble() -> str:
    return "".join(f"#include <{include}>\n" for include in INCLUDES)
