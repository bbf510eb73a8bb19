"""User Mode Linux, unmodified, with disks of `pyvhost scsi` on every kind of store at once.

A file, memory, nbdkit, qcow2 through qemu-nbd, and a file that is read-only are disks of one guest: it partitions,
makes file systems, checks what it reads back, is started again, and sees disks come, grow and go.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from interop import scsi_guest
from interop.conftest import Controller, Served, eventually
from pyvhost.cli.guests import UmlGuest
from requirements import need, need_program

MIB = 1 << 20
PLACES = ("0:0", "0:1", "0:2", "0:3", "0:4")
FILE, MEMORY, NBDKIT, QCOW2, READONLY = PLACES
#: What is on them. On the file it is in a partition.
SYSTEMS = {FILE: "ext4", MEMORY: "xfs", NBDKIT: "ext4", QCOW2: "ext4"}


class World:
    """The guest, its controller, and the servers behind two of its disks."""

    def __init__(self, served: Served, stack: ExitStack) -> None:
        folder = served.folder
        self.served = served
        self.image = folder / "disk.img"
        self.qcow2 = folder / "disk.qcow2"
        self.readonly = folder / "readonly.img"
        with self.image.open("wb") as file:
            file.truncate(96 * MIB)
        self.readonly_bytes = os.urandom(3 * MIB)
        self.readonly.write_bytes(self.readonly_bytes)
        subprocess.run(
            [need_program("qemu-img", package="qemu-utils"), "create", "-qf", "qcow2", self.qcow2, "96M"],
            check=True,
        )
        nbdkit, qemu_nbd = folder / "nbdkit.sock", folder / "qemu-nbd.sock"
        serve(stack, nbdkit, "nbdkit", "--foreground", "-U", str(nbdkit), "memory", "96M")
        self.qemu_nbd = serve(
            stack,
            qemu_nbd,
            "qemu-nbd",
            "--persistent",
            *("--socket", str(qemu_nbd), "--format", "qcow2", "--discard=unmap", str(self.qcow2)),
            package="qemu-utils",
        )
        self.controller: Controller = served.start_disks(
            "disks",
            str(self.image),
            # Less than 300 MiB mkfs.xfs does not take. Memory that is not written is not there.
            "memory:320M",
            f"nbd+unix:///?socket={nbdkit}",
            f"nbd+unix:///?socket={qemu_nbd}",
            f"{self.readonly},readonly",
            request_queues=2,
        )
        served.wait()
        self.guest = self.next_guest()

    def next_guest(self) -> UmlGuest:
        """One that was not started."""
        # fio's libraries map 130 MiB of zeros at once, and where UML's heap begins takes up to 30 MiB from the guest.
        return UmlGuest(disks=[self.controller.socket], memory_mib=224)

    def stop(self) -> None:
        """End the guest that there is by then."""
        self.guest.stop()

    def systems(self, *places: str) -> dict[str, str]:
        """Block devices as this boot names them, and the file systems on them: these, or all."""
        names = scsi_guest.disks(self.guest)
        names[FILE] += "1"
        return {names[place]: SYSTEMS[place] for place in places or SYSTEMS}


def serve(
    stack: ExitStack, socket: Path, *command: str, package: str | None = None
) -> subprocess.Popen[bytes]:
    """An NBD server, which listens when this returns."""
    name, *words = command
    process = subprocess.Popen([need_program(name, package=package), *words])
    stack.callback(process.wait)
    # A polite end waits for the client.
    stack.callback(process.kill)
    eventually(lambda: socket.exists() or process.poll() is not None)
    assert process.poll() is None
    return process


@pytest.fixture(scope="module")
def world(served: Served) -> Iterator[World]:
    need_program("linux.uml", package="user-mode-linux")
    for program, package in (
        ("fio", None),
        ("mkfs.xfs", "xfsprogs"),
        ("mkfs.ext4", "e2fsprogs"),
        ("sfdisk", "fdisk"),
    ):
        need_program(program, package=package)
    need(os.access("/dev/shm", os.W_OK), "a /dev/shm that can be written")
    with ExitStack() as stack:
        found = World(served, stack)
        stack.callback(found.stop)
        found.guest.start()
        yield found


@pytest.fixture
def guest(world: World) -> UmlGuest:
    return world.guest


def test_every_disk_is_found(world: World, guest: UmlGuest) -> None:
    scsi_guest.wait_disks(guest, *PLACES)
    for place, mebibytes in ((FILE, 96), (MEMORY, 320), (NBDKIT, 96), (QCOW2, 96), (READONLY, 3)):
        assert scsi_guest.size(guest, place) == mebibytes * MIB
        assert scsi_guest.is_readonly(guest, place) == (place == READONLY)


def test_file_systems_on_four_stores_at_once(world: World, guest: UmlGuest) -> None:
    scsi_guest.partition(guest, scsi_guest.disks(guest)[FILE])
    systems = world.systems()
    scsi_guest.make(guest, systems)
    scsi_guest.mount(guest, systems)
    scsi_guest.verify(guest, systems)
    scsi_guest.unmount(guest, systems)
    scsi_guest.check(guest, systems)
    scsi_guest.no_complaints(guest)


def test_the_host_finds_the_same_file_system(world: World) -> None:
    """What the guest has unmounted is in the file, where its partition begins."""
    image = f"{world.image}?offset={MIB}"
    subprocess.run([need_program("fsck.ext4", package="e2fsprogs"), "-fn", image], check=True)


def test_discarded_blocks_are_given_back(world: World, guest: UmlGuest) -> None:
    """What fio has written is a hole in the file again."""
    before = world.image.stat().st_blocks * 512
    assert before > 16 * MIB
    systems = world.systems(FILE)
    scsi_guest.mount(guest, systems)
    for block in systems:
        guest.run(f"rm $TMPDIR/{block}/{block}* && sync && fstrim $TMPDIR/{block}")
    scsi_guest.unmount(guest, systems)
    assert world.image.stat().st_blocks * 512 < before - 15 * MIB


def test_a_readonly_disk(world: World, guest: UmlGuest) -> None:
    scsi_guest.refused_write(guest, scsi_guest.disks(guest)[READONLY])
    assert world.readonly.read_bytes() == world.readonly_bytes


def test_disks_come_grow_and_go(world: World, guest: UmlGuest) -> None:
    """While the guest runs: at a target that it has, and at one that it has not. One grows with its file system."""
    scsi_guest.come_grow_and_go(guest, world.controller, PLACES, world.served.folder / "added.img")


def test_a_disk_goes_under_load(world: World, guest: UmlGuest) -> None:
    """Whoever reads it is told so; the others don't notice."""
    scsi_guest.goes_under_load(guest, world.controller, PLACES)


