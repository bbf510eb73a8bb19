"""The two ends of the demo: two guests, or two drivers, with a NIC each, and what they do with it.

Promises: both ends of a transfer hash what they sent and got, and `check` compares; a kind that this host can't
have is told as DemoError before anything is served. Never: knows how what it does is shown.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from pyvhost.cli import demo_disk, demo_vsock
from pyvhost.cli.guests import (
    Disks,
    Guest,
    GuestError,
    KernelError,
    Nic,
    QemuGuest,
    UmlGuest,
    find_kernel,
    qemu,
    uml,
)

KINDS = {
    "uml": "User Mode Linux",
    "qemu": "QEMU",
    "driver": "driver side",
}

Say = Callable[[str], None]
Show = tuple[str, Callable[[Say], None]]

_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = 7007
_BOOT_SECONDS = 120.0
# The driver hears of its link, and the kernel of that, a moment after it is up.
_LINK = "for _ in $(seq 100); do [ $(cat /sys/class/net/eth0/operstate) = up ] && break; sleep 0.05; done"
# What a guest that is emulated and has no Python sends whole, so that it can be compared.
_MEBIBYTES = 8


class DemoError(RuntimeError):
    """This kind of end can't be had on this host; the message says why."""


class Ends(ABC):
    """Two NICs and who has them."""

    #: What was booted, once it was.
    description = ""
    #: What to show before the transfer: a title, and what prints it.
    shows: Sequence[Show] = ()
    #: What the transfer came to, in a line.
    result = ""
    #: What the disk came to, likewise; nothing if there was none.
    disk_result = ""

    @abstractmethod
    def start(self) -> None:
        """Bring both ends up. The back end listens."""

    @abstractmethod
    def transfer(self, seconds: float) -> None:
        """Have the first send to the second for so long; sets `result`."""

    @abstractmethod
    def check(self) -> None:
        """GuestError: what came is not what was sent."""

    @abstractmethod
    def stop(self) -> None:
        """Take both ends down."""


def make_ends(kind: str, sockets: Sequence[Path], disks: Path, vsock: Path, say: Say) -> Ends:
    """The two ends, not started; the first with the SCSI controller at `disks`, and the socket device at `vsock`
    if something in it could use that. DemoError: not on this host.
    """
    if kind == "uml":
        if shutil.which(uml.PROGRAM) is None:
            raise DemoError(f"apt-get install {uml.PACKAGE}")
        if not _on_host("ip"):
            raise DemoError("its root is this host's, and has no ip(8): apt-get install iproute2")
        first, second = sockets
        return UmlEnds(
            [
                UmlGuest([first], disks=[disks], vsock=vsock, name=f"guest {first.name}"),
                UmlGuest([second], name=f"guest {second.name}"),
            ]
        )
    if kind == "qemu":
        if shutil.which(qemu.PROGRAM) is None:
            raise DemoError(f"apt-get install {qemu.PACKAGE}")
        say("QEMU needs a kernel: looking for Debian's, and fetching it if it is not here")
        try:
            kernel = find_kernel()
        except KernelError as problem:
            raise DemoError(str(problem)) from problem
        first, second = sockets
        modules = ("virtio_pci", "virtio_net", *demo_disk.MODULES)
        return QemuEnds(
            [
                QemuGuest(
                    [Nic(first)],
                    disks=[Disks(disks)],
                    name=f"guest {first.name}",
                    kernel=kernel,
                    modules=modules,
                ),
                QemuGuest([Nic(second)], name=f"guest {second.name}", kernel=kernel),
            ]
        )
    from pyvhost.cli.demo_driver import DriverEnds

    return DriverEnds(sockets, disks)


class GuestEnds(Ends):
    """Two guests, one sending to the other."""

    def __init__(self, guests: Sequence[Guest]) -> None:
        self._guests = guests
        self._sent: tuple[int, str] = (0, "")
        self._received: tuple[int, str] = (0, "")
        self.shows = (
            ("The first guest's own view of its card", self._show_link),
            ("Its disk, the file disk.img", self._show_disk),
            (f"It pings the second, {_ADDRESSES[1]}", self._show_ping),
        )

    def start(self) -> None:
        try:
            for guest in self._guests:
                guest.launch()
            for guest in self._guests:
                guest.wait_booted(_BOOT_SECONDS)
        except GuestError as problem:
            raise DemoError(str(problem)) from problem
        first = self._guests[0]
        release = first.run(["uname", "-sr"]).output.strip()
        self.description = (
            f"Two guests run {release}, unmodified, processes {' and '.join(map(_pid, self._guests))}"
        )
        for guest, address in zip(self._guests, _ADDRESSES, strict=True):
            guest.run(f"ip address add {address}/24 dev eth0; ip link set eth0 up; {_LINK}")

    def _show_link(self, say: Say) -> None:
        self._guests[0].run("ip address show dev eth0", on_line=say)

    def _show_disk(self, say: Say) -> None:
        self.disk_result = demo_disk.show_disk(self._guests[0], say)

    def _show_ping(self, say: Say) -> None:
        if isinstance(self._guests[0], UmlGuest) and not _on_host("ping"):
            say("(this host, whose programs the guest runs, has no ping: apt-get install iputils-ping)")
            return
        self._guests[0].run(f"ping -c 4 -i 0.3 {_ADDRESSES[1]}", on_line=say)

    def check(self) -> None:
        if self._sent != self._received:
            raise GuestError(f"sent (bytes, SHA-256) {self._sent}, received {self._received}")

    def stop(self) -> None:
        for guest in self._guests:
            guest.stop()

    def _sum_up(self, sent: str, received: str, seconds: float) -> None:
        self._sent, self._received = _parse(sent), _parse(received)
        amount = self._received[0]
        self.result = (
            f"TCP: {amount / 2**20:.0f} MiB in {seconds:.1f} s, {8 * amount / seconds / 1e9:.2f} Gbit/s, "
            f"{'the same' if self._sent == self._received else 'ANOTHER'} SHA-256 at the far end"
        )


