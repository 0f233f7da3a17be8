"""Say what a residual branch is made of, for people: its kind of work and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dropbp_fx import _torch
from dropbp_fx.graph.branch import ResidualBranch
from dropbp_fx.graph.values import example_value
from dropbp_fx.graph.work import does_work

_ATTENTION = ("attention", "flex_attention", "sdpa")
_CONVOLUTION = ("conv",)
_EXPERTS = ("grouped_mm", "topk", "one_hot", "experts", "moe")
_RECURRENCE = ("scan", "cumsum", "_rnn", "lstm", "gru", "fft", "ssm")


@dataclasses.dataclass(frozen=True)
class BranchFacts:
    """What a branch holds.

    Attributes:
        kind: "attention", "cross-attention", "MLP", "linear", "mixture of experts", "convolution", "recurrence" or
            "other": what its operators amount to, for reading only.
        parameters: elements of the parameters it reads; parameters shared between branches count in each.
        trainable_parameters: those of them that require a gradient.
    """

    kind: str
    parameters: int
    trainable_parameters: int


def describe_branch(branch: ResidualBranch, inputs: Iterable[fx.Node]) -> BranchFacts:
    """Describe ``branch``, whose floating-point graph inputs are ``inputs``."""
    parameters = [
        value for value in map(example_value, inputs) if isinstance(value, nn.Parameter) or _requires_gradient(value)
    ]
    return BranchFacts(
        kind=kind_of_work(branch),
        parameters=sum(_elements(value) for value in parameters),
        trainable_parameters=sum(_elements(value) for value in parameters if value.requires_grad),
    )


def kind_of_work(branch: ResidualBranch) -> str:
    """Name what the operators of a branch amount to; see :class:`BranchFacts`."""
    names = [_operator_name(node) for node in branch.body]
    if any(_has(name, _EXPERTS) for name in names):
        return "mixture of experts"
    if any(_has(name, _ATTENTION) for name in names) or _scores_by_hand(branch.body):
        return "cross-attention" if _reads_another_stream(branch) else "attention"
    if any(_has(name, _RECURRENCE) for name in names):
        return "recurrence"
    if any(_has(name, _CONVOLUTION) for name in names):
        return "convolution"
    products = [node for node in branch.work if _is_matrix_product(node)]
    if len(products) == 1:
        return "linear"
    return "MLP" if products else "other"


def _scores_by_hand(body: Sequence[fx.Node]) -> bool:
    """Attention written out: a softmax between two matrix products of activations."""
    weights = [node for node in body if "softmax" in _operator_name(node)]
    return any(_is_activation_product(user) for node in weights for user in _reached(node, 6))


def _reached(node: fx.Node, steps: int) -> set[fx.Node]:
    """What is computed from ``node`` in at most ``steps`` operations: a cast, a dropout, a view may stand between."""
    reached, frontier = set[fx.Node](), {node}
    for _ in range(steps):
        frontier = {user for item in frontier for user in item.users} - reached
        reached |= frontier
    return reached


def _is_activation_product(node: fx.Node) -> bool:
    name = _operator_name(node)
    if name not in {"matmul", "bmm", "baddbmm", "einsum", "__matmul__"}:
        return False
    return sum(parent.op not in ("placeholder", "get_attr") for parent in node.all_input_nodes) > 1


def _reads_another_stream(branch: ResidualBranch) -> bool:
    """Whether a matrix product with parameters reads an activation that is not computed from the skip: an encoder's."""
    position = {node: index for index, node in enumerate(branch.graph.nodes)}
    body = set(branch.body)
    below = {branch.skip}
    for node in sorted(body, key=position.__getitem__):
        if any(parent in below for parent in node.all_input_nodes):
            below.add(node)
    for node in branch.work:
        if node.target is F.linear or _operator_name(node) in {"addmm", "mm"}:
            activation = next(iter(node.all_input_nodes), None)
            if activation is not None and activation not in below and not _is_parameter(activation):
                return True
    return False


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(example_value(node), nn.Parameter)


def _is_matrix_product(node: fx.Node) -> bool:
    return does_work(node) and not _has(_operator_name(node), _CONVOLUTION + _ATTENTION)


def _operator_name(node: fx.Node) -> str:
    if node.op == "call_function":
        if _torch.is_operator_overload(node.target):
            return str(node.target)
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target) if node.op == "call_method" else ""


def _has(name: str, words: Iterable[str]) -> bool:
    return any(word in name.lower() for word in words)


def _requires_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf


def _elements(value: torch.Tensor) -> int:
    return int(value.numel()) if not isinstance(value.numel(), torch.SymInt) else 0
