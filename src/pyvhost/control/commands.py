"""What can be asked of a device, by its kind: each a name, how it is written, what it is for, and who does it.

Promises: everything here runs on the control thread and returns at once. Never: makes a device; imports a
device's room before there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pyvhost.net.device import NetDevice
    from pyvhost.vsock.device import VsockDevice


class Device(Protocol):
    """What every device has."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def acked_features(self) -> int: ...


class Store(Protocol):
    """What is told of a logical unit's store."""

    @property
    def spec(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def online(self) -> bool: ...


class Unit(Protocol):
    """A logical unit of a SCSI device."""

    @property
    def target(self) -> int: ...

    @property
    def lun(self) -> int: ...

    @property
    def store(self) -> Store: ...


class Disks(Protocol):
    """A SCSI device. Its methods raise OSError or ValueError for what can't be done."""

    @property
    def luns(self) -> Iterable[Unit]: ...

    def add_lun(self, target: int, lun: int, spec: str, /) -> object: ...

    def remove_lun(self, target: int, lun: int, /) -> object: ...

    def resize_lun(self, target: int, lun: int, size: int | None, /) -> object: ...


@dataclass(frozen=True)
class Command:
    """`function` gets its arguments, as many as `least` to `most`; `changes`: it is worth a line in the log."""

    name: str
    usage: str
    what: str
    function: Callable[..., Any]
    least: int = 0
    most: int = 0
    changes: bool = True

    def run(self, arguments: Sequence[str]) -> Any:
        """What comes of it, as JSON has it. ValueError, OSError: why nothing does."""
        if not self.least <= len(arguments) <= self.most:
            raise ValueError(
                f"{self.name}: {len(arguments)} arguments; it is: {self.name} {self.usage}".rstrip()
            )
        return self.function(*arguments)


def of_device(device: Device) -> dict[str, Command]:
    """The commands of a device, by name."""
    special: list[Command] = []
    more: Callable[[], dict[str, Any]] = dict
    if device.kind == "scsi":
        special, more = _scsi(cast(Disks, device))
    elif device.kind == "net":
        special, more = _net(cast("NetDevice", device))
    elif device.kind == "vsock":
        more = _vsock(cast("VsockDevice", device))

    def status() -> dict[str, Any]:
        return {
            "device": device.name,
            "kind": device.kind,
            "features": f"{device.acked_features:#x}",
            **more(),
        }

    def help_() -> list[dict[str, str]]:
        return [{"command": each.name, "usage": each.usage, "what": each.what} for each in known.values()]

    common = [
        Command("help", "", "what can be asked", help_, changes=False),
        Command("status", "", "what the device is and has", status, changes=False),
    ]
    known = {each.name: each for each in (*common, *special)}
    return known


def _vsock(device: VsockDevice) -> Callable[[], dict[str, Any]]:
    def status() -> dict[str, Any]:
        return {
            "guest_cid": device.guest_cid,
            "group": device.group,
            "connections": len(device.connections),
        }

    return status


def _net(device: NetDevice) -> tuple[list[Command], Callable[[], dict[str, Any]]]:
    def link(state: str) -> None:
        if state not in ("up", "down"):
            raise ValueError(f"a link is up or down, not {state!r}")
        device.set_link(state == "up")

    def status() -> dict[str, Any]:
        return {
            "backend": device.backend.spec,
            "mac": device.mac.hex(":"),
            "queue_pairs": device.queue_pairs,
            "link": "up" if device.link else "down",
        }

    return [
        Command("link", "up|down", "plug the guest's cable in, or out", link, 1, 1),
        Command("announce", "", "have the guest announce itself on the network", device.announce),
    ], status


def _scsi(device: Disks) -> tuple[list[Command], Callable[[], dict[str, Any]]]:
    from pyvhost.scsi.lun import parse_place, place
    from pyvhost.scsi.stores.spec import parse_size

    def add(text: str) -> dict[str, str]:
        (unit,) = place([text], [(unit.target, unit.lun) for unit in device.luns])
        device.add_lun(unit.target, unit.lun, unit.spec)
        return {"lun": f"{unit.target}:{unit.lun}"}

    def remove(text: str) -> None:
        device.remove_lun(*parse_place(text))

    def resize(text: str, size: str | None = None) -> None:
        device.resize_lun(*parse_place(text), None if size is None else parse_size(size))

    def status() -> dict[str, Any]:
        return {"luns": [_unit(unit) for unit in sorted(device.luns, key=lambda u: (u.target, u.lun))]}

    return [
        Command(
            "add-lun", "[TARGET:LUN=]SPEC", "add a disk; without a place, at the first free LUN", add, 1, 1
        ),
        Command("remove-lun", "TARGET:LUN", "take a disk away", remove, 1, 1),
        Command(
            "resize-lun",
            "TARGET:LUN [SIZE]",
            "look at the store's size now, or have it be SIZE where the store can",
            resize,
            1,
            2,
        ),
    ], status


def _unit(unit: Unit) -> dict[str, Any]:
    store = unit.store
    return {
        "lun": f"{unit.target}:{unit.lun}",
        "store": store.spec,
        "bytes": store.size,
        "block_size": store.block_size,
        "read_only": store.read_only,
        "online": store.online,
    }
