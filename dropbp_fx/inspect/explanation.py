"""The object that an explanation is to its user: what was found, and every way to show it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropbp_fx.inspect import draw, heatmap, report, tables
from dropbp_fx.inspect.figures import RATES
from dropbp_fx.inspect.findings import Findings
from dropbp_fx.inspect.graph_view import GraphView, view_layer

if TYPE_CHECKING:
    import pandas as pd


class Explanation(Findings):
    """What would be dropped in a model, what that saves, and why. Made by :func:`dropbp_fx.explain`.

    Attributes:
        model: class name of the model, or "backend" for an explanation of a live backend.
        given: the model inside of adapters and wrappers, and what it was given: inputs, dtypes, what is trained, rate,
            policy and device.
        branches: the residual branches in execution order.
        rejected: adds that were looked at and not taken for a branch: pairs (name of the graph node, reason).
        shortfall: why less is dropped than is asked for, as far as it is known: a sentence or two for each cause, as in
            :class:`LessDroppedWarning`.
        granularity: "branch" or "layer": what is dropped as a whole.
        rate: the drop rate of the backend that was explained.
        inner: the inner compiler for which saved bytes are predicted.
        pattern: the pattern of the backend that was explained, whose samples predictions are means over.
        parameters: elements of all parameters of the model; ``None`` for a live backend.
        trainable_parameters: those of them that require a gradient.
        graphs: how many training graphs Dynamo makes of the model.
        regions: how many regions these have.
        unique_regions: how many of them differ; the others share their code.
        variants: how many variants :meth:`DropBPBackend.warmup` compiles.
    """

    # ---- pictures --------------------------------------------------------------------------------------------------

    def draw(
        self,
        path: str | Path,
        *,
        layer: str | None = None,
        dropped: Collection[int | str] = (),
        detail: bool = False,
    ) -> None:
        """Draw a layer's joint graph, forward and backward side by side, each branch a colour, pruned nodes hollow.

        Args:
            path: ends in .svg, .png or .pdf (these need Graphviz), or .dot (text).
            layer: ``ExplainedBranch.layer`` of the layer to draw; the first one with a droppable branch if not given.
            dropped: the pattern, by index or name; branches of other layers do not matter.
            detail: also show operators that only move data (views, transposes, casts), and edges to what reads saved values.

        Raises:
            ImportError: pydot is not installed.
            KeyError: there is no such layer or branch.
            ValueError: nothing can be drawn: no branch is droppable, or the path has another ending.
            RuntimeError: Graphviz is not installed.
        """
        draw.render(*self._picture(layer, dropped, detail), Path(path), detail=detail)

    def to_svg(self, *, layer: str | None = None, dropped: Collection[int | str] = (), detail: bool = False) -> str:
        """What :meth:`draw` draws, as SVG text to put into a page."""
        return draw.svg(*self._picture(layer, dropped, detail), detail=detail)

    def _picture(
        self, layer: str | None, dropped: Collection[int | str], detail: bool
    ) -> tuple[GraphView, dict[int, str], str]:
        layers = self.layers()
        if not layers:
            raise ValueError(f"{self.model} has no droppable branch, so there is no pruned graph to draw.")
        layer = layers[0] if layer is None else layer
        if layer not in layers:
            raise KeyError(
                f"There is no layer {layer!r} with a droppable branch; the first ones are {', '.join(layers[:3])}."
            )
        mine = [branch for branch in self.droppable if branch.layer == layer]
        graph = self._graphs[mine[0].graph]
        mine = [branch for branch in mine if branch.graph == mine[0].graph]
        chosen = {self.branch(item).index for item in dropped}
        numbers = {number for number, index in enumerate(graph.indices) if index in chosen}
        view = view_layer(graph, sorted({branch.region for branch in mine}), numbers, detail=detail)
        gone = [branch.name for branch in mine if branch.index in chosen]
        title = f"{layer}: " + (f"{', '.join(gone)} dropped" if gone else "nothing dropped")
        return view, {branch.index: branch.name for branch in mine}, title

    def draw_heatmap(self, path: str | Path, value: str = "backward_flops") -> None:
        """Draw a heat map of layers x branches to an image file.

        Args:
            path: an image file of a format that matplotlib writes.
            value: "rate", "sensitivity", "forward_flops", "backward_flops", "saved_bytes" or "parameters".

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there is no such value, or none is known.
        """
        heatmap.draw(self, Path(path), value)

    def save_html(self, path: str | Path, *, layer: str | None = None) -> None:
        """Write one self-contained page: summary, a rate slider that shows predicted cost and memory, the branches, a heat
        map, and the joint graph of a layer with its variants to switch between (where Graphviz is installed).

        Args:
            path: where to.
            layer: the layer whose graph is shown; the first one with a droppable branch if not given.

        Raises:
            ImportError: jinja2 or pydot is not installed.
            KeyError: there is no such layer.
        """
        page = report.html(self, layer, self.to_svg)
        Path(path).write_text(page, encoding="utf-8")

    # ---- tables ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return tables.text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {self.model}: {len(self.branches)} branches, {self.unique_regions} unique regions>"

    def to_markdown(self) -> str:
        """The tables of ``print(explanation)`` in GitHub's Markdown."""
        return tables.text(self, style="github")

    def to_json(self, path: str | Path | None = None, *, rates: Iterable[float] = RATES) -> str:
        """Every figure as JSON text, also written to ``path`` if one is given; predictions at ``rates``."""
        text = tables.json_text(self, rates)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_dataframe(self) -> pd.DataFrame:
        """The branches as a pandas DataFrame, a row for each, columns as the fields of :class:`ExplainedBranch`.

        Raises:
            ImportError: pandas is not installed.
        """
        return tables.dataframe(self)

    def as_dict(self, rates: Iterable[float] = RATES) -> dict[str, Any]:
        """What :meth:`to_json` writes, in plain Python types."""
        return tables.as_dict(self, rates)
