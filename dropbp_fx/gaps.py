"""Look at a graph for branches that it seems to have and that cannot be dropped, and report them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.branch import BranchSearch
from dropbp_fx.graph.coverage import UnevenLayers, cut_adds, keeps_shape, uneven_layers
from dropbp_fx.graph.homes import home_of, is_one_of_several, unwrapped
from dropbp_fx.graph.naming import module_path
from dropbp_fx.graph.values import example_value
from dropbp_fx.graph.work import does_work
from dropbp_fx.shortfall import NoResidualBranchWarning, absence_text, cut_text, uneven_text
from dropbp_fx.state import BackendState

Parameters = list[weakref.ref[torch.Tensor]]


def report_gaps(state: BackendState, gm: fx.GraphModule, search: BranchSearch, *, quiet: bool) -> Parameters:
    """Say so where it looks as if there were branches that cannot be dropped; ``quiet`` takes note only.

    Returns:
        The parameters of a graph without branches in a model that Dynamo breaks: whether it has some is not known yet.

    Raises:
        ValueError: something is amiss, and the backend is strict.
    """
    shortfall = state.shortfall
    ended_by = _torch.graph_break_after(gm)
    if ended_by is not None:
        shortfall.breaks[ended_by] = None
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    trains = torch.is_grad_enabled() and any(map(_requires_grad, inputs))
    if not trains:
        return []
    callers = _torch.calling_modules().called
    layer = unwrapped(callers[0]) if callers else None
    home = None if layer is None else home_of(layer, callers)
    in_layer = layer is not None and home is not None and is_one_of_several(layer, home)
    cut = cut_adds([rejected.addition for rejected in search.rejected], _activations(inputs), in_layer=in_layer)
    if cut:
        where = module_path(cut[0].addition) or ("the model" if layer is None else type(layer).__name__)
        text = cut_text(len(cut), where, list(shortfall.breaks))
        shortfall.report("break", text, error=ValueError, quiet=quiet)
    uneven = uneven_layers(gm, search.branches)
    works = any(map(does_work, gm.graph.nodes))  # not so in a piece of a model before a break, such as its embedding
    if works and layer is not None and in_layer and not search.branches and not shortfall.breaks and keeps_shape(gm):
        uneven += _beside_others(state, layer)
    if uneven:
        shortfall.report("layers", uneven_text(uneven), error=ValueError, quiet=quiet)
    if search.branches or len(state.sampler.branches) or not works:
        return []
    if shortfall.breaks:  # other pieces of the model may have some
        return references(_torch.given_value(node) for node in inputs if _requires_grad(node))
    shortfall.report("absence", absence_text(()), NoResidualBranchWarning, error=ValueError, quiet=quiet)
    return []


def references(values: Iterable[Any]) -> Parameters:
    """Weak references to those of the values that are trainable parameters."""
    return [weakref.ref(value) for value in values if isinstance(value, torch.nn.Parameter) and value.requires_grad]


def _beside_others(state: BackendState, layer: torch.nn.Module) -> tuple[UnevenLayers, ...]:
    """A layer that is compiled by itself and holds no branch, beside others that hold some."""
    if not (len(state.sampler.branches) and state.modules.knows(layer)):
        return ()
    path = state.modules.path_of(layer)
    return (UnevenLayers(state.sampler.branches[0].layer, ((path, type(layer).__name__),)),) if path else ()


def _requires_grad(node: fx.Node) -> bool:
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _activations(inputs: Sequence[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """What a graph is about to be called with for the inputs that are computed from parameters, and no parameters."""
    given = {node: _torch.given_value(node) for node in inputs if _requires_grad(node)}
    return {
        node: value
        for node, value in given.items()
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    }
