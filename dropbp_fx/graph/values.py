"""What a node of a Dynamo graph computes: the fake value it left, its memory, and what it writes into."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dropbp_fx import _torch

_CUTS_GRADIENT = frozenset(
    {
        *("detach", "detach_", "data", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    }
)


def example_value(node: fx.Node) -> Any:
    """The fake value Dynamo computed for a node, ``None`` where there is none."""
    return node.meta.get("example_value")


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two (fake) tensors have equal sizes, without installing guards on symbolic ones."""
    return len(left.shape) == len(right.shape) and all(
        _expression(a) == _expression(b) for a, b in zip(left.shape, right.shape, strict=True)
    )


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def is_activation(node: fx.Node, *, scalar: bool = False) -> bool:
    """Whether a node is a tensor of floating point numbers, of at least one dimension unless a ``scalar`` will do."""
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and (scalar or value.ndim >= 1)


def have_one_shape(left: fx.Node, right: fx.Node) -> bool:
    """Whether two nodes are activations of equal sizes."""
    return is_activation(left) and is_activation(right) and same_shape(example_value(left), example_value(right))


def is_differentiable_value(node: fx.Node) -> bool:
    """Whether a node is of a type, or holds tensors of a type, that has gradients."""
    value = example_value(node)
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, torch.Tensor) and item.is_floating_point() for item in value)
    return False


def is_constant_like(node: fx.Node) -> bool:
    """A number or a vector made of graph inputs that are one too, parameters and buffers: what a scale is made of."""
    value = example_value(node)
    if not isinstance(value, torch.Tensor) or value.ndim > 1:
        return False
    sources = node.all_input_nodes
    return node.op in ("placeholder", "get_attr") or (bool(sources) and all(map(is_constant_like, sources)))


def cuts_gradient(node: fx.Node) -> bool:
    """Whether a node's output is no differentiable function of its inputs, whatever requires a gradient in this run."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _CUTS_GRADIENT


def storage_of(value: Any) -> int | None:
    """An identity of a (fake) tensor's memory, ``None`` for what has none of its own."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return _torch.storage_identity(value)
    except (NotImplementedError, RuntimeError):  # wrapper subclasses have no storage of their own
        return None


def mutated_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensor an operation writes into: by its schema, or by PyTorch's naming of in-place operations."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    written: list[Any] = [node.kwargs.get("out")]
    inplace = name.endswith("_") and not name.endswith("__")
    inplace |= name in {"setitem", "__setitem__"} or (name.startswith("__i") and name.endswith("__"))
    inplace |= getattr(node.target, "__module__", "") == "_operator" and name in {
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"),
        *("ilshift", "irshift"),
    }
    if node.op == "call_function":
        at = _position_of_inplace(node.target)
        inplace |= at is not None and (node.args[at] if at < len(node.args) else node.kwargs.get("inplace")) is True
        written += [
            node.args[at] if at < len(node.args) else node.kwargs.get(name)
            for at, name in _torch.written_arguments(node.target)
        ]
    if inplace and node.args:
        written.append(node.args[0])
    flat = [part for item in written for part in (item if isinstance(item, (list, tuple)) else (item,))]
    return [item for item in flat if isinstance(item, fx.Node)]


@functools.cache
def _position_of_inplace(function: Callable[..., Any]) -> int | None:
    """Where a function such as ``F.dropout`` takes its ``inplace``: modules pass it by position."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins have no signature
        return None
    return names.index("inplace") if "inplace" in names else None
