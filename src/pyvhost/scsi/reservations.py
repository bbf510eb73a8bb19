"""Reservations of a logical unit: RESERVE(6) and RELEASE(6) (SPC-2), and persistent ones (SPC-4, 5.13).

Promises: every method does all of what SPC-4 says it does or, refusing, nothing; `generation` counts as table 64
says. Registrations belong to an initiator port's name, not to its presence: they outlive resets and, with APTPL,
this process. Never: parses a CDB or a parameter list; aborts a task (it says whose are to be).
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Callable
from pathlib import Path

from pyvhost.scsi.nexus import Nexus
from pyvhost.scsi.sense import Asc, illegal
from pyvhost.scsi.task import Refused, Status


class Type(enum.IntEnum):
    """Types of persistent reservation (SPC-4, table 236)."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 8


_WRITE_EXCLUSIVE = {Type(1), Type(5), Type(7)}
_ALL_REGISTRANTS = {Type(7), Type(8)}
_FOR_REGISTRANTS = {Type(5), Type(6), Type(7), Type(8)}


class Access(enum.Enum):
    """What a command does as far as reservations are concerned (SPC-4, table 68; SBC-3, table 12)."""

    #: Never in conflict.
    FREE = "free"
    #: Never in conflict with a persistent reservation; with RESERVE(6) it is.
    STATUS = "status"
    #: In conflict with exclusive access.
    READ = "read"
    #: In conflict with any reservation.
    WRITE = "write"
    #: RESERVE(6): in conflict with any registration.
    LEGACY = "legacy"
    #: RELEASE(6): as RESERVE(6), but for another's RESERVE(6).
    LEGACY_RELEASE = "legacy release"
    #: PERSISTENT RESERVE IN and OUT: in conflict with RESERVE(6) only.
    PERSISTENT = "persistent"


#: Asc to establish for the port of that name.
Notify = Callable[[int, Asc], object]


def _conflict() -> Refused:
    return Refused(Status.RESERVATION_CONFLICT)


