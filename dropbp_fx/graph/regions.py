"""Split a Dynamo graph with gates on its residual branches into regions.

A region is a stretch of the graph that holds one residual branch (several, where branches overlap or sit in one
activation checkpoint), from its first node to its add; what stands between two branches without doing work (a
post-norm) goes to the region before it. Before the first branch lies the prologue, after the last one the epilogue. A
region is compiled once for each subset of its branches and regions that are alike share everything, so that any
pattern of a deep model is composed from a handful of compiled variants.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.fx.passes.split_module import split_module

from dropbp_fx import _torch
from dropbp_fx.graph.branch import ResidualBranch
from dropbp_fx.graph.gate import GATE
from dropbp_fx.graph.gating import SCALE_OF
from dropbp_fx.graph.hooks import hook_gradient
from dropbp_fx.graph.values import example_value, mutated_by, storage_of
from dropbp_fx.graph.work import does_work
from dropbp_fx.graph.writes import COPY, InputWrites

_MODE_CHANGES = frozenset({_torch.ENTER_AUTOCAST, _torch.EXIT_AUTOCAST, _torch.SET_GRAD_ENABLED})


@dataclasses.dataclass(frozen=True)
class Region:
    """One region: a graph with gates, and where its values come from and go to.

    Attributes:
        gm: the region's graph; returns a tuple.
        inputs: for each placeholder the slot its value is read from.
        outputs: for each output the slot its value is written to.
        branches: indices of its residual branches, in execution order; the i-th has the gates labelled i and ~i.
        streams: which inputs are the stream that one of its branches reads.
        examples: for each placeholder the fake value (or symbol) Dynamo computed.
    """

    gm: fx.GraphModule
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    branches: tuple[int, ...]
    streams: frozenset[int]
    examples: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class RegionProgram:
    """A whole graph as a sequence of regions over numbered slots.

    Attributes:
        regions: in execution order.
        slots: how many values there are.
        inputs: the slot of each graph input.
        examples: the example value of each graph input.
        scales: the inputs that scale the gradients of kept branches: branch, slot and device of each.
        constants: slots that hold a tensor the graph owns.
        outputs: for each graph output its slot, or a one-element list holding a constant.
        writes: inputs that are written to; what they shall hold comes last in ``outputs``.
        staying: slots of what lies in one place at every call: parameters and buffers of modules.
    """

    regions: tuple[Region, ...]
    slots: int
    inputs: tuple[int, ...]
    examples: tuple[Any, ...]
    scales: tuple[tuple[int, int, torch.device], ...]
    constants: dict[int, Any]
    outputs: tuple[int | list[Any], ...]
    writes: InputWrites = dataclasses.field(default_factory=InputWrites)
    staying: frozenset[int] = frozenset()

    @property
    def returned(self) -> frozenset[int]:
        """The slots that are graph outputs."""
        return frozenset(slot for slot in self.outputs if isinstance(slot, int))

    @property
    def has_symbols(self) -> bool:
        """Whether some size or number is symbolic."""
        return any(
            isinstance(size, torch.SymInt)
            for region in self.regions
            for value in region.examples
            for size in (value.shape if isinstance(value, torch.Tensor) else (value,))
        )


def split_into_regions(
    gm: fx.GraphModule, branches: Sequence[ResidualBranch], gates: Sequence[frozenset[fx.Node]]
) -> RegionProgram:
    """Split a gated graph into regions."""
    _hoist_getitems(gm.graph)
    _repeat_items(gm.graph)
    order = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    region_of, members = _assign(order, branches, gates)
    for group in members:
        for local, index in enumerate(group):
            for node in gates[index]:
                if node.target is GATE:
                    node.args = (node.args[0], local if cast("int", node.args[1]) >= 0 else ~local)
    names = {node: node.name for node in gm.graph.nodes}
    split = split_module(gm, gm, lambda node: region_of[node], keep_original_order=True)
    streams = [{branches[index].in_top_graph(branches[index].skip) for index in group} for group in members]
    stream_names = [{names[node] for node in nodes if node is not None} for nodes in streams]
    return _read_program(split, members, stream_names)


def _hoist_getitems(graph: fx.Graph) -> None:
    """Unpack tuples where they are made: no region can hand a tuple to the next."""
    for node in list(graph.nodes):
        if isinstance(example_value(node), (list, tuple)) and node.op not in ("placeholder", "output"):
            for user in reversed(list(node.users)):
                if user.op == "call_function" and user.target is operator.getitem and user.args[0] is node:
                    node.append(user)


def _repeat_items(graph: fx.Graph) -> None:
    """Read a number out of a tensor anew for each use: under ``dynamic=True`` Dynamo passes Python floats as tensors,
    and a region can take the tensor but not the symbol.
    """
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "item":
            for user in list(node.users)[1:]:
                with graph.inserting_before(user):
                    again = graph.node_copy(node, lambda argument: argument)
                user.replace_input_with(node, again)
            first = next(iter(node.users), None)
            if first is not None:
                first.prepend(node)


def _assign(
    order: Sequence[fx.Node], branches: Sequence[ResidualBranch], gates: Sequence[frozenset[fx.Node]]
) -> tuple[dict[fx.Node, int], list[tuple[int, ...]]]:
    """Number each node's region, and list each region's branches."""
    position = {node: index for index, node in enumerate(order)}
    intervals: list[tuple[int, int, list[int]]] = []
    for index, branch in enumerate(branches):
        held = [position[node] for node in (branch.anchor, *branch.body, *gates[index]) if node in position]
        intervals.append((min(held), max(held), [index]))
    groups = _merge_overlapping(intervals)
    allowed = _allowed_cuts(order)
    cuts: set[int] = set()
    end_before = -1
    for number, (start, end, _) in enumerate(groups):
        gap = range(end_before + 1, start + 1)
        if number and any(does_work(node) for node in order[gap.start : gap.stop - 1]):
            cuts.update(_nearest(gap.start, gap, allowed))
        cuts.update(_nearest(start, gap, allowed))
        end_before = end
    cuts.update(_nearest(end_before + 1, range(end_before + 1, len(order)), allowed))
    region_of: dict[fx.Node, int] = {}
    region = 0
    for index, node in enumerate(order):
        if index in cuts and index:
            region += 1
        region_of[node] = region
    members: list[list[int]] = [[] for _ in range(region + 1)]
    for start, _, indices in groups:
        members[region_of[order[start]]].extend(indices)
    return region_of, [tuple(sorted(group)) for group in members]


def _merge_overlapping(intervals: Sequence[tuple[int, int, list[int]]]) -> list[tuple[int, int, list[int]]]:
    """Join branches that cannot be told apart by position: parallel ones, and those of one checkpoint."""
    groups: list[tuple[int, int, list[int]]] = []
    for start, end, indices in sorted(intervals):
        if groups and start <= groups[-1][1]:
            before = groups.pop()
            groups.append((before[0], max(before[1], end), before[2] + indices))
        else:
            groups.append((start, end, indices))
    return groups


def _nearest(wanted: int, where: range, allowed: Sequence[bool]) -> list[int]:
    """The allowed cut in ``where`` that is nearest to ``wanted``, none if there is none: the regions then merge."""
    possible = [cut for cut in where if cut < len(allowed) and allowed[cut]]
    return [min(possible, key=lambda cut: abs(cut - wanted))] if possible else []


def _allowed_cuts(order: Sequence[fx.Node]) -> list[bool]:
    """Where the graph may be cut: ``allowed[p]`` speaks of the place before ``order[p]``.

    Not where a value that is neither a tensor nor a symbol would have to cross, and not between the making of a tensor
    and its mutation, which would turn a local in-place operation into the mutation of a region's input. Not between the
    making of a tensor and a hook on it, which is to see the whole of its gradient.
    """
    position = {node: index for index, node in enumerate(order)}
    forbidden = [0] * (len(order) + 1)

    def forbid(first: int, last: int) -> None:
        if first <= last:
            forbidden[first] += 1
            forbidden[last + 1] -= 1

    born: dict[int, int] = {}
    for node in order:
        at = position[node]
        users = [position[user] for user in node.users if user in position]
        value = example_value(node)
        crossable = isinstance(value, (torch.Tensor, torch.SymInt, int)) and not isinstance(value, bool)
        if node.target not in _MODE_CHANGES and users and not crossable:
            forbid(at + 1, max(users))
        hooked = node.args[0] if node.target is hook_gradient else None
        if isinstance(hooked, fx.Node) and hooked in position:
            forbid(position[hooked] + 1, at)
        storage = storage_of(value)
        if storage is not None and node.meta.get(COPY):
            born[storage] = at
        elif storage is not None:
            born.setdefault(storage, at)
        for target in mutated_by(node):
            mutated = storage_of(example_value(target))
            if target in position and mutated is not None and mutated in born:
                forbid(born[mutated] + 1, at)
    allowed, depth = [], 0
    for index in range(len(order)):
        depth += forbidden[index]
        allowed.append(depth == 0)
    return allowed


def _read_program(
    split: fx.GraphModule, members: Sequence[tuple[int, ...]], stream_names: Sequence[set[str]]
) -> RegionProgram:
    slot_of: dict[fx.Node, int] = {}
    constants: dict[int, Any] = {}
    inputs: list[int] = []
    scales: list[tuple[int, int, torch.device]] = []
    examples: list[Any] = []
    regions: list[Region] = []
    calls: dict[fx.Node, list[int]] = {}
    outputs: tuple[int | list[Any], ...] = ()
    staying: set[int] = set()

    numbers = itertools.count()

    def new_slot() -> int:
        return next(numbers)

    for node in split.graph.nodes:
        if node.op == "placeholder":
            slot_of[node] = new_slot()
            if SCALE_OF in node.meta:
                scales.append((node.meta[SCALE_OF], slot_of[node], example_value(node).device))
            else:
                inputs.append(slot_of[node])
                examples.append(example_value(node))
                if _torch.stays_in_place(node):
                    staying.add(slot_of[node])
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(split)
            slot_of[node] = new_slot()
            constants[slot_of[node]] = value
        elif node.op == "call_module":
            number = int(str(node.target).removeprefix("submod_"))
            region_gm = getattr(split, str(node.target))
            returns_one = _return_tuple(region_gm.graph)
            _enclose_in_grad_mode(region_gm.graph)
            region_gm.recompile()
            placeholders = [n for n in region_gm.graph.nodes if n.op == "placeholder"]
            made: list[int] = []
            calls[node] = made
            made.extend(new_slot() for _ in _output_values(region_gm.graph))
            if returns_one:
                slot_of[node] = made[0]
            regions.append(
                Region(
                    gm=region_gm,
                    inputs=tuple(slot_of[argument] for argument in node.args if isinstance(argument, fx.Node)),
                    outputs=tuple(made),
                    branches=members[number],
                    streams=frozenset(i for i, p in enumerate(placeholders) if p.name in stream_names[number]),
                    examples=tuple(example_value(p) for p in placeholders),
                )
            )
        elif node.op == "call_function":  # getitem: one output of a region
            slot_of[node] = calls[node.args[0]][node.args[1]]
        else:
            outputs = tuple(
                slot_of[argument] if isinstance(argument, fx.Node) else [argument] for argument in node.args[0]
            )
    return RegionProgram(
        tuple(regions),
        next(numbers),
        tuple(inputs),
        tuple(examples),
        tuple(scales),
        constants,
        outputs,
        staying=frozenset(staying),
    )


def _return_tuple(graph: fx.Graph) -> bool:
    """Make a region return a tuple; tell whether it returned a bare value (torch 2.11 cannot be asked not to)."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    bare = isinstance(output.args[0], fx.Node)
    if bare:
        output.args = ((output.args[0],),)
    return bare


def _output_values(graph: fx.Graph) -> tuple[Any, ...]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    return tuple(output.args[0])


def _enclose_in_grad_mode(graph: fx.Graph) -> None:
    """Start and end a region with gradients enabled, and drop switches that change nothing: equal layers stay equal."""
    enabled = True
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is _torch.SET_GRAD_ENABLED:
            wanted = bool(node.args[0])
            if wanted is enabled:
                graph.erase_node(node)
            enabled = wanted
        elif node.op == "output" and not enabled:
            with graph.inserting_before(node):
                graph.call_function(_torch.SET_GRAD_ENABLED, (True,))
