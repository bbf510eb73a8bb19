"""The disk of the demo: a file, made here with a file system in it, which a guest mounts, writes and reads again.

Promises: what the guest reads the second time comes from the disk, not from what it remembers: it has unmounted it
in between. Without e2fsprogs on the host there is no file system to mount, which is said. Never: needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from pyvhost.cli.guests import Guest, GuestError

MIB = 1 << 20
_SIZE = 64 * MIB
_MEBIBYTES = 16
#: What a guest's kernel needs where it has modules: jbd2 asks for a CRC by its name.
MODULES = ("virtio_scsi", "sd_mod", "crc32c_generic", "ext4")


def make_disk(path: Path) -> None:
    """A sparse file, with an ext4 if this host can make one."""
    with path.open("wb") as file:
        file.truncate(_SIZE)
    if program := _mkfs():
        subprocess.run([program, "-q", "-F", str(path)], check=True)


def show_disk(guest: Guest, say: Callable[[str], None]) -> str:
    """The guest mounts it, writes a file, unmounts and mounts it again; what came of it, or "" if nothing did.

    GuestError: what it reads is not what it wrote.
    """
    if not _mkfs():
        say("(this host has no mkfs.ext4 to make a file system with: apt-get install e2fsprogs)")
        return ""
    guest.run(_MOUNT, on_line=say)
    written = guest.run(_WRITE.format(mebibytes=_MEBIBYTES), on_line=say, timeout=60).output.split()[0]
    read = guest.run(_READ, on_line=say, timeout=60).output.split()[0]
    if read != written:
        raise GuestError(f"the disk was given SHA-256 {written}, and gave {read}")
    return f"Disk: {_MEBIBYTES} MiB written to ext4, the same SHA-256 when it was mounted again"


def _mkfs() -> str | None:
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return shutil.which("mkfs.ext4", path=path)


# Its drivers are loaded; that it has found the disk may take a moment longer.
_MOUNT = """
for _ in $(seq 200); do [ -b /dev/sda ] && break; sleep 0.05; done
cat /sys/block/sda/device/vendor /sys/block/sda/device/model | tr -s ' \\n' ' '
echo
mkdir -p $TMPDIR/disk
mount -t ext4 /dev/sda $TMPDIR/disk && grep /dev/sda /proc/mounts
"""

_WRITE = """
cd $TMPDIR/disk
dd if=/dev/urandom of=data bs=1M count={mebibytes} 2>/dev/null
sha256sum data
cd /
umount $TMPDIR/disk
"""

_READ = """
mount -t ext4 /dev/sda $TMPDIR/disk
cd $TMPDIR/disk
sha256sum data
cd /
umount $TMPDIR/disk
"""
