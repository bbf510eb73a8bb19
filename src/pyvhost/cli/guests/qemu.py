"""QEMU with Debian's stock kernel: a guest with real PCI devices, many queues and a monitor.

Promises: the kernel is unmodified and the root file system an initramfs of busybox and a few programs of the host,
gone when the guest is; its NICs, SCSI controllers and socket device are vhost-user devices, attached as a user would
attach them (`-netdev vhost-user`, `-device vhost-user-scsi-pci`, shared memory from a memfd).
Emulated (TCG) unless told otherwise: it boots in seconds anywhere.
Never: needs root or a disk image.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from pyvhost.cli.guests import agent
from pyvhost.cli.guests.base import Guest, GuestError, LineCallback
from pyvhost.cli.guests.initramfs import Initramfs, InitramfsError
from pyvhost.cli.guests.kernel import Kernel, KernelError, find_kernel
from pyvhost.cli.guests.modules import ModuleError, content, load_order
from pyvhost.cli.guests.qmp import Message, Qmp, QmpError

_T = TypeVar("_T")

PROGRAM = "qemu-system-x86_64"
PACKAGE = "qemu-system-x86"

# The shell's line: a virtio-serial port, of which no byte is lost however late the guest reads, as an emulated
# UART's are. The UART is what a person reads. It has a name: its number depends on where the cards are.
_PORT = "pyvhost.shell"
_PORT_MODULES = ("virtio_pci", "virtio_console")
_DISK_MODULES = ("virtio_scsi", "sd_mod", "sg")
_VSOCK_MODULES = ("vmw_vsock_virtio_transport",)


@dataclass(frozen=True)
class Nic:
    """One vhost-user NIC: the back end's socket, and how many queue pairs to ask for."""

    socket: str | Path
    queue_pairs: int = 1
    mac: str = ""  # default: one made from the socket's path, so that no two are the same
    options: str = ""  # more of virtio-net-pci's properties, as in "packed=on"

    @property
    def address(self) -> str:
        """The MAC address it has."""
        digest = hashlib.sha256(str(self.socket).encode()).digest()
        return self.mac or "52:54:00:" + digest[:3].hex(":")


@dataclass(frozen=True)
class Disks:
    """One vhost-user SCSI controller: the back end's socket, and how many request queues to ask for."""

    socket: str | Path
    queues: int = 1
    options: str = ""  # more of vhost-user-scsi-pci's properties


