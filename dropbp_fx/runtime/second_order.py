"""Let a backward run under ``create_graph=True``, and refuse to differentiate what it gave.

Compiled code has no second derivative. Gradients that it computed while a graph was asked for are right; the error comes
from whoever differentiates them, as under plain ``torch.compile``. Autograd runs only what leads to where gradients are
wanted, so the node that refuses has to lead to everything that the gradients depend on: it would be passed over, and zeros
taken for the second derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def way_to(values: Sequence[Tensor]) -> Tensor | None:
    """An empty tensor from which autograd gets to those of ``values`` that are no leaves, none of which it keeps alive."""
    inner = [value for value in values if value.grad_fn is not None]
    return _Way.apply(*inner) if inner else None  # type: ignore[no-untyped-call]


def refusing_second_derivatives(
    gradients: Sequence[Tensor | None], node: Any, way: Tensor | None, tangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients, such that a backward through one of them raises.

    Args:
        gradients: what a backward computed.
        node: the autograd node that it is the backward of.
        way: leads to the values that the node read, leaves aside.
        tangents: the gradients that the backward took.
    """
    leaves = [getattr(following, "variable", None) for following, _ in node.next_functions]
    sources = [value for value in (way, *leaves, *tangents) if value is not None and value.requires_grad]
    present = [gradient for gradient in gradients if gradient is not None]
    with torch.enable_grad():
        marked = iter(_NotTwice.apply(len(sources), *sources, *present))  # type: ignore[no-untyped-call]
    return [None if gradient is None else next(marked) for gradient in gradients]


class _Way(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        return tuple(tensor.detach() for tensor in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "A compiled model cannot be differentiated twice: backward() and grad() with create_graph=True give its first "
            "derivatives only. Compute second derivatives with the eager model."
        )
