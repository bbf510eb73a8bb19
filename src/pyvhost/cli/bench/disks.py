"""Who is measured in `bench scsi` on the host: the file itself, pyvhost's disk on it, qemu-storage-daemon's.

All three work on one processor, on the same file, by turns; the two back ends are loaded from another processor by
the same compiled driver, which sleeps until it is called, as a guest's does.

Promises: a slice's processor time and system calls are those of the process that does the I/O, its threads included.
Never: compares.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pyvhost.abi import virtio
from pyvhost.cli.bench import counting, usage
from pyvhost.cli.bench.backend import BackEnd, BackEndError
from pyvhost.cli.bench.loader import RING, Loader, Workload
from pyvhost.cli.bench.machine import favour
from pyvhost.cli.bench.testpmd import Cores
from pyvhost.driver import cdb
from pyvhost.driver.blk import BlkDriver
from pyvhost.driver.errors import DeviceError
from pyvhost.driver.memory import GuestMemory
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.vhost_user import VhostUserFrontend

DAEMON = "qemu-storage-daemon"
#: What it is called in results.
DAEMON_NAME = "daemon"
#: Room for the deepest workload's requests.
_MEMORY = 160 << 20
_SETTLE_SECONDS = 0.05
_UNIT_ATTENTIONS = 3


class BenchError(RuntimeError):
    """One of the programs did not do as told; the message ends with its last line."""


@dataclass(frozen=True)
class Sample:
    """A slice: how many I/Os in how many seconds, the processor's seconds, system calls where they were counted."""

    ios: int
    seconds: float
    cpu_seconds: float
    calls: int | None = None

    @property
    def rate(self) -> float:
        """I/Os a second."""
        return self.ios / self.seconds if self.seconds else 0.0

    @property
    def cpu_us(self) -> float:
        """Processor time of an I/O, in us."""
        return self.cpu_seconds / self.ios * 1e6 if self.ios else 0.0

    @property
    def calls_each(self) -> float | None:
        """System calls of an I/O."""
        return self.calls / self.ios if self.calls is not None and self.ios else None


class Contender(Protocol):
    """One of those that are compared."""

    name: str

    def measure(self, workload: Workload, seconds: float, *, count: bool = False) -> Sample:
        """One slice; `count`: its system calls too, which may slow it down."""
        ...