class QemuGuest(Guest):
    """A QEMU with one virtio NIC for each of `nics`, and one virtio SCSI controller for each of `disks`.

    `vsock`: the back end's socket of its one virtio socket device. The back ends must be listening by `start`.

    `kernel` is what to boot (default: `find_kernel()`); `programs` are the host's, taken into the guest if the
    host has them. `reconnect`: seconds after which QEMU dials a back end again that has gone, 0 for never.
    `machine`: QEMU's, with options after commas; `devices`: values of `-device`, before the NICs;
    `kernel_arguments`: more for the kernel's command line. `movable`: it is to be migrated (see `migration`).
    `incoming`: it does not boot, but waits, paused, for what another one is.
    """

    def __init__(
        self,
        nics: Sequence[Nic] = (),
        *,
        disks: Sequence[Disks] = (),
        vsock: str | Path | None = None,
        name: str = "QEMU",
        memory_mib: int = 256,
        cpus: int | None = None,
        accelerator: str = "tcg",
        machine: str = "pc",
        devices: Sequence[str] = (),
        kernel: Kernel | None = None,
        kernel_arguments: str = "",
        modules: Sequence[str] | None = None,
        programs: Sequence[str] = ("ethtool", "iperf3"),
        reconnect: int = 0,
        movable: bool = False,
        incoming: bool = False,
        on_line: LineCallback | None = None,
    ) -> None:
        super().__init__(name, on_line=on_line)
        self.nics = list(nics)
        self.disks = list(disks)
        self.vsock = vsock
        self.memory_mib = memory_mib
        queues = [*(nic.queue_pairs for nic in nics), *(controller.queues for controller in disks)]
        self.cpus = cpus or max([1, *queues])
        self.accelerator = accelerator
        self.machine = machine
        self.devices = list(devices)
        self.kernel = kernel
        self.kernel_arguments = kernel_arguments
        # QEMU 7.2 that emulates loses pages that the processor wrote just before the end of a migration, where a
        # memory is a multiple of 64 pages: it looks at its dirty bitmap by words, and leaves the TLB as it is.
        self.memory_kib = memory_mib * 1024 + (8 if movable else 0)
        self.movable = movable
        self.incoming = incoming
        if modules is None:
            modules = [
                *("virtio_pci", "virtio_net"),
                *(_DISK_MODULES if disks else ()),
                *(_VSOCK_MODULES if vsock else ()),
            ]
        self.modules = list(modules)
        self.programs = list(programs)
        self.reconnect = reconnect
        self._monitor: socket.socket | None = None
        self._incoming_path: Path | None = None
        self._qmp: Qmp | None = None

    @property
    def qmp(self) -> Qmp:
        """The monitor. GuestError: the guest was not started."""
        if self._qmp is None:
            raise GuestError(f"{self.name} has no monitor: it was not started")
        return self._qmp

    def execute(self, command: str, **arguments: Any) -> Any:
        """A command to its monitor, and what that returns. GuestError: QEMU refused it, or went away."""
        return self._told_by_qmp(lambda qmp: qmp.execute(command, **arguments))

    def wait_event(
        self, name: str, matching: Callable[[Message], bool] = lambda data: True, timeout: float = 30.0
    ) -> Message:
        """The data of the monitor's next event of that name. GuestError: none within `timeout` seconds."""
        return self._told_by_qmp(lambda qmp: qmp.wait_event(name, matching=matching, timeout=timeout))

    # Migration: see `migration`.

    @property
    def incoming_path(self) -> Path:
        """Where another QEMU's migration comes in. GuestError: it was not launched."""
        if self._incoming_path is None:
            raise GuestError(f"{self.name} has not been started")
        return self._incoming_path

    def twin(self, sockets: Sequence[str | Path], name: str) -> Self:
        """Another one of the same parts, for this one's guest to migrate to; its NICs' back ends are at `sockets`."""
        nics = [
            replace(nic, socket=path, mac=nic.address) for nic, path in zip(self.nics, sockets, strict=True)
        ]
        return type(self)(
            nics,
            disks=self.disks,
            vsock=self.vsock,
            name=name,
            memory_mib=self.memory_mib,
            cpus=self.cpus,
            accelerator=self.accelerator,
            machine=self.machine,
            devices=self.devices,
            kernel=self.kernel,
            kernel_arguments=self.kernel_arguments,
            modules=self.modules,
            programs=self.programs,
            reconnect=self.reconnect,
            movable=self.movable,
            incoming=True,
        )

    def take_over(self, source: QemuGuest) -> None:
        """The guest that ran in `source` runs here now: commands go here."""
        self._boots = source._boots[:]

    def wait_booted(self, timeout: float = 60.0) -> Self:
        """As of any guest; one that is to come in is only waited for until it has a monitor."""
        if not self.incoming:
            return super().wait_booted(timeout)
        try:
            self._launched()
        except BaseException:
            self.stop()
            raise
        return self

    # NICs by number, as in `nics`, while it runs.

    def unplug(self, number: int, *, timeout: float = 30.0) -> None:
        """Take the card out of the running guest; the back end's connection stays."""
        self._told_by_qmp(lambda qmp: qmp.execute("device_del", id=f"nic{number}"))
        self._told_by_qmp(
            lambda qmp: qmp.wait_event(
                "DEVICE_DELETED", matching=lambda data: data.get("device") == f"nic{number}", timeout=timeout
            )
        )

    def plug(self, number: int) -> None:
        """Put the card in again."""
        driver, *properties = _device(number, self.nics[number], self.accelerator).split(",")
        pairs = (item.split("=", 1) for item in properties)
        arguments = {key: _typed(value) for key, value in pairs}
        self._told_by_qmp(lambda qmp: qmp.execute("device_add", driver=driver, **arguments))

    def disconnect(self, number: int) -> None:
        """Leave the back end: an unplugged card's connection ends."""
        # The character device, which is the connection, goes with it.
        self._told_by_qmp(lambda qmp: qmp.execute("netdev_del", id=f"net{number}"))

    def connect(self, number: int) -> None:
        """Connect to the back end again, before the card is plugged in."""
        nic = self.nics[number]
        address = {"type": "unix", "data": {"path": str(nic.socket)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        self._told_by_qmp(lambda qmp: qmp.execute("chardev-add", id=f"chr{number}", backend=backend))
        ids = {"id": f"net{number}", "chardev": f"chr{number}"}
        self._told_by_qmp(
            lambda qmp: qmp.execute("netdev_add", type="vhost-user", queues=nic.queue_pairs, **ids)
        )

    def set_link(self, number: int, up: bool) -> None:
        """Pull the card's cable, or put it in."""
        self._told_by_qmp(lambda qmp: qmp.execute("set_link", name=f"nic{number}", up=up))

    def reset(self, timeout: float = 60.0) -> None:
        """Press the reset button, and wait until the guest takes commands again."""
        self._reboot(lambda: self._told_by_qmp(lambda qmp: qmp.execute("system_reset")), timeout)

    # What Guest asks for.

    def _command(
        self, folder: Path, shell: socket.socket
    ) -> tuple[list[str], dict[str, str], list[socket.socket]]:
        program = shutil.which(PROGRAM)
        if program is None:
            raise GuestError(f"there is no {PROGRAM}: apt-get install {PACKAGE}")
        try:
            kernel = self.kernel or find_kernel()
            initramfs = folder / "initramfs"
            initramfs.write_bytes(self._initramfs(kernel))
        except (KernelError, ModuleError, InitramfsError) as problem:
            raise GuestError(f"{self.name}: {problem}") from problem
        self._monitor, monitor = socket.socketpair()
        argv = [program, "-nodefaults", "-no-user-config", "-display", "none"]
        argv += [
            "-machine",
            f"{self.machine},accel={self.accelerator},memory-backend=mem",
            "-smp",
            str(self.cpus),
        ]
        argv += ["-m", f"{self.memory_kib}K"]
        argv += ["-object", f"memory-backend-memfd,id=mem,size={self.memory_kib}K,share=on"]
        argv += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
        arguments = "console=ttyS0 panic=-1 quiet loglevel=5 no_timer_check tsc=reliable"
        argv += ["-append", f"{arguments} {self.kernel_arguments}".rstrip()]
        argv += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        argv += ["-chardev", f"socket,id=shell,fd={shell.fileno()}"]
        # Before the NICs and at a place of its own: whatever cards follow, it stays where a migration looks for it.
        argv += ["-device", "virtio-serial-pci,id=serial0,addr=0x2,max_ports=2"]
        argv += ["-device", f"virtserialport,id=port0,bus=serial0.0,nr=1,chardev=shell,name={_PORT}"]
        argv += [
            "-chardev",
            f"socket,id=monitor,fd={monitor.fileno()}",
            "-mon",
            "chardev=monitor,mode=control",
        ]
        for device in self.devices:
            argv += ["-device", device]
        again = f",reconnect={self.reconnect}" if self.reconnect else ""
        for number, nic in enumerate(self.nics):
            argv += ["-chardev", f"socket,id=chr{number},path={_escaped(nic.socket)}{again}"]
            argv += ["-netdev", f"vhost-user,id=net{number},chardev=chr{number},queues={nic.queue_pairs}"]
            argv += ["-device", _device(number, nic, self.accelerator)]
        for number, controller in enumerate(self.disks):
            argv += ["-chardev", f"socket,id=disks{number},path={_escaped(controller.socket)}{again}"]
            argv += ["-device", _controller(number, controller, self.accelerator)]
        if self.vsock is not None:
            # QEMU 7.2 does not dial again for this device.
            argv += ["-chardev", f"socket,id=vsock,path={_escaped(self.vsock)}"]
            # Vectors as for the others: one a ring (rx, tx, event), one for the configuration.
            vectors = 0 if self.accelerator == "tcg" else 4
            argv += ["-device", f"vhost-user-vsock-pci,chardev=vsock,id=vsock0,vectors={vectors}"]
        if self.incoming:
            self._incoming_path = folder / "incoming"
            argv += ["-S", "-incoming", "defer"]
        return argv, {}, [monitor]

    def _launched(self) -> None:
        assert self._monitor is not None
        if self._qmp is not None:
            return
        try:
            self._qmp = Qmp(self._monitor)
        except QmpError as problem:
            self._reaped(1)
            raise GuestError(self._told(f"{self.name}: {problem}")) from problem

    def _released(self) -> None:
        if self._monitor is not None:
            self._monitor.close()

    def _initramfs(self, kernel: Kernel) -> bytes:
        tree = Initramfs()
        for folder in ("dev", "proc", "sys", "tmp"):
            tree.add_folder(folder)
        tree.add_busybox()
        files = load_order(kernel.modules, [*_PORT_MODULES, *self.modules])
        for module in files:
            tree.add_file(_in_guest(module), content(module))
        line = load_order(kernel.modules, list(_PORT_MODULES))
        path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
        for program in self.programs:
            if found := shutil.which(program, path=path):
                tree.add_program(found)
        first, later = (
            [_in_guest(file) for file in files if (file in line) is early] for early in (True, False)
        )
        tree.add_file("init", agent.qemu_init(_PORT, first, later).encode(), executable=True)
        self._furnish(tree)
        return tree.packed()

    def _furnish(self, tree: Initramfs) -> None:
        """What else a kind of guest wants in its root file system."""

    def _told_by_qmp(self, act: Callable[[Qmp], _T]) -> _T:
        try:
            return act(self.qmp)
        except QmpError as problem:
            raise GuestError(self._told(f"{self.name}: {problem}")) from problem


def _in_guest(module: Path) -> str:
    """Where the initramfs has a module's file."""
    return "/modules/" + module.name[: module.name.index(".ko") + 3]


def _device(number: int, nic: Nic, accelerator: str) -> str:
    # One vector a ring, one for the control queue, one for the configuration. Without KVM there is no irqfd, and
    # QEMU 7.2 dies of that as soon as a vhost-user card uses MSI-X (kvm_virtio_pci_irqfd_use with no vector_irqfd).
    vectors = 0 if accelerator == "tcg" else 2 * nic.queue_pairs + 2
    parts = [
        "virtio-net-pci",
        f"netdev=net{number}",
        f"id=nic{number}",
        f"mac={nic.address}",
        f"vectors={vectors}",
    ]
    if nic.queue_pairs > 1:
        parts += ["mq=on"]
    return ",".join([*parts, nic.options] if nic.options else parts)


def _controller(number: int, controller: Disks, accelerator: str) -> str:
    # Vectors as above: one a ring (control, event, requests), one for the configuration.
    vectors = 0 if accelerator == "tcg" else controller.queues + 3
    parts = [
        "vhost-user-scsi-pci",
        f"chardev=disks{number}",
        f"id=scsi{number}",
        f"num_queues={controller.queues}",
        f"vectors={vectors}",
    ]
    return ",".join([*parts, controller.options] if controller.options else parts)


def _typed(value: str) -> str | int | bool:
    """A property of `-device` as JSON has it."""
    if value in ("on", "off"):
        return value == "on"
    return int(value) if value.isdecimal() else value


def _escaped(path: str | Path) -> str:
    return str(path).replace(",", ",,")
