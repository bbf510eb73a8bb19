"""What can be written after --backend, and what is said where it can't be meant."""

from __future__ import annotations

import pytest

from pyvhost.host.stream import Role
from pyvhost.net.backends import registry
from pyvhost.net.backends.base import MAX_QUEUE_PAIRS, Backend, PortKind
from pyvhost.net.backends.packet import PacketBackend
from pyvhost.net.backends.spec import Spec, SpecError
from pyvhost.net.backends.stream import StreamBackend
from pyvhost.net.backends.switch import SwitchBackend
from pyvhost.net.backends.tap import TapBackend
from pyvhost.net.backends.user import UserBackend


@pytest.mark.parametrize(
    ("text", "kind", "offloads", "pairs"),
    [
        ("tap:vm0", PortKind.FD, True, MAX_QUEUE_PAIRS),
        ("tap:vm0,mtu=9000,bridge=br0,sndbuf=1048576", PortKind.FD, True, MAX_QUEUE_PAIRS),
        ("packet:eth0", PortKind.FD, True, MAX_QUEUE_PAIRS),
        ("packet:eth0,qdisc,promisc=off", PortKind.FD, True, MAX_QUEUE_PAIRS),
        ("switch:lan", PortKind.SWITCH, True, MAX_QUEUE_PAIRS),
        ("switch:lan,uplink=tap:vm0", PortKind.SWITCH, True, MAX_QUEUE_PAIRS),
        ("user", PortKind.STREAM, False, 1),
        ("user,tcp=2222:22,tcp=8080,udp=53,mtu=1500", PortKind.STREAM, False, 1),
        ("stream:/run/peer", PortKind.STREAM, False, 1),
        ("stream:/run/peer,listen", PortKind.STREAM, False, 1),
        ("loop", PortKind.LOOP, True, MAX_QUEUE_PAIRS),
        ("null", PortKind.NULL, True, MAX_QUEUE_PAIRS),
        ("generate", PortKind.GENERATE, True, MAX_QUEUE_PAIRS),
        ("generate:1518,count=10,mac=52:54:00:12:34:56", PortKind.GENERATE, True, MAX_QUEUE_PAIRS),
    ],
)
def test_what_can_be_written(text: str, kind: PortKind, offloads: bool, pairs: int) -> None:
    backend = registry.make(text)
    assert (backend.spec, backend.kind) == (text, kind)
    assert (backend.offloads, backend.queue_pairs_max) == (offloads, pairs)
    assert backend.fds == [], "making it opened something"
    backend.check_pairs(pairs)
    for wrong in (0, pairs + 1):
        with pytest.raises(ValueError, match=r"queue pairs?, not"):
            backend.check_pairs(wrong)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "KIND"),
        (":vm0", "KIND"),
        ("TAP:vm0", "KIND"),
        ("tpa:vm0", r"no backend is called 'tpa' \(did you mean 'tap'\?\); there are: tap, packet, switch"),
        ("zzz", "there are: tap"),
        ("tap", "tap needs its name, as in tap:NAME"),
        ("tap:", "tap needs its name"),
        ("tap:a/b", r"'tap:a/b': the name: 'a/b' is no name for an interface"),
        ("tap:sixteen.bytes.xx", "no name for an interface"),
        ("tap:vm0,mtuu=1", r"no option 'mtuu' \(did you mean 'mtu'\?\); it has: mtu, bridge, sndbuf"),
        ("tap:vm0,mtu", "mtu needs a value: mtu=..."),
        ("tap:vm0,mtu=", "mtu needs a value"),
        ("tap:vm0,mtu=1e3", "mtu: a number from 68 to 65535 is wanted, not '1e3'"),
        ("tap:vm0,mtu=67", "from 68 to 65535"),
        ("tap:vm0,mtu=-1", "from 68 to 65535"),
        ("tap:vm0,mtu=٣٣٣", "from 68 to 65535"),
        ("tap:vm0,mtu=" + "9" * 5000, "from 68 to 65535"),
        ("tap:vm0,mtu=1500,mtu=1500", "mtu is there 2 times"),
        ("tap:vm0,", "no option after a comma"),
        ("tap:vm0,=3", "no option after a comma"),
        ("packet", "packet needs its ifname, as in packet:IFNAME"),
        ("packet:eth0,qdisc=yes", "qdisc is on or off, not 'yes'"),
        ("switch", "switch needs its name"),
        ("switch:lan,uplink=user", "an uplink is tap:NAME or packet:IFNAME, not 'user'"),
        ("switch:lan,uplink=tap:a/b", "no name for an interface"),
        ("user:x", "takes no argument"),
        ("user,tcp", "tcp needs a value"),
        ("user,mtu=65521", "from 68 to 65520"),
        ("stream", "stream needs its path"),
        ("stream:/p,listen,connect", "connect or listen, not both"),
        ("loop:x", "takes no argument"),
        ("loop,fast", "no option 'fast'; it has none"),
        ("null:", "takes no argument"),
        ("generate:41", "the size: a number from 42 to 65549 is wanted, not '41'"),
        ("generate:65550", "from 42 to 65549"),
        ("generate:", "generate needs its size"),
        ("generate:64,mac=52:54:00", "mac: an address like 52:54:00:12:34:56"),
    ],
)
def test_what_can_not_be_meant_and_what_is_said(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        registry.make(text)


def test_two_commas_stand_for_one() -> None:
    backend = registry.make("stream:/run/a,,b,listen")
    assert isinstance(backend, StreamBackend)
    assert (backend.path, backend.role) == ("/run/a,b", Role.LISTEN)


def test_only_the_first_colon_parts_kind_and_argument() -> None:
    backend = registry.make("stream:/run/a:b")
    assert isinstance(backend, StreamBackend)
    assert (backend.path, backend.role) == ("/run/a:b", Role.AUTO)


def test_options_reach_their_backend() -> None:
    user = registry.make("user,tcp=2222:22,tcp=8080,dns=1.1.1.1,mtu=1500,no-map-gw,no-dhcp=off")
    assert isinstance(user, UserBackend)
    assert user.options == ["--tcp-ports", "2222:22,8080", "--dns", "1.1.1.1", "--no-map-gw", "--mtu", "1500"]
    assert user.mtu == 1500
    assert registry.make("user").mtu == 65520

    tap = registry.make("tap:vm0")
    assert isinstance(tap, TapBackend)
    packet = registry.make("packet:eth0,promisc=off")
    assert isinstance(packet, PacketBackend)
    assert (tap.name, packet.name, packet._promiscuous, packet._qdisc) == ("vm0", "eth0", False, False)

    switch = registry.make("switch:lan,uplink=packet:eth0")
    assert isinstance(switch, SwitchBackend)
    assert repr(switch._uplink) == "<PacketBackend packet:eth0>"


def test_a_kind_of_ones_own() -> None:
    class Mine(Backend):
        kind = PortKind.NULL

        def __init__(self, spec: str, colour: str | None) -> None:
            super().__init__(spec)
            self.colour = colour

        @classmethod
        def from_spec(cls, spec: Spec) -> Mine:
            return cls(spec.text, spec.value("colour", str))

    registry.register("mine", Mine.from_spec)
    try:
        mine = registry.make("mine,colour=red")
        assert isinstance(mine, Mine)
        assert mine.colour == "red"
        assert "mine" in registry.kinds()
        with pytest.raises(SpecError, match="no option 'color'"):
            registry.make("mine,color=red")
        with pytest.raises(ValueError, match="already"):
            registry.register("mine", Mine.from_spec)
    finally:
        registry.unregister("mine")
    with pytest.raises(SpecError, match="no backend is called 'mine'"):
        registry.make("mine")


def test_names_that_no_kind_can_have() -> None:
    for name in ("", "Tap", "a b", "1st"):
        with pytest.raises(ValueError, match="can't name"):
            registry.register(name, Backend.from_spec)
    with pytest.raises(ValueError, match="already"):
        registry.register("tap", Backend.from_spec)
    with pytest.raises(KeyError):
        registry.unregister("tap")


def test_every_built_in_kind_says_how_it_is_written() -> None:
    for kind, backend in registry.BUILT_IN.items():
        assert backend.usage.startswith(kind)
        assert backend.summary
