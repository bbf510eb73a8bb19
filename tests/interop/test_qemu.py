"""QEMU 7.2 with Debian's stock kernel, unmodified and emulated, against `pyvhost net`: many queues, PCI, hotplug.

One guest with three cards (one queue pair and four on taps, one on a switch with a UML guest) goes through it all;
as root the taps are in a network of the tests' own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop import exchange
from interop.conftest import Card, Ip, Served, eventually
from interop.exchange import Digests, Listener
from pyvhost.cli.guests import Guest, Kernel, Nic, QemuGuest, UmlGuest
from requirements import need_program, need_root

SIZE = 2 << 20
ONE, FOUR, SWITCH = 0, 1, 2
HOST = {ONE: "10.1.0.1", FOUR: "10.2.0.1", SWITCH: "10.3.0.1"}
GUEST = {ONE: "10.1.0.2", FOUR: "10.2.0.2", SWITCH: "10.3.0.2"}


class World:
    """The guest, the UML at the far end of its switch, and what serves them."""

    def __init__(self, served: Served, kernel: Kernel, ip: Ip | None) -> None:
        self.served = served
        self.ip = ip
        self.cards: dict[int, Card] = {}
        if ip is not None:
            (self.cards[ONE],) = served.start("one", "tap:vm1")
            (self.cards[FOUR],) = served.start("four", "tap:vm4", "--queue-pairs", "4")
        self.cards[SWITCH], far = served.start("switch", "switch:lan", sockets=2)
        served.wait()
        if ip is not None:
            self.set_up_taps()
        pairs = {FOUR: 4}
        nics = [Nic(card.socket, queue_pairs=pairs.get(number, 1)) for number, card in self.cards.items()]
        self.guest = QemuGuest(nics, kernel=kernel, name="the guest", reconnect=1)
        self.far = UmlGuest([far.socket], name="the far guest")

    def set_up_taps(self) -> None:
        assert self.ip is not None
        for number, name in ((ONE, "vm1"), (FOUR, "vm4")):
            self.ip(f"address add {HOST[number]}/24 dev {name}")
            self.ip(f"link set {name} up")

    def start(self) -> None:
        self.guest.launch()
        self.far.launch()
        self.far.wait_booted()
        self.far.run("ip address add 10.3.0.1/24 dev eth0 && ip link set eth0 up")
        self.guest.wait_booted(120)
        self.set_up()

    def set_up(self) -> None:
        """Addresses, as after each boot."""
        for number in self.cards:
            self.up(number)

    def up(self, number: int) -> None:
        """An address for a card that has none yet."""
        interface = self.interface(number)
        self.guest.run(f"ip address add {GUEST[number]}/24 dev {interface}; ip link set {interface} up")

    def interface(self, number: int) -> str:
        """The guest's name for a card, by its address."""
        mac = self.guest.nics[list(self.cards).index(number)].address
        return self.guest.run(f"cd /sys/class/net && grep -l {mac} */address").output.partition("/")[0]


@pytest.fixture(scope="module")
def world(kernel: Kernel, served: Served, ip: Ip | None) -> Iterator[World]:
    need_program("linux.uml", package="user-mode-linux")
    found = World(served, kernel, ip)
    try:
        found.start()
        yield found
    finally:
        found.guest.stop()
        found.far.stop()


@pytest.fixture
def guest(world: World) -> QemuGuest:
    return world.guest


def through(guest: Guest, host: str) -> None:
    """Files over TCP, from the guest to the host and back, each whole at the other end."""
    listener = Listener(host, 0)
    sent = guest.run(
        f"dd if=/dev/urandom of=/tmp/sent bs={SIZE} count=1 2>/dev/null; nc {host} {listener.port} </tmp/sent;"
        " sha256sum </tmp/sent",
        timeout=60,
    ).output
    assert listener.digests().received == sent.split()[0]
    listener = Listener(host, SIZE)
    # nc leaves when its input ends: that of this one does not.
    received = guest.run(
        f"mkfifo /tmp/never 2>/dev/null; nc {host} {listener.port} <>/tmp/never | sha256sum", timeout=60
    ).output
    assert listener.digests().sent == received.split()[0]


