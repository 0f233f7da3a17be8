"""Take products in sums apart: gated mixes of a stream and a branch, what is repeated for several streams, mixed streams."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dropbp_fx.graph.residual_forms import ADDITIONS, MULTIPLICATIONS, Term, is_view, name_of, operands_of
from dropbp_fx.graph.values import example_value

_MATRIX_PRODUCTS: frozenset[Any] = frozenset({operator.matmul, torch.matmul, torch.bmm, torch.einsum})
_MATRIX_PRODUCTS |= {"matmul", "__matmul__", "bmm"}
_EXPANSIONS: frozenset[Any] = frozenset({"expand", "expand_as", "repeat", "broadcast_to", torch.broadcast_to})


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of an elementwise product of nodes."""
    if node.op not in ("call_function", "call_method") or node.target not in MULTIPLICATIONS:
        return None
    operands = operands_of(node, "input", "other")
    if len(operands) != 2 or operands[0] is operands[1]:
        return None
    left, right = operands
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def gated_mix(stream: fx.Node, other: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What is mixed where ``stream + other`` is ``x * g + h * (1 - g)``, in any order: ``x`` and ``h``."""
    left, right = factors(stream), factors(other)
    if left is None or right is None:
        return None
    for kept, gate in (left, left[::-1]):
        for added, rest in (right, right[::-1]):
            if _are_complements(gate, rest):
                return kept, added
    return None


def _are_complements(gate: fx.Node, rest: fx.Node) -> bool:
    return any(
        taken is not None and _same_value(taken, whole)
        for whole, taken in ((gate, _one_minus(rest)), (rest, _one_minus(gate)))
    )


def _one_minus(node: fx.Node) -> fx.Node | None:
    """``g`` where ``node`` is ``1 - g``."""
    node = _without_views(node)
    operands = operands_of(node, "input", "other")
    if node.target in (torch.rsub, "rsub", "__rsub__"):
        operands = operands[::-1]
    elif node.target not in (operator.sub, torch.sub):
        return None
    if len(operands) != 2 or "alpha" in node.kwargs or operands[0] != 1:
        return None
    return operands[1] if isinstance(operands[1], fx.Node) else None


def _without_views(node: fx.Node) -> fx.Node:
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _same_value(left: Any, right: Any, depth: int = 6) -> bool:
    """Whether two nodes are one, or compute the same from the same, views aside: ``sigmoid(g)`` is often written twice."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return type(left) is type(right) and bool(left == right)
    left, right = _without_views(left), _without_views(right)
    if left is right:
        return True
    if (
        depth == 0
        or (left.op, left.target) != (right.op, right.target)
        or left.op not in ("call_function", "call_method")
    ):
        return False
    if left.kwargs or right.kwargs or len(left.args) != len(right.args) or "dropout" in name_of(left):
        return False
    return all(_same_value(a, b, depth - 1) for a, b in zip(left.args, right.args, strict=True))


def expanded(term: Term) -> Iterator[Term]:
    """What is repeated, each time with a weight of its own, to make ``term``: ``h`` of ``h.unsqueeze(-2) * beta``.

    The likelier factor comes first. Nothing where ``term`` is no such product, or is used by others too.
    """
    value = term.value
    above = term.consumer
    while is_view(value) and len(value.users) == 1 and isinstance(value.args[0], fx.Node):
        if _is_expanded(value, above):
            break
        value, above = value.args[0], value
    if _is_expanded(value, above):
        yield Term((value,), above)
        return
    if len(value.users) != 1:
        return
    if value.target in _EXPANSIONS and isinstance(value.args[0], fx.Node):
        yield Term((value.args[0],), value)
        return
    pair = factors(value) or _outer_factors(value)
    if pair is None:
        return
    for factor in sorted(pair, key=lambda node: -_elements(node)):
        if _elements(factor) < _elements(value):
            yield Term((factor,), value)


def _is_expanded(value: fx.Node, consumer: fx.Node) -> bool:
    """Whether ``consumer`` sums, and broadcasts ``value``."""
    return consumer.target in ADDITIONS and _elements(value) < _elements(consumer)


def _outer_factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a matrix product, or an einsum, that sums over nothing."""
    if node.op not in ("call_function", "call_method") or node.target not in _MATRIX_PRODUCTS:
        return None
    operands = node.all_input_nodes
    if len(operands) != 2:
        return None
    left, right = operands
    if node.target is torch.einsum:
        equation = str(node.args[0]).replace(" ", "")
        inputs, _, output = equation.partition("->")
        return (left, right) if output and set(inputs) - {","} <= set(output) else None
    value = example_value(left)
    return (left, right) if isinstance(value, torch.Tensor) and value.shape[-1] == 1 else None


def mixed(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands of a product that may mix streams: of a matrix product, or of a product summed over a dimension."""
    if node.op not in ("call_function", "call_method"):
        return ()
    if node.target in _MATRIX_PRODUCTS:
        return tuple(node.all_input_nodes)
    if node.target in (torch.sum, "sum") and node.args and isinstance(node.args[0], fx.Node):
        return factors(node.args[0]) or ()
    return ()


def _elements(node: fx.Node) -> int:
    value = example_value(node)
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:  # a symbol counts as the traced example's, which installs no guard
        count *= int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)
    return count
