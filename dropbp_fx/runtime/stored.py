"""Refuse a loss that depends on what a dropped branch hands to the graph's outputs.

Keys and values for a cache, or attention weights, leave a branch beside its output. A forward that drops the branch saves
nothing for their gradients either, since hardly any loss reads them. In an eager model whose branch is detached they would
have gradients; one that arrives here in the backward is therefore an error, not silently lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class StoredValue(NamedTuple):
    """A value that a graph returns and whose gradient a pattern drops.

    Attributes:
        slot: where it is.
        sources: slots of the graph's inputs that would get a gradient from it.
    """

    slot: int
    sources: tuple[int, ...]


class StoredValues:
    """What one pattern's forwards return without a gradient, that of a detached branch would have one.

    Args:
        stored: those values.
    """

    def __init__(self, stored: Sequence[StoredValue]) -> None:
        self._slots = tuple(value.slot for value in stored)
        self._sources = tuple(dict.fromkeys(slot for value in stored for slot in value.sources))

    def leaves(self, values: Sequence[Any]) -> list[Tensor]:
        """What the refusal is to be connected to, from the values before a forward: whoever asks for the gradients of
        some parameters alone must come by. Engines for several processes look for parameters by walking up from the
        outputs, and must not find those: a leaf of its own serves ``backward()``.
        """
        if dist.is_available() and dist.is_initialized():
            return []
        return [values[slot] for slot in self._sources]

    def refuse_gradients(self, values: list[Any], leaves: Sequence[Tensor]) -> None:
        """Let a gradient that arrives at one of the values be an error."""
        own = torch.zeros((), device="cpu", requires_grad=True)
        marked = _Refusal.apply([values[slot] for slot in self._slots], own, *leaves)
        for slot, value in zip(self._slots, marked, strict=True):
            values[slot] = value


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: list[Tensor], *leaves: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return tuple([value.detach() for value in values])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if any(gradient is not None for gradient in gradients):
            raise RuntimeError(
                "The loss depends on a value that a dropped branch hands to the compiled model's outputs, such as keys and "
                "values for a cache or attention weights, and the gradient of that value is dropped with the branch. "
                "Compile the function that computes this part of the loss together with the model, or keep the "
                "branches it reads: backend.rates[name] = 0."
            )
        return (None,) * len(ctx.needs_input_grad)
