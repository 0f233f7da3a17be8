"""Prune a joint forward/backward graph: drop the gradients of chosen gates and everything that only served them.

A vector-Jacobian product is linear in the incoming gradient, so a gradient node all of whose gradient-carrying inputs are
zero is itself zero. Zero is therefore never computed: it is propagated symbolically from the dropped gates towards the
parameters (Woo et al., NeurIPS 2024, section 3.1: the dropped sub-layer's term leaves the sum of the residual's two
gradients). Gradients that end up zero are returned as ``None``, exactly what autograd gives for a detached branch, and
dead-code elimination removes the rest, so that the partitioner has nothing left to save for it.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import fx

from dropbp_fx.graph.gate import GATE_BACKWARD, HOOKED, IDENTITIES, drops

_ADDITIONS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, operator.add})
_TANGENT_PREFIX = "tangents_"


def prune_joint_graph(graph: fx.Graph, dropped: Collection[int]) -> int:
    """Drop the gradients of the gates of the branches ``dropped`` and remove every gate, in place.

    Args:
        graph: a joint graph as AOTAutograd traces it: placeholders ``primals_*`` and ``tangents_*``; one output node
            whose argument is a (possibly nested) sequence of forward outputs and gradients.
        dropped: numbers of branches (see :func:`dropbp_fx.graph.gate.drops`). One the graph does not hold is ignored: a
            gate whose value needs no gradient has no backward node.

    Returns:
        The number of nodes removed, gates not counted.
    """
    before = [node for node in graph.nodes if node.target not in (GATE_BACKWARD, HOOKED, *IDENTITIES)]
    carriers = gradient_carriers(graph)
    zero: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "output":
            _drop_zero_gradients(node, zero)
        elif node.target in IDENTITIES:
            node.replace_all_uses_with(_argument(node, 0))
            graph.erase_node(node)
        elif node.target is GATE_BACKWARD:
            gradient = _argument(node, 0)
            if drops(dropped, _argument(node, 1)) or gradient in zero:
                zero.add(node)
            else:
                node.replace_all_uses_with(gradient)
                graph.erase_node(node)
        elif (
            node.target is HOOKED
        ):  # no linear function: it may make something of nothing, where autograd would not ask it
            if _argument(node, 1) in zero:
                zero.add(node)
            else:
                node.replace_all_uses_with(_argument(node, 0))
                graph.erase_node(node)
        elif node in carriers:
            _propagate(graph, node, carriers, zero)
    # A gradient that is random or writes memory counts as impure, so it would survive ordinary dead-code elimination.
    for node in reversed(list(graph.nodes)):
        if node in zero and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    left = set(graph.nodes)
    return sum(node not in left for node in before)


def prune_pass(dropped: Collection[int], look: Callable[[fx.Graph], None] | None = None) -> Callable[[fx.Graph], None]:
    """:func:`prune_joint_graph` with its labels bound, for a compiler's hook; ``look`` sees the graph before."""
    labels = frozenset(dropped)

    def run(graph: fx.Graph) -> None:
        if look is not None:
            look(graph)
        prune_joint_graph(graph, labels)

    return run


def prune_cache_key(dropped: Collection[int]) -> str:
    """A key for on-disk caches that differs whenever the labels or this pass's source differ."""
    source = Path(__file__).read_bytes()
    return hashlib.sha256(source + repr(sorted(dropped)).encode()).hexdigest()


def _argument(node: fx.Node, index: int) -> Any:
    return node.args[index]


def gradient_carriers(graph: fx.Graph) -> set[fx.Node]:
    """Every node that depends on a tangent."""
    carriers: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if str(node.target).startswith(_TANGENT_PREFIX):
                carriers.add(node)
        elif any(parent in carriers for parent in node.all_input_nodes):
            carriers.add(node)
    return carriers


