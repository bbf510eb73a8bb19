"""The comparison drawn: one bar a row, its length the ratio to the peer, every pair of slices a dot.

Promises: the same results give the same file, byte for byte.
Never: draws a bare rate.
"""

from __future__ import annotations

from pathlib import Path

from pyvhost.cli.bench.results import Report

_OURS = {0: "#2a6f97", 1: "#61a5c2"}
_BEHIND = {0: "#b5535a", 1: "#d98c91"}
_INK = "#222222"
_FAINT = "#8a8f98"


class NoMatplotlibError(RuntimeError):
    """The drawing needs matplotlib, which only the development extras install."""


def draw(report: Report, path: Path) -> None:
    """Writes the SVG. Raises NoMatplotlibError without matplotlib, ValueError without rows."""
    if not report.rows:
        raise ValueError("nothing to draw")
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlibError("install matplotlib to have the results drawn") from error
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    sizes = sorted({row.size for row in report.rows})
    with matplotlib.rc_context({"svg.hashsalt": "pyvhost", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(8.6, 1.7 + 0.52 * len(report.rows)), facecolor="white")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        ticks: list[float] = []
        labels: list[str] = []
        at = 0.0
        before = report.rows[0].case
        # The axis ends behind the longest whisker, so that the words behind the bars have room.
        end = max(1.25, *(row.ratio.high for row in report.rows)) * 1.36
        for row in report.rows:
            at += 1.0 if row.case == before else 1.45
            before = row.case
            shade = (_OURS if row.ratio.median >= 1.0 else _BEHIND)[sizes.index(row.size) % 2]
            axes.barh(at, row.ratio.median, height=0.72, color=shade, zorder=2)
            axes.plot(row.ratios, [at] * len(row.ratios), "o", ms=3, color=_INK, alpha=0.28, mew=0, zorder=4)
            axes.plot([row.ratio.low, row.ratio.high], [at, at], color=_INK, lw=0.8, alpha=0.55, zorder=3)
            axes.text(
                end * 0.995,
                at,
                f"{row.ratio.median:.2f} ×",
                ha="right",
                va="center",
                fontsize=11,
                fontweight="bold",
                color=_INK,
            )
            axes.text(
                end * 0.88,
                at,
                f"{row.ours_mpps.median:.1f} / {row.theirs_mpps.median:.1f} Mpps",
                ha="right",
                va="center",
                fontsize=8,
                color=_FAINT,
            )
            ticks.append(at)
            labels.append(f"{row.title}, {row.size} B")
        axes.axvline(1.0, color=_INK, lw=1.2, zorder=5)
        axes.text(1.0, 0.25, report.peer, ha="center", va="bottom", fontsize=8.5, color=_INK)
        axes.set_yticks(ticks, labels)
        axes.set_ylim(at + 0.6, 0.3)
        axes.set_xlim(0, end)
        axes.set_xlabel(
            "packets a second, relative to the peer's (median; dots: each pair of slices)", color=_FAINT
        )
        axes.xaxis.grid(True, color="#e6e8eb", zorder=0)
        axes.tick_params(axis="x", colors=_FAINT, length=0)
        axes.tick_params(axis="y", colors=_INK, length=0)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        figure.suptitle(f"{report.subject}'s net device against {report.peer}", fontsize=13, color=_INK)
        distances = [row.round_trip_ns.median for row in report.rows if row.round_trip_ns]
        apart = (
            f"; cache line {min(distances):.0f} to {max(distances):.0f} ns there and back"
            if distances
            else ""
        )
        figure.text(
            0.5,
            0.008,
            f"the same testpmd virtio-user front end, by turns, one core each{apart}",
            ha="center",
            fontsize=8,
            color=_FAINT,
        )
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.savefig(path, format="svg", metadata={"Date": None})
