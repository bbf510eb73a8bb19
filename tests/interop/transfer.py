"""Files over TCP between the host and a guest that has busybox alone."""

from __future__ import annotations

from interop.exchange import Listener
from pyvhost.cli.guests import Guest

SEND = """
dd if=/dev/urandom of=/tmp/sent bs={size} count=1 2>/dev/null
nc {address} {port} </tmp/sent
sha256sum </tmp/sent
"""


def through(guest: Guest, address: str, size: int, guest_sees: str | None = None) -> None:
    """A file from the guest to the host's `address` and one back, each whole at the other end.

    `guest_sees`: what the guest has to call that address, if it is another.
    """
    listener = Listener(address, 0)
    sent = guest.run(
        SEND.format(size=size, address=guest_sees or address, port=listener.port), timeout=60
    ).output
    assert listener.digests().received == sent.split()[0]
    listener = Listener(address, size)
    # nc leaves when its input ends: that of this one does not.
    received = guest.run(
        f"mkfifo /tmp/never 2>/dev/null; nc {guest_sees or address} {listener.port} <>/tmp/never | sha256sum",
        timeout=60,
    ).output
    assert listener.digests().sent == received.split()[0]
