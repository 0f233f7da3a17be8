"""Keep gradients that do not exist apart from gradients that are zero.

A compiled graph with several outputs computes its backward with zeros for the outputs that nobody differentiated, and
so turns ``None`` gradients into zeros: of an encoder whose every cross-attention is dropped, for one, because Hugging
Face returns the encoder's output beside the loss. Which outputs the caller uses is known in the backward only; a hook on
the region's autograd node then takes back the gradients that no differentiated output leads to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dropbp_fx.graph.gradflow import GradientFlow


class UndefinedGradients:
    """Takes back the zero gradients of one training variant.

    Args:
        flow: the region's gradient flow.
        dropped: labels of the gates the variant drops.
        live: outputs that may receive a gradient.
    """

    def __init__(self, flow: GradientFlow, dropped: frozenset[int], live: frozenset[int]) -> None:
        self._flow = flow
        self._dropped = dropped
        self._live = sorted(live)
        self._input_of_edge: dict[int, int] | None = None

    def reached(self, outputs: Iterable[int]) -> frozenset[int]:
        """The inputs that get a gradient where only these outputs have one."""
        return frozenset().union(*(self._flow.sources(output, self._dropped) for output in outputs))

    def watch(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Hook the autograd node that made ``outputs`` from ``inputs``."""
        nodes = {outputs[j].grad_fn for j in self._live}
        if len(nodes) != 1 or None in nodes:
            return  # some output is a view of an input: autograd itself carries its gradient
        (node,) = nodes
        positions = [(outputs[j].output_nr, j) for j in self._live]
        if self._input_of_edge is None:
            self._input_of_edge = _match_edges(node, inputs)
        input_of_edge = self._input_of_edge

        def take_back(
            grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
        ) -> tuple[Tensor | None, ...] | None:
            defined = [j for position, j in positions if grad_outputs[position] is not None]
            if len(defined) == len(positions):
                return None
            reached = self.reached(defined)
            return tuple(
                None if index in input_of_edge and input_of_edge[index] not in reached else gradient
                for index, gradient in enumerate(grad_inputs)
            )

        node.register_hook(take_back)


def _match_edges(node: Any, inputs: Sequence[Any]) -> dict[int, int]:
    """Which input each of an autograd node's gradients goes to."""
    by_edge: dict[tuple[Any, int], int] = {}
    for index, value in enumerate(inputs):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            edge = torch.autograd.graph.get_gradient_edge(value)
            by_edge[edge.node, edge.output_nr] = index
    return {
        position: by_edge[edge]
        for position, edge in enumerate(node.next_functions)
        if edge[0] is not None and edge in by_edge
    }
