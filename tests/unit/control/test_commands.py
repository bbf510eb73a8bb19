"""What can be asked of devices of each kind."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from pyvhost.control.commands import of_device
from pyvhost.net.device import NetDevice


@dataclass
class Store:
    spec: str
    size: int = 1 << 20
    block_size: int = 512
    read_only: bool = False
    online: bool = True


@dataclass
class Unit:
    target: int
    lun: int
    store: Store


@dataclass
class Disks:
    """What a SCSI device has for this."""

    name: str = "/run/vm0.sock"
    kind: str = "scsi"
    acked_features: int = 1 << 32
    luns: list[Unit] = field(default_factory=lambda: [Unit(0, 0, Store("a.img"))])
    sizes: list[tuple[int, int, int | None]] = field(default_factory=list)

    def add_lun(self, target: int, lun: int, spec: str) -> None:
        if spec == "absent":
            raise FileNotFoundError(2, "No such file or directory", spec)
        self.luns.append(Unit(target, lun, Store(spec)))

    def remove_lun(self, target: int, lun: int) -> None:
        self.luns = [unit for unit in self.luns if (unit.target, unit.lun) != (target, lun)]

    def resize_lun(self, target: int, lun: int, size: int | None) -> None:
        self.sizes.append((target, lun, size))


def test_disks_are_added_and_taken_away() -> None:
    device = Disks()
    commands = of_device(device)
    assert commands["add-lun"].run(["memory:1G"]) == {"lun": "0:1"}
    assert commands["add-lun"].run(["3:7=b.img,readonly"]) == {"lun": "3:7"}
    with pytest.raises(ValueError, match="3:7 is there already"):
        commands["add-lun"].run(["3:7=c"])
    with pytest.raises(FileNotFoundError):
        commands["add-lun"].run(["absent"])
    commands["remove-lun"].run(["0:0"])
    assert commands["status"].run([]) == {
        "device": "/run/vm0.sock",
        "kind": "scsi",
        "features": "0x100000000",
        "luns": [
            {
                "lun": lun,
                "store": spec,
                "bytes": 1 << 20,
                "block_size": 512,
                "read_only": False,
                "online": True,
            }
            for lun, spec in (("0:1", "memory:1G"), ("3:7", "b.img,readonly"))
        ],
    }


def test_a_disks_size() -> None:
    device = Disks()
    commands = of_device(device)
    commands["resize-lun"].run(["0:0"])
    commands["resize-lun"].run(["0:3", "2G"])
    assert device.sizes == [(0, 0, None), (0, 3, 2 << 30)]
    for words in (["0:0", "many"], ["0"], [], ["0:0", "1", "2"]):
        with pytest.raises(ValueError, match=r"size|TARGET:LUN|arguments"):
            commands["resize-lun"].run(words)


def test_a_network_card() -> None:
    device = NetDevice("null", mac="52:54:00:12:34:56", name="vm0")
    commands = of_device(device)
    assert commands["status"].run([]) == {
        "device": "vm0",
        "kind": "net",
        "features": "0x0",
        "backend": "null",
        "mac": "52:54:00:12:34:56",
        "queue_pairs": 1,
        "link": "up",
    }
    commands["link"].run(["down"])
    assert not device.link
    commands["link"].run(["up"])
    assert device.link
    with pytest.raises(ValueError, match="up or down, not 'sideways'"):
        commands["link"].run(["sideways"])
    device.close()


def test_help_lists_what_there_is() -> None:
    listed = of_device(Disks())["help"].run([])
    assert [row["command"] for row in listed] == ["help", "status", "add-lun", "remove-lun", "resize-lun"]
