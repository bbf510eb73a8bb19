"""QEMU 7.2 with Debian's stock kernel, unmodified and emulated, against `pyvhost net`: many queues, PCI, hotplug.

One guest with a card for each backend goes through it all; a UML guest is at the far end of its switch and its
stream. As root the host's ends are in a network of the tests' own; without root what needs it is left out.
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
from interop.exchange import Digests
from interop.transfer import SEND, through
from pyvhost.cli.guests import Guest, Kernel, Nic, QemuGuest, UmlGuest
from requirements import need_program, need_root

SIZE = 2 << 20
# Debian's passt hangs on long transfers now and then, with QEMU's own card as well.
LITTLE = 30_000
#: The guest is .2, the other end .1 of 10.N.0.0/24.
NETWORKS = {"one": 1, "four": 2, "switch": 3, "packet": 4, "stream": 5, "user": 99}
PAIRS = {"four": 4}


class World:
    """The guest, the UML at the far end of its switch and its stream, and what serves them."""

    def __init__(self, served: Served, kernel: Kernel, ip: Ip | None) -> None:
        self.served = served
        self.ip = ip
        self.cards: dict[str, Card] = {}
        if ip is not None:
            ip("link add out type veth peer name nowhere")
            ip("address add 10.99.0.2/24 dev out")
            ip("link set out up")
            ip("link set nowhere up")
            ip("route add default via 10.99.0.1")
            ip("link add veth0 type veth peer name veth1")
            ip("link set veth0 up")
            ip("link set veth1 up")
            ip("address add 10.4.0.1/24 dev veth1")
            (self.cards["one"],) = served.start("one", "tap:vm1")
            (self.cards["four"],) = served.start("four", "tap:vm4", "--queue-pairs", "4")
            (self.cards["packet"],) = served.start("packet", "packet:veth0")
        self.cards["switch"], far_switch = served.start("switch", "switch:lan", sockets=2)
        peer = served.folder / "peer"
        (self.cards["stream"],) = served.start("stream", f"stream:{peer}")
        (far_stream,) = served.start("far-stream", f"stream:{peer}")
        addresses = "address=10.99.0.2,netmask=255.255.255.0,gateway=10.99.0.1"
        (self.cards["user"],) = served.start("user", f"user,{addresses}")
        for name, backend in (("loop", "loop"), ("null", "null"), ("generate", "generate:200,count=2000")):
            (self.cards[name],) = served.start(name, backend)
        served.wait()
        if ip is not None:
            for name, interface in (("one", "vm1"), ("four", "vm4")):
                ip(f"address add {host(name)}/24 dev {interface}")
                ip(f"link set {interface} up")
        nics = [Nic(card.socket, queue_pairs=PAIRS.get(name, 1)) for name, card in self.cards.items()]
        self.guest = QemuGuest(nics, kernel=kernel, name="the guest", reconnect=1)
        self.far = UmlGuest([far_switch.socket, far_stream.socket], name="the far guest")

    def start(self) -> None:
        self.guest.launch()
        self.far.launch()
        self.far.wait_booted()
        for number, name in enumerate(("switch", "stream")):
            self.far.run(f"ip address add {host(name)}/24 dev eth{number} && ip link set eth{number} up")
        self.guest.wait_booted(120)
        self.set_up()

    def set_up(self) -> None:
        """Addresses, as after each boot."""
        for name in self.cards:
            if name in NETWORKS:
                self.up(name)

    def up(self, name: str) -> None:
        """An address for a card that has none yet."""
        interface = self.interface(name)
        self.guest.run(
            f"ip address add 10.{NETWORKS[name]}.0.2/24 dev {interface}; ip link set {interface} up"
        )

    def number(self, name: str) -> int:
        """Which of the guest's NICs it is."""
        return list(self.cards).index(name)

    def mac(self, name: str) -> str:
        return self.guest.nics[self.number(name)].address

    def interface(self, name: str) -> str:
        """The guest's name for a card, by its address."""
        return self.guest.run(f"cd /sys/class/net && grep -l {self.mac(name)} */address").output.partition(
            "/"
        )[0]

    def statistic(self, name: str, what: str) -> int:
        """What the guest's kernel counts at a card."""
        return int(self.guest.run(f"cat /sys/class/net/{self.interface(name)}/statistics/{what}").output)


def host(name: str) -> str:
    """The address at the other end of a card."""
    return f"10.{NETWORKS[name]}.0.1"


