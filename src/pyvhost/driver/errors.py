"""What can go wrong on the driver's side, told apart by who is to blame.

`DeviceError` is the one that a test wants to see never, or exactly once: the other side broke a rule.
Messages name the ring, the field and the numbers.
"""

from __future__ import annotations


class DriverError(Exception):
    """Anything that the driver's side raises on its own account."""


class DeviceError(DriverError):
    """The device, or its back end, did what no device may do."""


class BackendGoneError(DeviceError):
    """The back end ended the connection."""


class RingFullError(DriverError):
    """Too few free descriptors for the chain; take used ones back first."""


class GuestMemoryError(DriverError):
    """An address or a length lies outside guest memory, or no room is left in it."""


class RefusedError(DeviceError):
    """The back end answered that a request failed."""
