"""QEMU with an emulated Intel IOMMU, Debian's stock kernel behind it, against `pyvhost net`.

In strict mode whatever the guest's driver hands to a card is mapped just before and unmapped just after: the card's
back end has to ask for every page and to forget it when told. In lazy mode all is forgotten at once, every 10 ms.
What is said about it over vhost-user is read from the trace. An
access that the IOMMU does not allow would be told by QEMU and by the guest's kernel; one to a page that is no
longer mapped would go to what has taken its place, and spoil what is transferred or read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from interop.conftest import Card, Ip, Served, eventually
from interop.transfer import through
from pyvhost.abi import virtio
from pyvhost.cli.guests import Kernel, Nic, QemuGuest
from requirements import need_program, need_root

# A page is asked for anew for almost every packet: it takes a while.
SIZE = 1 << 18
PAGE = 4096
PLATFORM = "disable-legacy=on,iommu_platform=on"
#: One has ATS, for which it has to be at a port of PCI Express's: the guest tells it itself of what it forgets. For
#: the other QEMU 7.2 finds out what was unmapped; in lazy mode it misses what was mapped for a short time.
PLACES = {"one": "ats=on,bus=root0", "large": "bus=root1"}
#: The guest is .2 and the host .1 of 10.N.0.0/24.
NETWORKS = {"one": 1, "large": 2}


class Trace:
    """What a serving process says of its IOTLB messages, as they come and go."""

    LINE = re.compile(
        r"(?:request|front end): IOTLB_MSG (?:need_reply )?([A-Z_]+) iova=(\w+)(?: size=(\w+))?"
    )

    def __init__(self) -> None:
        self.said: list[tuple[str, int, int]] = []

    def __call__(self, line: str) -> None:
        if found := self.LINE.search(line):
            self.said.append((found[1], int(found[2], 16), int(found[3] or "1", 16)))

    def count(self) -> Counter[str]:
        """How many messages of each type."""
        return Counter(kind for kind, _, _ in self.said)

    def flushes(self) -> int:
        """How often all was forgotten: QEMU's address space is in two parts, each of more than the guest's memory."""
        return sum(kind == "INVALIDATE" and size >= 1 << 30 for kind, _, size in list(self.said))

    def wait_more(self, before: Counter[str], number: int) -> None:
        """Wait until so many more of each type have been said since then."""
        kinds = ("MISS", "UPDATE", "INVALIDATE")
        eventually(lambda: all(self.count()[kind] >= before[kind] + number for kind in kinds))

    def asked_again(self) -> int:
        """How often a page was asked for, after it had been mapped and unmapped."""
        mapped: set[int] = set()
        unmapped: set[int] = set()
        again = 0
        for kind, iova, size in list(self.said):
            pages = range(iova // PAGE, (iova + size + PAGE - 1) // PAGE)
            if kind == "UPDATE":
                mapped.update(pages)
            elif kind == "INVALIDATE":
                # All of the address space at once is said in one message.
                gone = {page for page in mapped if page in pages}
                mapped -= gone
                unmapped |= gone
            elif kind == "MISS" and iova // PAGE in unmapped and iova // PAGE not in mapped:
                unmapped.discard(iova // PAGE)
                again += 1
        return again


class World:
    """The guest, and two cards of it on taps of the host: one with ATS, and one with large rings."""

    def __init__(self, served: Served, kernel: Kernel, ip: Ip) -> None:
        self.traces = {name: Trace() for name in NETWORKS}
        self.cards: dict[str, Card] = {}
        options = {"one": [], "large": ["--queue-pairs", "2"]}
        for name, trace in self.traces.items():
            options[name] += ["--log-level", "trace"]
            (self.cards[name],) = served.start(name, f"tap:{name}", *options[name], on_line=trace)
        served.wait()
        for name, network in NETWORKS.items():
            ip(f"address add 10.{network}.0.1/24 dev {name}")
            ip(f"link set {name} up")
        nics = [
            Nic(self.cards["one"].socket, options=f"{PLATFORM},{PLACES['one']}"),
            Nic(
                self.cards["large"].socket,
                queue_pairs=2,
                options=f"{PLATFORM},{PLACES['large']},rx_queue_size=1024,tx_queue_size=1024",
            ),
        ]
        self.guest = QemuGuest(
            nics,
            kernel=kernel,
            name="the guest",
            cpus=1,
            machine="q35",
            # It has to be there before the cards.
            devices=[
                "intel-iommu,intremap=off,device-iotlb=on",
                *(f"pcie-root-port,id=root{slot},slot={slot}" for slot in range(len(PLACES))),
            ],
            kernel_arguments="intel_iommu=on iommu.strict=1",
        )

    def set_up(self) -> None:
        """Addresses, as after each boot."""
        self.up("one")
        self.guest.run("ethtool -L eth1 combined 2")
        self.up("large")

    def up(self, name: str) -> None:
        """An address for a card that has none yet, and a first packet each way."""
        interface = f"eth{list(NETWORKS).index(name)}"
        address = f"10.{NETWORKS[name]}.0"
        self.guest.run(
            f"ip address add {address}.2/24 dev {interface}; ip link set {interface} up; ping -c 1 {address}.1"
        )


@pytest.fixture(scope="module")
def world(kernel: Kernel, served: Served, ip: Ip | None) -> Iterator[World]:
    need_root()
    need_program("ethtool")
    assert ip is not None
    found = World(served, kernel, ip)
    try:
        found.guest.start(120)
        found.set_up()
        yield found
    finally:
        found.guest.stop()


@pytest.fixture(autouse=True)
def nothing_is_refused(world: World) -> Iterator[None]:
    """Whatever a test does, no access is outside of what is mapped at the time, and no ring is found broken."""
    yield
    told = [line for line in world.guest.console if re.search(r"DMAR: \[|vtd_|Fail to lookup", line)]
    assert not told, told
    for name, card in world.cards.items():
        assert not world.traces[name].count()["ACCESS_FAIL"]
        for queue in ("rx0", "tx0"):
            assert card.counted(queue).get("faults") == 0, (name, queue)


# --- the tests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_driver_goes_through_the_iommu(world: World, name: str) -> None:
    device = f"/sys/class/net/eth{list(NETWORKS).index(name)}/device"
    said = world.guest.run(f"cat {device}/features; cat {group(name)}/type").output
    features, domain = said.split()
    assert features[virtio.F_ACCESS_PLATFORM] == "1"
    assert domain == "DMA"  # strict: a lazy one is DMA-FQ


def group(name: str) -> str:
    """The folder of a card's IOMMU group in the guest."""
    return f"$(readlink -f /sys/class/net/eth{list(NETWORKS).index(name)}/device/..)/iommu_group"


