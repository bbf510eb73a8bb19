"""A guest's connections with the package's own ends at their other side, and a data path that carries no byte.

    with PlainHost(UnixEnds(path)) as host:
        key = host.connected(80)      # the guest has asked, and was accepted
        os.write(host.fd_of(key), b"hello")

Promises: nothing happens but within `until` and what the guest says; what is attached to a connection is `fd_of`.
Never: starts a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from types import TracebackType
from typing import Self

from pyvhost.abi import virtio_vsock as abi
from pyvhost.host.poller import Poller
from pyvhost.vsock.connections import Connections
from pyvhost.vsock.contract import Key
from pyvhost.vsock.ends.base import Ends, Guest, Host
from vsock_parts import BOTH, PlainCarrier, Sent

PATIENCE = 20.0
#: The guest's own ports.
_ports = count(5000)


class PlainHost:
    """One guest. `poller`: another's, whose sibling it is."""

    def __init__(
        self,
        *ends: Ends,
        cid: int = 52,
        group: str | None = None,
        poller: Poller | None = None,
        limit: int = 100,
    ) -> None:
        self.now = 1000.0
        self.carrier = PlainCarrier()
        self._own_poller = poller is None
        self.poller = poller or Poller()
        self.connections = Connections(
            self.carrier, cid, clock=lambda: self.now, limit=limit, name=f"guest {cid}"
        )
        self.carrier.connections = self.connections
        self.connections.types = frozenset((abi.TYPE_STREAM, abi.TYPE_SEQPACKET))
        self.guest = Guest(f"guest {cid}", cid, group, self.poller, self.connections)
        self.host = Host(self.guest, ends)
        self.host.open()
        #: What the guest was sent, and nobody has looked at.
        self._got: list[Sent] = []

    # --- the guest ----------------------------------------------------------------------------------------

    def request(self, port: int, cid: int = abi.VMADDR_CID_HOST, type_: int = abi.TYPE_STREAM) -> Key:
        """The guest asks for a connection."""
        key = Key(type_, next(_ports), cid, port)
        self.says(key, abi.OP_REQUEST)
        return key

    def says(self, key: Key, op: int, flags: int = 0) -> None:
        """The guest sends a packet."""
        self.carrier.guest(key, op, flags)
        self.settle()

    def answer(self, key: Key) -> tuple[int, int]:
        """The next packet of a connection for the guest: op and flags."""
        self.until(lambda: any(sent[0] == key for sent in self._got), f"a packet of {key}")
        at = next(at for at, sent in enumerate(self._got) if sent[0] == key)
        _, op, flags = self._got.pop(at)
        return op, flags

    def asked(self) -> Key:
        """The next connection that the guest is asked for."""
        self.until(lambda: any(op == abi.OP_REQUEST for _, op, _ in self._got), "REQUEST")
        at = next(at for at, sent in enumerate(self._got) if sent[1] == abi.OP_REQUEST)
        return self._got.pop(at)[0]

    def connected(self, port: int, type_: int = abi.TYPE_STREAM) -> Key:
        """A connection that the guest has asked for, and got."""
        key = self.request(port, type_=type_)
        assert self.answer(key) == (abi.OP_RESPONSE, 0)
        return key

    # --- the data path ------------------------------------------------------------------------------------

    def fd_of(self, key: Key) -> int:
        """What a connection carries data from and to."""
        row = self.carrier.rows[self.carrier.table[key]]
        assert row.started
        assert row.fd is not None
        return row.fd

    def tell(self, what: str, key: Key, *rest: object) -> None:
        """The data path tells of something: eof, failed, ..."""
        self.carrier.todo.append((what, (self.carrier.table[key], *rest)))
        self.settle()

    def settle(self) -> None:
        """Until the data path has nothing left to do."""
        self._got += self.carrier.got()

    def until(self, ready: Callable[[], bool], what: str = "what is awaited") -> None:
        """Lets the control thread's loop go round. It is a failure when nothing happens any more."""
        late: list[bool] = []
        timer = self.poller.call_later(PATIENCE, lambda: late.append(True))
        self.settle()
        while not ready():
            self.poller.run_once()
            self.settle()
            assert not late, f"{what}: never came"
        timer.cancel()

    def turn(self, times: int = 3) -> None:
        """What is ready happens, and nothing is waited for."""
        for _ in range(times):
            self.poller.run_once(0)
            self.settle()

    def close(self) -> None:
        """As the device does it."""
        self.host.close()
        self.connections.stop()
        self.settle()
        if self._own_poller:
            self.poller.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None:
            assert len(self.connections) == 0


def shut(host: PlainHost, keys: Sequence[Key]) -> None:
    """The guest closes connections, and hears RST."""
    for key in keys:
        host.says(key, abi.OP_SHUTDOWN, BOTH)
        assert host.answer(key) == (abi.OP_RST, 0)
