"""What a joint forward/backward graph costs: floating-point operations and bytes saved for the backward.

Operations are counted with the formulas of :mod:`torch.utils.flop_counter` on the graph's own nodes, so that what
pruning removes is what the count loses. As there, matrix products, convolutions and attention count and everything
else, which is bound by memory, does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from dropbp_fx import _torch
from dropbp_fx.graph.gate import GATE, drops
from dropbp_fx.graph.prune import gradient_carriers, prune_joint_graph
from dropbp_fx.graph.values import storage_of

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


def joint_cost(joint: fx.Graph, dropped: Collection[int] = ()) -> JointCost:
    """The cost of a joint graph with the gates labelled ``dropped`` pruned; ``joint`` itself is left as it is."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(joint, {}))
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
    arguments, keywords = _torch.tree_map_only(fx.Node, lambda n: n.meta.get("val"), (node.args, node.kwargs))
    return operator_flops(node.target, arguments, keywords, node.meta.get("val"))


def operator_flops(target: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], result: Any) -> int:
    """Operations of one ATen operator called with ``arguments``, 0 for what has no formula."""
    formula = _formula(target)
    if formula is None:
        return 0
    sizes, named = _sizes(tuple(arguments)), {name: _sizes(value) for name, value in keywords.items()}
    if "scaled_dot_product" in str(target):
        sizes = _with_equal_heads(sizes, 1 if "backward" in str(target) else 0)
    return int(formula(*sizes, **named, out_val=_sizes(result)))


def _with_equal_heads(sizes: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    """Grouped queries cost what as many keys and values would; older releases' formulas refuse unequal numbers.

    Args:
        sizes: the operator's arguments, tensors as their sizes.
        at: where the query is; key and value follow.
    """
    query = sizes[at]
    if len(query) != 4:
        return sizes
    repeated = tuple(torch.Size([size[0], query[1], *size[2:]]) for size in sizes[at + 1 : at + 3])
    return (*sizes[: at + 1], *repeated, *sizes[at + 3 :])


@dataclasses.dataclass(frozen=True)
class SavedValues:
    """What a partitioned forward graph hands to its backward, by memory: views of one piece of memory count once.

    Attributes:
        inner_bytes: bytes of the pieces that are neither an input's nor an output's.
        inputs: positions of the graph inputs whose memory is saved, parameters included.
        outputs: for each of the graph's own outputs whose memory is saved its position and the bytes.
    """

    inner_bytes: int
    inputs: frozenset[int]
    outputs: tuple[tuple[int, int], ...]


def saved_values(forward: fx.GraphModule, outputs: int) -> SavedValues:
    """Read off ``forward``, whose first ``outputs`` outputs are its own, what it saves."""
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    inputs = [node for node in forward.graph.nodes if node.op == "placeholder"]
    input_of = {_memory(node): position for position, node in reversed(list(enumerate(inputs)))}
    output_of = {_memory(node): position for position, node in reversed(list(enumerate(output.args[0][:outputs])))}
    inner: dict[int | None, int] = {}
    read: set[int] = set()
    made: dict[int, int] = {}
    for node in output.args[0][outputs:]:
        memory = _memory(node)
        if memory is None:
            continue
        if memory in input_of:
            read.add(input_of[memory])
        elif memory in output_of:
            made[output_of[memory]] = memory_bytes(node.meta["val"])
        else:
            inner[memory] = memory_bytes(node.meta["val"])
    return SavedValues(sum(inner.values()), frozenset(read), tuple(sorted(made.items())))


def memory_bytes(value: torch.Tensor) -> int:
    """Bytes of the memory a tensor is in, all of it where the tensor is a view."""
    try:
        return concrete(value.untyped_storage().nbytes())
    except (NotImplementedError, RuntimeError):  # wrapper subclasses have no storage of their own
        return concrete(value.numel()) * value.element_size()


def branch_forward_flops(joint: fx.GraphModule, label: int) -> int:
    """Operations of the forward nodes of ``joint``, a joint graph with its gates, that lead to the gates ``label``.

    Another branch's output counts as given: of two branches in a row each counts its own work.
    """
    gates = [node for node in joint.graph.nodes if node.target is GATE]
    pending = [node for node in gates if drops({label}, node.args[1])]
    seen = set(pending)
    while pending:
        for parent in pending.pop().all_input_nodes:
            foreign = parent.target is GATE and not drops({label}, parent.args[1])
            if parent not in seen and not foreign:
                seen.add(parent)
                pending.append(parent)
    return sum(node_flops(node) for node in seen)


def graph_flops(graph: fx.Graph) -> int:
    """Operations of a whole ATen graph."""
    return sum(node_flops(node) for node in graph.nodes)


def _memory(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    memory = storage_of(value)
    return id(node) if memory is None else memory


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
    if isinstance(value, (list, tuple)):
        return type(value)(_sizes(item) for item in value)
    return concrete(value) if isinstance(value, torch.SymInt) else value
