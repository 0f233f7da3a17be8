"""Draw held-out loss against time: each method beside the curve of the baseline."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Record
from benchmarks.plots import INK, figure, styles_of
from benchmarks.quality.frontier import Result, results_by_task
from benchmarks.quality.methods import EXACT


def draw(records: Sequence[Record], path: Path, *, by_flops: Container[str] = ()) -> None:
    """Draw a panel for each task into an SVG file; bars are standard deviations over seeds.

    Args:
        records: of any kind.
        path: of the file.
        by_flops: sizes in whose panels FLOPs stand for time.

    Raises:
        ValueError: the records hold no task with runs of "none".
    """
    tasks = [
        (task, [result for result in found if result.method not in EXACT and result.time is not None])
        for task, found in results_by_task(records, by_flops=by_flops)
    ]
    if not tasks:
        raise ValueError("There is nothing to draw: no task has a run of the method 'none' with all of its steps.")
    styles = styles_of(result.method for _, found in tasks for result in found if result.method != "none")
    with figure(path, len(tasks)) as axes:
        for axis, (task, found) in zip(axes, tasks, strict=True):
            for name in ("none", *styles):
                mine = sorted((result for result in found if result.method == name), key=lambda r: r.time or 0.0)
                if mine:
                    colour, marker = styles.get(name, (INK, "o"))
                    _line(axis, name, mine, colour, marker)
            timed = found[0].step_ms is not None
            axis.set(title=task, xlabel="time of the run" if timed else "FLOPs of the run", ylabel="held-out loss")
            axis.grid(color=INK, alpha=0.25)
            axis.legend(frameon=False, fontsize=7)


def _line(axis: Any, name: str, results: Sequence[Result], colour: str, marker: str) -> None:
    axis.errorbar(
        [result.time for result in results],
        [result.loss for result in results],
        yerr=[result.spread or 0.0 for result in results],
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=2.2 if name == "none" else 1.0,
        label="baseline" if name == "none" else name,
    )
    if name == "none":
        return
    for result in results:
        axis.annotate(f"{result.rate:g}", (result.time, result.loss), (4, 3), textcoords="offset points", fontsize=7,
                      color=colour)  # fmt: skip
