"""KVM is tried by running a guest: what the trial says where that works, hangs, or is refused."""

from __future__ import annotations

import errno
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pyvhost.host import kvm
from requirements import need


class Trial(subprocess.Popen[str]):
    """Stands for the trial's process: runs `code` instead."""

    code = ""

    def __init__(self, command: list[str], **options: object) -> None:
        assert command[1:] == ["-m", "pyvhost.host.kvm"]
        super().__init__([sys.executable, "-c", self.code], **options)  # type: ignore[call-overload]


@pytest.fixture
def openable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A device that opens, on a host of the kind that the trial is made for."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(kvm, "DEVICE", str(device))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(subprocess, "Popen", Trial)
    return str(device)


def test_no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kvm, "DEVICE", str(tmp_path / "absent"))
    assert kvm.probe() == kvm.Answer(False, f"there is no {tmp_path / 'absent'}")


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu vmx ept\n", True),
        ("flags\t\t: fpu svm\n", True),
        ("flags\t\t: fpu hypervisor\nvmx flags\t: none\n", False),
        ("", False),
    ],
)
def test_a_device_without_a_processor_for_it_promises_nothing(
    openable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpuinfo: str, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert kvm.likely(tmp_path / "cpuinfo") is expected
    assert not kvm.likely(tmp_path / "absent")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert kvm.likely(tmp_path / "absent")
    monkeypatch.setattr(kvm, "DEVICE", str(tmp_path / "no kvm"))
    assert not kvm.likely(tmp_path / "cpuinfo")


def test_a_guest_that_ran(openable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "code", "")
    assert kvm.probe().runs


def test_a_guest_that_never_ends_is_ended(openable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "code", "import signal; signal.pause()")
    answer = kvm.probe(0.3)
    assert not answer.runs
    assert answer.text == f"{openable} opens, but a guest that should take 0.1 s did not end in 0.3 s"


def test_what_kvm_refused_is_said(openable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Trial, "code", "print('it makes no machine: Device or resource busy'); raise SystemExit(1)"
    )
    assert kvm.probe() == kvm.Answer(
        False, f"{openable} opens, but it makes no machine: Device or resource busy"
    )


def test_a_trial_that_crashes(openable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "code", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert kvm.probe().text.endswith("the trial ended with -11")


def test_other_processors_are_not_tried(openable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    answer = kvm.probe()
    assert not answer.runs
    assert "not tried" in answer.text


def test_numbers_are_the_kernels() -> None:
    # As <linux/kvm.h> has them on x86-64.
    assert (kvm.GET_API_VERSION, kvm.CREATE_VM, kvm.CREATE_VCPU) == (0xAE00, 0xAE01, 0xAE41)
    assert (kvm.GET_VCPU_MMAP_SIZE, kvm.RUN) == (0xAE04, 0xAE80)
    assert kvm.SET_USER_MEMORY_REGION == 0x4020AE46
    assert (kvm.SET_REGS, kvm.GET_SREGS, kvm.SET_SREGS) == (0x4090AE82, 0x8138AE83, 0x4138AE84)


def test_something_that_is_not_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "DEVICE", "/dev/null")
    with pytest.raises(OSError, match="Inappropriate ioctl") as refusal:
        kvm.run_guest()
    assert refusal.value.errno == errno.ENOTTY


def test_a_short_guest_comes_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where guests run in software, one that counts to 3 gets there: the trial itself is right."""
    need(Path(kvm.DEVICE).exists() and platform.machine() == "x86_64", "an x86-64 host with /dev/kvm")
    program = kvm._PROGRAM.replace(kvm._COUNT.to_bytes(4, "little"), (3).to_bytes(4, "little"))
    assert program != kvm._PROGRAM
    monkeypatch.setattr(kvm, "_PROGRAM", program)
    kvm.run_guest()


def test_a_guest_that_says_something_else_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    need(Path(kvm.DEVICE).exists() and platform.machine() == "x86_64", "an x86-64 host with /dev/kvm")
    monkeypatch.setattr(kvm, "_PROGRAM", bytes((0xB0, 0x41, 0xE6, 0x10, 0xF4)))
    with pytest.raises(OSError, match="a guest said b'A' and not"):
        kvm.run_guest()
    monkeypatch.setattr(kvm, "_PROGRAM", b"\xf4")
    with pytest.raises(OSError, match="a guest said b'' and not"):
        kvm.run_guest()
    # ud2, and no handler for it: a triple fault
    monkeypatch.setattr(kvm, "_PROGRAM", b"\x0f\x0b")
    with pytest.raises(OSError, match="a guest"):
        kvm.run_guest()