class Reservations:
    """Who has reserved a unit, and who has registered. Ports go by their names (`Nexus.wwn`)."""

    def __init__(self, notify: Notify, path: Path | None = None) -> None:
        self._notify = notify
        #: Where registrations are kept that are to outlive power loss (APTPL); None: that can't be had.
        self.path = path
        self.keys: dict[int, int] = {}
        self.generation = 0
        self.type: Type | None = None
        #: The holder's name; None with a type: all registrants hold it.
        self.holder: int | None = None
        self.aptpl = False
        #: Who has reserved the unit by RESERVE(6).
        self.legacy: Nexus | None = None
        if path is not None:
            self._load(path)

    # What conflicts

    @property
    def plain(self) -> bool:
        """Whether nobody has reserved anything."""
        return self.type is None and self.legacy is None

    def conflicts(self, nexus: Nexus, access: Access) -> bool:
        """Whether a command of that kind from `nexus` ends with RESERVATION CONFLICT."""
        if access is Access.FREE:
            return False
        if access in (Access.LEGACY, Access.LEGACY_RELEASE) and self.keys:
            return True
        if self.legacy is not None:
            return access is not Access.LEGACY_RELEASE and self.legacy is not nexus
        if access in (Access.LEGACY, Access.LEGACY_RELEASE):
            return False
        if self.type is None or access in (Access.STATUS, Access.PERSISTENT):
            return False
        if self.holds(nexus.wwn) or (self.type in _FOR_REGISTRANTS and nexus.wwn in self.keys):
            return False
        return access is Access.WRITE or self.type not in _WRITE_EXCLUSIVE

    def holds(self, wwn: int) -> bool:
        """Whether that port holds the persistent reservation."""
        if self.type is None:
            return False
        return wwn in self.keys if self.type in _ALL_REGISTRANTS else self.holder == wwn

    # RESERVE(6), RELEASE(6)

    def reserve(self, nexus: Nexus) -> None:
        """RESERVE(6), when nothing conflicts."""
        self.legacy = nexus

    def release(self, nexus: Nexus | None) -> None:
        """RELEASE(6), or with None: whoever it was, by a reset."""
        if nexus is None or self.legacy is nexus:
            self.legacy = None

    # PERSISTENT RESERVE OUT: each does it, or raises Refused or CheckCondition and changes nothing.

    def register(
        self, wwn: int, key: int, new: int, *, ignore: bool, aptpl: bool, others: list[int] | None = None
    ) -> None:
        """REGISTER, or with `ignore` REGISTER AND IGNORE EXISTING KEY; `others`: ports of SPEC_I_PT."""
        registered = wwn in self.keys
        if not ignore and key != self.keys.get(wwn, 0):
            raise _conflict()
        if others and registered:
            raise illegal(Asc.INVALID_FIELD_IN_PARAMETER_LIST)
        if any(other in self.keys for other in others or ()):
            raise _conflict()
        self.aptpl = aptpl
        if new == 0:
            if registered:
                self._unregister(wwn)
                self.generation += 1
            return
        for name in [wwn, *(others or ())]:
            self.keys[name] = new
        self.generation += 1

    def take(self, wwn: int, key: int, kind: Type) -> None:
        """RESERVE."""
        self._must_be_registered(wwn, key)
        if self.type is not None:
            if self.holds(wwn) and self.type is kind:
                return
            raise _conflict()
        self._establish(wwn, kind)

    def give_up(self, wwn: int, key: int, kind: Type) -> None:
        """RELEASE."""
        self._must_be_registered(wwn, key)
        if not self.holds(wwn):
            return
        if self.type is not kind:
            raise illegal(Asc.INVALID_RELEASE_OF_PERSISTENT_RESERVATION)
        self._released(wwn)

    def clear(self, wwn: int, key: int) -> None:
        """CLEAR."""
        self._must_be_registered(wwn, key)
        others = [name for name in self.keys if name != wwn]
        self.keys.clear()
        self._drop()
        self.generation += 1
        for other in others:
            self._notify(other, Asc.RESERVATIONS_PREEMPTED)

    def preempt(self, wwn: int, key: int, victim: int, kind: Type) -> list[int]:
        """PREEMPT, and PREEMPT AND ABORT: then the tasks of the ports that it returns are to be aborted."""
        self._must_be_registered(wwn, key)
        everybody = self.type in _ALL_REGISTRANTS
        if victim == 0 and not everybody:
            raise illegal(Asc.INVALID_FIELD_IN_PARAMETER_LIST)
        holder_key = self.keys.get(self.holder) if self.holder is not None else None
        takes = (everybody and victim == 0) or (
            self.type is not None and not everybody and holder_key == victim
        )
        hit = [name for name, registered in self.keys.items() if victim in (0, registered)]
        if not hit:
            raise _conflict()
        removed = [name for name in hit if name != wwn] if takes else list(hit)
        former = self.type
        for name in removed:
            del self.keys[name]
        if takes:
            self._establish(wwn, kind)
        elif everybody and not self.keys:
            self._drop()
        self.generation += 1
        for name in removed:
            if name != wwn:
                self._notify(name, Asc.REGISTRATIONS_PREEMPTED)
        if takes and former is not kind:
            for name in self.keys:
                if name != wwn:
                    self._notify(name, Asc.RESERVATIONS_RELEASED)
        return removed if takes or wwn not in removed else [name for name in removed if name != wwn]

    def move(self, wwn: int, key: int, new: int, other: int, *, unregister: bool, aptpl: bool) -> None:
        """REGISTER AND MOVE, to the port `other`."""
        self._must_be_registered(wwn, key)
        if self.type is None or self.type in _ALL_REGISTRANTS or self.holder != wwn:
            raise _conflict()
        if new == 0 or other == wwn:
            raise illegal(Asc.INVALID_FIELD_IN_PARAMETER_LIST)
        self.keys[other] = new
        self.holder = other
        if unregister:
            del self.keys[wwn]
        self.aptpl = aptpl
        self.generation += 1

    def _must_be_registered(self, wwn: int, key: int) -> None:
        if self.keys.get(wwn) != key or wwn not in self.keys:
            raise _conflict()

    def _establish(self, wwn: int, kind: Type) -> None:
        self.type = kind
        self.holder = None if kind in _ALL_REGISTRANTS else wwn

    def _drop(self) -> None:
        self.type = None
        self.holder = None

    def _released(self, by: int) -> None:
        shared = self.type in _FOR_REGISTRANTS
        self._drop()
        if shared:
            for name in self.keys:
                if name != by:
                    self._notify(name, Asc.RESERVATIONS_RELEASED)

    def _unregister(self, wwn: int) -> None:
        held = self.holds(wwn)
        del self.keys[wwn]
        if held and (self.type not in _ALL_REGISTRANTS or not self.keys):
            self._released(wwn)

    # What outlives power loss

    def snapshot(self) -> bytes | None:
        """What is to be in the file now; None: there is to be no file."""
        if not self.aptpl:
            return None
        registrations = {f"{name:016x}": f"{key:016x}" for name, key in self.keys.items()}
        return json.dumps(
            {
                "format": 1,
                "registrations": registrations,
                "type": None if self.type is None else int(self.type),
                "holder": None if self.holder is None else f"{self.holder:016x}",
            },
            indent=1,
        ).encode()

    @staticmethod
    def write(path: Path, content: bytes | None) -> None:
        """Put a snapshot where it outlives power loss. OSError: it may not. It blocks: not for the control thread."""
        if content is None:
            path.unlink(missing_ok=True)
        else:
            new = path.with_name(path.name + ".new")
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _load(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        try:
            kept = json.loads(content)
            if kept["format"] != 1:
                raise ValueError(f"format {kept['format']!r}, known is 1")
            keys = {int(name, 16): int(key, 16) for name, key in kept["registrations"].items()}
            kind = None if kept["type"] is None else Type(kept["type"])
            holder = None if kept["holder"] is None else int(kept["holder"], 16)
            if kind is not None and kind not in _ALL_REGISTRANTS and holder not in keys:
                raise ValueError("its holder isn't registered")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not a file of persistent reservations: {error}") from error
        self.keys, self.type, self.holder, self.aptpl = keys, kind, holder, True
