"""Hooks on tensors that a forward registers (``h.register_hook(f)``), as Dynamo traces them into a graph.

Dynamo's own operator registers the hook while the joint graph is traced, so that what it does to the gradient becomes
part of that graph. It takes for granted that the tensor requires a gradient. In a variant that drops the branch, or trains
nothing before it, the tensor may not, and its hook then does not run, as in an eager model whose branch is detached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from dropbp_fx import _torch
from dropbp_fx.graph.checkpoints import checkpoint_bodies
from dropbp_fx.graph.copying import copy_graph_module
from dropbp_fx.graph.gate import HOOKED

_MARK = "dropbp_hooked"


def hook_gradient(tensor: Tensor, hook: Callable[..., Tensor | None], *operands: Any) -> Tensor:
    """Register ``hook`` on ``tensor``, if that requires a gradient, and return ``tensor``."""
    if not tensor.requires_grad:
        return tensor

    def run(gradient: Tensor) -> Tensor | None:
        changed = hook(gradient, *operands)
        return None if changed is None else HOOKED(changed, gradient)

    tensor.register_hook(run)
    if tensor.grad_fn is not None:
        metadata: Any = tensor.grad_fn.metadata
        metadata[_MARK] = True
    return tensor


def is_hooked(grad_fn: Any) -> bool:
    """Whether :func:`hook_gradient` put a hook on what an autograd node made."""
    return _MARK in grad_fn.metadata


def with_own_hooks(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph in which :func:`hook_gradient` stands for Dynamo's operator; ``gm`` itself where there is none."""
    operator = _torch.register_hook_operator()
    if operator is None or not _uses(gm, operator):
        return gm
    gm = copy_graph_module(gm)  # Dynamo's own is to stay as it is
    _replace(gm, operator)
    return gm


def _uses(gm: fx.GraphModule, operator: Any) -> bool:
    return any(node.target is operator for node in gm.graph.nodes) or any(
        _uses(body, operator) for _, body in checkpoint_bodies(gm)
    )


def _replace(gm: fx.GraphModule, operator: Any) -> None:
    for _, body in checkpoint_bodies(gm):
        _replace(body, operator)
    for node in gm.graph.nodes:
        if node.target is operator:
            node.target = hook_gradient
    gm.recompile()
