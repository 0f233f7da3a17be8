"""Heat maps: of an explanation's layers x branches, and of the patterns that a run drew."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dropbp_fx.inspect.figures import ExplainedBranch
from dropbp_fx.inspect.findings import Findings

#: What a heat map can show, and what its scale is called.
VALUES = {
    "rate": "drop rate",
    "sensitivity": "sensitivity",
    "forward_flops": "forward FLOPs",
    "backward_flops": "backward FLOPs",
    "saved_bytes": "bytes saved for the backward",
    "parameters": "parameters",
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Layers x branches.

    Attributes:
        layers: names of the rows.
        columns: what the branches of a layer are called: their names within the layer.
        cells: for each row and column the branch, ``None`` where the layer has none.
    """

    layers: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[ExplainedBranch | None, ...], ...]


def grid(findings: Findings) -> Grid:
    """Arrange the branches of an explanation by layer and by their name within it."""
    layers: dict[str, dict[str, ExplainedBranch]] = {}
    for branch in findings.branches:
        row = layers.setdefault(branch.layer, {})
        column = branch.name.removeprefix(f"{branch.layer}.") or branch.kind
        row[column if column not in row else f"{column} {len(row)}"] = branch
    columns = list(dict.fromkeys(column for row in layers.values() for column in row))
    cells = tuple(tuple(row.get(column) for column in columns) for row in layers.values())
    return Grid(tuple(layers), tuple(columns), cells)


def figure_of(branch: ExplainedBranch, value: str) -> float | None:
    """One figure of a branch, under the names of :data:`VALUES`."""
    if value == "saved_bytes":
        return float(branch.saved_bytes_kept - branch.saved_bytes_dropped)
    found = getattr(branch, value)
    return None if found is None else float(found)


def draw(findings: Findings, path: Path, value: str) -> None:
    """Draw the heat map of one figure to ``path``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such figure, or no branch has it.
    """
    if value not in VALUES:
        raise ValueError(f"A heat map shows one of {', '.join(map(repr, VALUES))}, not {value!r}.")
    table = grid(findings)
    figures = [[None if cell is None else figure_of(cell, value) for cell in row] for row in table.cells]
    if not any(figure is not None for row in figures for figure in row):
        raise ValueError(
            f"No branch has a {value}, so there is nothing to show. "
            + (
                "Let a policy measure it first."
                if value == "sensitivity"
                else "Explain a model with residual branches."
            )
        )
    pyplot = _pyplot()
    height = 1.2 + 0.22 * len(table.layers)
    canvas, axes = pyplot.subplots(figsize=(2.6 + 1.1 * len(table.columns), height), layout="constrained")
    numbers = [[float("nan") if figure is None else figure for figure in row] for row in figures]
    image = axes.imshow(numbers, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(table.columns)), table.columns, rotation=20, ha="right")
    step = max(1, len(table.layers) // 40)
    axes.set_yticks(range(0, len(table.layers), step), table.layers[::step])
    canvas.colorbar(image, label=VALUES[value])
    axes.set_title(findings.given.model)
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)


def draw_patterns(patterns: Sequence[frozenset[int]], names: Mapping[int, str], path: Path) -> None:
    """Draw a run's patterns, a column for each forward and a row for each branch, to ``path``.

    Args:
        patterns: for each forward the indices of the branches that it dropped.
        names: the name of each branch, by index.
        path: where to.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no forward was recorded.
    """
    if not patterns:
        raise ValueError(
            "No training forward was recorded, so there is no history to draw. Train within record_patterns()."
        )
    pyplot = _pyplot()
    rows: Sequence[Sequence[bool]] = [[index in pattern for pattern in patterns] for index in sorted(names)]
    width = min(16.0, 3 + 0.08 * len(patterns))
    canvas, axes = pyplot.subplots(figsize=(width, 1.2 + 0.2 * len(rows)), layout="constrained")
    axes.imshow(rows, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [names[index] for index in sorted(names)], fontsize=8)
    axes.set(xlabel="training forward", title="dropped branches (dark)")
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"A heat map needs matplotlib ({error}). Install the extra: pip install 'dropbp-fx[inspect]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
