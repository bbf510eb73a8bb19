"""What a host can do for pyvhost, found out by doing it: the checks behind `pyvhost doctor`.

Promises: each check answers within seconds and leaves nothing behind; what may hang or crash runs in a process
of its own, with a time limit. Never: installs, loads or changes anything; imports Numba.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from pyvhost.cli.bench import testpmd
from pyvhost.cli.guests import kernel, qemu, uml
from pyvhost.cli.guests.base import GuestError
from pyvhost.host import eventfd, kvm, memfd, tap
from pyvhost.host.uring import Uring
from pyvhost.scsi.stores import libnbd

#: Where an ordinary user's PATH may not lead.
_SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_DESCRIPTORS = (
    Path("/etc/qemu/vhost-user"),
    Path("/usr/local/share/qemu/vhost-user"),
    Path("/usr/share/qemu/vhost-user"),
)
_SECONDS = 20.0
#: Descriptors of a net device with one queue pair: kicks, calls, errors, memory, its socket, its tap.
_FDS_PER_DEVICE: Final = 12


class State(Enum):
    """How a check came out."""

    YES = "yes"
    #: It works, but not as well as it could; or there is something to know.
    NOTE = "note"
    NO = "no"


@dataclass(frozen=True)
class Found:
    """What a check found, and which Debian packages would change it."""

    state: State
    text: str
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """One question to the host."""

    group: str
    name: str
    purpose: str
    ask: Callable[[], Found]
    #: Without it pyvhost serves nothing.
    vital: bool = False


def _program(name: str) -> str | None:
    places = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *_SYSTEM_DIRECTORIES]
    return shutil.which(name, path=os.pathsep.join(places))


def _first_line(*argv: str) -> str:
    """What a program says first; empty if it says nothing in time."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    return "".join(c for c in lines[0] if c.isprintable())[:80] if lines else ""


def _tool(name: str, package: str, *version: str) -> Found:
    """A program that is there or not, and what it says of its version."""
    path = _program(name)
    if path is None:
        return Found(State.NO, f"no {name}", (package,))
    return Found(State.YES, (_first_line(path, *version) if version else "") or path)


# --- what everything needs ---------------------------------------------------------------------------


def _python() -> Found:
    text = f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        return Found(State.NO, f"{text}: 3.11 to 3.14 it must be", ("python3",))
    return Found(State.YES, text)


_NUMBA = """
import json, sys, time
started = time.monotonic()
from pyvhost.dataplane import policy
import numba
json.dump({
    "version": numba.__version__,
    "plain": policy.PLAIN,
    "seconds": time.monotonic() - started,
    "wanted": str(policy.cache_directory()),
    "cache": str(policy.CACHE) if policy.CACHE else None,
    "warm": sorted(p.stem for p in policy.CACHE.glob("*.ready")) if policy.CACHE else [],
}, sys.stdout)
"""


