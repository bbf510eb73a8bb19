"""Kinds of arguments that several commands take.

Promises: what is wrong is said with what was given and what is possible. Never: imports what a command needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable


def seconds(least: float, most: float) -> Callable[[str], float]:
    """Reads seconds from `least` to `most`. ArgumentTypeError: it is no such number (NaN and infinity are none)."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from {least:g} to {most:g}")
        return number

    return read
