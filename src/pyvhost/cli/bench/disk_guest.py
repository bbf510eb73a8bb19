"""A QEMU guest with two disks on one file, measured in `bench scsi`: pyvhost's and QEMU's own virtio-scsi.

fio in the guest runs on both by turns. QEMU's own controller is what a user would make of it for speed: an iothread,
`aio=io_uring`, no page cache. Where nothing runs under KVM the guest is emulated (TCG), and the emulated processor is
what limits both.

Promises: both controllers are virtio-scsi of one queue with interrupts of one kind, both disks are the same file;
nothing writes to it. Never: mounts it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvhost.cli.bench import counting
from pyvhost.cli.bench.backend import BackEnd
from pyvhost.cli.bench.disks import Sample, fio_options, parse_fio, pyvhost_arguments
from pyvhost.cli.bench.loader import Workload
from pyvhost.cli.guests import Disks, GuestError, QemuGuest

OWN = "QEMU"
OURS = "pyvhost"
#: What becomes of a disk's name in the guest is found by who made it.
_VENDORS = {"QEMU": OWN}
_BOOT_SECONDS = 120.0
#: Starting fio takes long on an emulated processor.
_FIO_SECONDS = 60.0


class DiskGuest:
    """The guest, with the two disks as its `names` of them."""

    def __init__(self, guest: QemuGuest, back_end_pid: int, engine: str, names: dict[str, str]) -> None:
        self.guest = guest
        self.names = names
        self._back_end_pid = back_end_pid
        self._engine = engine

    def turn(self, workloads: Sequence[Workload], seconds: float) -> dict[tuple[str, str], Sample]:
        """All workloads on both disks, one after the other, in one run of fio: by workload's key and disk."""
        jobs = []
        for number, workload in enumerate(workloads):
            # Who goes first changes.
            for who in (OURS, OWN) if number % 2 == 0 else (OWN, OURS):
                jobs += self._job(f"{workload.key}:{who}", workload, who, seconds)
        wanted = len(workloads) * 2 * (seconds + 1.0)
        found = self._fio(jobs, _FIO_SECONDS + wanted)
        return {(key, who): sample for name, sample in found.items() for key, who in [name.split(":")]}

    def cost(self, workload: Workload, who: str, seconds: float, *, count: bool) -> Sample:
        """One workload on one disk: what it costs the host besides the guest's processor.

        Processor time is that of QEMU's threads but for the one that is the guest's processor, and of pyvhost;
        system calls are of all of both. It is the difference of a long run and a short one: starting fio costs both.
        """
        short, long = (self._cost(workload, who, length, count) for length in (seconds / 4, seconds))
        ios = long.ios - short.ios
        if ios <= 0:
            raise GuestError(f"{self.guest.name}: {short.ios} I/Os in a short time, {long.ios} in a long one")
        calls = long.calls - short.calls if long.calls is not None and short.calls is not None else None
        return Sample(
            ios, long.seconds - short.seconds, max(0.0, long.cpu_seconds - short.cpu_seconds), calls
        )

    def _cost(self, workload: Workload, who: str, seconds: float, count: bool) -> Sample:
        pids = [self.guest.pid, self._back_end_pid]
        with contextlib.ExitStack() as stack:
            counts = [stack.enter_context(counting.system_calls(pid)) for pid in pids] if count else []
            before = sum(_besides_the_guest(pid) for pid in pids)
            found = self._fio(self._job("cost", workload, who, seconds), _FIO_SECONDS + seconds)
            used = sum(_besides_the_guest(pid) for pid in pids) - before
        sample = found["cost"]
        return Sample(sample.ios, sample.seconds, used, sum(each.total for each in counts) if count else None)

    def _job(self, name: str, workload: Workload, who: str, seconds: float) -> list[str]:
        options = fio_options(workload, seconds, direct=True)
        return [f"--name={name}", "--stonewall", f"--filename=/dev/{self.names[who]}", *options]

    def _fio(self, jobs: Sequence[str], timeout: float) -> dict[str, Sample]:
        # Options before the first job are for all of them.
        words = ["fio", f"--ioengine={self._engine}", "--allow_file_create=0", "--output-format=json", *jobs]
        return parse_fio(self.guest.run(words, timeout=timeout).output)


def _besides_the_guest(pid: int) -> float:
    """Processor time of a process's threads, exact, without those that are a guest's processor."""
    spent = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if not (task / "comm").read_text().startswith("CPU "):
                spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


@contextlib.contextmanager
def disk_guest(
    folder: Path, image: Path, transcript: Path, *, accelerator: str = "tcg"
) -> Iterator[DiskGuest]:
    """Boots it. GuestError: it does not come up, or sees other disks than these."""
    socket = folder / "guest-disk"
    vectors = "vectors=0" if accelerator == "tcg" else "vectors=4"
    with contextlib.ExitStack() as stack:
        back = stack.enter_context(
            BackEnd("pyvhost scsi", pyvhost_arguments(socket, image), transcript=transcript)
        )
        back.wait_ready([socket])
        guest = QemuGuest(
            # As many entries as virtio-scsi-pci has: seg_max follows from it, and so into how much 1 MiB is cut.
            disks=[Disks(socket, options="virtqueue_size=256")],
            memory_mib=512,
            accelerator=accelerator,
            modules=("virtio_pci", "virtio_scsi", "sd_mod"),
            programs=("fio",),
        )
        stack.callback(guest.stop)
        guest.start(_BOOT_SECONDS)
        guest.execute("object-add", **{"qom-type": "iothread", "id": "own"})
        guest.execute(
            "blockdev-add",
            **{
                "driver": "file",
                "node-name": "own",
                "filename": str(image),
                "aio": "io_uring",
                "cache": {"direct": True},
                # The other disk is the same file.
                "locking": "off",
            },
        )
        controller = f"virtio-scsi-pci,id=own0,iothread=own,{vectors}"
        _plug(guest, controller)
        _plug(guest, "scsi-hd,bus=own0.0,drive=own,share-rw=on")
        yield DiskGuest(guest, back.pid, _engine(guest), _names(guest))


def _plug(guest: QemuGuest, device: str) -> None:
    driver, *rest = device.split(",")
    options: dict[str, str | int | bool] = {}
    for option in rest:
        key, _, value = option.partition("=")
        options[key] = value == "on" if value in ("on", "off") else int(value) if value.isdigit() else value
    guest.execute("device_add", driver=driver, **options)


def _names(guest: QemuGuest) -> dict[str, str]:
    """Block devices by who serves them; the new one may be a moment in coming."""
    deadline = time.monotonic() + 30
    while True:
        told = guest.run(
            "for disk in /sys/block/sd*; do echo ${disk##*/} $(cat $disk/device/vendor); done", timeout=20
        ).output
        pairs = [line.split() for line in told.splitlines() if len(line.split()) == 2]
        names = {_VENDORS.get(vendor, OURS): name for name, vendor in pairs}
        if names.keys() == {OURS, OWN}:
            return names
        if time.monotonic() > deadline:
            raise GuestError(f"{guest.name} has these disks, and should have two: {told!r}")
        time.sleep(0.5)


def _engine(guest: QemuGuest) -> str:
    """The best that fio has there."""
    return (
        "io_uring"
        if guest.run("test -e /proc/sys/kernel/io_uring_disabled", check=False).status == 0
        else "libaio"
    )