class UmlEnds(GuestEnds):
    """Two UMLs. Python is there, the host's own."""

    def __init__(self, guests: Sequence[UmlGuest]) -> None:
        super().__init__(guests)
        path = Path(guests[0].vsock or "").with_name("guest")
        title = f"It answers on vsock port {demo_vsock.PORT}"
        self.shows = (*self.shows, (title, lambda say: demo_vsock.show_vsock(guests[0], path, say)))

    def transfer(self, seconds: float) -> None:
        first, second = self._guests
        second.run([sys.executable, "-I", "-c", _RECEIVE, str(_PORT)])
        sent = first.run(
            [sys.executable, "-I", "-c", _SEND, _ADDRESSES[1], str(_PORT), str(seconds)], timeout=seconds + 60
        ).output
        received = second.run("cat $TMPDIR/received", timeout=60).output
        *numbers, spent = sent.split()
        self._sum_up(" ".join(numbers), received, float(spent))


class QemuEnds(GuestEnds):
    """Two QEMUs. There is busybox, and iperf3 if the host has it."""

    def transfer(self, seconds: float) -> None:
        first, second = self._guests
        second.run(_SHELL_RECEIVE.format(port=_PORT))
        script = _SHELL_SEND.format(address=_ADDRESSES[1], port=_PORT, mebibytes=_MEBIBYTES)
        start, end, *sent = first.run(script, timeout=120).output.split()
        received = second.run("cat $TMPDIR/received", timeout=60).output
        self._sum_up(" ".join(sent), received, float(end) - float(start))
        if second.run("command -v iperf3", check=False).status == 0:
            second.run("iperf3 -s -D -1")
            said = first.run(f"iperf3 -J -c {_ADDRESSES[1]} -t {round(seconds)}", timeout=seconds + 60).output
            self.result += (
                f"; {json.loads(said)['end']['sum_received']['bits_per_second'] / 1e9:.2f} Gbit/s by iperf3"
            )


def _on_host(program: str) -> bool:
    """Whether a guest whose root is the host's finds it there, or in busybox."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return any(shutil.which(name, path=path) for name in (program, "busybox"))


def _pid(guest: Guest) -> str:
    return str(guest.pid)


def _parse(text: str) -> tuple[int, str]:
    """`<bytes> <digest>`, as both ends print it. GuestError: it is not that."""
    words = text.split()
    if len(words) != 2 or not words[0].isdecimal():
        raise GuestError(f"the transfer came to: {text!r}")
    return int(words[0]), words[1]


# Listens, and when it does, ends: a child goes on, and gives the sum to whoever reads the pipe.
_RECEIVE = """
import hashlib, os, socket, sys
result = os.environ["TMPDIR"] + "/received"
if os.path.exists(result):
    os.unlink(result)
os.mkfifo(result)
server = socket.create_server(("", int(sys.argv[1])))
if os.fork():
    os._exit(0)
os.setsid()
null = os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
connection, _ = server.accept()
digest, total, room = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
while size := connection.recv_into(room):
    digest.update(room[:size])
    total += size
with open(result, "w") as f:
    f.write(f"{total} {digest.hexdigest()}")
"""

_SEND = """
import hashlib, os, socket, sys, time
block = os.urandom(1 << 20) * 2
digest, total = hashlib.sha256(), 0
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as connection:
    start = time.monotonic()
    while (spent := time.monotonic() - start) < float(sys.argv[3]):
        # Never the same twice in a row: what goes missing or comes twice shows.
        at = total // 65536 * 4099 % (1 << 20)
        piece = block[at : at + 65536]
        connection.sendall(piece)
        digest.update(piece)
        total += len(piece)
print(total, digest.hexdigest(), f"{spent:.3f}")
"""

# As above, of busybox. nc leaves when its input ends, so that of the listening one never does.
_SHELL_RECEIVE = """
cd $TMPDIR
mkfifo input received
(
    nc -l -p {port} <>input >data
    echo $(wc -c <data) $(sha256sum <data | cut -c 1-64) >received
) >/dev/null 2>&1 &
until netstat -ltn | grep -q :{port}; do usleep 20000; done
"""

_SHELL_SEND = """
cd $TMPDIR
dd if=/dev/urandom of=data bs=1M count={mebibytes} 2>/dev/null
cut -d ' ' -f 1 /proc/uptime
nc {address} {port} <data >/dev/null
cut -d ' ' -f 1 /proc/uptime
echo $(wc -c <data) $(sha256sum <data | cut -c 1-64)
"""
