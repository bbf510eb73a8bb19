"""Draws what the pages show of `pyvhost top` and of a trace: top.svg and trace.svg, beside this file.

    .venv/bin/python docs/images/draw.py

Both are of devices that are served while it runs: to two guests (UML), one of which sends the other data over TCP
and to the package's own drivers. The benchmarks' pictures are `pyvhost bench`'s own, copied.

Promises: draws nothing that it did not see; the pictures load nothing from elsewhere.
Never: is needed to read the pages.
"""

from __future__ import annotations

import html
import io
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

from pyvhost.abi import virtio
from pyvhost.cli.bench import vsock_ends
from pyvhost.cli.bench.loader import Loader, Workload
from pyvhost.cli.bench.vsock_ends import TO_GUEST, Guest, HostEnd
from pyvhost.cli.demo_guests import UmlEnds
from pyvhost.cli.guests.uml import UmlGuest
from pyvhost.cli.serving import Serving
from pyvhost.driver import cdb
from pyvhost.driver.memory import MIB, GuestMemory
from pyvhost.driver.net import NetDriver
from pyvhost.driver.scsi import ScsiDriver
from pyvhost.driver.vhost_user import VhostUserFrontend
from pyvhost.observe.reader import snapshot
from pyvhost.observe.top import History, render

HERE = Path(__file__).resolve().parent
PROGRAM = """\
import logging
from pyvhost import NetDevice, ScsiDevice, VsockDevice, serve

logging.basicConfig(format="%(levelname)s: %(message)s")
logging.getLogger("pyvhost").setLevel("INFO")
serve({
    "vm0": NetDevice("switch:lan", name="vm0"),
    "vm1": NetDevice("switch:lan", name="vm1"),
    "vm0-vsock": VsockDevice(4, name="vm0-vsock"),
    "vm2-disks": ScsiDevice(["disk.img"], name="vm2-disks"),
    "vm2-vsock": VsockDevice(3, uds_path="guest", name="vm2-vsock"),
})
"""
SOCKETS = ("vm0", "vm1", "vm0-vsock", "vm2-disks", "vm2-vsock")
#: What is looked at, and how often, seconds; columns of the terminal.
LOOKS, INTERVAL, WIDTH = 9, 1.0, 100
#: Rich's own, without the fonts that it would load, and the window's buttons.
TERMINAL = """\
<svg class="rich-terminal" viewBox="0 0 {width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: {char_height}px;
 line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
<rect fill="#ffffff" width="{width}" height="{height}"/>
<g transform="translate({terminal_x}, 0)" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main() -> None:
    """Draws both."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        # Its counters alone: others' processes may be served here as well.
        os.environ["XDG_RUNTIME_DIR"] = name
        (HERE / "top.svg").write_text(top(folder))
        (HERE / "trace.svg").write_text(trace(folder))


def top(folder: Path) -> str:
    """`pyvhost top`, of two cards, a disk and a guest's connection, all of them busy."""
    (folder / "serve.py").write_text(PROGRAM)
    with (folder / "disk.img").open("wb") as image:
        image.write(os.urandom(64 * MIB))
    vsock_ends.prepare()
    where = [folder / "pyvhost"]
    with ExitStack() as stack:
        served = Serving([], SOCKETS, program="serve.py", folder=folder)
        stack.enter_context(served).wait_ready()
        first = UmlGuest([folder / "vm0"], vsock=folder / "vm0-vsock", name="vm0")
        ends = UmlEnds([first, UmlGuest([folder / "vm1"], name="vm1")])
        stack.callback(ends.stop)
        ends.start()
        loader = stack.enter_context(loaded_disk(folder / "vm2-disks"))
        guest = stack.enter_context(Guest(folder / "vm2-vsock", 4096, 4096))
        stack.enter_context(HostEnd(guest, folder / "guest", TO_GUEST, 4096))
        seconds = LOOKS * INTERVAL + 2
        workload = Workload(writes=False, random=True, size=4096, depth=8)
        with loader.prepared(workload) as prepared:
            work = [
                threading.Thread(target=ends.transfer, args=(seconds,)),
                threading.Thread(target=prepared.run, args=(seconds,)),
            ]
            for thread in work:
                thread.start()
            history, before = History(), snapshot(where)
            for _ in range(LOOKS):
                # What is looked at is a span of time; there is no event to wait for.
                time.sleep(INTERVAL)
                now = snapshot(where)
                table = render(now, before, history=history, width=WIDTH)
                before = now
            for thread in work:
                thread.join()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ pyvhost top\n"))
    console.print(table)
    return console.export_svg(
        title="", theme=DEFAULT_TERMINAL_THEME, code_format=TERMINAL, unique_id="pyvhost"
    )


