"""Draw results: step time against activation memory, and first steps. Readable on light and on dark pages."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Record
from benchmarks.results import Run

#: Grey with a contrast of at least 3.9 on white and on near black.
INK = "#7d7d7d"
#: Okabe and Ito's colours that stand out on both; ours is the first.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c00", "#a0522d", "#777777")
_MARKERS = "osD^vPX*h"
_LEFT_OUT = ("forward alone",)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw a panel of time against memory for each setting, and one of the first steps, into an SVG file.

    Raises:
        ValueError: the runs hold nothing that can be drawn.
    """
    settings = _settings(runs)
    firsts = _first_steps(runs)
    panels = len(settings) + bool(firsts)
    if not panels:
        raise ValueError("There is nothing to draw: no run holds step times or first steps that did not fail.")
    with figure(path, panels) as axes:
        styles = styles_of(record["method"] for records in settings.values() for record in records)
        for axis, (title, records) in zip(axes, settings.items(), strict=False):
            _time_against_memory(axis, title, records, styles)
        if firsts:
            _bars(axes[panels - 1], firsts)


@contextlib.contextmanager
def figure(path: Path, panels: int) -> Iterator[list[Any]]:
    """Axes of as many panels, two in a row, that are written to an SVG file at the end of the block."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('Plots need matplotlib, which comes with pip install "dropbp-fx[examples]".') from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "dropbp_fx", "svg.fonttype": "none", "font.size": 9, "text.color": INK,
             "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}  # fmt: skip
    with matplotlib.rc_context(style):
        columns = min(panels, 2)
        rows = -(-panels // columns)
        drawn, grid = pyplot.subplots(
            rows, columns, figsize=(5.2 * columns, 4.2 * rows), squeeze=False, layout="constrained"
        )
        axes = list(grid.flat)
        yield axes[:panels]
        for axis in axes[panels:]:
            axis.set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(drawn)


def _settings(runs: Sequence[Run]) -> dict[str, list[Record]]:
    """Records that may be drawn together: of one run, one suite, one loss."""
    found: dict[tuple[int, str], list[Record]] = {}
    for number, run in enumerate(runs):
        for record in run.figures("steps"):
            if record["method"] not in _LEFT_OUT and record["activation_gib"] > 0:
                key = number, f"{record['suite']}, {record['loss_function']} loss, {run.machine}"
                found.setdefault(key, []).append(record)
    titles = [title for _, title in found]
    return {
        title if titles.count(title) == 1 else f"{title}, run {number + 1}": records
        for (number, title), records in found.items()
    }


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each method, the same in every panel."""
    ordered = sorted(set(names), key=lambda name: (name != "dropbp_fx", name != "torch.compile", name))
    return dict(zip(ordered, zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False), strict=False))


def _time_against_memory(
    axis: Any, title: str, records: Sequence[Record], styles: Mapping[str, tuple[str, str]]
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    mine = {record["method"] for record in records}
    for name, (colour, marker) in ((name, style) for name, style in styles.items() if name in mine):
        points = sorted(
            (record["activation_gib"], record["step_ms"], record["value"])
            for record in records
            if record["method"] == name
        )
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, marker=marker, label=name,
                  markersize=5, linewidth=2.2 if name == "dropbp_fx" else 1.2)  # fmt: skip
        for x, y, value in points:
            if value is not None:
                axis.annotate(f"{value:g}", (x, y), (3, 3), textcoords="offset points", fontsize=7, color=colour)
    axis.set(title=title, xlabel="activation memory, GiB", ylabel="step, ms", xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        side.set_major_formatter(ScalarFormatter())
        side.set_minor_formatter(NullFormatter())
    axis.grid(color=INK, alpha=0.25, which="major")
    axis.legend(frameon=False, fontsize=7)


def _first_steps(runs: Sequence[Run]) -> list[tuple[str, float, float]]:
    """Label, seconds of the first step, and seconds with every variant compiled."""
    return [
        (
            f"{record['method']}\n{record['suite']}, {record['layers']} layers, {'warm' if record['warm'] else 'cold'}",
            record["first_step_s"],
            record["all_variants_s"],
        )
        for run in runs
        for record in run.figures("first step")
    ]


def _bars(axis: Any, firsts: Sequence[tuple[str, float, float]]) -> None:
    labels = [label for label, _, _ in firsts]
    axis.barh(
        labels, [whole for _, _, whole in firsts], color=_COLOURS[1], alpha=0.45, label="with every variant compiled"
    )
    axis.barh(labels, [first for _, first, _ in firsts], color=_COLOURS[1], label="first step")
    axis.invert_yaxis()
    axis.set(title="first step", xlabel="seconds")
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(color=INK, alpha=0.25, axis="x")
    axis.legend(frameon=False, fontsize=7)
