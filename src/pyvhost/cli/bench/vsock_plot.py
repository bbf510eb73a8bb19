"""`bench vsock` drawn: for each direction and size a bar, its length pyvhost's rate over a unix socket pair's.

Promises: the same results give the same file, byte for byte. Never: draws a bare rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_COLOUR: Final = "#2a6f97"
_PUBLISHED: Final = "#8f6aa8"
_INK: Final = "#222222"
_FAINT: Final = "#8a8f98"


def draw(
    titles: Sequence[str], turns: Sequence[Sequence[float]], peers: Sequence[float | None], path: Path
) -> None:
    """Writes the SVG. `turns`: of each row the ratio to the pair turn by turn; `peers`: the published share of the
    kernel's rate that the userspace peer has. ImportError without matplotlib, ValueError without rows.
    """
    if not turns:
        raise ValueError("nothing to draw")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "pyvhost", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(8.6, 1.5 + 0.42 * len(turns)), facecolor="white")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        end = max(1.25, *(max(ratios) for ratios in turns)) * 1.25
        for at, (ratios, peer) in enumerate(zip(turns, peers, strict=True)):
            middle = statistics.median(ratios)
            axes.barh(at, middle, height=0.72, color=_COLOUR, zorder=2)
            axes.plot([min(ratios), max(ratios)], [at, at], color=_INK, lw=0.8, alpha=0.55, zorder=3)
            axes.plot(ratios, [at] * len(ratios), "o", ms=3, color=_INK, alpha=0.4, mew=0, zorder=4)
            axes.text(end * 0.995, at, f"{middle:.2f} ×", ha="right", va="center", fontweight="bold")
            if peer is not None:
                axes.plot([peer], [at], "D", ms=6, color=_PUBLISHED, zorder=5)
        axes.axvline(1.0, color=_INK, lw=1.2, zorder=5)
        axes.text(1.0, -0.62, "unix socket pair", ha="center", va="bottom", fontsize=8.5, color=_INK)
        axes.set_yticks(range(len(titles)), titles)
        axes.set_ylim(len(titles) - 0.4, -0.6)
        axes.set_xlim(0, end)
        axes.set_xlabel(
            "bytes a second, relative to the pair's (median; dots: turns); diamonds, published, another machine:\n"
            "the userspace peer relative to Linux's vhost-vsock",
            color=_FAINT,
        )
        axes.xaxis.grid(True, color="#e6e8eb", zorder=0)
        axes.tick_params(axis="both", length=0)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})
