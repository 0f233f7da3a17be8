"""The figures of an explanation, as plain data: of a branch, and of a step at some rate."""

from __future__ import annotations

import dataclasses

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
