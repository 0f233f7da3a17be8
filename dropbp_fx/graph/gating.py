"""Put gates on the residual branches of a Dynamo graph, where dropping a branch cuts the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.branch import ResidualBranch
from dropbp_fx.graph.gate import GATE, SCALE_GRADIENT
from dropbp_fx.graph.values import example_value, mutated_by, storage_of
from dropbp_fx.values import Drop

#: What dropping a branch drops: all its gradients; only those of its parameters; or all its gradients and, below the lowest
#: branch that is kept, those of the residual stream as well.
#: Key in a placeholder's ``meta``: the number of the branch whose gradients this graph input scales.
SCALE_OF = "dropbp_scale_of"


def insert_gates(
    gm: fx.GraphModule, branches: Sequence[ResidualBranch], *, drop: Drop = "branch", rescale: bool = False
) -> tuple[frozenset[fx.Node], ...]:
    """Put gates where dropping a branch cuts the gradient.

    Args:
        gm: the graph that holds the branches; gets one more placeholder a branch for ``rescale``.
        branches: what :func:`~dropbp_fx.graph.branches.find_branches` found.
        drop: "branch" and "below" gate every branch's output and every value that leaves a branch for the graph's outputs
            alone; "weights" gates the parameters that a branch reads, and leaves the gradients of its activations alone.
        rescale: let an input of the graph scale the gradients that pass a branch's gates.

    Returns:
        For each branch its gate nodes; their labels are set by :func:`~dropbp_fx.graph.regions.split_into_regions`.

    Raises:
        NotImplementedError: ``rescale`` for a branch inside nested activation checkpoints.
    """
    gates: list[frozenset[fx.Node]] = []
    writes: dict[fx.Graph, list[fx.Node]] = {}
    for index, branch in enumerate(branches):
        if drop != "weights":
            if branch.graph not in writes:
                writes[branch.graph] = [node for node in branch.graph.nodes if mutated_by(node)]
            written = writes[branch.graph]
            mine = {_gate_edge(output, user, index, written): None for output, user in branch.outputs}
        else:
            mine = dict.fromkeys(_gate_weights(branch, index))
        if rescale:
            scale = _scale_input(gm, branch, index)
            mine.update(dict.fromkeys([_scale_gate(gate, scale) for gate in mine]))
        if drop != "weights":
            mine.update({_gate_edge(value, user, ~index, writes[branch.graph]): None for value, user in branch.escapes})
        gates.append(frozenset(mine))
    return tuple(gates)


def _gate_edge(node: fx.Node, user: fx.Node, label: int, writes: Sequence[fx.Node]) -> fx.Node:
    graph = node.graph
    is_input = node.op in ("placeholder", "get_attr")  # other inputs follow it
    written = _last_written(node, user, writes)
    with graph.inserting_before(user) if is_input else graph.inserting_after(written):
        gated = graph.call_function(GATE, (node, label))
    gated.meta = dict(node.meta)
    user.replace_input_with(node, gated)
    return gated


def _last_written(node: fx.Node, user: fx.Node, writes: Sequence[fx.Node]) -> fx.Node:
    """What last wrote to the memory of ``node`` before ``user`` reads it: a gate copies what it finds there."""
    storage, last = storage_of(example_value(node)), node
    for write in writes:  # in execution order
        targets = (storage_of(example_value(target)) for target in mutated_by(write))
        if storage is not None and node < write < user and storage in targets:
            last = write
    return last


def _gate_weights(branch: ResidualBranch, label: int) -> list[fx.Node]:
    """Gate the parameters that a branch reads, once each and before their first use in it."""
    gates: dict[fx.Node, fx.Node] = {}
    for user in branch.readers:
        for parent in user.all_input_nodes:
            if parent.op != "placeholder" or not _is_trainable_parameter(branch, parent):
                continue
            if parent not in gates:
                with branch.graph.inserting_before(user):
                    gates[parent] = branch.graph.call_function(GATE, (parent, label))
                gates[parent].meta["example_value"] = example_value(parent)
            user.replace_input_with(parent, gates[parent])
    return list(gates.values())


def _is_trainable_parameter(branch: ResidualBranch, node: fx.Node) -> bool:
    outer = branch.in_top_graph(node)
    value = None if outer is None else example_value(outer)
    return isinstance(value, torch.nn.Parameter) and value.requires_grad


def _scale_input(gm: fx.GraphModule, branch: ResidualBranch, index: int) -> fx.Node:
    """A new graph input that scales the gradients of a branch, as the branch's own graph sees it."""
    example = example_value(branch.addition)
    with _torch.fake_mode_of([example]):
        value = torch.ones((), dtype=torch.float32, device=example.device)
    outer = _append_placeholder(gm.graph, f"dropbp_scale_{index}", value)
    outer.meta[SCALE_OF] = index
    if branch.graph is gm.graph:
        return outer
    inputs = [node for node in branch.graph.nodes if node.op == "placeholder"]
    if branch.anchor.graph is not gm.graph or len(inputs) != len(branch.anchor.args) - 1:
        raise NotImplementedError(
            "rescale=True is not supported for a residual branch inside nested activation checkpoints. Use one level of "
            "checkpoints, or rescale=False."
        )
    branch.anchor.args = (*branch.anchor.args, outer)
    inner = _append_placeholder(branch.graph, f"dropbp_scale_{index}", value)
    if branch.graph.owning_module is not None:
        branch.graph.owning_module.recompile()
    return inner


def _append_placeholder(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    return node


def _scale_gate(gate: fx.Node, scale: fx.Node) -> fx.Node:
    with gate.graph.inserting_before(gate):
        scaled = gate.graph.call_function(SCALE_GRADIENT, (gate.args[0], scale))
    scaled.meta = dict(gate.meta)
    gate.args = (scaled, *gate.args[1:])
    return scaled
