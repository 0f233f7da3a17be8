"""Put the calls of nested compile regions (``torch.compiler.nested_compile_region``) back into the graph that makes them.

Dynamo traces such a function once and calls that graph from then on. Calls hide residual branches, and Inductor gets their
gradients wrong: in the releases up to 2.15 it takes what a region's forward saves, its input or once more its output, for
memory of its own and writes over the original; before 2.15 a region's backward also writes over inputs whose position
is that of something which the whole backward may write over. What the calls are there for is not lost: regions of equal
structure are compiled once.

The nodes of a call are those of the trace in a place of their own: what they know of memory, and of the modules they belong
to, is made that of the call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from dropbp_fx import _torch
from dropbp_fx.graph.checkpoints import checkpoint_bodies
from dropbp_fx.graph.copying import copy_graph_module
from dropbp_fx.graph.naming import CalledModules, rename_modules
from dropbp_fx.graph.values import example_value, storage_of


def inline_nested_regions(gm: fx.GraphModule) -> int:
    """Put the calls of nested compile regions back, in place, also those that are made inside of other graphs in ``gm``.

    Numerics are preserved. Options that a region was given for its own compilation go with it.

    Returns:
        The number of calls that were put back.
    """
    return _Inlining().within(gm, {})


class _Inlining:
    """The calls of one graph from Dynamo."""

    def __init__(self) -> None:
        #: By the graph that is called, the call during which it was traced: the first one.
        self._traced: dict[fx.GraphModule, CalledModules] = {}

    def within(self, gm: fx.GraphModule, given: Mapping[fx.Node, str]) -> int:
        """Put back the calls in ``gm``; ``given`` says what its inputs are called that its caller knows."""
        own = {node: _torch.source_of(node) for node in gm.graph.nodes if node.op == "placeholder"}
        sources = {node: source for node, source in own.items() if source is not None} | dict(given)
        count = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is _torch.nested_region_operator():
                self._inline(gm, node, sources)
                count += 1
                continue
            for body in _graphs_in(gm, node):
                operands = node.args[1:] if node.target is _torch.checkpoint_operator() else ()
                count += self.within(body, _handed_to(body, operands, sources))
        if count:
            gm.graph.lint()
            gm.recompile()
        return count

    def _inline(self, gm: fx.GraphModule, call: fx.Node, sources: Mapping[fx.Node, str]) -> None:
        where, operands = call.args[0], call.args[2:]
        assert isinstance(where, fx.Node)
        body: fx.GraphModule = getattr(gm, str(where.target))
        modules = CalledModules.of(call, [sources.get(operand) for operand in operands])  # type: ignore[arg-type]
        first = body not in self._traced
        traced = self._traced.setdefault(body, modules)
        if first:
            self.within(body, _handed_to(body, operands, sources))
        memory = _Memory(_known_memory(body, call), traced_here=first)

        def adapt(node: fx.Node) -> None:
            if "example_value" in node.meta:
                node.meta["example_value"] = memory.moved(node.meta["example_value"])
            if not first:
                rename_modules(node, traced, modules)

        values: dict[fx.Node, Any] = dict(zip(_inputs(body), operands, strict=True))
        with gm.graph.inserting_before(call):
            for node in body.graph.nodes:
                if node.op not in ("placeholder", "output"):
                    copied = gm.graph.node_copy(node, values.__getitem__)
                    if node.op == "get_attr":
                        copied.target = _add_attribute(gm, str(node.target), getattr(body, str(node.target)), adapt)
                    adapt(copied)
                    values[node] = copied
        _replace_outputs(call, map_arg(_outputs(body), values.__getitem__))
        gm.graph.erase_node(call)
        if not where.users:
            gm.graph.erase_node(where)
        if not any(node.op == "get_attr" and node.target == where.target for node in gm.graph.nodes):
            delattr(gm, str(where.target))


class _Memory:
    """Gives the fake values of a traced graph the memory that they have in one of its calls.

    Args:
        known: by memory in the trace, a value of the call that has its place.
        traced_here: whether this is the call during which the graph was traced: other memory is the call's already.
    """

    def __init__(self, known: dict[int, torch.Tensor], *, traced_here: bool) -> None:
        self._known = known
        self._traced_here = traced_here

    def moved(self, value: Any) -> Any:
        """``value``, of the trace, as the call has it."""
        if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
            return type(value)(map(self.moved, value)) if type(value) in (list, tuple) else value
        memory = storage_of(value)
        mode = _torch.fake_mode_of([value])
        if memory is None or mode is None or (self._traced_here and memory not in self._known):
            return value
        with mode, torch.no_grad():
            owner = self._known.get(memory)
            if owner is None:
                owner = self._known[memory] = torch.empty(0, dtype=value.dtype, device=value.device)
            if storage_of(owner) == memory:
                return value
            moved = torch.empty(0, dtype=value.dtype, device=value.device)
            moved.set_(owner.untyped_storage(), value.storage_offset(), value.size(), value.stride())
            return moved.requires_grad_(value.requires_grad)


def _known_memory(body: fx.GraphModule, call: fx.Node) -> dict[int, torch.Tensor]:
    """By memory in the trace of ``body`` the fake values of a call: what it is given, and what it returns."""
    pairs: list[tuple[Any, Any]] = list(zip(_inputs(body), call.args[2:], strict=True))
    outputs = _outputs(body)
    pairs += [(outputs[item.args[1]], item) for item in _items(call)]
    known: dict[int, torch.Tensor] = {}
    for traced, here in pairs:
        if isinstance(traced, fx.Node) and isinstance(here, fx.Node):
            memory, value = storage_of(example_value(traced)), example_value(here)
            if memory is not None and storage_of(value) is not None:
                known.setdefault(memory, value)
    return known


def _inputs(body: fx.GraphModule) -> list[fx.Node]:
    return [node for node in body.graph.nodes if node.op == "placeholder"]


def _outputs(body: fx.GraphModule) -> Sequence[Any]:
    outputs: Sequence[Any] = next(node for node in body.graph.nodes if node.op == "output").args[0]
    return outputs


def _items(call: fx.Node) -> list[Any]:
    """The nodes that take one output of ``call`` each."""
    return [user for user in call.users if user.target is operator.getitem and isinstance(user.args[1], int)]


def _handed_to(body: fx.GraphModule, operands: Sequence[Any], sources: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """What the inputs of ``body`` are called if it is called with ``operands``."""
    pairs = zip(_inputs(body), operands, strict=False)
    return {node: sources[operand] for node, operand in pairs if operand in sources}


def _graphs_in(gm: fx.GraphModule, node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that ``node`` runs."""
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            body = getattr(gm, str(argument.target), None)
            if isinstance(body, fx.GraphModule):
                yield body


