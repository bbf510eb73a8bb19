"""A real kernel's vhost devices: Debian's stock kernel in QEMU, with this interpreter to drive them.

    with KernelLab() as lab:
        print(lab.python("kernel.in_guest", "features"))

The initramfs holds the interpreter that runs the tests, of its standard library what `kernel.in_guest` and the
driver's rooms import, and these themselves: what was read from where is asked of the host's interpreter, and lies at
the same paths in the guest. No third-party package goes in, so that what drives the kernel is shown to stand without
one. Whether the interpreter is Debian's or built elsewhere makes no difference; it boots in a few seconds, emulated.

Promises: needs no root; the guest has nothing of the host but what was copied. Never: writes there.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import py_compile
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from kernel import target
from pyvhost.cli.guests import Kernel, QemuGuest
from pyvhost.cli.guests.initramfs import Initramfs

TESTS = Path(__file__).resolve().parent.parent
SOURCES = TESTS.parent / "src"
DATA = TESTS / "kernel" / "recorded"
MODULES = ("virtio_pci", "tun", "vhost_net", "vhost_vsock", *target.MODULES)

# Run by the host's interpreter, without its site packages: imports what the guest will, and says where that was.
_ASK = """
import importlib, json, sys
sys.path[:0] = {folders!r}
for name in {names!r}:
    importlib.import_module(name)
specs = [getattr(module, "__spec__", None) for module in list(sys.modules.values())]
files = {{spec.origin for spec in specs if spec is not None and spec.has_location}}
libraries = {{module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)}}
print(json.dumps(sorted(files | libraries)))
"""


class KernelLab(QemuGuest):
    """The guest. `kernel` as for any QEMU guest."""

    def __init__(self, *, kernel: Kernel | None = None, on_line: Callable[[str], None] | None = None) -> None:
        super().__init__([], name="the kernel's lab", kernel=kernel, cpus=2, modules=MODULES, programs=())
        self._on_line = on_line

    def python(self, module: str, *words: str, timeout: float = 120.0) -> str:
        """What a module of these tests prints there, run as a program. GuestError: it failed."""
        environment = f"PYTHONPATH={SOURCES}:{TESTS}"
        command = ["env", environment, str(interpreter()), "-S", "-m", module, *words]
        return self.run(command, timeout=timeout).output

    def _furnish(self, tree: Initramfs) -> None:
        # Beside what it imports: what `-m` and an error need.
        names = ["kernel.in_guest", "pkgutil", "runpy", "traceback"]
        for room in ("abi", "host", "driver"):
            package = importlib.import_module(f"pyvhost.{room}")
            names += [f"pyvhost.{room}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
        add_python(tree, names)
        for path in DATA.glob("*.json"):
            _add(tree, path)


def add_python(tree: Initramfs, names: Sequence[str]) -> None:
    """Put the interpreter into a guest's root, with what these modules import."""
    program = interpreter()
    _add(tree, program, executable=True)
    tree.add_libraries(str(program))
    # Where the interpreter looks for what tells it its prefix.
    tree.add_folder(f"{library_folder()}/lib-dynload")
    with TemporaryDirectory() as scratch:
        for path in files(names):
            _add(tree, path, executable=path.suffix == ".so")
            if path.suffix == ".so":
                tree.add_libraries(str(path))
            else:
                tree.add_file(_cache_of(path), compiled(path, Path(scratch)))


def interpreter() -> Path:
    """The interpreter itself, not an environment's link to it or copy of it."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def library_folder() -> Path:
    """Where its standard library is."""
    return Path(os.__file__).parent


def files(names: Sequence[str]) -> Sequence[Path]:
    """What the guest's interpreter will import with these modules: sources, and extensions' libraries."""
    ask = _ASK.format(folders=[str(SOURCES), str(TESTS)], names=list(names))
    done = subprocess.run(
        [str(interpreter()), "-I", "-S", "-c", ask], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"what the guest is to import is not all there:\n{done.stderr}"
    found = [Path(name) for name in json.loads(done.stdout)]
    foreign = [path for path in found if "site-packages" in path.parts or "dist-packages" in path.parts]
    assert not foreign, f"the driver's side needs more than the standard library: {foreign}"
    return found


def compiled(path: Path, scratch: Path) -> bytes:
    """A source's byte code, which is believed without a look at the source's date: emulated, compiling is slow."""
    target = scratch / "module.pyc"
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(path), str(target), str(path), doraise=True, invalidation_mode=unchecked)
    return target.read_bytes()


def _cache_of(path: Path) -> str:
    return f"{path.parent}/__pycache__/{path.stem}.{sys.implementation.cache_tag}.pyc"


def _add(tree: Initramfs, path: Path, *, executable: bool = False) -> None:
    tree.add_file(str(path), path.read_bytes(), executable=executable)