class Fio:
    """The file, read and written by fio through io_uring: the limit."""

    name = "file"

    def __init__(self, path: Path, cores: Cores, *, direct: bool) -> None:
        self._path = path
        self._core = cores.back_end
        self._direct = direct

    def measure(self, workload: Workload, seconds: float, *, count: bool = False) -> Sample:
        """Its processor time has the making of the requests in it, which the back ends' has not, and leaves out the
        kernel's workers, which the back ends' has.
        """
        command = [
            *("nice", "-n", "-20", "taskset", "--cpu-list", str(self._core)),
            *("fio", f"--filename={self._path}", *fio_options(workload, seconds, direct=self._direct)),
            *("--ioengine=io_uring", "--name=file", "--output-format=json"),
        ]
        with tempfile.TemporaryDirectory(prefix="pyvhost-fio-") as folder:
            counted = Path(folder) / "calls"
            done = subprocess.run(
                [*counting.wrapper("io_uring_enter", counted), *command] if count else command,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise BenchError(f"fio failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
            calls = counting.wrapped(counted) if count else None
        (sample,) = parse_fio(done.stdout).values()
        return Sample(sample.ios, sample.seconds, sample.cpu_seconds, calls)


def fio_options(workload: Workload, seconds: float, *, direct: bool) -> list[str]:
    """How fio is asked for a workload, for so long."""
    return [
        f"--rw={workload.fio}",
        f"--bs={workload.size}",
        f"--iodepth={workload.depth}",
        f"--direct={int(direct)}",
        f"--runtime={round(seconds * 1000)}ms",
        *("--time_based", "--norandommap", "--invalidate=0", "--randrepeat=0"),
    ]


def parse_fio(text: str) -> dict[str, Sample]:
    """The jobs in fio's JSON, by name. ValueError: it is none."""
    found = {}
    for job in json.loads(text[text.index("{") : text.rindex("}") + 1])["jobs"]:
        side = max(job["read"], job["write"], key=lambda each: each["total_ios"])
        seconds = side["runtime"] / 1000
        share = (job["usr_cpu"] + job["sys_cpu"]) / 100
        found[job["jobname"]] = Sample(side["total_ios"], seconds, share * job["job_runtime"] / 1000)
    return found


class Served:
    """A back end process and the driver that loads it."""

    def __init__(self, name: str, pid: int, loader: Loader, cores: Cores) -> None:
        self.name = name
        self.pid = pid
        self._loader = loader
        self._cores = cores

    def measure(self, workload: Workload, seconds: float, *, count: bool = False) -> Sample:
        """After a moment in which it settles."""
        with self._loader.prepared(workload) as prepared, on_processor(self._cores.front_end):
            favour(self.pid)
            prepared.run(_SETTLE_SECONDS)
            with contextlib.ExitStack() as stack:
                counted = stack.enter_context(counting.system_calls(self.pid)) if count else None
                before = usage.cpu_seconds_exact(self.pid)
                done = prepared.run(seconds)
                # A thread of the kernel's for this process may have ended meanwhile, and taken its time along.
                used = max(0.0, usage.cpu_seconds_exact(self.pid) - before)
        return Sample(done.ios, done.seconds, used, None if counted is None else counted.total)

    @contextlib.contextmanager
    def loaded(self, workload: Workload, seconds: float) -> Iterator[None]:
        """Is loaded, by a thread, for so long or as long as the block takes."""
        errors: list[DeviceError] = []

        def load() -> None:
            try:
                with on_processor(self._cores.front_end):
                    prepared.run(seconds)
            except DeviceError as error:
                errors.append(error)

        with self._loader.prepared(workload) as prepared:
            thread = threading.Thread(target=load, name="load")
            thread.start()
            try:
                yield
            finally:
                thread.join()
        if errors:
            raise errors[0]


@contextlib.contextmanager
def on_processor(core: int) -> Iterator[None]:
    """This thread on one processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def pyvhost_disk(
    socket: Path, image: Path, cores: Cores, *, direct: bool, transcript: Path
) -> Iterator[Served]:
    """`pyvhost scsi` with the file as its disk."""
    with contextlib.ExitStack() as stack:
        back = stack.enter_context(
            BackEnd(
                "pyvhost scsi",
                pyvhost_arguments(socket, image, direct=direct),
                core=cores.back_end,
                transcript=transcript,
            )
        )
        back.wait_ready([socket])
        memory = stack.enter_context(GuestMemory(_MEMORY))
        front = stack.enter_context(VhostUserFrontend.connect(socket))
        driver = stack.enter_context(ScsiDriver(front, memory, ring_size=RING))
        driver.start()
        # The first commands are told that the device is new.
        if not any(driver.command(0, 0, cdb.test_unit_ready()).good for _ in range(_UNIT_ATTENTIONS)):
            raise DeviceError("the disk does not become ready")
        loader = Loader(
            memory,
            driver.requests[0],
            "scsi",
            image.stat().st_size,
            event_idx=driver.has(virtio.RING_F_EVENT_IDX),
        )
        stack.callback(loader.close)
        yield Served("pyvhost", back.pid, loader, cores)


def pyvhost_arguments(socket: Path, image: Path, *, direct: bool = True) -> list[str]:
    """`pyvhost scsi`, as a user would type it."""
    lun = str(image).replace(",", ",,") + ("" if direct else ",direct=off")
    return ["scsi", "--socket-path", str(socket), "--lun", lun]


@contextlib.contextmanager
def daemon_disk(
    socket: Path, image: Path, cores: Cores, *, direct: bool, transcript: Path
) -> Iterator[Served]:
    """qemu-storage-daemon with the file as a vhost-user-blk device, in an iothread."""
    node = {
        "driver": "file",
        "node-name": "disk",
        "filename": str(image),
        "aio": "io_uring",
        "cache": {"direct": direct},
        # pyvhost's disk is the same file.
        "locking": "off",
    }
    export = {
        "type": "vhost-user-blk",
        "id": "export",
        "node-name": "disk",
        "writable": True,
        "iothread": "thread",
        "addr": {"type": "unix", "path": str(socket)},
    }
    command = [
        *("setpriv", "--pdeathsig", "KILL", "taskset", "--cpu-list", str(cores.back_end), DAEMON),
        *("--object", "iothread,id=thread", "--blockdev", json.dumps(node), "--export", json.dumps(export)),
    ]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(transcript.open("wb"))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(_end, process)
        _wait_for(socket, process, transcript)
        memory = stack.enter_context(GuestMemory(_MEMORY))
        front = stack.enter_context(VhostUserFrontend.connect(socket))
        driver = stack.enter_context(BlkDriver(front, memory, RING))
        driver.start()
        driver.read(0, 4096)
        loader = Loader(
            memory, driver.queue, "blk", driver.capacity, event_idx=driver.has(virtio.RING_F_EVENT_IDX)
        )
        stack.callback(loader.close)
        yield Served(DAEMON_NAME, process.pid, loader, cores)


def _wait_for(socket: Path, process: subprocess.Popen[bytes], transcript: Path) -> None:
    deadline = time.monotonic() + 20
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            said = transcript.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise BackEndError(f"{DAEMON} does not listen: {said[0]}")
        # It says nothing when it listens, and a folder can't be waited for without inotify.
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def make_image(path: Path, size: int) -> None:
    """A file of `size` bytes, all of them written, so that no block has to be found while it is measured."""
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def warm(path: Path) -> None:
    """Has all of a file in the page cache: what was written directly has left it."""
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass


def missing(programs: Sequence[str]) -> list[str]:
    """Which of them are not installed."""
    return [name for name in programs if shutil.which(name) is None]
