"""The gate: an identity operator that marks a value, and its gradient, in a joint graph.

``y = gate(x, label)`` leaves the value alone and puts the nodes ``dropbp_fx.gate`` and ``dropbp_fx.gate_backward`` into
the joint forward/backward graph that AOTAutograd traces. :mod:`dropbp_fx.graph.prune` looks for them by label: a dropped
gate's gradient is zero, every other gate is removed. No gate is left when a variant runs.

A label is the number of the branch within its region, so that equal layers have equal graphs. The gates of values that
leave a branch for the graph's outputs are labelled by its complement, ``~number``: they are dropped with the branch
(:func:`drops`), but what is lost there would not be lost by detaching the branch's output.

``y = scale_gradient(x, scale)`` stands beside a gate where the gradients of kept branches are rescaled: the scale is an
input of the graph, so that rates may change without recompiling.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("dropbp_fx::gate", mutates_args=())
def gate(x: Tensor, label: int) -> Tensor:
    """Return ``x`` (a copy: a functional operator may not alias its input)."""
    return x.clone()


@torch.library.custom_op("dropbp_fx::gate_backward", mutates_args=())
def gate_backward(grad: Tensor, label: int) -> Tensor:
    """The vector-Jacobian product of :func:`gate`: the gradient unchanged."""
    return grad.clone()


@gate.register_fake
def _gate_fake(x: Tensor, label: int) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


@gate_backward.register_fake
def _gate_backward_fake(grad: Tensor, label: int) -> Tensor:
    return torch.empty_strided(grad.size(), grad.stride(), dtype=grad.dtype, device=grad.device)


def _remember_label(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.dropbp_gate_label = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return gate_backward(grad, ctx.dropbp_gate_label), None


gate.register_autograd(_backward, setup_context=_remember_label)

GATE = torch.ops.dropbp_fx.gate.default
GATE_BACKWARD = torch.ops.dropbp_fx.gate_backward.default


@torch.library.custom_op("dropbp_fx::scale_gradient", mutates_args=())
def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``x``; its gradient is multiplied by ``scale``, a tensor of no dimensions."""
    return x.clone()


@scale_gradient.register_fake
def _scale_gradient_fake(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)


def _remember_scale(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_scaled(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (scale,) = ctx.saved_tensors
    return grad * scale, None


scale_gradient.register_autograd(_backward_scaled, setup_context=_remember_scale)

SCALE_GRADIENT = torch.ops.dropbp_fx.scale_gradient.default


@torch.library.custom_op("dropbp_fx::hooked", mutates_args=())
def hooked(changed: Tensor, grad: Tensor) -> Tensor:
    """Return ``changed``, what a tensor's hook made of its gradient ``grad``: where that is zero, the hook does not run."""
    return changed.clone()


@hooked.register_fake
def _hooked_fake(changed: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_strided(changed.size(), changed.stride(), dtype=changed.dtype, device=changed.device)


HOOKED = torch.ops.dropbp_fx.hooked.default

#: Operators whose value is their first argument; none is left in a compiled variant's forward.
IDENTITIES = frozenset({GATE, SCALE_GRADIENT})


def drops(dropped: Collection[int], label: int) -> bool:
    """Whether a gate's gradient is dropped with the branches ``dropped`` (numbers within the region)."""
    return (label if label >= 0 else ~label) in dropped


def gate_label_of(grad_fn: Any) -> int | None:
    """The label of an autograd node that a gate made, ``None`` for every other node."""
    return getattr(grad_fn, "dropbp_gate_label", None)
