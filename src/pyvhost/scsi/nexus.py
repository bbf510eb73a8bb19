"""An I_T nexus: one initiator port at one target port (SAM-5, 4.6.4).

Ports are named as SAS names them, by a 64-bit world wide name: virtio has no names of its own, and that is what
Linux's vhost target calls its endpoints too.

Promises: two nexuses with the same name are the same to a persistent reservation, whenever they come and go.
"""

from __future__ import annotations

import hashlib

#: Protocol identifier of SAS (SPC-4, table 444).
PROTOCOL_SAS = 6


def world_wide_name(text: str) -> int:
    """A locally assigned NAA name (SPC-4, 7.8.6.6.4: NAA 3h) that belongs to `text`, always the same."""
    digest = hashlib.sha256(text.encode()).digest()
    return 0x3 << 60 | int.from_bytes(digest[:8], "big") & (1 << 60) - 1


class Nexus:
    """An initiator port as a target sees it. `wwn`: its world wide name; None: one made from `name`."""

    def __init__(self, name: str, wwn: int | None = None) -> None:
        self.name = name
        self.wwn = world_wide_name(name) if wwn is None else wwn

    @property
    def transport_id(self) -> bytes:
        """Its TransportID (SPC-4, 7.6.4.7: SAS), 24 bytes."""
        return bytes([PROTOCOL_SAS, 0, 0, 0]) + self.wwn.to_bytes(8, "big") + bytes(12)

    def __repr__(self) -> str:
        return f"<Nexus {self.name} {self.wwn:016x}>"