def _add_attribute(gm: fx.GraphModule, name: str, value: Any, adapt: Callable[[fx.Node], None]) -> str:
    """Give ``gm`` what a node of a called graph reads, a graph as a copy of this call's own; under which name."""
    if isinstance(value, fx.GraphModule):
        value = copy_graph_module(value)
        _adapt_all(value, adapt)
    new, number = name, 0
    while hasattr(gm, new):
        number += 1
        new = f"{name}_{number}"
    setattr(gm, new, value)
    return new


def _adapt_all(gm: fx.GraphModule, adapt: Callable[[fx.Node], None]) -> None:
    for node in gm.graph.nodes:
        adapt(node)
    for _, body in checkpoint_bodies(gm):
        _adapt_all(body, adapt)


def _replace_outputs(call: fx.Node, outputs: Any) -> None:
    for item in _items(call):
        _replace(item, outputs[item.args[1]])
        call.graph.erase_node(item)
    _replace(call, outputs)


def _replace(old: fx.Node, new: Any) -> None:
    """Let what takes ``old`` take ``new``, which may be no node."""
    if isinstance(new, fx.Node):
        old.replace_all_uses_with(new)
        return
    for user in list(old.users):
        user.args, user.kwargs = map_arg((user.args, dict(user.kwargs)), lambda node: new if node is old else node)
