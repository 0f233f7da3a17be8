"""A residual branch in a graph, and an add that is none."""

from __future__ import annotations

import dataclasses

from torch import fx

from dropbp_fx.graph.residual_forms import is_fused
from dropbp_fx.graph.work import does_work


@dataclasses.dataclass(frozen=True)
class ResidualBranch:
    """One residual branch, located in a graph.

    Attributes:
        graph: the graph that holds it: the top graph, or the body of an activation checkpoint.
        skip: the node of ``x``, the stream the branch reads and is added to.
        outputs: the node of ``h`` and the add that takes it; several where ``h`` is itself a sum whose terms are added
            to the stream one by one (LoRA's update beside the frozen layer's output), or a product whose factors are
            handed to the add. See :mod:`~dropbp_fx.graph.residual_forms` for what takes ``h`` where it is no plain add.
        addition: the outermost add of the (possibly parallel) sum that ``h`` goes into.
        body: nodes from after ``skip`` to ``output``: descendants of the one and ancestors of the other, branches of other
            streams left out, and what is computed on the way for the branch alone (a cross-attention's keys and values of
            the encoder's output).
        escapes: pairs (node of the body, user outside of it) through which a value that the body's work reads is handed to
            the graph's outputs as it is, such as a key/value cache.
        anchor: the node of the *top* graph that holds the branch: ``addition``, or the checkpoint that contains it.
    """

    graph: fx.Graph
    skip: fx.Node
    outputs: tuple[tuple[fx.Node, fx.Node], ...]
    addition: fx.Node
    body: tuple[fx.Node, ...]
    escapes: tuple[tuple[fx.Node, fx.Node], ...]
    anchor: fx.Node

    def in_top_graph(self, node: fx.Node) -> fx.Node | None:
        """The node of the top graph that ``node`` of the branch's graph stands for, ``None`` if it is made inside of a
        checkpoint (or of one checkpoint inside another).
        """
        if self.graph is self.anchor.graph:
            return node
        inputs = [placeholder for placeholder in self.graph.nodes if placeholder.op == "placeholder"]
        operands = self.anchor.args[1:]
        if node not in inputs or len(inputs) != len(operands):
            return None
        operand = operands[inputs.index(node)]
        return operand if isinstance(operand, fx.Node) else None

    @property
    def readers(self) -> tuple[fx.Node, ...]:
        """The body, and an add that multiplies as well (``addmm``): what may read the branch's parameters."""
        return (*self.body, *(node for node in dict.fromkeys(user for _, user in self.outputs) if is_fused(node)))

    @property
    def work(self) -> tuple[fx.Node, ...]:
        """The branch's matrix products, convolutions and the like, in execution order."""
        return tuple(node for node in self.readers if does_work(node))


@dataclasses.dataclass(frozen=True)
class RejectedAdd:
    """An add of two equally shaped activations that is no residual branch, and the reason."""

    addition: fx.Node
    reason: str


@dataclasses.dataclass(frozen=True)
class BranchSearch:
    """What :func:`find_branches` found: branches in execution order, and adds it looked at and did not take."""

    branches: tuple[ResidualBranch, ...]
    rejected: tuple[RejectedAdd, ...]
