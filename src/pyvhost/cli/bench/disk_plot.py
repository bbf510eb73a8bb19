"""`bench scsi` drawn: for each place and workload a bar a peer, its length pyvhost's rate over that peer's.

Promises: the same results give the same file, byte for byte. Never: draws a bare rate.
"""

from __future__ import annotations

from pathlib import Path

from pyvhost.cli.bench.disk_results import GOALS, Report

_COLOURS = {"file": "#2a6f97", "daemon": "#61a5c2", "QEMU": "#8f6aa8"}
_INK = "#222222"
_FAINT = "#8a8f98"


def draw(report: Report, path: Path) -> None:
    """Writes the SVG. ImportError without matplotlib, ValueError without rows."""
    if not report.rows:
        raise ValueError("nothing to draw")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    bars = [(row, peer) for row in report.rows for peer in row.ratios]
    with matplotlib.rc_context({"svg.hashsalt": "pyvhost", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(8.6, 1.6 + 0.26 * len(bars)), facecolor="white")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        # One turn that was far off is cut, so that the bars can be read.
        end = max(GOALS["QEMU"], *(row.ratios[peer].median for row, peer in bars)) * 1.5
        at, before, ticks, labels = 0.0, None, [], []
        drawn: set[str] = set()
        for row, peer in bars:
            at += 1.0 if before == (row.place, row.key) else 1.5
            if before != (row.place, row.key):
                ticks.append(at + (len(row.ratios) - 1) / 2)
                labels.append(f"{row.place}: {row.title}")
            before = (row.place, row.key)
            ratio = row.ratios[peer]
            axes.barh(
                at,
                ratio.median,
                height=0.8,
                color=_COLOURS.get(peer, _FAINT),
                zorder=2,
                label=None if peer in drawn else f"over {peer}",
            )
            drawn.add(peer)
            axes.plot([ratio.low, ratio.high], [at, at], color=_INK, lw=0.8, alpha=0.6, zorder=3)
            axes.plot(
                row.pairs[peer], [at] * ratio.count, "o", ms=2.5, color=_INK, alpha=0.3, mew=0, zorder=4
            )
            axes.text(end * 0.995, at, f"{ratio.median:.2f} ×", ha="right", va="center", fontweight="bold")
        axes.axvline(1.0, color=_INK, lw=1.1, zorder=5)
        axes.set_yticks(ticks, labels)
        axes.set_ylim(at + 0.8, 0.6)
        axes.set_xlim(0, end)
        axes.set_xlabel("pyvhost's I/Os a second over the peer's (median; dots: turns)", color=_FAINT)
        axes.xaxis.grid(True, color="#e6e8eb", zorder=0)
        axes.tick_params(axis="both", length=0)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))
        figure.tight_layout()
        figure.subplots_adjust(left=0.31)
        figure.savefig(path, format="svg", metadata={"Date": None})
