"""Where this vhost answers otherwise than Linux's, and means to: one list, by name, with the reason.

The table in docs/reference/ioctls.md has the same names; a test compares them.

Promises: a difference that nothing here names is a failure. Never: excuses a case as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernel.replay import Difference


def _nothing(found: Difference) -> bool:
    return False


@dataclass(frozen=True)
class Named:
    """A difference that is meant. `covers`: whether what a replay found is this one."""

    name: str
    reason: str
    covers: Callable[[Difference], bool] = _nothing


def _ioctl(found: Difference, *names: str) -> bool:
    name: str = found.step.get("ioctl", "")
    return name.removeprefix("VHOST_") in names


def _is_child(found: Difference) -> bool:
    # What a child did before has not been done.
    before = ("owner/taken-by-a-child-first", "scsi/events-missed")
    after = found.case.endswith(before) and found.step.get("by", "self") == "self"
    return (found.step.get("by") == "child" and found.got == "not done") or after


def _is_endian(found: Difference) -> bool:
    wanted = (found.step.get("result"), found.got)
    return _ioctl(found, "SET_VRING_ENDIAN", "GET_VRING_ENDIAN") and wanted in (
        ("ENOTTY", 0),
        ("ENOTTY", "EINVAL"),
        ("ENOTTY", "EBUSY"),
        ("ENOTTY", "EFAULT"),
    )


def _is_newer(found: Difference) -> bool:
    newer = _ioctl(
        found, "GET_FEATURES_ARRAY", "SET_FEATURES_ARRAY", "SET_FORK_FROM_OWNER", "GET_FORK_FROM_OWNER"
    )
    return newer and found.step.get("result") in ("ENOTTY", "EPERM", "EFAULT")


def _is_worker(found: Difference) -> bool:
    ours = _ioctl(found, "NEW_WORKER", "FREE_WORKER", "ATTACH_VRING_WORKER", "GET_VRING_WORKER")
    return ours and found.step.get("result") == "ENOTTY"


def _is_thread_name(found: Difference) -> bool:
    return bool(found.step["op"] == "workers" and found.got == [])


def _is_second_miss(found: Difference) -> bool:
    again = found.case.endswith("iotlb/update-answers-only-covering-misses")
    return again and found.step["op"] == "read" and found.got == "EAGAIN"


def _is_file(found: Difference) -> bool:
    return found.step["op"] in ("lseek 100", "mmap", "pread", "fsync", "ftruncate", "epoll add", "fstat")


def _is_host_socket(found: Difference) -> bool:
    return str(found.step["op"]).startswith("AF_VSOCK")


DIFFERENCES = (
    Named(
        "child",
        "a forked child has a copy of the object and no worker: it may read features, and is refused the rest",
        _is_child,
    ),
    Named(
        "endian",
        "VRING_ENDIAN is there: a kernel has it where CONFIG_VHOST_CROSS_ENDIAN_LEGACY is set, and Debian's is not",
        _is_endian,
    ),
    Named(
        "newer",
        "FEATURES_ARRAY and FORK_FROM_OWNER are there, as in Linux 6.17; the recorded kernel is older",
        _is_newer,
    ),
    Named(
        "workers",
        "NEW_WORKER, FREE_WORKER, ATTACH_VRING_WORKER, GET_VRING_WORKER are net's; Linux has them for scsi",
        _is_worker,
    ),
    Named(
        "thread-names",
        "workers are threads of the process, shared between devices; no kernel thread is called vhost-PID",
        _is_thread_name,
    ),
    Named(
        "one-miss-an-update",
        "a ring asks once for each kick that is seen and once after an UPDATE; Linux may ask more often",
        _is_second_miss,
    ),
    Named(
        "asks-at-once",
        "a running ring that loses its parts, by INVALIDATE or by ACCESS_PLATFORM, asks for them at once and not at "
        "its next kick or packet",
    ),
    Named(
        "no-file",
        "what is opened is an object: its descriptor is to be polled, and nothing else",
        _is_file,
    ),
    Named(
        "num_buffers",
        "with VERSION_1 and without MRG_RXBUF `num_buffers` is written as 1 (virtio 1.2, 5.1.6.4)",
    ),
    Named(
        "no-spin", "a packet shorter than its header stops the ring with err; Linux's worker tries for ever"
    ),
    Named(
        "no-lost-chain",
        "a writable or empty descriptor on transmit stops the ring with err; Linux takes the chain and never uses it",
    ),
    Named(
        "unreadable",
        "a buffer in memory that is not mapped stops the ring with err; Linux's ring stops without a word",
    ),
    Named("one-err", "a bad indirect table signals err once; Linux signals it twice"),
    Named(
        "stopped-flags",
        "while a bad chain stops a ring its used flags may ask for kicks or not; Linux's ask for none",
    ),
    Named(
        "dry-at-once",
        "a receive ring asks for kicks as soon as its last buffer is used; Linux's when a frame finds none",
    ),
    Named("calls", "how many packets a call is for depends on how the worker batches; Linux's are 64"),
    Named(
        "dropped-bytes",
        "a frame that does not fit may have been written into the buffer, which is kept; Linux looks first",
    ),
    Named(
        "interface-down",
        "a frame for an interface that is down is refused by the tap, and counted as dropped alone",
    ),
    Named("log-signals", "how often LOG_FD is signalled depends on how the worker batches"),
    Named(
        "eventfd-full",
        "a call eventfd that blocks and is full holds up the worker; Linux's signal never waits",
    ),
    Named("non-blocking", "a tap or packet socket is non-blocking while a ring is bound to it"),
    Named("used-length", "scsi: a used element has the bytes that were written; Linux's have 0"),
    Named(
        "sense-length", "scsi: sense data are as long as they say (SPC-4, 4.5); Linux's are filled up to 96"
    ),
    Named("inquiry", "scsi: INQUIRY has another vendor and product, and other versions"),
    Named(
        "unit-attention",
        "scsi: a disk says POWER ON to a driver that is new (SAM-5, 5.14); Linux's says nothing",
    ),
    Named("residual", "scsi: where nothing was moved, all of the room is residual; Linux says 0"),
    Named("overrun", "scsi: data that don't fit are OVERRUN (virtio 1.2, 5.6.6.1); Linux refuses the CDB"),
    Named(
        "incorrect-lun", "scsi: INQUIRY and REPORT LUNS are answered for a LUN that is not there (SPC-4, 6.4)"
    ),
    Named("bad-lun", "scsi: eight bytes that name no unit are BAD_TARGET; Linux signals err as well"),
    Named("well-known", "scsi: the REPORT LUNS well known unit is there (virtio 1.2, 5.6.6.1)"),
    Named(
        "short-request",
        "scsi: a request too short for its header or its response stops the ring with err; Linux takes it",
    ),
    Named(
        "host-sockets",
        "vsock: the host's side is this process's (vsock.connect, vsock.listen), not the host's AF_VSOCK",
        _is_host_socket,
    ),
    Named("functions", "scsi: all task management functions; Linux has LOGICAL UNIT RESET alone"),
)


def named(found: Difference) -> Named | None:
    """The difference that is meant, if it is one."""
    return next((difference for difference in DIFFERENCES if difference.covers(found)), None)
