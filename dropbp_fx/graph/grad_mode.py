"""Graphs that are called with gradients off and switch them on inside."""

from __future__ import annotations

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.values import example_value


def switches_gradients_on(gm: fx.GraphModule) -> bool:
    """Whether ``gm``, from Dynamo, computes something with gradients though it is called without (``torch.enable_grad()``
    inside of ``torch.no_grad()``).
    """
    if torch.is_grad_enabled():
        return False
    return any(
        isinstance(example_value(node), torch.Tensor) and example_value(node).requires_grad
        for node in gm.graph.nodes
        if node.op not in ("placeholder", "get_attr")
    )


def start_without_gradients(gm: fx.GraphModule) -> None:
    """Let ``gm`` switch gradients off before anything else: called with gradients on it then computes what it did, called
    without. Numerics are preserved.
    """
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        gm.graph.call_function(_torch.SET_GRAD_ENABLED, (False,))
    gm.graph.lint()
    gm.recompile()