def iperf3(guest: Guest, host: str, options: str) -> str:
    """What the guest's iperf3 says of a run against the host's."""
    program = need_program("iperf3")
    server = subprocess.Popen(
        [program, "-s", "-1", "-B", host, "--forceflush"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        while "listening" not in (line := server.stdout.readline()):
            assert server.poll() is None, line
        said = guest.run(f"iperf3 -c {host} -t 1 {options}", timeout=60).output
    finally:
        server.kill()
        server.communicate()
    amounts = re.findall(r"([\d.]+) [KMG]?Bytes .*receiver", said)
    assert amounts, said
    assert all(float(amount) > 0 for amount in amounts), said
    return said


def to_the_far_guest(world: World) -> None:
    """A file through the switch, from an emulated guest to UML."""
    world.guest.run("ping -c 1 10.3.0.1")
    world.far.run([sys.executable, "-I", str(Path(exchange.__file__)), "listen", "7007", "0"])
    sent = world.guest.run(
        f"dd if=/dev/urandom of=/tmp/sent bs={SIZE} count=1 2>/dev/null; nc 10.3.0.1 7007 </tmp/sent;"
        " sha256sum </tmp/sent",
        timeout=60,
    ).output
    assert Digests.parse(world.far.run("cat $TMPDIR/exchanged").output).received == sent.split()[0]


# --- traffic ---------------------------------------------------------------------------------------------


def test_one_queue_pair_on_a_tap(guest: QemuGuest) -> None:
    need_root()
    guest.run("ping -c 2 10.1.0.1")
    through(guest, "10.1.0.1")


@pytest.mark.parametrize("options", ["", "-R", "-u -b 50M", "-u -b 50M -R"])
def test_iperf3_with_offloads(world: World, guest: QemuGuest, options: str) -> None:
    need_root()
    features = guest.run(f"ethtool -k {world.interface(ONE)}").output
    assert "tcp-segmentation-offload: on" in features, features
    iperf3(guest, "10.1.0.1", options)
    for protocol in ("Tcp", "Udp"):
        names, values = re.findall(rf"^{protocol}: (.*)$", guest.run("cat /proc/net/snmp").output, re.M)
        counted = dict(zip(names.split(), values.split(), strict=True))
        assert counted["InCsumErrors"] == "0", counted


def test_four_queue_pairs(world: World, guest: QemuGuest) -> None:
    """The driver uses as many as there are processors, and traffic of each goes its own way."""
    need_root()
    channels = guest.run(f"ethtool -l {world.interface(FOUR)}").output
    assert re.findall(r"Combined:\s+(\d+)", channels) == ["4", "4"], channels
    guest.run("ping -c 1 10.2.0.1")
    through(guest, "10.2.0.1")
    pinned = " & ".join(f"taskset {1 << cpu:x} ping -c 3 -i 0.2 10.2.0.1 >/dev/null" for cpu in range(4))
    guest.run(f"{pinned} & wait")
    for pair in range(4):
        assert world.cards[FOUR].counted(f"tx{pair}").get("packets") > 0, pair
    iperf3(guest, "10.2.0.1", "-P 4")
    received = [world.cards[FOUR].counted(f"rx{pair}").get("packets") for pair in range(4)]
    assert sum(count > 0 for count in received) > 1, received


def test_the_driver_changes_the_number_of_pairs(world: World, guest: QemuGuest) -> None:
    need_root()
    interface = world.interface(FOUR)
    for pairs in (1, 3, 4):
        guest.run(f"ethtool -L {interface} combined {pairs}")
        through(guest, "10.2.0.1")


def test_a_switch_with_another_kind_of_guest(world: World) -> None:
    to_the_far_guest(world)


# --- the machine's life ----------------------------------------------------------------------------------


def test_a_cable_out_and_in(world: World, guest: QemuGuest) -> None:
    interface = world.interface(SWITCH)
    for up, state in ((False, "0"), (True, "1")):
        guest.set_link(list(world.cards).index(SWITCH), up)
        guest.run(f"until [ $(cat /sys/class/net/{interface}/carrier) = {state} ]; do usleep 10000; done")
    to_the_far_guest(world)


def test_the_card_is_taken_out_and_put_in(world: World, guest: QemuGuest) -> None:
    """PCI hotplug: on the connection that there is, then with a new one."""
    number = list(world.cards).index(SWITCH)
    attached = len(attachments(world.cards[SWITCH]))
    guest.unplug(number)
    guest.plug(number)
    come_back(world, SWITCH)
    to_the_far_guest(world)
    assert len(attachments(world.cards[SWITCH])) == attached
    guest.unplug(number)
    guest.disconnect(number)
    guest.connect(number)
    guest.plug(number)
    come_back(world, SWITCH)
    to_the_far_guest(world)
    assert len(attachments(world.cards[SWITCH])) == attached + 1


def attachments(card: Card) -> list[str]:
    return [line for line in card.serving.lines if "attached" in line]


def come_back(world: World, number: int) -> None:
    """Wait for a card that was put in, and give it its address."""
    mac = world.guest.nics[list(world.cards).index(number)].address
    world.guest.run(f"until grep -q {mac} /sys/class/net/*/address; do usleep 20000; done")
    world.up(number)


def test_the_guest_reboots(world: World, guest: QemuGuest) -> None:
    guest.reboot(120)
    world.set_up()
    traffic_everywhere(world)


def test_the_machine_is_reset_under_load(world: World, guest: QemuGuest) -> None:
    """No driver says goodbye: QEMU stops the rings while they carry traffic."""
    number = FOUR if world.ip is not None else SWITCH
    guest.run(f"ping -f -q {HOST[number]} >/dev/null 2>&1 &", timeout=5)
    guest.reset(120)
    world.set_up()
    traffic_everywhere(world)


def traffic_everywhere(world: World) -> None:
    to_the_far_guest(world)
    if world.ip is not None:
        through(world.guest, "10.1.0.1")
        through(world.guest, "10.2.0.1")


def test_the_back_end_goes_and_comes_back(world: World, guest: QemuGuest) -> None:
    """QEMU dials again; the guest knows nothing of it, but that frames were lost meanwhile."""
    need_root()
    old = world.cards[ONE]
    world.served.end(old.serving)
    (world.cards[ONE],) = world.served.start("one", "tap:vm1")
    world.served.wait()
    assert world.ip is not None
    world.ip("address replace 10.1.0.1/24 dev vm1")
    world.ip("link set vm1 up")
    # It dials once a second.
    eventually(lambda: attachments(world.cards[ONE]))
    guest.run("until ping -c 1 -W 1 10.1.0.1 >/dev/null; do :; done")
    through(guest, "10.1.0.1")


def test_the_guest_goes_for_good(world: World, guest: QemuGuest) -> None:
    assert guest.power_off() == 0
    # Nothing serves it any more, and the switch goes on without it.
    world.far.run("ip link show dev eth0 | grep -q LOWER_UP")
