"""`pyvhost doctor`: what this host can do, and what to install for the rest.

Promises: exit status 0 if pyvhost can serve here at all, 1 if not; what to install is one line, ready to paste.
Never: installs or changes anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyvhost.cli.checks import Check, Found, State, ask_all

_MARKS = {State.YES: ("✓", "green"), State.NOTE: ("•", "yellow"), State.NO: ("✗", "red")}

#: Terminal cells from which on there is room to say what each thing is good for.
_WIDE = 100

Answers = Sequence[tuple[Check, Found]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyvhost doctor`."""
    parser.description = (
        "Say what this host can do for pyvhost, by trying it, and what to install for the rest."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; its exit status."""
    console = Console()
    if args.json or not console.is_terminal:
        answers = list(ask_all())
    else:
        with console.status("") as status:
            answers = list(ask_all(before=lambda check: status.update(f"trying: {check.name}")))
    able = not impossible(answers)
    if args.json:
        print(json.dumps(as_json(answers), ensure_ascii=False, indent=2))
    else:
        console.print(table(answers, purposes=console.width >= _WIDE))
        for line in conclusion(answers):
            console.print(line, soft_wrap=True)
    return 0 if able else 1


def impossible(answers: Answers) -> list[str]:
    """What is missing without which nothing can be served."""
    return [check.name for check, found in answers if check.vital and found.state is State.NO]


def apt_line(answers: Answers) -> str:
    """The one line that installs all that is missing; empty if there is nothing to install."""
    packages = _unique(package for _, found in answers for package in found.packages)
    if not packages:
        return ""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}apt-get install -y --no-install-recommends {' '.join(packages)}"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def as_json(answers: Answers) -> dict[str, object]:
    """The answers as JSON's own types."""
    return {
        "able": not impossible(answers),
        "install": apt_line(answers),
        "checks": [
            {
                "group": check.group,
                "name": check.name,
                "purpose": check.purpose,
                "vital": check.vital,
                "state": found.state.value,
                "found": found.text,
                "packages": list(found.packages),
            }
            for check, found in answers
        ],
    }


def table(answers: Answers, *, purposes: bool = True) -> Table:
    """A line a check, under the heading of its group; what it is good for only with `purposes`."""
    shown = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    shown.add_column(width=1)
    shown.add_column(no_wrap=False)
    shown.add_column(overflow="fold")
    if purposes:
        shown.add_column(style="dim")
    group = None
    for check, found in answers:
        if check.group != group:
            if group is not None:
                shown.add_row()
            shown.add_row("", Text(check.group, style="bold"))
            group = check.group
        mark, colour = _MARKS[found.state]
        cells = [Text(mark, style=colour), Text(check.name), Text(found.text), Text(check.purpose)]
        shown.add_row(*cells[: len(shown.columns)])
    return shown


def conclusion(answers: Answers) -> list[Text]:
    """What it comes to, and the line to paste."""
    lines = [Text()]
    lacking = impossible(answers)
    if lacking:
        lines.append(Text(f"pyvhost can serve nothing here: {', '.join(lacking)}", style="bold red"))
    else:
        lines.append(Text("pyvhost can serve here.", style="bold green"))
    line = apt_line(answers)
    if line:
        here = "For what is missing:" if shutil.which("apt-get") else "For what is missing, on Debian:"
        lines += [Text(here), Text(f"    {line}")]
    return lines
