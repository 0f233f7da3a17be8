"""Tell whether two regions are the same computation, so that they can share compiled code."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.values import storage_of


def structural_key(gm: fx.GraphModule, examples: Sequence[Any], streams: frozenset[int]) -> Hashable:
    """A key that is equal for two regions exactly when one's compiled code is right for the other.

    It holds every operation with its constants, and of every input the sizes, strides, dtype, device, class, which of
    them share memory, and whether a gradient is required. Parameters are inputs, so layers with different weights are
    equal. Inputs in ``streams`` count as requiring a gradient: the first layer above a frozen embedding is then like the
    others. Keys compare within one process only (they hold function objects).
    """
    storages: dict[int, int] = {}
    inputs = tuple(_input_key(value, index in streams, storages) for index, value in enumerate(examples))
    return inputs, _graph_key(gm), _ambient_key()


def _graph_key(gm: fx.GraphModule) -> Hashable:
    number = {node: index for index, node in enumerate(gm.graph.nodes)}
    entries: list[Hashable] = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            entries.append("input")
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(gm)
            entries.append(("attribute", _graph_key(value) if isinstance(value, fx.GraphModule) else id(value)))
        else:
            arguments = _constant_key((node.args, node.kwargs), number)
            entries.append((node.op, node.target if node.op != "output" else "", arguments))
    return tuple(entries), _function_key(_torch.checkpoint_context(gm))


def _function_key(function: Any) -> Hashable:
    """What a function does, as far as it shows: layers make functions of their own that differ in nothing, such as a
    selective checkpoint's. Whatever cannot be looked into counts as itself.
    """
    if isinstance(function, functools.partial):
        options = sorted(function.keywords.items())
        return tuple(map(_function_key, (function.func, *function.args))), tuple(
            (k, _function_key(v)) for k, v in options
        )
    if isinstance(function, types.FunctionType):
        cells = tuple(_function_key(cell.cell_contents) for cell in function.__closure__ or ())
        defaults = (*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items()))
        return function.__code__, id(function.__globals__), cells, tuple(map(_function_key, defaults))
    if isinstance(function, (list, tuple)):
        return type(function).__name__, tuple(map(_function_key, function))
    if function is None or isinstance(function, (bool, int, float, str)):
        return type(function).__name__, function
    return id(function)


def _constant_key(value: Any, number: dict[fx.Node, int]) -> Hashable:
    if isinstance(value, fx.Node):
        return ("node", number[value])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_constant_key(item, number) for item in value))
    if isinstance(value, dict):
        return ("dict", *((str(name), _constant_key(item, number)) for name, item in value.items()))
    if isinstance(value, slice):
        return ("slice", *(_constant_key(part, number) for part in (value.start, value.stop, value.step)))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("symbol", str(value.node.expr))
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value))
    return (type(value).__name__, repr(value))  # the type tells 1, 1.0 and True apart, the text one NaN from another


def _input_key(value: Any, is_stream: bool, storages: dict[int, int]) -> Hashable:
    if isinstance(value, torch.Tensor):
        memory = storage_of(value)
        storage = -1 if memory is None else storages.setdefault(memory, len(storages))
        return (
            type(value).__name__,
            isinstance(value, torch.nn.Parameter),
            str(tuple(value.shape)),
            str(tuple(value.stride())) if value.layout is torch.strided else "",
            str(value.storage_offset()) if value.layout is torch.strided else "",
            value.dtype,
            value.device,
            value.requires_grad or (is_stream and value.is_floating_point()),
            storage,
        )
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("symbol", str(value.node.expr))
    return (type(value).__name__, repr(value))


def _ambient_key() -> Hashable:
    """Global state that Dynamo guards on and that tracing bakes in."""
    devices = ("cpu", "cuda")
    return (
        tuple(torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device)) for device in devices),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )
