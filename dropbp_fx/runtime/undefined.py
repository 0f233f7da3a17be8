"""Keep gradients that do not exist apart from gradients that are zero.

A compiled graph with several outputs computes its backward with zeros for the outputs that nobody differentiated, and
so turns ``None`` gradients into zeros: of an encoder whose every cross-attention is dropped, for one, because Hugging
Face returns the encoder's output beside the loss. Which outputs the caller uses is known in the backward only; a hook on
the region's autograd node then takes back the gradients that no differentiated output leads to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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

    def reached(self, outputs: Iterable[int]) -> frozenset[int]:
        """The inputs that get a gradient where only these outputs have one."""
        return frozenset().union(*(self._flow.sources(output, self._dropped) for output in outputs))

    def watch(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Hook the autograd node that made ``outputs`` from ``inputs``, and those of views among them."""
        outside = {edge.node for edge in map(_edge_of, inputs) if edge is not None}
        made: dict[Any, list[tuple[int, int]]] = {}
        for j in self._live:
            node, at = _maker(outputs[j], outside)
            if node is not None:
                made.setdefault(node, []).append((at, j))
        for node, positions in made.items():
            self._hook(node, positions, _match_edges(node, inputs))

    def _hook(self, node: Any, positions: Sequence[tuple[int, int]], input_of_edge: dict[int, int]) -> None:
        """Take back what ``node`` makes of undefined gradients of the outputs at ``positions`` among its own.

        A node runs with no gradient at all if what is above it hands on none.
        """

        def take_back(
            grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
        ) -> tuple[Tensor | None, ...] | None:
            defined = [j for at, j in positions if grad_outputs[at] is not None]
            if len(defined) == len(positions):
                return None
            reached = self.reached(defined)
            return tuple(
                None if index in input_of_edge and input_of_edge[index] not in reached else gradient
                for index, gradient in enumerate(grad_inputs)
            )

        node.register_hook(take_back)


def _edge_of(value: Any) -> Any:
    """The gradient edge of an input, ``None`` if it requires no gradient."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return torch.autograd.graph.get_gradient_edge(value)
    return None


def _maker(output: Tensor, outside: Collection[Any]) -> tuple[Any, int]:
    """The autograd node that made an output, below those of views that it was seen through, and the number of its output.

    ``outside`` are the nodes of the inputs: where an output is a view of one, autograd carries its gradient past the region.
    """
    node, at = output.grad_fn, output.output_nr
    while node is not None and len(node.next_functions) == 1:
        below, number = node.next_functions[0]
        if below is None or below in outside:
            break
        node, at = below, number
    return node, at


def _match_edges(node: Any, inputs: Sequence[Any]) -> dict[int, int]:
    """Which input each of an autograd node's gradients goes to."""
    by_edge: dict[tuple[Any, int], int] = {}
    for index, value in enumerate(inputs):
        edge = _edge_of(value)
        if edge is not None:
            by_edge[edge.node, edge.output_nr] = index
    return {
        position: by_edge[edge]
        for position, edge in enumerate(node.next_functions)
        if edge[0] is not None and edge in by_edge
    }
