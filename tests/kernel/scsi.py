"""The recorded experiments with SCSI, and where their facts are to be others here."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from kernel import experiment as net
from kernel.meant import ANY, SOME
from kernel.scsi_bench import DATA, FILL, HEADER, RESPONSE, TARGET, WRITE, Fact, ScsiBench, told_sense
from pyvhost.abi import virtio
from pyvhost.abi import virtio_scsi as abi
from pyvhost.driver import cdb
from pyvhost.driver.scsi_command import REPORT_LUNS, address

EXPERIMENTS: dict[str, Callable[[ScsiBench], None]] = {}


def experiment(name: str) -> Callable[[Callable[[ScsiBench], None]], Callable[[ScsiBench], None]]:
    """Put a function on the list."""

    def put(function: Callable[[ScsiBench], None]) -> Callable[[ScsiBench], None]:
        EXPERIMENTS[name] = function
        return function

    return put


@experiment("scsi/commands")
def commands(bench: ScsiBench) -> None:
    """What a disk is asked for."""
    bench.fact("rings", lambda: [ring.state() for ring in bench.rings])
    bench.command("TEST UNIT READY", cdb.test_unit_ready())
    bench.command("TEST UNIT READY again", cdb.test_unit_ready())
    bench.command("INQUIRY", cdb.inquiry(64), room=64)
    bench.command("READ CAPACITY(10)", cdb.read_capacity10(), room=8)
    data = bytes(range(256)) * 2
    bench.command("WRITE(10) lba 3", cdb.write10(3, 1), data)
    bench.command("READ(10) lba 3", cdb.read10(3, 1), room=512)
    bench.fact("read back equal", lambda: bench.memory.read(DATA, 512) == data)
    bench.command("READ past the end", cdb.read10(8192, 1), room=512)
    bench.command("unknown opcode 0xff", b"\xff" + bytes(15))
    bench.command("READ with a buffer that is too small", cdb.read10(3, 2), room=512)
    bench.command("READ with a buffer that is too big", cdb.read10(3, 1), room=1024)
    bench.command("REPORT LUNS", cdb.report_luns(32), room=32)
    bench.fact("state", bench.request.state)


@experiment("scsi/addressing")
def addressing(bench: ScsiBench) -> None:
    """Whom a request is for."""
    for name, lun in (
        ("target 0 (not there)", address(0)),
        ("target 255", address(255)),
        ("lun 1 (not there)", address(TARGET, 1)),
        ("lun 0 written as 00 00", address(TARGET, 0, peripheral=True)),
        ("first byte 0", b"\0" + address(TARGET)[1:]),
        ("first byte 2", b"\2" + address(TARGET)[1:]),
        ("well-known REPORT LUNS", REPORT_LUNS),
    ):
        bench.command(name, cdb.inquiry(36), room=36, lun=lun, counted=True)


@experiment("scsi/malformed")
def malformed(bench: ScsiBench) -> None:
    """Requests that are none."""

    def found() -> dict[str, object]:
        told = bench.memory.read(RESPONSE + 11, 1)[0]
        return {"used": bench.request.used(), "state": bench.request.state(), "response_byte": told}

    def offer(name: str, *pieces: tuple[int, int, int], head: int | None = None) -> None:
        bench.lay(cdb.test_unit_ready())
        bench.request.chain(*pieces, head=head)
        bench.fact(name, found)
        bench.set_up()

    size = bench.format.response_size
    offer("request of 50 bytes", (HEADER, 50, 0), (RESPONSE, size, WRITE))
    offer("response of 107 bytes", (HEADER, 51, 0), (RESPONSE, 107, WRITE))
    offer("no response", (HEADER, 51, 0))
    parts = [(HEADER, 8, 0), (HEADER + 8, 11, 0), (HEADER + 19, 32, 0)]
    offer(
        "request in 3 parts, response in 2", *parts, (RESPONSE, 12, WRITE), (RESPONSE + 12, size - 12, WRITE)
    )
    offer("head out of range", (HEADER, 51, 0), (RESPONSE, size, WRITE), head=16)


@experiment("scsi/control")
def control(bench: ScsiBench) -> None:
    """Task management, and notification."""
    for subtype in range(9):
        bench.tmf(f"TMF subtype {subtype}", subtype)
    bench.an("AN query", abi.T_AN_QUERY)
    bench.an("AN subscribe", abi.T_AN_SUBSCRIBE)
    bench.tmf("TMF to a target that is not there", abi.T_TMF_LOGICAL_UNIT_RESET, address(9))
    bench.ask("unknown type 9", (9).to_bytes(4, "little") + bytes(20), 1)


@experiment("scsi/events")
def events(bench: ScsiBench) -> None:
    """Disks that come and go."""
    bench.set_up(1 << virtio.F_VERSION_1 | 1 << abi.F_HOTPLUG)
    ring = bench.event

    def buffer(number: int) -> None:
        bench.memory.write(DATA + 64 * number, bytes([FILL]) * 16)
        ring.chain((DATA + 64 * number, 16, WRITE), at=number)

    def used(name: str) -> None:
        bench.fact(name, ring.used)
        ring.told()

    def content(name: str, number: int) -> None:
        bench.fact(name, lambda: bench.memory.read(DATA + 64 * number, 16).hex())

    buffer(0)
    buffer(1)
    bench.endpoint.add_lun(TARGET, 5, "memory:1M")
    used("LUN 5 came: used")
    content("event bytes (event, lun[8], reason)", 0)
    bench.endpoint.remove_lun(TARGET, 5)
    used("LUN 5 went: used")
    content("event bytes", 1)
    bench.endpoint.add_lun(TARGET, 5, "memory:1M")
    used("came again, no buffer: used")
    bench.fact("GET_EVENTS_MISSED", lambda: int(bench.front.get_events_missed()))
    buffer(2)
    used("a buffer: used")
    content("event bytes", 2)
    bench.fact("GET_EVENTS_MISSED", lambda: int(bench.front.get_events_missed()))
    bench.fact("state", ring.state)


# --- what is to be found ----------------------------------------------------------------------------------------


def recorded() -> dict[str, list[Fact]]:
    """What Linux does, in the words that the bench has for it."""
    found = json.loads(net.RECORDED.read_text())["experiments"]
    return {
        entry["name"]: [(name, in_words(value)) for name, value in entry["facts"]]
        for entry in found
        if entry["device"] == "vhost-scsi"
    }


def in_words(value: Any) -> Any:
    """A recorded value without what differs between any two disks."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [head for head, _ in value]
    if not isinstance(value, dict):
        return value
    value = {key: value[key] for key in value if key not in ("sense_len", "status_qualifier")}
    if "used" in value:
        value["used"] = [head for head, _ in value["used"]]
    if "sense" in value:
        value["sense"] = told_sense(bytes.fromhex(value["sense"]))
        if value["status"] or value["response"]:
            # What lay there before.
            value["data"] = ""
    return value


