"""`switch:NAME`: a learning switch between the guests of this process, and to one interface of the host.

The members' frames go from ring to ring in the compiled loop; here is only who belongs to which switch.

Promises: switches are told apart by name, in the whole process; the uplink is open while there is a member.
Never: knows an address: what is behind which member is learnt in the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pyvhost.host.poller import Poller
from pyvhost.net.backends.base import Backend, PortKind
from pyvhost.net.backends.packet import PacketBackend
from pyvhost.net.backends.spec import Spec, SpecError
from pyvhost.net.backends.tap import TapBackend

_UPLINKS: dict[str, Callable[[Spec], Backend]] = {
    "tap": TapBackend.from_spec,
    "packet": PacketBackend.from_spec,
}


class Switch:
    """The members of a name, and their uplink."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: list[SwitchBackend] = []
        #: Open as long as there are members; None if no member named one.
        self.uplink: Backend | None = None
        #: Whatever the data plane keeps for this switch: its table, its ports.
        self.state: object | None = None

    def __repr__(self) -> str:
        return f"<Switch {self.name}, {len(self.members)} members>"


_switches: dict[str, Switch] = {}


def switches() -> list[Switch]:
    """Those that have members now."""
    return list(_switches.values())


class SwitchBackend(Backend):
    """One member's port."""

    kind = PortKind.SWITCH
    usage: ClassVar[str] = "switch:NAME[,uplink=tap:NAME|packet:IFNAME]"
    summary: ClassVar[str] = "a learning switch between this process's guests"

    def __init__(self, spec: str, name: str, uplink: Backend | None = None) -> None:
        super().__init__(spec)
        self.name = name
        self._uplink = uplink
        #: The switch, while open.
        self.group: Switch | None = None

    @classmethod
    def from_spec(cls, spec: Spec) -> SwitchBackend:
        name = spec.required("name", str)
        return cls(spec.text, name, spec.value("uplink", _uplink_of))

    def open(self, queue_pairs: int, poller: Poller | None = None) -> list[int]:
        self.check_pairs(queue_pairs)
        group = _switches.get(self.name) or Switch(self.name)
        if self._uplink is not None:
            if group.uplink is None:
                self._uplink.open(1, poller)
                group.uplink = self._uplink
            elif group.uplink.spec != self._uplink.spec:
                raise ValueError(
                    f"{self.spec}: switch {self.name} has another uplink already: {group.uplink.spec}"
                )
        _switches[self.name] = group
        group.members.append(self)
        self.group = group
        self.fds = [-1] * queue_pairs
        return self.fds

    def close(self) -> None:
        group, self.group, self.fds = self.group, None, []
        if group is None:
            return
        group.members.remove(self)
        if not group.members:
            del _switches[self.name]
            if group.uplink is not None:
                group.uplink.close()
                group.uplink = None


def _uplink_of(text: str) -> Backend:
    spec = Spec(text)
    if spec.kind not in _UPLINKS:
        raise SpecError(f"an uplink is tap:NAME or packet:IFNAME, not {text!r}")
    uplink = _UPLINKS[spec.kind](spec)
    spec.done()
    return uplink