def _propagate(graph: fx.Graph, node: fx.Node, carriers: set[fx.Node], zero: set[fx.Node]) -> None:
    incoming = [parent for parent in node.all_input_nodes if parent in carriers]
    vanished = [parent for parent in incoming if parent in zero]
    if not vanished:
        return
    if len(vanished) == len(incoming):
        zero.add(node)
        return
    survivor = _other_summand(node, vanished)
    if survivor is not None:
        node.replace_all_uses_with(survivor)
        carriers.add(survivor)
        graph.erase_node(node)
        return
    with graph.inserting_before(node):
        for parent in vanished:
            node.replace_input_with(parent, _explicit_zeros(graph, parent, carriers))


def _other_summand(node: fx.Node, vanished: list[fx.Node]) -> fx.Node | None:
    """The summand that is left of ``add(zero, g)``, if it already is laid out like the sum.

    Strides count: a view of the sum further on was traced for the sum's own.
    """
    if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or len(vanished) != 1:
        return None
    survivor = right if left is vanished[0] else left
    value, total = survivor.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(total, torch.Tensor):
        return None
    same = value.dtype == total.dtype and value.device == total.device and value.shape == total.shape
    return survivor if same and value.stride() == total.stride() else None


def _explicit_zeros(graph: fx.Graph, node: fx.Node, carriers: set[fx.Node]) -> fx.Node:
    """Zeros of ``node``'s shape that do not depend on ``node``, for an operator that also takes a gradient that is left."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise NotImplementedError(
            f"The gradient node {node.format_node()} became zero, and the operator that takes it together with other "
            f"gradients needs an explicit value, but its value is a {type(value).__name__}, not a tensor. Please report "
            "the model; backend.disabled() trains it without dropping."
        )
    sizes = [_size_argument(graph, size, node, carriers) for size in value.shape]
    # The operator's own layout follows its inputs', and later views were traced for it: keep the order of dimensions.
    order = sorted(range(value.dim()), key=lambda dim: value.stride(dim), reverse=True)
    repeated = [value.stride(dim) == 0 and value.shape[dim] != 1 for dim in range(value.dim())]
    stored = value.detach().new_empty([1 if repeated[dim] else value.shape[dim] for dim in order])
    zeros = graph.call_function(
        torch.ops.aten.full.default,
        ([1 if repeated[dim] else sizes[dim] for dim in order], 0),
        {"dtype": value.dtype, "device": value.device, "layout": value.layout, "pin_memory": False},
    )
    zeros.meta["val"] = stored
    if order != sorted(order):
        back = [order.index(dim) for dim in range(value.dim())]
        zeros = graph.call_function(torch.ops.aten.permute.default, (zeros, back))
        zeros.meta["val"] = stored = stored.permute(back)
    if any(repeated):
        zeros = graph.call_function(torch.ops.aten.expand.default, (zeros, sizes))
        zeros.meta["val"] = stored.expand(value.shape)
    return zeros


def _size_argument(graph: fx.Graph, size: int | torch.SymInt, before: fx.Node, carriers: set[fx.Node]) -> Any:
    """``size`` as an argument: itself, or for a symbol a node that computes it, if possible from the forward pass."""
    if isinstance(size, int):
        return size
    wanted = size.node.expr
    for node in graph.nodes:
        if node is before:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == wanted and node not in carriers:
            return node
        if isinstance(value, torch.Tensor) and (node.op == "placeholder" or node not in carriers):
            for dim, length in enumerate(value.shape):
                if isinstance(length, torch.SymInt) and length.node.expr == wanted:
                    found = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                    found.meta["val"] = size
                    return found
    found = graph.call_function(torch.ops.aten.sym_size.int, (before, list(before.meta["val"].shape).index(size)))
    found.meta["val"] = size
    return found


def _drop_zero_gradients(output: fx.Node, zero: set[fx.Node]) -> None:
    def replace(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return None if argument in zero else argument
        if isinstance(argument, (list, tuple)):
            return type(argument)(replace(item) for item in argument)
        return argument

    output.args = tuple(replace(argument) for argument in output.args)