_STOPPED = {
    "used": [],
    "state": {"used_idx": 0, "used_flags": ANY, "avail_event": 0, "base": 0, "calls": 0, "errs": SOME},
    "response_byte": FILL,
}


def _standard(device: str, product: str) -> str:
    """The first 36 bytes of standard INQUIRY data: nothing's, or a well known unit's."""
    return device + "00063245000002" + f"{'PYVHOST':8}{product:16}{'1':4}".encode().hex()


#: Name of the difference, experiment, and what is found there instead: by the fact's place; of a dictionary, some
#: entries.
CHANGES: list[tuple[str, str, dict[int, Any]]] = [
    ("unit-attention", "scsi/commands", {1: {"status": 2, "sense": [6, 0x29, 0]}}),
    ("inquiry", "scsi/commands", {3: {"data": ANY}}),
    ("inquiry", "scsi/addressing", {3: {"data": ANY}}),
    ("residual", "scsi/commands", {8: {"resid": 512}}),
    ("overrun", "scsi/commands", {10: {"status": 0, "sense": [], "response": abi.S_OVERRUN}}),
    ("incorrect-lun", "scsi/addressing", {2: {"status": 0, "sense": [], "data": _standard("7f", "TARGET")}}),
    ("bad-lun", "scsi/addressing", {4: {"errs": 0}, 5: {"errs": 0}}),
    ("well-known", "scsi/addressing", {6: {"response": 0, "errs": 0, "data": _standard("1e", "TARGET")}}),
    ("short-request", "scsi/malformed", {0: _STOPPED, 1: _STOPPED, 2: _STOPPED}),
    ("stopped-flags", "scsi/malformed", {4: _STOPPED}),
    (
        "functions",
        "scsi/control",
        {**{place: {"response": "00"} for place in range(8)}, 11: {"response": "03"}},
    ),
    ("functions", "scsi/control", {12: {"used": [0], "response": "0b", "errs": 0, "calls": 1}}),
]


def meant(name: str, facts: list[Fact]) -> list[Fact]:
    """The facts that are expected here, where Linux's are these."""
    found = list(facts)
    for _, where, changes in CHANGES:
        for place, change in changes.items() if where == name else ():
            fact, value = found[place]
            changed = {**value, **change} if isinstance(value, dict) and isinstance(change, dict) else change
            found[place] = (fact, changed)
    return found


def run(name: str, expected: list[Fact]) -> list[Fact]:
    """The facts as they are found, where these are expected."""
    with ScsiBench(expected) as bench:
        EXPERIMENTS[name](bench)
        return bench.facts
