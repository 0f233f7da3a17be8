"""Take writes into graph inputs out of a graph: ``x.add_(1)``, ``x[:, 0] = 0``, a buffer that is scaled and then read.

Autograd follows such a write through the memory that two tensors share; regions that are compiled apart hand on values, not
memory. So the graph writes into copies instead, hands out what the inputs shall hold in the end, and whoever runs it writes
that back (:mod:`dropbp_fx.runtime.writeback`). A write that nobody in the graph reads afterwards and that carries no
gradient, as running statistics are, stays where it is: the region that holds it does it in place.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.checkpoints import checkpoint_bodies
from dropbp_fx.graph.copying import copy_graph_module
from dropbp_fx.graph.values import example_value, mutated_by, storage_of

#: Marks a copy in a node's ``meta``: what shares memory with older copies is not used after it.
COPY = "dropbp_copy"
_CHANGES_FORM = frozenset(
    {
        *("t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_", "resize_", "resize_as_", "set_"),
        *("as_strided_", "detach_", "swap_"),
    }
)


class UnsupportedWriteError(Exception):
    """A graph writes into an input in a way that cannot be taken out of it."""


@dataclasses.dataclass(frozen=True)
class ReturnedInput:
    """An output of the graph that is one of the inputs it writes to, or a view of one.

    Attributes:
        output: its position among the outputs.
        write: the position in :attr:`InputWrites.arguments` of the input.
        view: size, strides and offset within the input, ``None`` for the input itself.
    """

    output: int
    write: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None


@dataclasses.dataclass(frozen=True)
class InputWrites:
    """The graph inputs that a graph writes to.

    Attributes:
        arguments: their positions. What each shall hold in the end is an output of the graph; these are its last outputs.
        returned: outputs that are such inputs.
    """

    arguments: tuple[int, ...] = ()
    returned: tuple[ReturnedInput, ...] = ()


def take_writes_out(gm: fx.GraphModule) -> tuple[fx.GraphModule, InputWrites]:
    """A graph that writes to copies of its inputs, and what is to be written back; ``gm`` itself where that is nothing.

    Raises:
        UnsupportedWriteError: the write changes an input's form, or memory that several inputs share, or happens inside of
            an activation checkpoint.
    """
    found = _written_inputs(gm.graph)
    _refuse_writes_in_checkpoints(gm)
    if not found:
        return gm, InputWrites()
    positions = {node.name: k for k, node in enumerate(_placeholders(gm.graph))}
    names = [node.name for node in found]
    gm = copy_graph_module(gm)  # Dynamo goes on reading its own graph's
    by_name = {node.name: node for node in _placeholders(gm.graph)}
    finals = [_Rewrite(gm.graph, by_name[name]).run() for name in names]
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    returned = _returned_inputs(output, finals)
    values = list(output.args[0])
    for alias in returned:
        values[alias.output] = finals[alias.write]
    output.args = ((*values, *finals),)
    gm.graph.lint()
    gm.recompile()
    return gm, InputWrites(tuple(positions[name] for name in names), returned)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _written_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The inputs whose writes have to be taken out."""
    inputs: dict[int, list[fx.Node]] = {}
    for node in _placeholders(graph):
        storage = storage_of(example_value(node))
        if storage is not None:
            inputs.setdefault(storage, []).append(node)
    position = {node: k for k, node in enumerate(graph.nodes)}
    first_write: dict[int, fx.Node] = {}
    writers: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        for target in mutated_by(node):
            storage = storage_of(example_value(target))
            if storage in inputs:
                first_write.setdefault(storage, node)
                writers.setdefault(storage, set()).add(node)
    found: list[fx.Node] = []
    for storage, first in first_write.items():
        aliases = [node for node in graph.nodes if storage_of(example_value(node)) == storage]
        read = any(
            position[user] > position[first] and (user not in writers[storage] or user.users)
            for alias in aliases
            for user in alias.users
        )
        carries = any(example_value(node).requires_grad for node in inputs[storage])
        if not read and not carries:
            continue
        if len(inputs[storage]) > 1:
            raise UnsupportedWriteError("it writes into memory that several of its inputs share")
        if any(str(node.target) in _CHANGES_FORM for node in writers[storage]):
            raise UnsupportedWriteError("it changes the shape or the memory of an input in place")
        found.extend(inputs[storage])
    return found