@pytest.fixture(scope="module")
def world(kernel: Kernel, served: Served, ip: Ip | None) -> Iterator[World]:
    need_program("linux.uml", package="user-mode-linux")
    need_program("passt")
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


def iperf3(guest: Guest, address: str, options: str) -> str:
    """What the guest's iperf3 says of a run against the host's."""
    program = need_program("iperf3")
    server = subprocess.Popen(
        [program, "-s", "-1", "-B", address, "--forceflush"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        while "listening" not in (line := server.stdout.readline()):
            assert server.poll() is None, line
        said = guest.run(f"iperf3 -c {address} -t 1 {options}", timeout=60).output
    finally:
        server.kill()
        server.communicate()
    amounts = re.findall(r"([\d.]+) [KMG]?Bytes .*receiver", said)
    assert amounts, said
    assert all(float(amount) > 0 for amount in amounts), said
    return said


def to_the_far_guest(world: World, name: str = "switch") -> None:
    """A file from an emulated guest to UML."""
    world.guest.run(f"ping -c 1 {host(name)}")
    world.far.run([sys.executable, "-I", str(Path(exchange.__file__)), "listen", "7007", "0"])
    sent = world.guest.run(SEND.format(size=SIZE, address=host(name), port=7007), timeout=60).output
    assert Digests.parse(world.far.run("cat $TMPDIR/exchanged").output).received == sent.split()[0]


# --- traffic ---------------------------------------------------------------------------------------------


def test_one_queue_pair_on_a_tap(guest: QemuGuest) -> None:
    need_root()
    guest.run("ping -c 2 10.1.0.1")
    through(guest, "10.1.0.1", SIZE)


@pytest.mark.parametrize("options", ["", "-R", "-u -b 50M", "-u -b 50M -R"])
def test_iperf3_with_offloads(world: World, guest: QemuGuest, options: str) -> None:
    need_root()
    features = guest.run(f"ethtool -k {world.interface('one')}").output
    assert "tcp-segmentation-offload: on" in features, features
    iperf3(guest, "10.1.0.1", options)
    for protocol in ("Tcp", "Udp"):
        names, values = re.findall(rf"^{protocol}: (.*)$", guest.run("cat /proc/net/snmp").output, re.M)
        counted = dict(zip(names.split(), values.split(), strict=True))
        assert counted["InCsumErrors"] == "0", counted


def test_four_queue_pairs(world: World, guest: QemuGuest) -> None:
    """The driver uses as many as there are processors, and traffic of each goes its own way."""
    need_root()
    channels = guest.run(f"ethtool -l {world.interface('four')}").output
    assert re.findall(r"Combined:\s+(\d+)", channels) == ["4", "4"], channels
    guest.run("ping -c 1 10.2.0.1")
    through(guest, "10.2.0.1", SIZE)
    pinned = " & ".join(f"taskset {1 << cpu:x} ping -c 3 -i 0.2 10.2.0.1 >/dev/null" for cpu in range(4))
    guest.run(f"{pinned} & wait")
    for pair in range(4):
        assert world.cards["four"].counted(f"tx{pair}").get("packets") > 0, pair
    iperf3(guest, "10.2.0.1", "-P 4")
    received = [world.cards["four"].counted(f"rx{pair}").get("packets") for pair in range(4)]
    assert sum(count > 0 for count in received) > 1, received


def test_the_driver_changes_the_number_of_pairs(world: World, guest: QemuGuest) -> None:
    need_root()
    interface = world.interface("four")
    for pairs in (1, 3, 4):
        guest.run(f"ethtool -L {interface} combined {pairs}")
        through(guest, "10.2.0.1", SIZE)


def test_packet(guest: QemuGuest) -> None:
    need_root()
    through(guest, host("packet"), SIZE)


def test_a_switch_with_another_kind_of_guest(world: World) -> None:
    to_the_far_guest(world)


def test_a_stream_to_another_kind_of_guest(world: World) -> None:
    to_the_far_guest(world, "stream")


def test_user(world: World, guest: QemuGuest) -> None:
    """The gateway leads to the host's loopback."""
    guest.run(f"ip route add default via 10.99.0.1 dev {world.interface('user')}")
    through(guest, "127.0.0.1", LITTLE, "10.99.0.1")


def test_loop(world: World, guest: QemuGuest) -> None:
    """Its questions come back, and nobody answers."""
    interface = world.interface("loop")
    guest.run(f"ip address add 10.6.0.2/24 dev {interface}; ip link set {interface} up")
    guest.run(f"arping -c 3 -I {interface} 10.6.0.1", check=False)
    eventually(lambda: world.statistic("loop", "rx_packets") == world.statistic("loop", "tx_packets") >= 3)
    assert world.statistic("loop", "rx_bytes") == world.statistic("loop", "tx_bytes")


def test_null(world: World, guest: QemuGuest) -> None:
    interface = world.interface("null")
    guest.run(f"ip address add 10.7.0.2/24 dev {interface}; ip link set {interface} up")
    guest.run(f"arping -c 3 -I {interface} 10.7.0.1", check=False)
    row = world.cards["null"].counted
    eventually(lambda: row("tx0").get("packets") == world.statistic("null", "tx_packets") >= 3)
    assert world.statistic("null", "rx_packets") == 0


def test_generate(world: World, guest: QemuGuest) -> None:
    guest.run(f"ip link set {world.interface('generate')} up")
    eventually(lambda: world.statistic("generate", "rx_packets") == 2000)
    assert world.statistic("generate", "rx_bytes") == 2000 * 200


# --- the machine's life ----------------------------------------------------------------------------------


def test_a_cable_out_and_in(world: World, guest: QemuGuest) -> None:
    interface = world.interface("switch")
    for up, state in ((False, "0"), (True, "1")):
        guest.set_link(world.number("switch"), up)
        guest.run(f"until [ $(cat /sys/class/net/{interface}/carrier) = {state} ]; do usleep 10000; done")
    to_the_far_guest(world)


def test_the_card_is_taken_out_and_put_in(world: World, guest: QemuGuest) -> None:
    """PCI hotplug: on the connection that there is, then with a new one."""
    number = world.number("switch")
    attached = len(attachments(world.cards["switch"]))
    guest.unplug(number)
    guest.plug(number)
    come_back(world, "switch")
    to_the_far_guest(world)
    assert len(attachments(world.cards["switch"])) == attached
    guest.unplug(number)
    guest.disconnect(number)
    guest.connect(number)
    guest.plug(number)
    come_back(world, "switch")
    to_the_far_guest(world)
    assert len(attachments(world.cards["switch"])) == attached + 1


def attachments(card: Card) -> list[str]:
    return [line for line in card.serving.lines if "attached" in line]


def come_back(world: World, name: str) -> None:
    """Wait for a card that was put in, and give it its address."""
    world.guest.run(f"until grep -q {world.mac(name)} /sys/class/net/*/address; do usleep 20000; done")
    world.up(name)


def test_the_guest_reboots(world: World, guest: QemuGuest) -> None:
    guest.reboot(120)
    world.set_up()
    traffic_everywhere(world)


def test_the_machine_is_reset_under_load(world: World, guest: QemuGuest) -> None:
    """No driver says goodbye: QEMU stops the rings while they carry traffic."""
    name = "four" if world.ip is not None else "switch"
    guest.run(f"ping -A -q -s 1400 {host(name)} >/dev/null 2>&1 &")
    guest.reset(120)
    world.set_up()
    traffic_everywhere(world)


def traffic_everywhere(world: World) -> None:
    to_the_far_guest(world)
    if world.ip is not None:
        through(world.guest, "10.1.0.1", SIZE)
        through(world.guest, "10.2.0.1", SIZE)


def test_the_back_end_goes_and_comes_back(world: World, guest: QemuGuest) -> None:
    """QEMU dials again; the guest knows nothing of it, but that frames were lost meanwhile."""
    need_root()
    old = world.cards["one"]
    world.served.end(old.serving)
    (world.cards["one"],) = world.served.start("one", "tap:vm1")
    world.served.wait()
    assert world.ip is not None
    world.ip("address replace 10.1.0.1/24 dev vm1")
    world.ip("link set vm1 up")
    # It dials once a second.
    eventually(lambda: attachments(world.cards["one"]))
    guest.run("until ping -c 1 -W 1 10.1.0.1 >/dev/null; do :; done")
    through(guest, "10.1.0.1", SIZE)


def test_the_guest_goes_for_good(world: World, guest: QemuGuest) -> None:
    assert guest.power_off() == 0
    # Nothing serves it any more, and the switch goes on without it.
    world.far.run("ip link show dev eth0 | grep -q LOWER_UP")
