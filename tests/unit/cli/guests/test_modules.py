"""Which modules are loaded, in which order: by what they say of themselves."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from pyvhost.cli.guests.modules import ModuleError, load_order


def module(folder: Path, name: str, needs: str = "", packed: bool = False) -> Path:
    """A file with the part of a module that is looked at."""
    data = b"\x7fELF....license=GPL\0depends=" + needs.encode() + b"\0name=" + name.encode() + b"\0...."
    path = folder / "kernel/drivers" / f"{name}.ko{'.xz' if packed else ''}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(data) if packed else data)
    return path


def test_dependencies_come_first_and_once(tmp_path: Path) -> None:
    base = module(tmp_path, "base")
    left = module(tmp_path, "left", "base")
    right = module(tmp_path, "right", "base,left")
    top = module(tmp_path, "top", "right,left")
    assert load_order(tmp_path, ["top", "base"]) == [base, left, right, top]


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    needed = module(tmp_path, "virtio-ring")
    top = module(tmp_path, "virtio_net", "virtio_ring")
    assert load_order(tmp_path, ["virtio-net"]) == [needed, top]


def test_packed_modules(tmp_path: Path) -> None:
    needed = module(tmp_path, "failover", packed=True)
    top = module(tmp_path, "net_failover", "failover", packed=True)
    assert load_order(tmp_path, ["net_failover"]) == [needed, top]


def test_what_is_built_in_is_left_out(tmp_path: Path) -> None:
    top = module(tmp_path, "virtio_net", "virtio_ring")
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_ring.ko\n")
    assert load_order(tmp_path, ["virtio_net"]) == [top]


def test_what_is_not_there_at_all(tmp_path: Path) -> None:
    module(tmp_path, "virtio_net", "virtio_ring")
    with pytest.raises(ModuleError, match="no module virtio_ring"):
        load_order(tmp_path, ["virtio_net"])


def test_a_packing_that_nobody_knows(tmp_path: Path) -> None:
    path = module(tmp_path, "odd")
    path.rename(path.with_suffix(".ko.rar"))
    with pytest.raises(ModuleError, match="how is this packed"):
        load_order(tmp_path, ["odd"])
