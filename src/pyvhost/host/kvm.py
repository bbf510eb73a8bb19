"""KVM, tried: a virtual machine that counts, says one byte and halts (Documentation/virt/kvm/api.rst).

/dev/kvm may open, make a machine, and even run its first instructions, on a host where no guest ever comes to
an end: one by one, in software. Only work tells, in the mode that systems run in: 64 bits, with paging.

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
from pathlib import Path

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

#: Guest physical addresses: the program, and the tables of its one page of 2 MiB.
_CODE = 0x1000
_PML4 = 0x2000
_PDPT = 0x3000
_PD = 0x4000
_MEMORY = 0x5000
#: How far it counts: under 0.1 s for a processor, minutes for software that plays one.
_COUNT = 1 << 26
#: The port it writes to, and what it writes.
_PORT = 0x10
_SAYS = 0x2A
_PROGRAM = (
    b"\xb9" + _COUNT.to_bytes(4, "little")  # mov ecx, _COUNT
    + b"\xff\xc9"  # dec ecx
    + b"\x75\xfc"  # jnz to the instruction before
    + bytes((0xB0, _SAYS))  # mov al, _SAYS
    + bytes((0xE6, _PORT))  # out _PORT, al
    + b"\xf4"  # hlt
)  # fmt: skip

_PRESENT_WRITABLE = 0b11
_PAGE_2M = 1 << 7
_CR0_PE_ET_PG = 1 << 0 | 1 << 4 | 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME_LMA = 1 << 8 | 1 << 10


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


class _Segment(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("selector", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("present", ctypes.c_uint8),
        ("dpl", ctypes.c_uint8),
        ("db", ctypes.c_uint8),
        ("s", ctypes.c_uint8),
        ("l", ctypes.c_uint8),
        ("g", ctypes.c_uint8),
        ("avl", ctypes.c_uint8),
        ("unusable", ctypes.c_uint8),
        ("padding", ctypes.c_uint8),
    )


class _Sregs(ctypes.Structure):
    """x86's struct kvm_sregs; what stays as it is has no name."""

    _fields_ = (
        ("cs", _Segment),
        ("data", _Segment * 5),
        ("tr_ldt", _Segment * 2),
        ("gdt_idt", ctypes.c_uint64 * 4),
        ("cr0", ctypes.c_uint64),
        ("cr2", ctypes.c_uint64),
        ("cr3", ctypes.c_uint64),
        ("cr4", ctypes.c_uint64),
        ("cr8", ctypes.c_uint64),
        ("efer", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
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


def likely(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether guests can be expected to run, by what the host says and at once; `probe` tries."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return False
    if platform.machine() != "x86_64":
        return True
    try:
        flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return not {"vmx", "svm"}.isdisjoint(flags.split())


def probe(seconds: float = 5.0) -> Answer:
    """Runs a guest under KVM, for `seconds` at most."""
    if not os.path.exists(DEVICE):
        return Answer(False, f"there is no {DEVICE}")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return Answer(False, f"{DEVICE} is there, and this user may not open it")
    if platform.machine() != "x86_64":
        return Answer(False, f"{DEVICE} opens; not tried, for that needs an x86-64 host")
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
        return Answer(
            False, f"{DEVICE} opens, but a guest that should take 0.1 s did not end in {seconds:g} s"
        )
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
        memory = mmap.mmap(-1, _MEMORY)
        memory[_CODE : _CODE + len(_PROGRAM)] = _PROGRAM
        for table, entry in ((_PML4, _PDPT), (_PDPT, _PD), (_PD, _PAGE_2M)):
            memory[table : table + 8] = (entry | _PRESENT_WRITABLE).to_bytes(8, "little")
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = _UserspaceMemoryRegion(0, 0, 0, len(memory), address)
        _ioctl("a machine takes no memory", machine, SET_USER_MEMORY_REGION, region)
        vcpu = _ioctl("a machine gets no processor", machine, CREATE_VCPU, 0)
        stack.callback(os.close, vcpu)
        run = mmap.mmap(vcpu, fcntl.ioctl(kvm, GET_VCPU_MMAP_SIZE, 0))
        stack.callback(run.close)
        sregs = _Sregs()
        _ioctl("a processor has no registers", vcpu, GET_SREGS, sregs)
        _to_long_mode(sregs)
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


def _to_long_mode(sregs: _Sregs) -> None:
    """Has the processor start where a system would have brought it: 64 bits, paging on."""
    flat = _Segment(limit=0xFFFFFFFF, selector=8, type=11, present=1, s=1, l=1, g=1)
    sregs.cs = flat
    for number in range(len(sregs.data)):
        sregs.data[number] = _Segment(limit=0xFFFFFFFF, selector=16, type=3, present=1, db=1, s=1, g=1)
    sregs.cr0 = _CR0_PE_ET_PG
    sregs.cr3 = _PML4
    sregs.cr4 = _CR4_PAE
    sregs.efer = _EFER_LME_LMA


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
