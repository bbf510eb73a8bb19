"""The virtio-blk driver against qemu-storage-daemon: what is written is in the file, and comes back."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from pyvhost.driver.blk import BlkDriver
from pyvhost.driver.errors import DeviceError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.vhost_user import VhostUserFrontend
from requirements import need_program

SIZE = 1 << 20


def test_a_disk_of_qemus_storage_daemon(tmp_path: Path) -> None:
    program = "qemu-storage-daemon"
    need_program(program, package="qemu-system-common")
    image, socket = tmp_path / "disk", tmp_path / "s"
    image.write_bytes(os.urandom(SIZE))
    export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
    command = [program, "--blockdev", f"driver=file,node-name=disk,filename={image}", "--export", export]
    with subprocess.Popen(command) as daemon:
        try:
            deadline = time.monotonic() + 20
            while not socket.exists():
                assert daemon.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with (
                GuestMemory(4 << 20) as memory,
                VhostUserFrontend.connect(socket) as front,
                BlkDriver(front, memory) as driver,
            ):
                driver.start()
                assert driver.capacity == SIZE
                assert driver.read(4096, 8192) == image.read_bytes()[4096 : 4096 + 8192]
                driver.write(512, b"\x5a" * 1024)
                driver.flush()
                assert image.read_bytes()[512:1536] == b"\x5a" * 1024
                with pytest.raises(DeviceError, match="failed with status 1"):
                    driver.read(SIZE, 512)
        finally:
            daemon.terminate()
