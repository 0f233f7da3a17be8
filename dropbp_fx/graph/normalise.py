"""Rewrite adds that write into an operand, and adds of whole lists, so that the graph shows the stream."""

from __future__ import annotations

import operator

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.checkpoints import graphs_of
from dropbp_fx.graph.residual_forms import OUT_OF_PLACE, is_inplace
from dropbp_fx.graph.values import example_value, storage_of


def normalise_inplace_adds(gm: fx.GraphModule) -> int:
    """Rewrite ``x += h`` so that later uses of ``x`` read the sum's node, and as ``x + h`` where nobody can tell.

    An in-place add may become out of place when its operand is no graph input, no other node that shares its memory is
    used afterwards, and type promotion would not change the result's dtype. Every other form that adds in place
    (``x.addcmul_(g, h)``) likewise, and adds of whole lists become one add each. Numerics are preserved.

    Returns:
        The number of adds made out of place.
    """
    count = 0
    for module, graph in graphs_of(gm):
        changed = _split_list_adds(graph)
        position = {node: index for index, node in enumerate(graph.nodes)}
        aliases = _nodes_by_storage(graph)
        for node in list(graph.nodes):
            mutated = node.args[0] if node.args else None
            if not isinstance(mutated, fx.Node) or not is_inplace(node):
                continue
            if not isinstance(example_value(mutated), torch.Tensor):
                continue
            for user in list(mutated.users):
                if position[user] > position[node]:
                    user.replace_input_with(mutated, node)
                    changed = True
            storage = storage_of(example_value(mutated))
            sharing = aliases.get(storage, []) if storage is not None else []
            observed = any(
                other.op == "placeholder" or any(position[user] > position[node] for user in other.users)
                for other in sharing
                if other is not node and position[other] < position[node]
            )
            if observed or mutated.op == "placeholder" or _promotes(node):
                continue
            with graph.inserting_before(node):
                replacement = graph.call_function(OUT_OF_PLACE[node.target], node.args, dict(node.kwargs))
            replacement.meta = dict(node.meta)
            position[replacement] = position[node]
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            changed = True
            count += 1
        if changed:
            graph.lint()
            module.recompile()
    return count


def _promotes(addition: fx.Node) -> bool:
    """Whether out of place the sum's type could be another than that of its first operand, which it is written into."""
    first, *others = (example_value(operand) for operand in addition.all_input_nodes)
    if not isinstance(first, torch.Tensor):
        return True
    return any(
        not isinstance(other, torch.Tensor) or torch.promote_types(first.dtype, other.dtype) != first.dtype
        for other in others
    )


def _nodes_by_storage(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    groups: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        storage = storage_of(example_value(node))
        if storage is not None:
            groups.setdefault(storage, []).append(node)
    return groups


def _split_list_adds(graph: fx.Graph) -> bool:
    """Rewrite ``torch._foreach_add`` of two lists as one add for each pair, in place; numerics are preserved.

    Returns:
        Whether there was one.
    """
    changed = False
    for node in list(graph.nodes):
        inplace = node.target is _torch.FOREACH_ADD_
        if node.op != "call_function" or not (inplace or node.target is _torch.FOREACH_ADD) or len(node.args) != 2:
            continue
        lefts, rights = node.args
        if not isinstance(lefts, (list, tuple)) or not isinstance(rights, (list, tuple)):
            continue
        operands = [*lefts, *rights]
        items = [user for user in node.users if user.target is operator.getitem and isinstance(user.args[1], int)]
        if len(items) < len(node.users) or len(set(operands)) < len(operands):
            continue
        if not all(isinstance(operand, fx.Node) for operand in operands):
            continue
        sums: list[fx.Node] = []
        for left, right in zip(lefts, rights, strict=True):
            with graph.inserting_before(node):
                arguments = ((left, right), dict(node.kwargs))
                sums.append(
                    graph.call_method("add_", *arguments) if inplace else graph.call_function(torch.add, *arguments)
                )
            sums[-1].meta = {**node.meta, "example_value": example_value(left)}
        for item in items:
            made = sums[item.args[1]]
            made.meta = dict(item.meta)
            item.replace_all_uses_with(made)
            graph.erase_node(item)
        graph.erase_node(node)
        changed = True
    return changed
