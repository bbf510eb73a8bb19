"""Guests that nobody here wrote: Linux booted under UML or QEMU, with NICs and disks served over vhost-user.

Promises: a guest is an ordinary process of this user, started, told to run commands, rebooted and ended through
one object; every wait ends, and an error carries the end of the guest's console. Never: changes the guest's
kernel or drivers, writes to the host's files, ends a process that it did not start, or needs root.
"""

from pyvhost.cli.guests.base import Guest, GuestError, GuestTimeoutError, Result
from pyvhost.cli.guests.kernel import Kernel, KernelError, find_kernel
from pyvhost.cli.guests.qemu import Disks, Nic, QemuGuest
from pyvhost.cli.guests.uml import UmlGuest

__all__ = [
    "Disks",
    "Guest",
    "GuestError",
    "GuestTimeoutError",
    "Kernel",
    "KernelError",
    "Nic",
    "QemuGuest",
    "Result",
    "UmlGuest",
    "find_kernel",
]
