"""What a joint forward/backward graph costs: floating-point operations and bytes saved for the backward.

Operations are counted with the formulas of :mod:`torch.utils.flop_counter` on the graph's own nodes, so that what
pruning removes is what the count loses. As there, matrix products, convolutions and attention count and everything
else, which is bound by memory, does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from dropbp_fx.graph.prune import gradient_carriers, prune_joint_graph

#: Operators whose formula a release may lack, and one of the same leading arguments and cost.
_SAME_FORMULA = {
    "aten._scaled_dot_product_flash_attention_for_cpu": "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": "aten._scaled_dot_product_flash_attention_backward",
}


@dataclasses.dataclass(frozen=True)
class JointCost:
    """The cost of a joint graph, or of what is left of one.

    Attributes:
        forward_flops: operations of the nodes that depend on no gradient.
        backward_flops: operations of the nodes that do.
        gradient_nodes: how many nodes do.
    """

    forward_flops: int
    backward_flops: int
    gradient_nodes: int


def joint_cost(joint: fx.GraphModule, dropped: Collection[int] = ()) -> JointCost:
    """The cost of ``joint`` with the gates labelled ``dropped`` pruned; ``joint`` itself is left as it is."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(joint.graph, {}))
    prune_joint_graph(graph, dropped)
    carriers = gradient_carriers(graph)
    forward = backward = 0
    for node in graph.nodes:
        if node in carriers:
            backward += node_flops(node)
        else:
            forward += node_flops(node)
    return JointCost(forward, backward, sum(node.op != "output" for node in carriers))


def node_flops(node: fx.Node) -> int:
    """Operations of one node of an ATen graph, 0 for what has no formula. Symbolic sizes count as the traced example's."""
    if node.op != "call_function":
        return 0
    formula = _formula(node.target)
    if formula is None:
        return 0
    arguments, keywords = pytree.tree_map_only(fx.Node, lambda n: _sizes(n.meta.get("val")), (node.args, node.kwargs))
    if "scaled_dot_product" in str(node.target):
        arguments = _with_equal_heads(arguments, backward="backward" in str(node.target))
    return int(formula(*arguments, **keywords, out_val=_sizes(node.meta.get("val"))))


def _with_equal_heads(arguments: Sequence[Any], *, backward: bool) -> list[Any]:
    """Attention's sizes with as many heads of keys and values as of queries, which is what its kernels compute when query
    heads share keys and values; torch 2.11's formulas refuse anything else.
    """
    first = 1 if backward else 0  # a backward's first argument is the gradient
    query, key, value = arguments[first : first + 3]
    shared = [torch.Size([*other[:1], *query[1:2], *other[2:]]) for other in (key, value)]
    return [*arguments[: first + 1], *shared, *arguments[first + 3 :]]


def saved_bytes(forward: fx.GraphModule, outputs: int) -> int:
    """Bytes that a partitioned forward graph hands to its backward, parameters and other graph inputs not counted.

    Args:
        forward: a forward graph as a partitioner makes it: its own outputs first, then what is saved.
        outputs: how many are its own.
    """
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    own, saved = output.args[0][:outputs], output.args[0][outputs:]
    held: dict[int, int] = {}
    for node in saved:
        value = node.meta.get("val") if isinstance(node, fx.Node) and node.op != "placeholder" else None
        if isinstance(value, torch.Tensor) and node not in own:
            held[id(node)] = concrete(value.numel()) * value.element_size()
    return sum(held.values())


def concrete(size: Any) -> int:
    """A size as a number: a symbol stands for its value in the traced example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _formula(target: Any) -> Any:
    packet = getattr(target, "overloadpacket", target)
    formula = flop_registry.get(packet)
    if formula is None and str(packet) in _SAME_FORMULA:
        namespace, name = _SAME_FORMULA[str(packet)].split(".")
        formula = flop_registry.get(getattr(getattr(torch.ops, namespace), name))
    return formula


def _sizes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.Size([concrete(size) for size in value.shape])
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_sizes(item) for item in value]
    return concrete(value) if isinstance(value, torch.SymInt) else value
