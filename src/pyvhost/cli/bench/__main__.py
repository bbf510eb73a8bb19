"""`python -m pyvhost.cli.bench net`: the benchmark without the rest of the command line."""

from __future__ import annotations

import argparse
import sys

from pyvhost.cli.bench import command


def main(words: list[str] | None = None) -> int:
    """Parses and runs. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="pyvhost bench", description="Measure against DPDK.")
    what = parser.add_subparsers(dest="what", required=True)
    command.add_arguments(what.add_parser("net", help="the net device", description=command.run.__doc__))
    return command.run(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
