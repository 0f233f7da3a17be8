"""What an explanation says: the branches of a model, what each costs, and what dropping saves at any rate."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropbp_fx.captured import CapturedGraph
from dropbp_fx.inspect.costs import CostModel, PatternCost
from dropbp_fx.inspect.patterns import sample_patterns
from dropbp_fx.policy.branches import Branch
from dropbp_fx.policy.drop_policy import checked_rate
from dropbp_fx.policy.patterns import Pattern, pattern_name
from dropbp_fx.policy.units import Granularity

if TYPE_CHECKING:
    import pandas as pd

    from dropbp_fx.inspect.graph_view import GraphView

#: Patterns that a prediction averages over.
PATTERNS = 32
#: Rates at which a report shows predictions.
RATES = tuple(step / 20 for step in range(20))


@dataclasses.dataclass(frozen=True)
class ExplainedBranch:
    """One residual branch and what it costs.

    FLOPs are counted with the formulas of :mod:`torch.utils.flop_counter`: matrix products, convolutions and attention.

    Attributes:
        index: its position in execution order, the number :meth:`DropBPBackend.pinned` takes.
        name: unique and readable, from the module tree.
        layer: the layer it belongs to.
        kind: kind of work: "attention", "MLP", "convolution", ... (:class:`dropbp_fx.graph.describe.BranchFacts`).
        graph: which of the model's graphs it is in.
        region: which region of that graph; parallel branches share one.
        trainable: whether it has parameters that require a gradient.
        droppable: whether a gradient reaches it. If not, it is never dropped and costs no backward, and the figures below
            are 0 except ``parameters``.
        forward_flops: of its forward, which always runs.
        backward_flops: of its backward: what a step that drops it saves.
        saved_bytes_kept: what its region saves for the backward, everything in the region being kept; values that come
            from other regions not counted.
        saved_bytes_dropped: the same with this branch dropped.
        gradient_nodes: operators of its region's backward, everything being kept.
        gradient_nodes_pruned: how many of them dropping this branch removes.
        parameters: elements of the parameters it reads.
        trainable_parameters: those of them that require a gradient.
        rate: its drop rate, in [0, 1).
        sensitivity: as the policy has measured it; ``None`` where it has not.
    """

    index: int
    name: str
    layer: str
    kind: str
    graph: int
    region: int
    trainable: bool
    droppable: bool
    forward_flops: int
    backward_flops: int
    saved_bytes_kept: int
    saved_bytes_dropped: int
    gradient_nodes: int
    gradient_nodes_pruned: int
    parameters: int
    trainable_parameters: int
    rate: float
    sensitivity: float | None


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a step is predicted to cost, without the optimizer.

    Attributes:
        rate: the drop rate asked for.
        dropped: the share of droppable branches that is dropped; lower than ``rate`` where one branch has to be kept.
        forward_flops: of the forward, which is the same at every rate.
        backward_flops: of the backward, mean over patterns.
        saved_bytes: what is saved for the backward at the end of the forward, mean over patterns; parameters, graph
            inputs and the transient memory of single operators are not counted.
        relative_cost: forward and backward FLOPs, divided by those at rate 0.
        relative_memory: ``saved_bytes`` divided by that at rate 0.
    """

    rate: float
    dropped: float
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    relative_cost: float
    relative_memory: float