@contextmanager
def churn(guest: QemuGuest) -> Iterator[None]:
    """The guest's pages change hands all the time, and what is in them is looked at.

    A card that still reached what a ring's buffer has been would spoil a file that has taken its place.
    """
    script = """
        touch churning
        dd if=/dev/urandom of=good bs=1M count=2 2>/dev/null
        good=$(md5sum <good)
        while [ -e churning ]; do
            cp good copy
            [ "$(md5sum <copy)" = "$good" ] || cp copy spoilt
            rm copy
        done
        rm good
        touch churned
    """
    guest.run(f"cd /tmp; ({script}) >/dev/null 2>&1 &")
    yield
    guest.run(
        "cd /tmp; rm churning; until [ -e churned ]; do usleep 20000; done; rm churned; [ ! -e spoilt ]"
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_files(world: World, name: str) -> None:
    """Under constant map and unmap. What was unmapped and is mapped anew is asked for anew."""
    trace = world.traces[name]
    before = trace.count()
    again = trace.asked_again()
    with churn(world.guest):
        through(world.guest, f"10.{NETWORKS[name]}.0.1", SIZE)
    trace.wait_more(before, SIZE // PAGE // 4)
    assert trace.asked_again() > again


def test_both_at_once(world: World) -> None:
    """Packets of two cards, and of two queue pairs, in flight while others are mapped and unmapped."""
    asking = [
        f"ping -A -q -c 200 -s {size} 10.{network}.0.1 >/tmp/pings{number}"
        for number, (network, size) in enumerate(((1, 56), (1, 1400), (2, 56), (2, 1400)))
    ]
    with churn(world.guest):
        said = world.guest.run(f"{' & '.join(asking)} & wait; cat /tmp/pings*", timeout=60).output
    assert said.count(" 200 packets received, 0% packet loss") == 4, said


def test_the_driver_leaves_and_comes_back(world: World) -> None:
    """All that it had mapped is unmapped, under load; what it maps then is asked for, rings and buffers."""
    guest, trace = world.guest, world.traces["large"]
    guest.run("ping -A -q -s 1400 10.2.0.1 >/dev/null 2>&1 & echo $! >/tmp/pinging")
    device = guest.run("basename $(readlink -f /sys/class/net/eth1/device)").output.strip()
    for _ in range(3):
        before = trace.count()
        guest.run(
            f"cd /sys/bus/virtio/drivers/virtio_net; echo {device} >unbind; echo {device} >bind;"
            "until [ -e /sys/class/net/eth1 ]; do usleep 10000; done; ethtool -L eth1 combined 2"
        )
        world.up("large")
        trace.wait_more(before, 1)
    # It gave up when its card had gone.
    guest.run("kill $(cat /tmp/pinging)", check=False)
    through(guest, "10.2.0.1", SIZE)


def test_lazily(world: World) -> None:
    """What was unmapped may be used until the next flush, which takes the rings' own pages away as well."""
    trace = world.traces["one"]
    world.guest.run(f"echo DMA-FQ >{group('one')}/type")
    before, flushed = trace.count(), trace.flushes()
    with churn(world.guest):
        through(world.guest, "10.1.0.1", SIZE)
    trace.wait_more(before, SIZE // PAGE // 4)
    assert trace.flushes() > flushed


def test_the_machine_is_reset_under_load(world: World) -> None:
    """The IOMMU loses all it knew, with the rings at work; firmware and kernel start without it."""
    world.guest.run("ping -A -q -s 1400 10.1.0.1 >/dev/null 2>&1 &")
    world.guest.reset(120)
    world.set_up()
    for network in NETWORKS.values():
        through(world.guest, f"10.{network}.0.1", SIZE)
