"""KVM, tried: a virtual machine of one page that says one byte and halts (Documentation/virt/kvm/api.rst).

/dev/kvm may open, and even make a machine, on a host where no guest ever runs; only running one tells.

Promises: `probe` answers within its time limit whatever the kernel does, for the trial is a process of its own.
Never: leaves a machine behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import subprocess
import sys
from dataclasses import dataclass

from pyvhost.abi._ioctl import _IO, _IOR, _IOW

DEVICE = "/dev/kvm"

_KVM = 0xAE
GET_API_VERSION = _IO(_KVM, 0x00)
CREATE_VM = _IO(_KVM, 0x01)
GET_VCPU_MMAP_SIZE = _IO(_KVM, 0x04)
CREATE_VCPU = _IO(_KVM, 0x41)
RUN = _IO(_KVM, 0x80)

API_VERSION = 12
EXIT_IO = 2
EXIT_HLT = 5

#: Where the program lies in the guest's memory, the port it writes to, and what it writes.
_CODE = 0x1000
_PORT = 0x10
_SAYS = 0x2A
#: mov al, _SAYS; out _PORT, al; hlt
_PROGRAM = bytes((0xB0, _SAYS, 0xE6, _PORT, 0xF4))


class _UserspaceMemoryRegion(ctypes.Structure):
    _fields_ = (
        ("slot", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("guest_phys_addr", ctypes.c_uint64),
        ("memory_size", ctypes.c_uint64),
        ("userspace_addr", ctypes.c_uint64),
    )


class _Regs(ctypes.Structure):
    """x86's struct kvm_regs: sixteen general registers, then rip and rflags."""

    _fields_ = (("general", ctypes.c_uint64 * 16), ("rip", ctypes.c_uint64), ("rflags", ctypes.c_uint64))


class _Sregs(ctypes.Structure):
    """x86's struct kvm_sregs, of which only the first segment register, cs, has names here."""

    _fields_ = (
        ("cs_base", ctypes.c_uint64),
        ("cs_limit", ctypes.c_uint32),
        ("cs_selector", ctypes.c_uint16),
        ("rest", ctypes.c_uint8 * 298),
    )


assert ctypes.sizeof(_UserspaceMemoryRegion) == 32
assert ctypes.sizeof(_Regs) == 144
assert ctypes.sizeof(_Sregs) == 312

SET_USER_MEMORY_REGION = _IOW(_KVM, 0x46, _UserspaceMemoryRegion)
SET_REGS = _IOW(_KVM, 0x82, _Regs)
GET_SREGS = _IOR(_KVM, 0x83, _Sregs)
SET_SREGS = _IOW(_KVM, 0x84, _Sregs)


@dataclass(frozen=True)
class Answer:
    """Whether guests run, and if not, why."""

    runs: bool
    text: str


def probe(seconds: float = 10.0) -> Answer:
    """Runs a guest under KVM, for `seconds` at most."""
    if not os.path.exists(DEVICE):
        return Answer(False, f"there is no {DEVICE}")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return Answer(False, f"{DEVICE} is there, and this user may not open it")
    if platform.machine() != "x86_64":
        return Answer(False, f"{DEVICE} opens; not tried, for that needs an x86-64 host")
    # The module alone, not by name: so that the trial doesn't depend on how this process was started.
    trial = subprocess.Popen(
        [sys.executable, "-m", __spec__.name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        said, complaint = trial.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        trial.kill()
        # Where even that doesn't end it, init will have to wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            trial.communicate(timeout=2)
        return Answer(False, f"{DEVICE} opens, but a guest did not end within {seconds:g} s")
    if trial.returncode == 0:
        return Answer(True, "a guest ran")
    lines = complaint.strip().splitlines() or [f"the trial ended with {trial.returncode}"]
    return Answer(False, f"{DEVICE} opens, but {said.strip() or lines[-1]}")


def run_guest() -> None:
    """Runs the guest in this process, which may never come back. OSError: what KVM refused."""
    with contextlib.ExitStack() as stack:
        kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, kvm)
        version = fcntl.ioctl(kvm, GET_API_VERSION, 0)
        if version != API_VERSION:
            raise OSError(errno.ENOTSUP, f"its API is version {version}, not {API_VERSION}")
        machine = _ioctl("it makes no machine", kvm, CREATE_VM, 0)
        stack.callback(os.close, machine)
        memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        memory[:] = b"\xf4" * len(memory)  # hlt, wherever it may stray
        memory[_CODE : _CODE + len(_PROGRAM)] = _PROGRAM
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = _UserspaceMemoryRegion(0, 0, 0, len(memory), address)
        _ioctl("a machine takes no memory", machine, SET_USER_MEMORY_REGION, region)
        vcpu = _ioctl("a machine gets no processor", machine, CREATE_VCPU, 0)
        stack.callback(os.close, vcpu)
        run = mmap.mmap(vcpu, fcntl.ioctl(kvm, GET_VCPU_MMAP_SIZE, 0))
        stack.callback(run.close)
        sregs = _Sregs()
        _ioctl("a processor has no registers", vcpu, GET_SREGS, sregs)
        sregs.cs_base = sregs.cs_selector = 0
        _ioctl("a processor takes no registers", vcpu, SET_SREGS, sregs)
        _ioctl("a processor takes no registers", vcpu, SET_REGS, _Regs(rip=_CODE, rflags=2))
        said = b""
        while True:
            _ioctl("a guest does not run", vcpu, RUN, 0)
            reason = int.from_bytes(run[8:12], sys.byteorder)
            if reason == EXIT_HLT:
                break
            if reason != EXIT_IO or len(said) > 1:
                raise OSError(errno.EIO, f"a guest stopped with exit reason {reason}")
            data = int.from_bytes(run[40:48], sys.byteorder)
            said += run[data : data + 1]
        if said != bytes((_SAYS,)):
            raise OSError(errno.EIO, f"a guest said {said!r} and not {bytes((_SAYS,))!r}")


def _ioctl(complaint: str, fd: int, request: int, argument: ctypes.Structure | int) -> int:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise OSError(error.errno, f"{complaint}: {error.strerror}") from None


if __name__ == "__main__":
    try:
        run_guest()
    except OSError as problem:
        print(problem.strerror)
        sys.exit(1)