class Explanation:
    """What would be dropped in a model, what that saves, and why. Made by :func:`dropbp_fx.explain`.

    Attributes:
        model: class name of the model, or "backend" for an explanation of a live backend.
        branches: the residual branches in execution order.
        rejected: adds that were looked at and not taken for a branch: pairs (name of the graph node, reason).
        shortfall: why less is dropped than is asked for, as far as it is known: a sentence or two for each cause, as in
            :class:`LessDroppedWarning`.
        granularity: "branch" or "layer": what is dropped as a whole.
        rate: the drop rate of the backend that was explained.
        inner: the inner compiler for which saved bytes are predicted.
        pattern: the pattern of the backend that was explained, whose draws predictions are means over.
        parameters: elements of all parameters of the model; ``None`` for a live backend.
        trainable_parameters: those of them that require a gradient.
        graphs: how many training graphs Dynamo makes of the model.
        regions: how many regions these have.
        unique_regions: how many of them differ; the others share their code.
        variants: how many variants :meth:`DropBPBackend.warmup` compiles.
    """

    def __init__(
        self,
        *,
        model: str,
        branches: Sequence[ExplainedBranch],
        graphs: Sequence[CapturedGraph],
        costs: CostModel,
        granularity: Granularity,
        rate: float,
        inner: str,
        pattern: Pattern,
        parameters: int | None,
        trainable_parameters: int | None,
        shortfall: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.branches = tuple(branches)
        self.rejected = tuple(item for graph in graphs for item in graph.rejected)
        self.shortfall = tuple(shortfall)
        self.granularity = granularity
        self.rate = rate
        self.inner = inner
        self.pattern = pattern_name(pattern)
        self._pattern = pattern
        self.parameters = parameters
        self.trainable_parameters = trainable_parameters
        self.graphs = len(graphs)
        self.regions = sum(len(graph.program.regions) for graph in graphs)
        self.unique_regions = len({variants for graph in graphs for variants in graph.variants})
        self._graphs = tuple(graphs)
        self._costs = costs
        self._predictions: dict[float, Prediction] = {}

    @functools.cached_property
    def variants(self) -> int:
        """How many variants :meth:`DropBPBackend.warmup` compiles."""
        return len(frozenset().union(*(self._costs.variants_to_compile(graph) for graph in self._graphs)))

    @property
    def droppable(self) -> tuple[ExplainedBranch, ...]:
        """The branches that can be dropped."""
        return tuple(branch for branch in self.branches if branch.droppable)

    def branch(self, chosen: int | str) -> ExplainedBranch:
        """The branch of that index or name.

        Raises:
            KeyError: there is none.
        """
        for branch in self.branches:
            if chosen in (branch.index, branch.name):
                return branch
        raise KeyError(
            f"There is no branch {chosen!r}: the model has {len(self.branches)} residual branches. "
            "[branch.name for branch in explanation.branches] lists them."
        )

    def cost_of(self, dropped: Collection[int | str]) -> PatternCost:
        """FLOPs and saved bytes of a step that drops exactly these branches, given by index or name.

        Raises:
            KeyError: there is no such branch.
        """
        indices = {self.branch(item).index for item in dropped}
        total = PatternCost(0, 0, 0)
        all_before = True
        for graph in self._graphs:
            numbers = frozenset(number for number, index in enumerate(graph.indices) if index in indices)
            total += self._costs.pattern(graph, numbers, below=graph.below and all_before)
            all_before = all_before and len(numbers) == len(graph.indices)
        return total

    def predict(self, rate: float) -> Prediction:
        """What a step costs when every branch is dropped at ``rate``: the mean over draws of the backend's pattern.

        The draws are the same for every call. The variants of the regions are traced when the first prediction is
        made (seconds), later ones are quick.

        Raises:
            TypeError, ValueError: ``rate`` is no number in [0, 1).
        """
        rate = checked_rate(rate)
        if rate not in self._predictions:
            full = self.cost_of(())
            patterns = self._patterns(rate)
            costs = [self.cost_of(pattern) for pattern in patterns]
            backward = statistics.fmean(cost.backward_flops for cost in costs)
            saved = statistics.fmean(cost.saved_bytes for cost in costs)
            flops = full.forward_flops + full.backward_flops
            self._predictions[rate] = Prediction(
                rate=rate,
                dropped=statistics.fmean(len(pattern) for pattern in patterns) / max(len(self.droppable), 1),
                forward_flops=full.forward_flops,
                backward_flops=round(backward),
                saved_bytes=round(saved),
                relative_cost=(full.forward_flops + backward) / flops if flops else 1.0,
                relative_memory=saved / full.saved_bytes if full.saved_bytes else 1.0,
            )
        return self._predictions[rate]

    def _patterns(self, rate: float) -> tuple[frozenset[int], ...]:
        if not rate:
            return (frozenset(),)
        branches = [
            Branch(branch.index, branch.name, branch.layer, rate, branch.trainable, True, branch.backward_flops)
            for branch in self.droppable
        ]
        return sample_patterns(branches, self._pattern, self.granularity, PATTERNS)

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
        from dropbp_fx.inspect import draw

        draw.render(*self._picture(layer, dropped, detail), Path(path), detail=detail)

    def to_svg(self, *, layer: str | None = None, dropped: Collection[int | str] = (), detail: bool = False) -> str:
        """What :meth:`draw` draws, as SVG text to put into a page."""
        from dropbp_fx.inspect import draw

        return draw.svg(*self._picture(layer, dropped, detail), detail=detail)

    def layers(self) -> tuple[str, ...]:
        """The layers that hold a droppable branch, in execution order."""
        return tuple(dict.fromkeys(branch.layer for branch in self.droppable))

    def _picture(
        self, layer: str | None, dropped: Collection[int | str], detail: bool
    ) -> tuple[GraphView, dict[int, str], str]:
        from dropbp_fx.inspect.graph_view import view_layer

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
        from dropbp_fx.inspect import heatmap

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
        from dropbp_fx.inspect import report

        Path(path).write_text(report.html(self, layer), encoding="utf-8")

    # ---- tables ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        from dropbp_fx.inspect import tables

        return tables.text(self)

    def __repr__(self) -> str:
        return f"<Explanation of {self.model}: {len(self.branches)} branches, {self.unique_regions} unique regions>"

    def to_markdown(self) -> str:
        """The tables of ``print(explanation)`` in GitHub's Markdown."""
        from dropbp_fx.inspect import tables

        return tables.text(self, style="github")

    def to_json(self, path: str | Path | None = None, *, rates: Iterable[float] = RATES) -> str:
        """Every figure as JSON text, also written to ``path`` if one is given; predictions at ``rates``."""
        from dropbp_fx.inspect import tables

        text = tables.json_text(self, rates)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_dataframe(self) -> pd.DataFrame:
        """The branches as a pandas DataFrame, a row for each, columns as the fields of :class:`ExplainedBranch`.

        Raises:
            ImportError: pandas is not installed.
        """
        from dropbp_fx.inspect import tables

        return tables.dataframe(self)

    def as_dict(self, rates: Iterable[float] = RATES) -> dict[str, Any]:
        """What :meth:`to_json` writes, in plain Python types."""
        from dropbp_fx.inspect import tables

        return tables.as_dict(self, rates)
