"""QEMU 7.2 with Debian's stock kernel, unmodified and emulated, with disks of `pyvhost scsi`: two request queues.

One guest goes through it all: a file with a partition and memory with a file system of another kind at once, disks
that come, grow and go, its own reboot and the reset button.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from interop import scsi_guest
from interop.conftest import Controller, Served, eventually
from pyvhost.cli.guests import Disks, Kernel, QemuGuest
from requirements import need_program

MIB = 1 << 20
PLACES = ("0:0", "0:1", "0:2")
FILE, MEMORY, READONLY = PLACES
#: What is on them. On the file it is in a partition.
SYSTEMS = {FILE: "ext4", MEMORY: "xfs"}
#: The host's, taken into the guest, with Debian's packages of them.
PROGRAMS = {
    "fio": "fio",
    "sfdisk": "fdisk",
    "mkfs.ext4": "e2fsprogs",
    "fsck.ext4": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
}
# jbd2 and ext4 ask for a CRC by its name, which no module's list of dependencies has.
MODULES = ("virtio_pci", "virtio_scsi", "sd_mod", "crc32c_generic", "ext4", "xfs")


class World:
    """The guest and its controller."""

    def __init__(self, served: Served, kernel: Kernel) -> None:
        self.served = served
        self.image = served.folder / "disk.img"
        self.readonly = served.folder / "readonly.img"
        for path, mebibytes in ((self.image, 64), (self.readonly, 1)):
            with path.open("wb") as file:
                file.truncate(mebibytes * MIB)
        self.controller: Controller = served.start_disks(
            "disks",
            str(self.image),
            # Less than 300 MiB mkfs.xfs does not take. Memory that is not written is not there.
            "memory:320M",
            f"{self.readonly},readonly",
            request_queues=2,
        )
        served.wait()
        self.guest = QemuGuest(
            disks=[Disks(self.controller.socket, queues=2)],
            kernel=kernel,
            memory_mib=768,
            modules=MODULES,
            programs=tuple(PROGRAMS),
        )

    def systems(self, *places: str) -> dict[str, str]:
        """Block devices as this boot names them, and the file systems on them: these, or all."""
        names = scsi_guest.disks(self.guest)
        names[FILE] += "1"
        return {names[place]: SYSTEMS[place] for place in places or SYSTEMS}


@pytest.fixture(scope="module")
def world(kernel: Kernel, served: Served) -> Iterator[World]:
    for program, package in PROGRAMS.items():
        need_program(program, package=package)
    found = World(served, kernel)
    try:
        found.guest.start(120)
        yield found
    finally:
        found.guest.stop()


@pytest.fixture
def guest(world: World) -> QemuGuest:
    return world.guest


def test_two_file_systems_on_two_stores_at_once(world: World, guest: QemuGuest) -> None:
    names = scsi_guest.wait_disks(guest, *PLACES)
    scsi_guest.partition(guest, names[FILE])
    systems = world.systems()
    scsi_guest.make(guest, systems)
    scsi_guest.mount(guest, systems)
    scsi_guest.verify(guest, systems, mebibytes=4)
    scsi_guest.unmount(guest, systems)
    scsi_guest.check(guest, systems)
    scsi_guest.no_complaints(guest)


def test_both_queues_were_used(world: World) -> None:
    """The driver has one for each of the two processors."""
    for queue in ("req0", "req1"):
        assert world.controller.counted(queue).get("kicks") > 0


def test_a_readonly_disk(world: World, guest: QemuGuest) -> None:
    assert scsi_guest.is_readonly(guest, READONLY)
    scsi_guest.refused_write(guest, scsi_guest.disks(guest)[READONLY])


def test_disks_come_grow_and_go(world: World, guest: QemuGuest) -> None:
    """While the guest runs: at a target that it has, and at one that it has not. One grows with its file system."""
    scsi_guest.come_grow_and_go(guest, world.controller, PLACES, world.served.folder / "added.img")


def test_a_disk_goes_under_load(world: World, guest: QemuGuest) -> None:
    """Whoever reads it is told so; the others don't notice."""
    scsi_guest.goes_under_load(guest, world.controller, PLACES)


@pytest.mark.parametrize("how", ["reboot", "reset"])
def test_the_guest_boots_again(world: World, guest: QemuGuest, how: str) -> None:
    """Files that it has kept are the same then; with the reset button nobody unmounts anything."""
    systems = world.systems()
    scsi_guest.mount(guest, systems)
    kept = [scsi_guest.write_file(guest, block) for block in systems]
    if how == "reboot":
        scsi_guest.unmount(guest, systems)
        guest.reboot(120)
    else:
        guest.reset(120)
    scsi_guest.wait_disks(guest, *PLACES)
    systems = world.systems()
    # Mounting repeats what is in the journal.
    scsi_guest.mount(guest, systems)
    assert [scsi_guest.read_file(guest, block) for block in systems] == kept
    scsi_guest.unmount(guest, systems)
    scsi_guest.check(guest, systems)
    scsi_guest.no_complaints(guest)
    assert guest.running


def test_the_guest_goes_for_good(world: World, guest: QemuGuest) -> None:
    assert guest.power_off() == 0
    eventually(lambda: "left" in world.controller.serving.lines[-1])
