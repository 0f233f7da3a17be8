"""What a search for branches did not find though something looks like one: cut by a graph break, or in some layers only."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from dropbp_fx.graph.branch import ResidualBranch
from dropbp_fx.graph.checkpoints import checkpoint_bodies
from dropbp_fx.graph.naming import module_stack
from dropbp_fx.graph.values import example_value, same_shape
from dropbp_fx.graph.work import does_work

#: Nodes of the autograd graph to look at for one add; what a break cut apart is only a few apart.
_FAR = 20_000


@dataclasses.dataclass(frozen=True)
class CutAdd:
    """An add ``x + h`` whose ``h`` was computed from ``x`` in an earlier graph: a break lies between the two.

    Attributes:
        addition: the add.
        skip: the graph input that ``x`` is.
        source: the graph input that ``h`` is computed from, and that itself was computed from ``x``.
    """

    addition: fx.Node
    skip: fx.Node
    source: fx.Node


def cut_adds(additions: Iterable[fx.Node], given: Mapping[fx.Node, Tensor], *, in_layer: bool) -> tuple[CutAdd, ...]:
    """The ``additions`` that are residual but for a graph break.

    Args:
        additions: adds of two equally shaped activations that were not taken for a branch.
        given: the tensors that the graph will be called with, by its inputs; parameters and buffers are left out. Their
            autograd graph tells which was computed from which.
        in_layer: the graph is a piece of one of several layers. There ``h`` counts as computed from ``x`` also where
            autograd only shows that it was from what was made together with ``x``, by one compiled graph: a norm before the
            break. Elsewhere that could be the sum of two embeddings.
    """
    found: list[CutAdd] = []
    for addition in additions:
        sides = [_inputs_of(operand, given) for operand in addition.all_input_nodes]
        if len(sides) != 2:
            continue
        for skips, sources in (sides, sides[::-1]):
            pairs = [(x, h) for x in skips for h in sources if x is not h and x not in sources]
            together = in_layer or _in_list(addition)
            known = ((x, h) for x, h in pairs if _computed_from(given[h], given[x], together=together))
            pair = next(known, None) if len(skips) == 1 else None
            if pair is not None:
                found.append(CutAdd(addition, *pair))
                break
    return tuple(found)


def _inputs_of(node: fx.Node, given: Mapping[fx.Node, Tensor]) -> list[fx.Node]:
    """The inputs of its graph that are activations and that ``node`` is computed from."""
    seen = {node}
    waiting = [node]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                waiting.append(parent)
    return [reached for reached in seen if reached in given]


def _in_list(node: fx.Node) -> bool:
    return any(path.rpartition(".")[2].isdigit() for path, _ in module_stack(node))


def _computed_from(value: Tensor, source: Tensor, *, together: bool) -> bool:
    """Whether autograd hands a gradient of ``value`` on to ``source``, or else to what was made ``together`` with it."""
    if not (value.requires_grad and source.requires_grad):
        return False
    wanted = (source.grad_fn, source.output_nr)
    waiting = [value.grad_fn]
    seen = set(waiting)
    while waiting and len(seen) < _FAR:
        function = waiting.pop()
        for before, number in function.next_functions if function is not None else ():
            if before is None:
                continue
            is_leaf = source.grad_fn is None and getattr(before, "variable", None) is source
            if is_leaf or (before, number) == wanted or (together and before is source.grad_fn):
                return True
            if before not in seen:
                seen.add(before)
                waiting.append(before)
    return False


@dataclasses.dataclass(frozen=True)
class UnevenLayers:
    """Layers of one list of which some hold a residual branch and others none.

    Attributes:
        holding: a layer that holds one.
        without: those that hold none, with their classes.
    """

    holding: str
    without: tuple[tuple[str, str], ...]


def uneven_layers(gm: fx.GraphModule, branches: Sequence[ResidualBranch]) -> tuple[UnevenLayers, ...]:
    """The lists of layers in which some hold no branch although they do work that is trained, hand on what they are given
    in the same shape, and are of the class of one that does hold a branch, or several of a class that has parts of its own.
    """
    layers: dict[str, _Layer] = {}
    for _, graph in _graphs(gm):
        _collect(graph, layers)
    holding: set[str] = set()
    for branch in branches:
        holding.update(path for path, _ in module_stack(branch.outputs[0][1]))
        stacks = [module_stack(node) for node in branch.work]
        holding.update(
            path for path, _ in stacks[0] if all(path in dict(stack) for stack in stacks)
        ) if stacks else None
    found: list[UnevenLayers] = []
    lists: dict[str, list[_Layer]] = {}
    for layer in layers.values():
        lists.setdefault(layer.path.rpartition(".")[0], []).append(layer)
    for mine in lists.values():
        full = [layer for layer in mine if layer.path in holding]
        kinds = {layer.kind for layer in full}
        often = Counter(layer.kind for layer in mine)
        without = [
            (layer.path, layer.kind)
            for layer in mine
            if full
            and layer not in full
            and layer.trained
            and layer.keeps_shape
            and (layer.kind in kinds or (layer.parts and often[layer.kind] > 1))
        ]
        if without:
            found.append(UnevenLayers(full[0].path, tuple(without)))
    return tuple(found)


@dataclasses.dataclass
class _Layer:
    """An element of a module list, as far as graphs show."""

    path: str
    kind: str
    trained: bool = False
    keeps_shape: bool = False
    parts: bool = False


def _graphs(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Graph]]:
    yield gm, gm.graph
    for _, body in checkpoint_bodies(gm):
        yield from _graphs(body)


def _collect(graph: fx.Graph, layers: dict[str, _Layer]) -> None:
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        stack = module_stack(node)
        for depth, (path, kind) in enumerate(stack):
            if path.rpartition(".")[2].isdigit():
                layer = layers.setdefault(path, _Layer(path, kind))
                layer.parts |= depth + 1 < len(stack)
                layer.trained |= does_work(node) and _requires_grad(node)
                nodes.setdefault(path, []).append(node)
    for path, mine in nodes.items():
        inside = set(mine)
        entries = {source for node in mine for source in node.all_input_nodes if source not in inside}
        exits = [node for node in mine if any(user not in inside for user in node.users)]
        layers[path].keeps_shape |= any(_alike(entry, out) for entry in entries for out in exits)


def keeps_shape(gm: fx.GraphModule) -> bool:
    """Whether a graph hands on something in the shape of an activation that it is given, as a layer of a stream does."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = [made for node in gm.graph.nodes if node.op == "output" for made in node.all_input_nodes]
    return any(_alike(given, made) for given in inputs for made in outputs)


def _requires_grad(node: fx.Node) -> bool:
    value = example_value(node)
    return isinstance(value, Tensor) and value.requires_grad


def _alike(entry: fx.Node, out: fx.Node) -> bool:
    given, made = example_value(entry), example_value(out)
    return (
        isinstance(given, Tensor)
        and isinstance(made, Tensor)
        and not isinstance(given, torch.nn.Parameter)
        and made.requires_grad
        and made.ndim > 1
        and same_shape(given, made)
    )
