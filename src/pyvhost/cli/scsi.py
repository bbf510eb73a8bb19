"""`pyvhost scsi`: disks for a guest, served until SIGTERM.

Promises: fails early and says why; prints the QEMU and UML lines that fit, ready to paste.
Never: imports the data plane before the arguments are right.
"""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING

from pyvhost.abi import virtio
from pyvhost.cli import serve

if TYPE_CHECKING:
    from pyvhost.scsi.device import ScsiDevice

_STORES = """\
where a disk's blocks are kept (SPEC):
  PATH                  a file or a block device
                          shared  others who say the same may have it too
                          direct=on|off  insist on direct I/O, or have none
  memory:SIZE           forgotten at the end
  nbd:URI               an NBD server's export: qcow2, Ceph, S3, ...
                          tls=off|allow|require  timeout=SECONDS
  and of any, after commas:
                        readonly  serial=TEXT  block=512|4096  physical=4096
                        aptpl=PATH  keep persistent reservations in this file
                        delay=MS  error-rate=P[:ERRNO]  limit=Niops|SIZE/s

  pyvhost scsi --socket-path /run/vm0.sock --lun disk.img --lun 1:0=memory:1G
  pyvhost scsi --socket-path /run/vm0.sock \\
      --lun 'nbd+unix:///?socket=/run/disk.nbd'
  pyvhost ctl /run/vm0.sock add-lun 0:3=/dev/vg0/data,serial=data
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost scsi`."""
    serve.add_arguments(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _STORES
    parser.add_argument(
        "--lun",
        action="append",
        metavar="[TARGET:LUN=]SPEC",
        default=[],
        help="a disk, kept as SPEC says (below); repeated: a disk for each, without a place at the first free LUN"
        " of target 0",
    )
    parser.add_argument("--request-queues", type=int, default=1, metavar="N", help="1 to 128 (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Serves; the exit status."""
    if args.print_capabilities:
        print(json.dumps({"type": "scsi"}))
        return 0
    if not serve.possible(args):
        return 2
    from pyvhost.scsi.lun import place

    place(args.lun)
    return serve.run(
        args,
        lambda path: _device(args, path),
        lambda path: {
            "QEMU": qemu_line(path, args.request_queues, connect=args.connect),
            "UML": uml_line(path),
        },
    )


def _device(args: argparse.Namespace, path: str | None) -> ScsiDevice:
    from pyvhost.scsi.device import ScsiDevice

    return ScsiDevice(
        args.lun,
        request_queues=args.request_queues,
        busyloop_timeout=args.busyloop_timeout,
        name=path,
    )


def qemu_line(path: str, request_queues: int = 1, *, connect: bool = False) -> str:
    """The QEMU options that attach a guest to the socket `path`."""
    # Control and event queue have a vector each, and the configuration another one.
    vectors = serve.vectors(request_queues + 3, False)
    return (
        f"{serve.qemu_options(path, connect)}"
        f" -device vhost-user-scsi-pci,chardev=vhost0,num_queues={request_queues}{vectors}"
    )


def uml_line(path: str) -> str:
    """What goes on the command line of UML."""
    return f"virtio_uml.device={shlex.quote(path)}:{virtio.ID_SCSI}"