def _numba() -> Found:
    """In a process of its own: a Numba that does not fit its NumPy can end more than an import."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _NUMBA],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    except subprocess.TimeoutExpired:
        return Found(State.NO, "import did not end in 60 s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"import ended with status {done.returncode}"]
        return Found(State.NO, f"{lines[-1][:200]}: pip install numba")
    about = json.loads(done.stdout)
    text = f"Numba {about['version']}, imported in {about['seconds']:.1f} s"
    if about["plain"]:
        return Found(State.NOTE, f"{text}; NUMBA_DISABLE_JIT is set: plain Python, a thousand times slower")
    if about["cache"] is None:
        return Found(State.NOTE, f"{text}; {about['wanted']} can't be written: every start compiles")
    if not about["warm"]:
        return Found(State.YES, f"{text}; the first start will compile, once")
    return Found(State.YES, f"{text}; compiled already")


def _shared_memory() -> Found:
    try:
        fd = memfd.create("pyvhost-doctor", 4096)
    except OSError as error:
        return Found(State.NO, f"memfd_create: {error.strerror}")
    try:
        if memfd.can_shrink(fd):
            return Found(State.NOTE, "memory files, but no seals")
        os.ftruncate(fd, 0)
    except PermissionError:
        return Found(State.YES, "memory files, and seals that hold")
    except OSError as error:
        return Found(State.NOTE, f"memory files; sealing: {error.strerror}")
    finally:
        os.close(fd)
    return Found(State.NOTE, "memory files, but seals do not hold")


def _eventfd() -> Found:
    """Passed over a Unix socket, as kicks and calls are, then signalled."""
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fd = eventfd.create()
            try:
                socket.send_fds(ours, [b"x"], [fd])
                _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            finally:
                os.close(fd)
        (fd,) = fds
        try:
            eventfd.signal(fd)
            works = eventfd.is_eventfd(fd) and eventfd.drain(fd) == 1
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        return Found(State.NO, str(error))
    return Found(State.YES, "they pass sockets and count") if works else Found(State.NO, "they don't count")


def _processors() -> Found:
    usable = len(os.sched_getaffinity(0))
    text = f"{usable} of {os.cpu_count()}"
    if usable < 2:
        return Found(State.NOTE, f"{text}: guest and back end will take turns; don't poll busily")
    return Found(State.YES, text)


def _descriptors_limit() -> Found:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(soft)} now, {_limit(hard)} at most"
    if soft != resource.RLIM_INFINITY and soft < 64 * _FDS_PER_DEVICE:
        return Found(
            State.NOTE, f"{text}: enough for some {max(1, soft // _FDS_PER_DEVICE)} devices; ulimit -n"
        )
    return Found(State.YES, text)


def _locked_limit() -> Found:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Found(State.YES, f"{_size(soft)} now, {_size(hard)} at most")


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def _size(number: int) -> str:
    if number == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{number >> 20} MiB" if number >= 1 << 20 else f"{number >> 10} KiB"


# --- where frames can go -----------------------------------------------------------------------------


def _tap() -> Found:
    """Makes a tap, which is gone a moment later."""
    try:
        for fd in tap.open_tap(f"pvdoc{os.getpid() % 10**9}"):
            os.close(fd)
    except PermissionError:
        user = os.environ.get("USER") or str(os.geteuid())
        return Found(
            State.NO,
            f"needs CAP_NET_ADMIN; root can make one for you: ip tuntap add vm0 mode tap user {user}",
        )
    except OSError as error:
        if error.errno == errno.ENOENT:
            return Found(State.NO, f"no {tap.DEVICE}: modprobe tun")
        return Found(State.NO, str(error.strerror))
    return Found(State.YES, "made one, and let it go")


def _packet() -> Found:
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except PermissionError:
        return Found(State.NO, "needs CAP_NET_RAW")
    except OSError as error:
        return Found(State.NO, f"packet socket: {error.strerror}")
    return Found(State.YES, "opens")


def _passt() -> Found:
    found = _tool("passt", "passt", "--version")
    if "unknown" in found.text:
        # Debian 12's does not know its own.
        installed = _first_line("dpkg-query", "-W", "-f", "passt ${Version}", "passt")
        return Found(found.state, installed or found.text)
    return found


def _without_anything() -> Found:
    return Found(State.YES, "need nothing of the host")


# --- where disks can be ------------------------------------------------------------------------------


def _io_uring() -> Found:
    """Makes one, which is gone a moment later."""
    try:
        Uring(8).close()
    except OSError as error:
        why = error.strerror
        if error.errno == errno.EPERM:
            why = "not allowed here (sysctl kernel.io_uring_disabled, or a container's seccomp filter)"
        return Found(State.NOTE, f"{why}; every command goes through Python, more slowly")
    return Found(State.YES, "made one, and let it go")


def _libnbd() -> Found:
    # Debian and Ubuntu have called it so ever since its first release.
    try:
        version = libnbd.version()
    except libnbd.NbdError as error:
        return Found(State.NO, str(error.strerror or error), ("libnbd0",))
    return Found(State.YES, version)


# --- guests ------------------------------------------------------------------------------------------


def _uml() -> Found:
    found = _tool(uml.PROGRAM, uml.PACKAGE, "--version")
    if found.state is not State.YES:
        return found
    try:
        place = uml.memory_folder(96)
    except GuestError as problem:
        return Found(State.NOTE, f"Linux {found.text}, but {problem}")
    return Found(State.YES, f"Linux {found.text}, its memory in {place}")


def _kernel() -> Found:
    try:
        found = kernel.find_kernel(download=False)
    except kernel.KernelError:
        if _program("apt-get"):
            return Found(State.NOTE, "none yet; it is fetched when first needed")
        return Found(State.NO, f"none: {kernel.METAPACKAGE}", (kernel.METAPACKAGE,))
    return Found(State.YES, f"{found.release}, {found.image}")


def _kvm() -> Found:
    answer = kvm.probe()
    if answer.runs:
        return Found(State.YES, answer.text)
    return Found(State.NOTE, f"{answer.text}; QEMU will emulate")


def _vsock() -> Found:
    # By what the kernel says of itself: opening one would load modules.
    try:
        known = any(
            line.startswith("AF_VSOCK ") for line in Path("/proc/net/protocols").read_text().splitlines()
        )
    except OSError:
        known = False
    state = "is there" if known else "is not loaded"
    return Found(State.NOTE, f"the host's AF_VSOCK {state}; only --forward wants it, with vsock_loopback")


def _hugepages() -> Found:
    pools = []
    for pool in sorted(Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        try:
            total, free = (int((pool / f"{name}_hugepages").read_text()) for name in ("nr", "free"))
        except (OSError, ValueError):
            continue
        if total:
            kib = int(pool.name.removeprefix("hugepages-").removesuffix("kB"))
            pools.append(f"{free} of {total} free of {kib >> 10} MiB")
    if pools:
        return Found(State.YES, "; ".join(pools))
    return Found(State.NOTE, "none reserved; sysctl vm.nr_hugepages=N has some")


def _described() -> Found:
    """The JSON files by which libvirt and others find back-end programs (QEMU's vhost-user.json)."""
    ours, others = [], 0
    for folder in _DESCRIPTORS:
        for path in sorted(folder.glob("*.json")):
            try:
                about = json.loads(path.read_bytes())
                program = about.get("binary", "") if isinstance(about, dict) else ""
            except (OSError, ValueError, RecursionError):
                continue
            if "pyvhost" in str(program):
                ours.append(str(path))
            else:
                others += 1
    if ours:
        return Found(State.YES, ", ".join(ours))
    have = [str(folder) for folder in _DESCRIPTORS if folder.is_dir()]
    where = f"{others} of others in {', '.join(have)}" if have else f"no {_DESCRIPTORS[-1]}"
    return Found(State.NOTE, f"{where}, none of pyvhost's: -chardev socket,path=... needs none")


SERVING: Final = "To serve"
BACKENDS: Final = "Where frames can go"
STORES: Final = "Where disks can be"
GUESTS: Final = "Guests to try it with"
PEERS: Final = "Benchmarks and tests"

CHECKS: Final = (
    Check(SERVING, "Python", "", _python, vital=True),
    Check(SERVING, "compiler", "the data plane", _numba, vital=True),
    Check(SERVING, "eventfds", "kicks and calls", _eventfd, vital=True),
    Check(SERVING, "shared memory", "the driver side, UML and QEMU", _shared_memory),
    Check(SERVING, "processors", "one for the guest, one for a worker that polls", _processors),
    Check(SERVING, "open files", f"some {_FDS_PER_DEVICE} a device", _descriptors_limit),
    Check(SERVING, "locked memory", "DPDK", _locked_limit),
    Check(SERVING, "descriptions", "libvirt finds back ends by them", _described),
    Check(BACKENDS, "switch, loop, null, generate, stream", "--backend", _without_anything),
    Check(BACKENDS, "tap", "--backend tap:NAME", _tap),
    Check(BACKENDS, "packet", "--backend packet:IFNAME", _packet),
    Check(BACKENDS, "user", "--backend user", _passt),
    Check(BACKENDS, "vsock", "pyvhost vsock --forward", _vsock),
    Check(STORES, "files, block devices, memory", "--lun", _without_anything),
    Check(STORES, "NBD", "--lun nbd:URI", _libnbd),
    Check(STORES, "io_uring", "reads and writes without Python", _io_uring),
    Check(GUESTS, "User Mode Linux", "pyvhost demo; an ordinary process", _uml),
    Check(GUESTS, "QEMU", "pyvhost demo", lambda: _tool(qemu.PROGRAM, qemu.PACKAGE, "--version")),
    Check(GUESTS, "a kernel", "for QEMU's guest", _kernel),
    Check(GUESTS, "busybox", "QEMU's guest", lambda: _tool("busybox", "busybox-static")),
    Check(GUESTS, "KVM", "QEMU's guest at full speed", _kvm),
    Check(PEERS, "DPDK", "pyvhost bench net", lambda: _tool(testpmd.PROGRAM, testpmd.PACKAGE)),
    Check(PEERS, "hugepages", "DPDK's, if wanted", _hugepages),
    Check(PEERS, "strace", "system calls a packet", lambda: _tool("strace", "strace", "--version")),
    Check(PEERS, "ip", "networks of the tests and the demo", lambda: _tool("ip", "iproute2", "-V")),
    Check(PEERS, "ethtool", "", lambda: _tool("ethtool", "ethtool", "--version")),
    Check(PEERS, "tcpdump", "reading what --pcap wrote", lambda: _tool("tcpdump", "tcpdump", "--version")),
    Check(PEERS, "iperf3", "", lambda: _tool("iperf3", "iperf3", "--version")),
)


def ask_all(
    checks: tuple[Check, ...] = CHECKS, before: Callable[[Check], object] | None = None
) -> Iterator[tuple[Check, Found]]:
    """Every check with what it found, one after the other; `before` is told of each.

    A check that fails itself is a NO that says so.
    """
    for check in checks:
        if before is not None:
            before(check)
        try:
            found = check.ask()
        except Exception as error:  # one odd host must not hide what the other checks found
            found = Found(State.NO, f"could not be found out: {error!r}")
        yield check, found
