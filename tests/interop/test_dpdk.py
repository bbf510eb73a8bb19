"""DPDK's testpmd as virtio-user, unmodified, against `pyvhost net`: a driver that polls, in a process of its own."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from interop.conftest import Card, Ip, Served, eventually
from pyvhost.cli.bench.machine import UnfitError, huge_pages
from pyvhost.cli.bench.testpmd import Testpmd
from requirements import need, need_program, need_root

ETHERTYPE = 0x88B5
HUGE_PAGES = 160


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where there are huge pages for one testpmd."""
    need_root()
    need_program("dpdk-testpmd", package="dpdk-dev")
    try:
        with huge_pages(tmp_path_factory.mktemp("dpdk") / "huge", HUGE_PAGES) as place:
            yield place
    except UnfitError as problem:
        need(False, str(problem))


@pytest.fixture(scope="module")
def cards(served: Served, ip: Ip | None, huge: Path) -> dict[str, list[Card]]:
    """A card for each backend that a driver without a network stack can do something with."""
    assert ip is not None
    ip("link add veth0 type veth peer name veth1")
    ip("link set veth0 up")
    ip("link set veth1 up")
    found = {
        "generate": served.start("generate", "generate:200"),
        "null": served.start("null", "null"),
        "loop": served.start("loop", "loop"),
        "switch": served.start("switch", "switch:lan", sockets=2),
        "tap": served.start("tap", "tap:vm0"),
        "packet": served.start("packet", "packet:veth0"),
        "four": served.start("four", "generate:200", "--queue-pairs", "4"),
    }
    served.wait()
    ip("link set vm0 up")
    return found


@contextmanager
def running(
    huge: Path, cards: list[Card], mode: str, *, queues: int = 1, device: str = ""
) -> Iterator[Testpmd]:
    """A testpmd with a port for each card; the forwarding has not begun."""
    arguments = ["--lcores", "0@0,1@1", "--no-pci", "--no-telemetry", "--in-memory", "--single-file-segments"]
    arguments += ["-m", "256", "--huge-dir", str(huge), "--file-prefix=test"]
    for number, card in enumerate(cards):
        device = device or "mrg_rxbuf=1"
        arguments += [
            f"--vdev=net_virtio_user{number},path={card.socket},queues={queues},queue_size=256,{device}"
        ]
    arguments += ["--", "-i", f"--forward-mode={mode}", f"--rxq={queues}", f"--txq={queues}"]
    arguments += ["--total-num-mbufs=8192"]
    with Testpmd("testpmd", arguments) as program:
        program.wait_ready()
        yield program


@pytest.mark.parametrize(
    "device",
    [
        "mrg_rxbuf=1",
        "mrg_rxbuf=1,in_order=1",
        "mrg_rxbuf=0,in_order=0",
        "mrg_rxbuf=0,in_order=1,vectorized=1",
    ],
)
def test_generate(cards: dict[str, list[Card]], huge: Path, device: str) -> None:
    """Each of DPDK's receive paths has whole frames; one after another attaches to the same card."""
    with running(huge, cards["generate"], "rxonly", device=device) as testpmd:
        testpmd.start()
        eventually(lambda: testpmd.port_stats().rx_packets > 10000)
        testpmd.stop()
        found = testpmd.port_stats()
        assert found.rx_bytes == 200 * found.rx_packets


def test_null(cards: dict[str, list[Card]], huge: Path) -> None:
    with running(huge, cards["null"], "txonly") as testpmd:
        testpmd.start()
        eventually(lambda: testpmd.port_stats().tx_packets > 10000)
        sent = testpmd.stop().tx_packets
        eventually(lambda: cards["null"][0].counted("tx0").get("packets") == sent)
        assert cards["null"][0].counted("tx0").get("bytes") == 64 * sent


def test_loop(cards: dict[str, list[Card]], huge: Path) -> None:
    with running(huge, cards["loop"], "io") as testpmd:
        testpmd.start(first_bursts=1)
        eventually(lambda: testpmd.port_stats().rx_packets > 10000)
        found = testpmd.stop()
        # They go round and round: 32 are in flight.
        assert found.rx_packets <= found.tx_packets <= found.rx_packets + 32


def test_switch(cards: dict[str, list[Card]], huge: Path) -> None:
    """Frames that nobody is known for go from each card to the other."""
    with running(huge, cards["switch"], "io") as testpmd:
        testpmd.start(first_bursts=1)
        eventually(lambda: all(testpmd.port_stats(port).rx_packets > 1000 for port in (0, 1)))


@pytest.mark.parametrize(("name", "interface"), [("tap", "vm0"), ("packet", "veth1")])
def test_there_and_back(cards: dict[str, list[Card]], huge: Path, name: str, interface: str) -> None:
    """Frames of every size go to the driver by the host's interface, and come back the same."""
    with running(huge, cards[name], "io") as testpmd, packets(interface) as sock:
        testpmd.start()
        for size in (60, 61, 64, 128, 1000, 1513, 1514):
            frame = b"\x02" + os.urandom(5) + b"\x02" + bytes(5) + ETHERTYPE.to_bytes(2, "big")
            frame += os.urandom(size - len(frame))
            sock.send(frame)
            assert received(sock) == frame


@contextmanager
def packets(interface: str) -> Iterator[socket.socket]:
    """A socket for the tests' frames, as they are on an interface."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE)) as sock:
        sock.bind((interface, ETHERTYPE))
        yield sock


def received(sock: socket.socket) -> bytes:
    """The next frame that is not one of our own on its way out."""
    while select.select([sock], [], [], 20)[0]:
        frame, about = sock.recvfrom(65536)
        if about[2] != socket.PACKET_OUTGOING:
            return bytes(frame)
    raise AssertionError("no frame came back")


def test_four_queue_pairs(cards: dict[str, list[Card]], huge: Path) -> None:
    with running(huge, cards["four"], "rxonly", queues=4) as testpmd:
        testpmd.start()
        card = cards["four"][0]
        eventually(lambda: all(card.counted(f"rx{pair}").get("packets") > 1000 for pair in range(4)))


def test_one_dies_and_another_attaches(cards: dict[str, list[Card]], huge: Path) -> None:
    """Killed while it sends and receives as fast as it can."""
    card = cards["loop"][0]
    for _ in range(2):
        before = card.counted("rx0").get("packets")
        with running(huge, cards["loop"], "io") as testpmd:
            testpmd.start(first_bursts=4)
            eventually(partial(looped, card, before + 10000))
    assert card.serving.running


def looped(card: Card, packets: int) -> bool:
    return card.counted("rx0").get("packets") > packets