def test_the_guest_boots_again(world: World, guest: UmlGuest) -> None:
    """Files that it has kept on four stores are the same in the next boot.

    It is powered off and started: where Debian 12's UML starts itself anew it now and then takes a fault at once, and
    again without end, with QEMU's own back end as well.
    """
    systems = world.systems()
    scsi_guest.mount(guest, systems)
    kept = [scsi_guest.write_file(guest, block) for block in systems]
    scsi_guest.unmount(guest, systems)
    assert guest.power_off() == 0
    world.guest = guest = world.next_guest()
    guest.start()
    scsi_guest.wait_disks(guest, *PLACES)
    systems = world.systems()
    scsi_guest.check(guest, systems)
    scsi_guest.mount(guest, systems)
    assert [scsi_guest.read_file(guest, block) for block in systems] == kept
    scsi_guest.unmount(guest, systems)
    scsi_guest.no_complaints(guest)


def test_qcow2_is_whole(world: World, guest: UmlGuest) -> None:
    """When guest and qemu-nbd have ended, its image has no leak and no error."""
    assert guest.power_off() == 0
    world.served.end(world.controller.serving)
    world.qemu_nbd.terminate()
    world.qemu_nbd.wait(10)
    subprocess.run([need_program("qemu-img", package="qemu-utils"), "check", "-q", world.qcow2], check=True)
