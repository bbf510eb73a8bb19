"""Live migration of a QEMU guest to another QEMU on this machine, in steps that a program can look between.

Source: QEMU's docs/devel/migration.rst and qapi/migration.json (7.2). Promises: memory is passed by QEMU's own
precopy; the source keeps its state until it is stopped, the destination is left paused until `resume`, so that
the memory of both can be compared. Never: changes what either is made of, or ends the source.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pyvhost.cli.guests.base import GuestError
from pyvhost.cli.guests.qemu import QemuGuest

PAGE = 4096
#: Bytes per second that are as many as the machine can pass.
UNLIMITED = 1 << 40
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Passed:
    """What QEMU says of a migration that has completed."""

    passes: int  # how often the dirty log was harvested
    bytes: int
    downtime: float  # seconds


class Migration:
    """`source`'s guest on its way into `destination`, which was made by `source.twin` and launched.

    GuestError from every method: QEMU refused or failed, or did not come so far within `timeout` seconds.
    """

    def __init__(self, source: QemuGuest, destination: QemuGuest, *, timeout: float = 60.0) -> None:
        self.source = source
        self.destination = destination
        self.timeout = timeout

    def start(self, *, bandwidth: int = UNLIMITED, downtime: float = 0.3) -> None:
        """Begin to pass memory, at most `bandwidth` bytes a second.

        When what is left takes no longer than `downtime` seconds the source stops and the rest follows.
        """
        capabilities = [{"capability": "events", "state": True}]
        path = self.destination.incoming_path
        for guest in (self.destination, self.source):
            guest.execute("migrate-set-capabilities", capabilities=capabilities)
        self.destination.execute("migrate-incoming", uri=f"unix:{path}")
        self.limit(bandwidth, downtime)
        self.source.qmp.forget_events("MIGRATION", "MIGRATION_PASS", "STOP")
        self.source.execute("migrate", uri=f"unix:{path}")

    def limit(self, bandwidth: int, downtime: float = 0.3) -> None:
        """Other limits, also while it is under way."""
        milliseconds = round(downtime * 1000)
        self.source.execute("migrate-set-parameters", max_bandwidth=bandwidth, downtime_limit=milliseconds)

    def wait_pass(self, number: int) -> None:
        """Wait until memory is gone over for the `number`th time (the first is 1): the dirty log is in use."""
        self.source.wait_event("MIGRATION_PASS", lambda data: data["pass"] >= number, self.timeout)

    def wait_completed(self) -> Passed:
        """Wait until both have all: the source is stopped for good, the destination paused."""
        for guest in (self.source, self.destination):
            found = guest.wait_event("MIGRATION", lambda data: data["status"] in _ENDS, self.timeout)
            if found["status"] != "completed":
                told = guest.execute("query-migrate")
                raise GuestError(f"{guest.name}'s migration {found['status']}: {told}")
        told = self.source.execute("query-migrate")
        ram = told["ram"]
        return Passed(ram["dirty-sync-count"], ram["transferred"], told["downtime"] / 1000)

    def cancel(self) -> None:
        """Call it off; the source runs on, the destination's QEMU ends."""
        self.source.execute("migrate_cancel")
        self.source.wait_event("MIGRATION", lambda data: data["status"] == "cancelled", self.timeout)

    def resume(self) -> None:
        """Let the guest go on at its new place, where it takes commands from now on."""
        self.destination.execute("cont")
        self.destination.take_over(self.source)


_ENDS = ("completed", "failed", "cancelled")


def differing_pages(one: QemuGuest, other: QemuGuest) -> list[int]:
    """The addresses of the pages in which the two guests' RAM differs, as offsets into their memory files."""
    first, second = memory_file(one), memory_file(other)
    try:
        size = os.fstat(first).st_size
        if os.fstat(second).st_size != size:
            raise GuestError(f"{one.name} and {other.name} have different amounts of memory")
        found = []
        for start in range(0, size, _CHUNK):
            mine, theirs = os.pread(first, _CHUNK, start), os.pread(second, _CHUNK, start)
            if mine == theirs:
                continue
            for page in range(0, len(mine), PAGE):
                if mine[page : page + PAGE] != theirs[page : page + PAGE]:
                    found.append(start + page)
        return found
    finally:
        os.close(first)
        os.close(second)


def memory_file(guest: QemuGuest) -> int:
    """A descriptor of the file that a running guest's RAM is, for reading. The caller closes it."""
    folder = f"/proc/{guest.pid}/fd"
    for name in os.listdir(folder):
        if os.readlink(f"{folder}/{name}").startswith("/memfd:memory-backend-memfd"):
            return os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    raise GuestError(f"{guest.name} has no memory file")
