"""Splitting a joint graph into a forward and a backward, so that a memory budget changes no gradient.

Under an activation memory budget below 1 the partitioner of PyTorch recomputes whatever is cheap, random operators too, and
these draw other numbers in the backward: gradients are those of another dropout mask. So what must not run twice is marked
to be saved. Regions under activation checkpointing are left alone: they restore the random state.

| hook | why it is needed |
| --- | --- |
| ``functorch.compile.min_cut_rematerialization_partition`` | partition a pruned joint graph as Inductor does |
| ``torch.Tag.nondeterministic_seeded``, ``OpOverload._schema`` | tell random operators from others |
| ``node.meta["recompute"]`` | ask the partitioner to save a value |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils.checkpoint import CheckpointPolicy

from dropbp_fx._torch.budgets import changed_budgets, lowest_budget
from dropbp_fx._torch.old_values import save_old_values

#: A budget of exactly 0 saves the inputs and nothing else, whatever is marked.
_LEAST_BUDGET = 1e-9
_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward graph of ``joint``: what the backward recomputes has the values of the forward.

    ``joint`` may be rewritten. ``kwargs`` are AOTAutograd's.
    """
    forward, backward = _partition_drawing_once(joint, inputs, **kwargs)
    save_old_values(forward, kwargs["num_fwd_outputs"])
    return forward, backward


def _partition_drawing_once(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The two graphs, of which no random operator runs in both."""
    random = _random_forward_nodes(joint) if lowest_budget(joint) < 1 else []
    if not random:
        return _partition(joint, inputs, **kwargs)
    untouched = _copy(joint)
    for node in random:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    with changed_budgets(joint, lambda budget: max(budget, _LEAST_BUDGET)):
        parts = _partition(joint, inputs, **kwargs)
    if _is_sound(*parts, {node.name for node in random}):
        return parts
    # With nothing but marked values to choose from, the partitioner of torch < 2.15 saves the marked tuples themselves.
    with changed_budgets(untouched, lambda _: 1.0):
        return _partition(untouched, inputs, **kwargs)


def _partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    from functorch.compile import min_cut_rematerialization_partition

    forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
    return forward, backward


def _copy(joint: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    outputs = graph.graph_copy(joint.graph, {})
    graph.output(outputs).meta = dict(joint.graph.output_node().meta)
    copy = fx.GraphModule(joint, graph)
    copy.meta = dict(joint.meta)
    return copy


def _is_sound(forward: fx.GraphModule, backward: fx.GraphModule, random: set[str]) -> bool:
    """Whether nothing of ``random`` runs in both, and ``forward`` returns tensors and numbers only."""
    first, second = ({node.name for node in part.graph.nodes} for part in (forward, backward))
    returned = forward.graph.output_node().all_input_nodes
    return not random & first & second and not any(isinstance(node.meta.get("val"), (tuple, list)) for node in returned)


def _random_forward_nodes(joint: fx.GraphModule) -> list[fx.Node]:
    """Nodes that draw random numbers, depend on no gradient and are not under activation checkpointing."""
    gradients: set[fx.Node] = set()
    found: list[fx.Node] = []
    for node in joint.graph.nodes:
        if node.op == "placeholder":
            if str(node.target).startswith("tangents"):
                gradients.add(node)
        elif any(parent in gradients for parent in node.all_input_nodes):
            gradients.add(node)
        elif node.meta.get("recompute") not in _RECOMPUTED and _is_random(joint, node):
            found.append(node)
    return found


def _is_random(owner: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return _draws(node.target, node.args, node.kwargs)
    if not isinstance(node.target, HigherOrderOperator):
        return False
    wrapped = any(_draws(operand, (), node.kwargs) for operand in node.args if isinstance(operand, OpOverload))
    bodies = _bodies(owner, node.all_input_nodes)
    return wrapped or any(_is_random(body, inner) for body in bodies for inner in body.graph.nodes)


def _bodies(owner: fx.GraphModule, operands: Iterable[fx.Node]) -> Iterator[fx.GraphModule]:
    for operand in operands:
        body = getattr(owner, str(operand.target), None) if operand.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield body


def _draws(operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws random numbers when it is called like this.

    Attention is tagged as random for its dropout; without any, recomputing it is right, and much of what a budget is for.
    Attention of other libraries is not tagged: there a dropout above zero tells.
    """
    rates = [
        args[at] if at < len(args) else kwargs.get(argument.name, argument.default_value)
        for at, argument in enumerate(operator._schema.arguments)
        if argument.name in ("dropout_p", "dropout", "p_dropout") and "float" in str(argument.type)
    ]
    if rates:
        return any(not isinstance(rate, (int, float)) or rate != 0 for rate in rates)
    return torch.Tag.nondeterministic_seeded in operator.tags