@contextmanager
def loaded_disk(path: Path) -> Iterator[Loader]:
    """What loads LUN 0:0 of the device at the socket."""
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(16 * MIB))
        front = stack.enter_context(VhostUserFrontend.connect(path))
        driver = stack.enter_context(ScsiDriver(front, memory, ring_size=128))
        driver.start()
        while not driver.command(0, 0, cdb.test_unit_ready()).good:
            pass  # the first commands hear that the device is new
        event_idx = driver.has(virtio.RING_F_EVENT_IDX)
        loader = Loader(memory, driver.requests[0], "scsi", 64 * MIB, event_idx=event_idx)
        stack.callback(loader.close)
        yield loader


#: A message of the trace: who says it, and what.
LINE = re.compile(r"^TRACE: .*?: (front|back) end: (.*)$")


def trace(folder: Path) -> str:
    """The messages between a front end and `pyvhost net`, from the first to the first frame, as arrows; without the
    acknowledgements of what succeeded."""
    path = folder / "traced"
    arguments = ["net", "--socket-path", str(path), "--backend", "loop", "--log-level", "trace"]
    with Serving(arguments, [path]) as served:
        served.wait_ready()
        with (
            GuestMemory(16 * MIB) as memory,
            VhostUserFrontend.connect(path) as front,
            NetDriver(front, memory) as driver,
        ):
            driver.start()
        served.close()
        found = [match.groups() for line in served.lines if (match := LINE.match(line))]
    # Nineteen times "success" say nothing more than once.
    return arrows([(who, words) for who, words in found if not words.endswith(" ack: success")])


def arrows(messages: list[tuple[str, ...]]) -> str:
    """An SVG: two lines for the two ends, an arrow for each message."""
    width, left, right, step, head = 900, 60, 840, 25, 58
    height = head + step * len(messages) + 24
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<style>text { font: 11.5px 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #222222 } "
        ".end { font: bold 14px 'DejaVu Sans', Helvetica, Arial, sans-serif } .reply { fill: #5b6470 }</style>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for at, name in ((left, "front end"), (right, "pyvhost")):
        rows.append(f'<text class="end" x="{at}" y="24" text-anchor="middle">{name}</text>')
        rows.append(f'<path d="M{at} 34V{height - 10}" stroke="#c8ccd2" stroke-width="2"/>')
    for number, (who, words) in enumerate(messages):
        y = head + step * number
        asks = who == "front"
        colour = "#2a6f97" if asks else "#8f6aa8"
        start, end, back = (left, right, -8) if asks else (right, left, 8)
        short = html.escape(words if len(words) <= 92 else words[:91] + "…")
        anchor = f'x="{left + 10}"' if asks else f'x="{right - 10}" text-anchor="end" class="reply"'
        rows.append(f'<text {anchor} y="{y - 4}">{short}</text>')
        rows.append(f'<path d="M{start} {y}H{end + back}" stroke="{colour}" stroke-width="1.4"/>')
        rows.append(f'<path d="M{end} {y}l{back} -4v8z" fill="{colour}"/>')
    return "\n".join([*rows, "</svg>", ""])


if __name__ == "__main__":
    main()
