"""A target of the kernel's own, for its /dev/vhost-scsi: what `endpoints.register` makes for ours.

    set_up("naa.600140554cf3a18e")

A disk of memory behind one portal group, over configfs, as targetcli would write it.

Promises: needs root in a guest of its own. Never: takes anything down; run where there is a target already.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

CONFIGFS: Final = Path("/sys/kernel/config")
#: The modules that it needs.
MODULES: Final = ("target_core_mod", "vhost_scsi")
_NEXUS: Final = "naa.60014050d3c1a001"
_PAGES: Final = 1024


def set_up(wwpn: str) -> None:
    """A target of that name, with one disk. OSError: the kernel refuses a part of it."""
    if not (CONFIGFS / "target").exists():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"none", bytes(CONFIGFS), b"configfs", 0, None):
            raise OSError(ctypes.get_errno(), f"mount {CONFIGFS}: {os.strerror(ctypes.get_errno())}")
    disk = CONFIGFS / "target/core/rd_mcp_0/disk"
    disk.mkdir(parents=True)
    (disk / "control").write_text(f"rd_pages={_PAGES}\n")
    (disk / "enable").write_text("1\n")
    # The first folder below `target` has the kernel look for who serves such targets.
    group = CONFIGFS / "target/vhost" / wwpn / "tpgt_1"
    for folder in (group.parent.parent, group.parent, group):
        if not folder.exists():
            folder.mkdir()
    (group / "nexus").write_text(_NEXUS + "\n")
    lun = group / "lun/lun_0"
    lun.mkdir()
    (lun / "disk").symlink_to(disk)
