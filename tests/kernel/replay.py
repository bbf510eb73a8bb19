"""Recorded cases of a vhost device's ioctls, replayed against whatever has the same interface.

    from kernel import replay
    for case in replay.cases("vhost-net"):
        for line in replay.replay(case, open_device):
            print(line)

`open_device(path, flags)` gives an object with `ioctl(request, address)`, `read(n)`, `write(b)`, `fileno()` and
`close()`: what `pyvhost.open` gives, or `KernelFile` here for a kernel's own device. Run as a program, it replays
against this machine's kernel:

    python3 -m kernel.replay [PART OF A CASE'S NAME ...]

Promises: the standard library alone; nothing of a case is left out in silence: what can't be done is a line of its
own. Never: decides whether a difference is meant (`differences` does).
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import mmap
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel.rests import kernel_rests
from kernel.scene import Scene

RECORDED = Path(__file__).parent / "recorded" / "kernel-answers.json"
SEQUENCES = Path(__file__).parent / "recorded" / "sequences.json"
#: POLLIN, POLLOUT, POLLRDNORM, POLLWRNORM.
POLLED = 0x1 | 0x4 | 0x40 | 0x100
#: How long something that is recorded may take to come, in seconds, where a worker has to run first.
PATIENCE = 20.0

Step = dict[str, Any]
Case = dict[str, Any]


class Device(Protocol):
    """An open device."""

    def ioctl(self, request: int, argument: int = 0) -> Any: ...
    def read(self, size: int) -> bytes: ...
    def write(self, data: bytes) -> int: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


Open = Callable[[str, int], Device]


@dataclass(frozen=True)
class Difference:
    """Step `number` of a case came out otherwise than recorded."""

    case: str
    number: int
    step: Step
    got: Any

    def __str__(self) -> str:
        step = self.step
        what = step.get("ioctl") or step.get("message") or step["op"]
        more = json.dumps(step.get("args") or {})[:120]
        wanted = f"{step.get('result')} {step.get('out_hex', step.get('hex', ''))}".strip()
        return f"{self.case}: step {self.number}: {what} {more}: {self.got}, recorded {wanted}"


class KernelFile:
    """A kernel's own device, opened by its path."""

    def __init__(self, path: str, flags: int = os.O_RDWR) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
        self._fd = os.open(path, flags | os.O_CLOEXEC)

    def ioctl(self, request: int, argument: int = 0) -> int:
        done = self._libc.ioctl(self._fd, request, argument)
        if done < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(done)

    def read(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def write(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def recorded() -> list[Case]:
    """All cases of the file."""
    found: list[Case] = json.loads(RECORDED.read_text())["cases"]
    return found


def sequences() -> list[Case]:
    """Ioctls of vhost-net in an order that was drawn by lot, and what the kernel answered to each."""
    found: list[Case] = json.loads(SEQUENCES.read_text())["cases"]
    return found


def cases(device: str) -> list[Case]:
    """The cases that were recorded for a device: "vhost-net", "vhost-scsi", "vhost-vsock"."""
    return [case for case in recorded() if case["device"] == device]


def replay(
    case: Case,
    open_device: Open,
    *,
    children: bool = True,
    patience: float = PATIENCE,
    kicked: Callable[[], None] = lambda: None,
    host: bool = False,
) -> list[Difference]:
    """Does a case's steps in order; what came out otherwise.

    `children`: steps of a forked child are done by one; without, they are differences ("not done"). `patience`:
    how long what is recorded is waited for, in seconds. `kicked` is called after each kick: `kernel_rests`, so that
    a kernel does not take the next one for the same. `host`: steps that use the host's own AF_VSOCK are done, too.
    """
    player = Player(case, open_device, children, patience, kicked, host)
    try:
        return list(player.play())
    finally:
        player.close()


class Player:
    """One case on its way."""

    def __init__(
        self,
        case: Case,
        open_device: Open,
        children: bool,
        patience: float,
        kicked: Callable[[], None],
        host: bool,
    ) -> None:
        self.case = case
        self._host = host
        self.patience = patience
        self._kicked = kicked
        self.scene = Scene()
        self._open = open_device
        self._children = children
        self._devices: dict[str, Device] = {}
        self._base = _recorded_base(case)
        self._add("dev", case["device"], os.O_RDWR)
        prepare = _PREPARE.get(case["case"].partition("/")[2])
        if prepare is not None:
            prepare(self.scene)

    def _add(self, name: str, device: str, flags: int) -> None:
        self._devices[name] = self._open(f"/dev/{device}", flags)

    def play(self) -> Iterator[Difference]:
        for number, step in enumerate(self.case["steps"]):
            if step["op"] == "note":
                self._note(step["text"])
                continue
            got = self._by(step)
            if not _agrees(step, got):
                yield Difference(self.case["case"], number, step, got)

    def close(self) -> None:
        for device in self._devices.values():
            device.close()
        self.scene.close()

    def _by(self, step: Step) -> Any:
        who = step.get("by", "self")
        if who == "child":
            return self._in_child(step) if self._children else "not done"
        if who == "thread":
            answers: list[Any] = []
            thread = threading.Thread(target=lambda: answers.append(self._do(step)))
            thread.start()
            thread.join()
            return answers[0]
        return self._do(step)

    def _in_child(self, step: Step) -> Any:
        inward, outward = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(outward, json.dumps(self._do(step)).encode())
            finally:
                os._exit(0)
        os.close(outward)
        with os.fdopen(inward, "rb") as answer:
            raw = answer.read()
        os.waitpid(pid, 0)
        return json.loads(raw) if raw else "the child died"

    def _do(self, step: Step) -> Any:
        done = _OPS.get(step["op"])
        if done is None:
            return "not done"
        try:
            return done(self, step)
        except OSError as error:
            return _name(error.errno or 0)

    def device(self, step: Step) -> Device:
        return self._devices[step.get("dev", "dev")]

    # --- what steps do --------------------------------------------------------------------------------

    def ioctl(self, step: Step) -> Any:
        args = step.get("args")
        if not args:
            return self.device(step).ioctl(int(step["request"], 0), 0)
        if "pointer" in args:
            return self.device(step).ioctl(int(step["request"], 0), self.scene.address(args["pointer"]))
        data = self._argument(step, args)
        # Where nothing is said of it there is room behind the argument, as there was when it was recorded.
        given = data[: args["readable_bytes"]] if "readable_bytes" in args else data + bytes(64)
        where = self.scene.argument.at_the_end(given)
        done = self.device(step).ioctl(int(step["request"], 0), where)
        if "out_hex" in step:
            size = len(step["out_hex"]) // 2
            return [done, self.scene.argument.get(where - self.scene.argument.address, size).hex()]
        return done

    def _argument(self, step: Step, args: dict[str, Any]) -> bytes:
        where = self.scene.address
        if "raw" in args:
            return bytes.fromhex(args["raw"])
        if "regions" in args:
            regions = args["regions"]
            count = where(args.get("nregions", len(regions)))
            table = struct.pack("=II", count, args.get("padding", 0))
            for guest, size, user, *more in regions:
                table += struct.pack(
                    "=4Q", where(guest), where(size), where(user), where(more[0] if more else 0)
                )
            return table
        if "desc_user_addr" in args:
            names = ("desc_user_addr", "used_user_addr", "avail_user_addr", "log_guest_addr")
            parts = [where(args[name]) for name in names]
            return struct.pack("=II4Q", where(args["index"]), where(args["flags"]), *parts)
        if "fd" in args:
            return struct.pack("=Ii", where(args["index"]), self._fd(args["fd"]))
        if "num" in args:
            return struct.pack("=II", where(args["index"]), where(args["num"]))
        if "value" in args:
            return self._value(step, args["value"])
        return bytes.fromhex(step["arg_hex"])

    def _value(self, step: Step, value: int | str) -> bytes:
        size = len(step["arg_hex"]) // 2
        if size == 4 and step["ioctl"] == "VHOST_SET_LOG_FD":
            return struct.pack("=i", self._fd(value))
        return (self.scene.address(value) % (1 << 8 * size)).to_bytes(size, sys.byteorder)

    def _fd(self, name: int | str) -> int:
        # Not a duplicate: it would keep the device open.
        known = self._devices.get(str(name))
        return self.scene.fd(name) if known is None else known.fileno()

    def write(self, step: Step) -> Any:
        return self.device(step).write(self._message(step))

    def _message(self, step: Step) -> bytes:
        raw = bytearray.fromhex(step["arg_hex"])
        if len(raw) >= 32:
            uaddr = struct.unpack_from("=Q", raw, 24)[0]
            if "unmapped" in (step.get("message") or ""):
                uaddr = self.scene.unmapped
            elif self._base and 0 <= uaddr - self._base < self.scene.mem.size:
                uaddr += self.scene.mem.address - self._base
            struct.pack_into("=Q", raw, 24, uaddr)
        return bytes(raw)

    def read(self, step: Step) -> Any:
        device = self.device(step)
        os.set_blocking(device.fileno(), not step.get("nonblock"))
        if step["result"] == 72:
            self.scene.wait_readable(device.fileno(), self.patience)
        data = device.read(step["length"])
        return [len(data), data.hex()] if data else 0

    def poll(self, step: Step) -> Any:
        poll = select.poll()
        poll.register(self.device(step).fileno(), POLLED)
        found = poll.poll(self.patience * 1000 if step["result"] else step["timeout_ms"])
        return found[0][1] if found else 0

    def open(self, step: Step) -> Any:
        self._add(step["dev"], step["device"], step["flags"])
        return 0

    def close_device(self, step: Step) -> Any:
        self.device(step).close()
        return step.get("result")

    def eventfd_write(self, step: Step) -> Any:
        done = os.write(self.scene.fd(step["fd"]), struct.pack("=Q", 1))
        self._kicked()
        return done

    def eventfd_read(self, step: Step) -> Any:
        fd = self.scene.fd(step["fd"])
        if step["result"]:
            self.scene.wait_readable(fd, self.patience)
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def memory(self, step: Step) -> Any:
        at = "mem+0x18000" if step["at"] == "used" else step["at"]
        offset, wanted = int(at.partition("+")[2], 0), bytes.fromhex(step["hex"])
        end = time.monotonic() + self.patience
        while self.scene.mem.get(offset, len(wanted)) != wanted and time.monotonic() < end:
            time.sleep(0.001)
        return [step.get("result"), self.scene.mem.get(offset, len(wanted)).hex()]

    def workers(self, step: Step) -> Any:
        names = []
        for comm in glob.glob("/proc/[0-9]*/comm") + glob.glob("/proc/self/task/*/comm"):
            try:
                names.append(Path(comm).read_text().strip())
            except OSError:
                continue  # it has ended
        return ["vhost-PID" for name in names if name == f"vhost-{os.getpid()}"]

    def file(self, step: Step) -> Any:
        """What any file may be asked."""
        fd, op = self.device(step).fileno(), step["op"]
        if op == "write 0 bytes":
            return self.device(step).write(b"")
        if op == "write 1 byte":
            return self.device(step).write(b"\1")
        if op == "lseek 100":
            return os.lseek(fd, 100, os.SEEK_SET)
        if op == "mmap":
            mmap.mmap(fd, 4096)
        elif op == "pread":
            os.set_blocking(fd, True)
            os.pread(fd, 72, 0)
        elif op == "fsync":
            os.fsync(fd)
        elif op == "ftruncate":
            os.ftruncate(fd, 0)
        elif op == "epoll add":
            with select.epoll() as epoll:
                epoll.register(fd)
        elif op == "fstat":
            status = os.fstat(fd)
            numbers = {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
            return {"mode": oct(status.st_mode), **numbers}
        return None

    def connect(self, step: Step) -> Any:
        """A connection from the host's side."""
        if not self._host:
            return "not done"
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            sock.settimeout(0.2)
            try:
                sock.connect((step["cid"], 1))
            except TimeoutError:
                return "timeout"
        return 0

    def _note(self, text: str) -> None:
        """A note may stand for what was not written down step by step."""
        if text.startswith("2048 more (max_iotlb_entries)"):
            for i in range(2048):
                message = struct.pack(
                    "=ii3QBB", 1, 0, 0x10000000 + 0x2000 * i, 0x1000, self.scene.mem.address, 3, 2
                )
                self._devices["dev"].write(message.ljust(72, b"\0"))


_OPS: dict[str, Callable[[Player, Step], Any]] = {
    "ioctl": Player.ioctl,
    "write": Player.write,
    "read": Player.read,
    "poll": Player.poll,
    "open": Player.open,
    "close": Player.close_device,
    "eventfd_write": Player.eventfd_write,
    "eventfd_read": Player.eventfd_read,
    "memory": Player.memory,
    "workers": Player.workers,
    "AF_VSOCK connect": Player.connect,
    **dict.fromkeys(
        (
            "write 0 bytes",
            "write 1 byte",
            "lseek 100",
            "mmap",
            "pread",
            "fsync",
            "ftruncate",
            "epoll add",
            "fstat",
        ),
        Player.file,
    ),
}


def _used_ring(scene: Scene) -> None:
    scene.mem.put(0x18000, bytes.fromhex("aabb0500ccddeeff"))


def _one_packet(scene: Scene) -> None:
    """Descriptor 0 of ring 1: a frame of 60 bytes behind a header, over the end of a page."""
    scene.mem.put(0x10000, struct.pack("=QIHH", 0x400FF0, 12 + 60, 0, 0))
    scene.mem.put(0x14000, struct.pack("=HHH", 0, 1, 0))
    frame = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(range(46))
    scene.mem.put(0x30FF0, bytes(12) + frame)


#: What was there before a case's first step.
_PREPARE = {
    "net-backend/what-binding-writes": _used_ring,
    "iotlb/miss-protocol": _one_packet,
}


def _name(code: int) -> str:
    """An errno's name; Linux has two for this number, and uses the second."""
    return "EOPNOTSUPP" if code == errno.EOPNOTSUPP else errno.errorcode.get(code, str(code))


def _agrees(step: Step, got: Any) -> bool:
    wanted = step.get("result")
    if step["op"] == "memory":
        return bool(got == [wanted, step["hex"]])
    if step["op"] in ("ioctl", "read") and "out_hex" in step:
        return bool(got == [wanted, step["out_hex"]])
    return bool(got == wanted)


def _recorded_base(case: Case) -> int:
    """Where "mem" lay when a case was recorded; 0: it can't be told."""
    if "mem" in case:
        return int(case["mem"])
    for step in case["steps"]:
        args = step.get("args") or {}
        for region in args.get("regions", ()):
            if region[2] == "mem" and args["regions"][0] == region and len(step.get("arg_hex", "")) >= 64:
                return int(struct.unpack_from("=Q", bytes.fromhex(step["arg_hex"]), 24)[0])
        if step["op"] == "write" and len(step["arg_hex"]) >= 64 and (step.get("message") or "") == "UPDATE":
            return int(struct.unpack_from("=Q", bytes.fromhex(step["arg_hex"]), 24)[0]) & ~0xFFF
    return 0


def main(parts: list[str]) -> int:
    """Replays what has one of `parts` in its name against this kernel; 1 if anything is different."""
    different = 0
    for case in [*recorded(), *sequences()]:
        if os.path.exists(f"/dev/{case['device']}") and (not parts or any(p in case["case"] for p in parts)):
            found = replay(case, KernelFile, kicked=kernel_rests)
            different += bool(found)
            print(f"{case['case']}: {len(found)} of {len(case['steps'])} steps differ")
            for line in found:
                print(f"  {line}")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
