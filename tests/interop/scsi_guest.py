"""What a guest does with its SCSI disks, the same for every kind of guest: scripts that it runs, and what they say.

A disk is named by its place, `TARGET:LUN`, as `pyvhost scsi --lun` has it. Which of `sda`, `sdb`... that is depends
on who was found first; it is looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from interop.conftest import Controller, eventually
from pyvhost.cli.guests import Guest

MIB = 1 << 20
#: Seconds for what is long: making a file system, checking one, random I/O.
LONG = 100

# Of every disk: its place, its name, its size in sectors of 512 bytes, whether it is read-only.
_LIST = """
for path in /sys/class/scsi_disk/*; do
    [ -e "$path" ] || continue
    for block in "$path"/device/block/*; do
        [ -e "$block" ] || continue
        read -r sectors <"$block/size" && read -r readonly <"$block/ro" || continue
        echo "${path##*/}" "${block##*/}" "$sectors" "$readonly"
    done
done
"""

# What a kernel says when something went wrong below a file system, or in it.
_COMPLAINTS = re.compile(
    r"(?i)i/o error|medium error|hardware error|aborted command|task abort|reset failed|offlined|timing out"
    r"|corrupt|call trace|bug:|(?:ext4|xfs).*(?:error|shut)"
)


def disks(guest: Guest) -> dict[str, str]:
    """The names of the guest's disks by their places."""
    return {place: name for place, (name, _, _) in _listed(guest).items()}


def _listed(guest: Guest) -> dict[str, tuple[str, int, bool]]:
    found = {}
    for line in guest.run(_LIST).output.splitlines():
        address, name, sectors, readonly = line.split()
        _, _, target, lun = address.split(":")
        found[f"{target}:{lun}"] = name, int(sectors) * 512, readonly == "1"
    return found


def size(guest: Guest, place: str) -> int:
    """A disk's size in bytes, as the guest sees it; 0: there is none."""
    return _listed(guest).get(place, ("", 0, False))[1]


def is_readonly(guest: Guest, place: str) -> bool:
    """Whether the guest takes a disk for one that can't be written."""
    return _listed(guest)[place][2]


def wait_disks(guest: Guest, *places: str) -> dict[str, str]:
    """Waits until the guest has these disks and no other; their names by their places."""
    found: dict[str, str] = {}

    def there() -> bool:
        nonlocal found
        listed = _listed(guest)
        found = {place: name for place, (name, _, _) in listed.items()}
        return set(found) == set(places) and all(size for _, size, _ in listed.values())

    try:
        eventually(there)
    except AssertionError:
        raise AssertionError(f"{found}\n{guest.run('dmesg | tail -30').output}") from None
    return found


def partition(guest: Guest, disk: str) -> str:
    """A GPT with one partition that takes all; its name."""
    guest.run(f"echo ',,L' | sfdisk -q --label gpt /dev/{disk} && until [ -b /dev/{disk}1 ]; do :; done")
    return f"{disk}1"


def make(guest: Guest, systems: Mapping[str, str]) -> None:
    """File systems, a type for each block device."""
    for block, kind in systems.items():
        force = {"ext4": "-F", "xfs": "-f"}[kind]
        guest.run(f"mkfs.{kind} -q {force} /dev/{block}", timeout=LONG)


def mount(guest: Guest, systems: Mapping[str, str]) -> None:
    """Mounts them, each below $TMPDIR under the device's name."""
    for block, kind in systems.items():
        guest.run(f"mkdir -p $TMPDIR/{block} && mount -t {kind} /dev/{block} $TMPDIR/{block}")


def unmount(guest: Guest, systems: Mapping[str, str]) -> None:
    for block in systems:
        guest.run(f"umount $TMPDIR/{block}", timeout=LONG)


def verify(guest: Guest, systems: Mapping[str, str], *, mebibytes: int = 16, queue_depth: int = 16) -> None:
    """fio on all at once: random reads and writes of all sizes past the page cache, each block's CRC checked."""
    names = " ".join(f"--name={block} --directory=$TMPDIR/{block}" for block in systems)
    said = guest.run(
        f"fio --thread --size={mebibytes}M --rw=randrw --bsrange=512-64k --direct=1 --ioengine=libaio"
        f" --iodepth={queue_depth} --verify=crc32c --verify_fatal=1 --end_fsync=1 --output-format=json {names}",
        timeout=LONG,
    ).output
    jobs = json.loads(said[said.index("{") :])["jobs"]
    assert [job["jobname"] for job in jobs] == list(systems)
    for job in jobs:
        assert job["error"] == 0, said
        # Each block that was written was read again after that.
        assert 0 < job["write"]["total_ios"] < job["read"]["total_ios"], said


def check(guest: Guest, systems: Mapping[str, str]) -> None:
    """They are not mounted, and whole: who checks finds nothing to mend."""
    for block, kind in systems.items():
        program = {"ext4": "fsck.ext4 -fn", "xfs": "xfs_repair -n"}[kind]
        guest.run(f"{program} /dev/{block}", timeout=LONG)


def no_complaints(guest: Guest) -> None:
    """The guest's kernel has met no error of a disk since it booted."""
    said = guest.run("dmesg").output
    assert not _COMPLAINTS.search(said), "\n".join(
        line for line in said.splitlines() if _COMPLAINTS.search(line)
    )


def write_file(guest: Guest, block: str, mebibytes: int = 1) -> str:
    """A file of random bytes on a mounted file system, on the disk when this returns; its SHA-256."""
    return guest.run(
        f"cd $TMPDIR/{block} && dd if=/dev/urandom of=kept bs=1M count={mebibytes} 2>/dev/null"
        " && sync && sha256sum kept",
        timeout=LONG,
    ).output.split()[0]


def read_file(guest: Guest, block: str) -> str:
    """The SHA-256 of what `write_file` has written, read from the disk."""
    return guest.run(
        f"echo 3 >/proc/sys/vm/drop_caches; sha256sum $TMPDIR/{block}/kept", timeout=LONG
    ).output.split()[0]


def refused_write(guest: Guest, disk: str) -> None:
    """A write to a disk that can't be written: the guest is told so, and keeps what it reads."""
    before = guest.run(f"sha256sum /dev/{disk}").output
    said = guest.run(f"dd if=/dev/urandom of=/dev/{disk} bs=4k count=1 conv=fsync", check=False)
    assert said.status != 0
    assert re.search("(?i)read-only|not permitted", said.output), said.output
    assert guest.run(f"echo 3 >/proc/sys/vm/drop_caches; sha256sum /dev/{disk}").output == before


def come_grow_and_go(guest: Guest, controller: Controller, places: Sequence[str], image: Path) -> None:
    """A memory disk on target 0 and one of a file on a target that was not there: both come, grow and go again.

    The second has a file system, mounted all the while it grows. `places`: what the guest has before and after.
    """
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    beside = controller.ctl("add-lun", "memory:64M")["lun"]
    assert controller.ctl("add-lun", f"3:5={image}") == {"lun": "3:5"}
    systems = {wait_disks(guest, *places, beside, "3:5")["3:5"]: "ext4"}
    make(guest, systems)
    mount(guest, systems)
    (block,) = systems
    kept = write_file(guest, block)
    controller.ctl("resize-lun", beside, "128M")
    with image.open("r+b") as file:
        file.truncate(192 * MIB)
    controller.ctl("resize-lun", "3:5")
    eventually(lambda: (size(guest, beside), size(guest, "3:5")) == (128 * MIB, 192 * MIB))
    guest.run(f"resize2fs /dev/{block}", timeout=LONG)
    blocks = int(guest.run(f"stat -f -c %b $TMPDIR/{block}").output)
    block_size = int(guest.run(f"stat -f -c %S $TMPDIR/{block}").output)
    assert blocks * block_size > 150 * MIB
    assert read_file(guest, block) == kept
    unmount(guest, systems)
    check(guest, systems)
    for place in (beside, "3:5"):
        controller.ctl("remove-lun", place)
    wait_disks(guest, *places)


def goes_under_load(guest: Guest, controller: Controller, places: Sequence[str]) -> None:
    """A disk is taken away while the guest reads it all the time: the reader ends, the guest and `places` don't."""
    place = "0:9"
    controller.ctl("add-lun", f"{place}=memory:64M")
    name = wait_disks(guest, *places, place)[place]
    guest.run(
        f"(while dd if=/dev/{name} of=/dev/null bs=64k iflag=direct; do :; done; echo >$TMPDIR/over)"
        " >/dev/null 2>&1 &"
    )
    before = controller.counted(place).get("read_bytes")
    eventually(lambda: controller.counted(place).get("read_bytes") > before + 8 * MIB)
    controller.ctl("remove-lun", place)
    guest.run("until [ -e $TMPDIR/over ]; do sleep 0.05; done", timeout=LONG)
    for name in wait_disks(guest, *places).values():
        guest.run(f"dd if=/dev/{name} of=/dev/null bs=64k count=8 iflag=direct")