def _refuse_writes_in_checkpoints(gm: fx.GraphModule) -> None:
    for _, body in checkpoint_bodies(gm):
        if _written_inputs(body.graph):
            raise UnsupportedWriteError("it writes into an input inside of an activation checkpoint")
        _refuse_writes_in_checkpoints(body)


class _Rewrite:
    """Redirects the writes into one input to copies, a new one before each write or group of writes that share views."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self._graph = graph
        self._input = node
        self._shared = example_value(node)
        self._storage = storage_of(self._shared)

    def run(self) -> fx.Node:
        """Rewrite the graph; the copy that holds what the input shall hold in the end."""
        current = self._input
        writers = [
            node
            for node in self._graph.nodes
            if any(storage_of(example_value(target)) == self._storage for target in mutated_by(node))
        ]
        for writer in writers:
            start = self._start(writer, current)
            if start is not None:
                current = self._copy_before(start, current)
        self._input.meta["example_value"] = _as_before_the_graph(self._input)
        return current

    def _start(self, writer: fx.Node, current: fx.Node) -> fx.Node | None:
        """Where the copy belongs that ``writer`` writes to: before whatever views it that is used from then on. ``None`` if
        the present copy is made there.
        """
        position = {node: k for k, node in enumerate(self._graph.nodes)}
        at = position[writer]
        views = [
            node
            for node in self._graph.nodes
            if position[current] < position[node] <= at and storage_of(example_value(node)) == self._storage
        ]
        needed = {writer}
        for node in reversed(views):
            if any(position[user] >= at or user in needed for user in node.users):
                needed.add(node)
        start = _before_switch(min(needed, key=lambda node: position[node]))
        if current is not self._input and position[start] <= position[current] + 1:
            return None
        return start

    def _copy_before(self, start: fx.Node, current: fx.Node) -> fx.Node:
        with self._graph.inserting_before(start):
            copy = self._graph.call_method("clone", (current,))
        copy.meta["example_value"] = self._shared
        copy.meta[COPY] = True
        position = {node: k for k, node in enumerate(self._graph.nodes)}
        for user in list(current.users):
            if position[user] > position[copy]:
                user.replace_input_with(current, copy)
        return copy


def _before_switch(node: fx.Node) -> fx.Node:
    """``node``, or where gradients are off there, what switched them off: a copy made after it would cut the gradient."""
    switch: fx.Node | None = None
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.op == "call_function" and earlier.target is _torch.SET_GRAD_ENABLED:
            switch = None if earlier.args[0] else switch or earlier
    return switch or node


def _as_before_the_graph(node: fx.Node) -> torch.Tensor:
    """A fake tensor like the input as it was: Dynamo's own took part in the write, and may carry its gradient."""
    value: torch.Tensor = example_value(node)
    known = getattr(node.meta.get("grapharg"), "example", None)
    requires_grad = known.requires_grad if isinstance(known, torch.Tensor) else value.requires_grad
    with _torch.fake_mode_of([value]), torch.no_grad():
        fresh = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(fresh, requires_grad=requires_grad)
    return fresh.requires_grad_(requires_grad)


def _returned_inputs(output: fx.Node, finals: list[fx.Node]) -> tuple[ReturnedInput, ...]:
    write_of = {storage_of(example_value(final)): k for k, final in enumerate(finals)}
    found: list[ReturnedInput] = []
    values: Any = output.args[0]
    for position, node in enumerate(values):
        value = example_value(node) if isinstance(node, fx.Node) else None
        write = write_of.get(storage_of(value)) if isinstance(value, torch.Tensor) else None
        if write is None:
            continue
        base = example_value(finals[write])
        form, whole = _form(cast("torch.Tensor", value)), _form(base)
        if form == whole:
            found.append(ReturnedInput(position, write, None))
        elif form is None or whole is None or not _is_dense(base):
            raise UnsupportedWriteError("it returns a view of an input that it writes to, of a size that is not fixed")
        else:
            size, stride, offset = form
            found.append(ReturnedInput(position, write, (size, stride, offset - whole[2])))
    return tuple(found)


def _form(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    form: Any = tuple(value.size()), tuple(value.stride()), value.storage_offset()
    return form if all(isinstance(n, int) for n in (*form[0], *form[1], form[2])) else None


def _is_dense(value: torch.Tensor) -> Any:
    return value.clone().stride() == value.stride()
