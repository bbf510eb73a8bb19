"""User Mode Linux: the guest that is an ordinary process, and boots in a second or two.

Promises: Debian's `user-mode-linux`, unmodified; its root is the host's own, through hostfs, mounted read-only, so
that every program of the host is there; what is written goes to a tmpfs. Its NICs, its SCSI controllers and its
socket device are vhost-user devices, one a socket. Runs as any user, each guest with the rights of that user.
Never: needs KVM, root or a disk image.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pyvhost.abi import virtio
from pyvhost.cli.guests import agent
from pyvhost.cli.guests.base import Guest, GuestError, LineCallback
from pyvhost.cli.guests.modules import ModuleError, load_order

PROGRAM = "linux.uml"
PACKAGE = "user-mode-linux"
MODULES = Path("/usr/lib/uml/modules")

# The shell's line: console 1. Console 0 is what a person reads.
_TTY = "/dev/tty1"
_DISK_MODULES = ("virtio_scsi", "sd_mod", "sg")
_VSOCK_MODULES = ("vmw_vsock_virtio_transport",)


class UmlGuest(Guest):
    """A UML with one virtio NIC for each of `sockets`, and one virtio SCSI controller for each of `disks`.

    `vsock`: the back end's socket of its one virtio socket device. The back ends must be listening by `start`.
    `modules`: the drivers to load; default: what the cards need.
    """

    def __init__(
        self,
        sockets: Sequence[str | Path] = (),
        *,
        disks: Sequence[str | Path] = (),
        vsock: str | Path | None = None,
        name: str = "UML",
        memory_mib: int = 96,
        modules: Sequence[str] | None = None,
        on_line: LineCallback | None = None,
    ) -> None:
        super().__init__(name, on_line=on_line)
        self.sockets = [str(Path(path).absolute()) for path in sockets]
        self.disks = [str(Path(path).absolute()) for path in disks]
        self.vsock = None if vsock is None else str(Path(vsock).absolute())
        self.memory_mib = memory_mib
        if modules is None:
            modules = [
                *(("virtio_net",) if sockets or not (disks or vsock) else ()),
                *(_DISK_MODULES if disks else ()),
                *(_VSOCK_MODULES if vsock else ()),
            ]
        self.modules = list(modules)

    def _command(
        self, folder: Path, shell: socket.socket
    ) -> tuple[list[str], dict[str, str], list[socket.socket]]:
        program = shutil.which(PROGRAM)
        if program is None:
            raise GuestError(f"there is no {PROGRAM}: apt-get install {PACKAGE}")
        init = folder / "init"
        init.write_text(agent.uml_init(_TTY, map(str, self._modules(program)), sys.executable))
        init.chmod(0o755)
        argv = [
            program,
            f"mem={self.memory_mib}M",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={init}",
            f"uml_dir={folder}/",
            "umid=guest",
            "con=null",
            "con0=null,fd:1",
            f"con1=fd:{shell.fileno()}",
            "ssl=null",
            "panic=-1",
            *(f"virtio_uml.device={path}:{virtio.ID_NET}" for path in self.sockets),
            *(f"virtio_uml.device={path}:{virtio.ID_SCSI}" for path in self.disks),
            *([f"virtio_uml.device={self.vsock}:{virtio.ID_VSOCK}"] if self.vsock else []),
        ]
        return argv, {"TMPDIR": str(memory_folder(self.memory_mib))}, []

    def _modules(self, program: str) -> list[Path]:
        """The drivers' files, or none for a kernel that has them built in and no modules beside it."""
        release = subprocess.run(
            [program, "--version"], stdout=subprocess.PIPE, text=True, check=False
        ).stdout.strip()
        folder = MODULES / release
        if not folder.is_dir():
            return []
        try:
            return load_order(folder, self.modules)
        except ModuleError as problem:
            raise GuestError(f"{self.name}: {problem}") from problem


def memory_folder(memory_mib: int) -> Path:
    """Where UML may keep its guest's memory: a file there is mapped, shared and partly executable.

    A tmpfs before a disk. GuestError: no place has room.
    """
    tried = []
    for place in ("/dev/shm", os.environ.get("TMPDIR"), "/tmp", "/var/tmp"):
        if place is None or not os.access(place, os.W_OK | os.X_OK):
            continue
        there = os.statvfs(place)
        # The kernel adds what its own text needs, less than this.
        if there.f_bavail * there.f_frsize >= (memory_mib + 160) << 20 and not there.f_flag & os.ST_NOEXEC:
            return Path(place)
        tried.append(place)
    raise GuestError(f"no room for {memory_mib} MiB of guest memory in any of: {', '.join(tried)}")
