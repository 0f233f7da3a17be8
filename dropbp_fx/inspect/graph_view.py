"""One layer's joint forward/backward graph reduced to what a picture shows: which node belongs to which branch, which are
pruned in a pattern, what is handed from the forward to the backward. Knows nothing about how it is drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.captured import CapturedGraph
from dropbp_fx.graph.cost import node_flops
from dropbp_fx.graph.gate import GATE, GATE_BACKWARD
from dropbp_fx.graph.prune import gradient_carriers, prune_joint_graph
from dropbp_fx.graph.regions import Region

#: Operators that move or relabel data and compute nothing: a picture without detail leaves them out.
_MOVES = frozenset(
    {
        *("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "detach"),
        *("clone", "alias", "slice", "select", "split", "getitem", "_to_copy", "as_strided", "contiguous", "unbind"),
        *("slice_backward", "select_backward", "view_copy", "lift_fresh_copy"),
    }
)

_VIEWS = _MOVES - {"clone", "_to_copy", "contiguous"}


@dataclasses.dataclass(frozen=True)
class ViewNode:
    """A node of the picture.

    Attributes:
        key: unique within the view.
        label: the operator's name.
        backward: whether it depends on a gradient.
        branch: index of the branch it belongs to, ``None`` for what every branch shares.
        pruned: whether the pattern removes it.
        shape: of its value, as text.
        flops: its operations.
        kind: "operator", "gate" or "input".
        saved: whether the backward reads it, in this pattern.
    """

    key: str
    label: str
    backward: bool
    branch: int | None
    pruned: bool
    shape: str
    flops: int
    kind: str
    saved: bool


@dataclasses.dataclass(frozen=True)
class GraphView:
    """The picture's nodes in execution order, and its edges as pairs of keys."""

    nodes: tuple[ViewNode, ...]
    edges: tuple[tuple[str, str], ...]


def view_layer(
    graph: CapturedGraph, regions: Sequence[int], dropped: Collection[int], *, detail: bool = False
) -> GraphView:
    """The joint graphs of some regions, joined where one hands a value to the next.

    Args:
        graph: the graph that the regions are of.
        regions: their positions in the program, ascending.
        dropped: numbers, within ``graph``, of the branches that the pattern drops.
        detail: also show operators that only move data.
    """
    nodes: list[ViewNode] = []
    edges: list[tuple[str, str]] = []
    made: dict[int, str] = {}
    receives: dict[int, str] = {}
    gradient_of: list[tuple[int, str]] = []
    for position in regions:
        region = graph.program.regions[position]
        joint = graph.variants[position].joint
        if joint is None:
            continue
        part = _Part(f"r{position}_", joint, region, graph.indices, dropped, detail)
        nodes += part.nodes
        edges += part.edges
        for number, slot in enumerate(region.inputs):
            inside = part.input_key(number)
            if inside is not None and slot in made:
                edges.append((made[slot], inside))
            gradient = part.gradient_key(number)
            if gradient is not None:
                gradient_of.append((slot, gradient))
        for number, slot in enumerate(region.outputs):
            outside = part.output_key(number)
            if outside is not None:
                made[slot] = outside
            tangent = part.tangent_key(number)
            if tangent is not None:
                receives[slot] = tangent
    edges += [(gradient, receives[slot]) for slot, gradient in gradient_of if slot in receives]
    return GraphView(tuple(nodes), tuple(dict.fromkeys(edges)))


class _Part:
    """The view of one region."""

    def __init__(
        self,
        prefix: str,
        joint: fx.GraphModule,
        region: Region,
        indices: Sequence[int],
        dropped: Collection[int],
        detail: bool,
    ) -> None:
        self._streams = region.streams
        labels = range(len(region.branches))
        carriers = gradient_carriers(joint.graph)
        gone, left = _pruned(joint, {label for label in labels if region.branches[label] in dropped})
        owner: dict[fx.Node, int] = {}
        for label in labels:
            for node in (*_leading_to(joint, label), *_pruned(joint, {label})[0]):
                owner.setdefault(node, indices[region.branches[label]])
        (output,) = (node for node in joint.graph.nodes if node.op == "output")
        outputs = list(_flat(output.args))
        self._tangents = [n for n in joint.graph.nodes if n.op == "placeholder" and n in carriers]
        self._inputs = [n for n in joint.graph.nodes if n.op == "placeholder" and n not in carriers]
        forward = [n for n in outputs if not isinstance(n, fx.Node) or n not in carriers]
        split = next((i for i, n in enumerate(outputs) if isinstance(n, fx.Node) and n in carriers), len(outputs))
        self._outputs = outputs[: len(output.args[0][0])] if _nested(output) else forward
        gradients = outputs[len(self._outputs) :] if _nested(output) else outputs[split:]
        self._gradients = left[len(self._outputs) :]
        ends = {n for n in (*self._outputs, *gradients) if isinstance(n, fx.Node)}
        using = {node for node in carriers - gone if node.op != "output"}
        self._shown: dict[fx.Node, str] = {}
        self.nodes: list[ViewNode] = []
        for node in joint.graph.nodes:
            if node.op == "output" or self._hidden(node, carriers, ends, detail):
                continue
            self._shown[node] = f"{prefix}{node.name}"
            self.nodes.append(
                ViewNode(
                    key=self._shown[node],
                    label=self._label(node, carriers),
                    backward=node in carriers,
                    branch=owner.get(node),
                    pruned=node in gone,
                    shape=_shape(node.meta.get("val")),
                    flops=node_flops(node),
                    kind=_kind(node),
                    saved=node not in carriers and any(user in using for user in _readers(node)),
                )
            )
        self.edges = [(self._shown[p], self._shown[node]) for node in self._shown for p in self._sources(node)]

    def _hidden(self, node: fx.Node, carriers: set[fx.Node], ends: set[fx.Node], detail: bool) -> bool:
        if node.op == "placeholder":
            return node not in carriers and not self._is_stream(node)
        if not node.users and node not in ends:
            return True
        return not detail and _name(node) in _MOVES

    def _is_stream(self, node: fx.Node) -> bool:
        """Whether an input is an activation: no parameter, no mask, no vector."""
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.ndim > 1 and self._inputs.index(node) in self._streams

    def _label(self, node: fx.Node, carriers: set[fx.Node]) -> str:
        if node.op == "placeholder":
            return "gradient in" if node in carriers else "stream in"
        if node.target is GATE:
            return "gate"
        if node.target is GATE_BACKWARD:
            return "gate's gradient"
        return _name(node).removeprefix("_").replace("scaled_dot_product", "sdpa")

    def _sources(self, node: fx.Node) -> Iterable[fx.Node]:
        """The shown nodes that ``node`` reads, looking through hidden ones."""
        found: dict[fx.Node, None] = {}
        pending = list(node.all_input_nodes)
        seen = set(pending)
        while pending:
            parent = pending.pop()
            if parent in self._shown:
                found[parent] = None
                continue
            for grandparent in parent.all_input_nodes:
                if grandparent not in seen:
                    seen.add(grandparent)
                    pending.append(grandparent)
        return found

    def _nearest(self, node: Any) -> str | None:
        while isinstance(node, fx.Node) and node not in self._shown:
            parents = list(node.all_input_nodes)
            node = parents[0] if parents else None
        return self._shown[node] if isinstance(node, fx.Node) else None

    def input_key(self, number: int) -> str | None:
        """The shown node of the region's input, ``None`` if it is not shown."""
        node = self._inputs[number] if number < len(self._inputs) else None
        return self._shown.get(node) if node is not None else None

    def output_key(self, number: int) -> str | None:
        """The shown node that makes the region's output."""
        return self._nearest(self._outputs[number]) if number < len(self._outputs) else None

    def gradient_key(self, number: int) -> str | None:
        """The shown node that makes the gradient of the region's input."""
        return self._nearest(self._gradients[number]) if number < len(self._gradients) else None

    def tangent_key(self, number: int) -> str | None:
        """The shown node through which the gradient of the region's output comes in."""
        differentiable = [n for n, value in enumerate(self._outputs) if _wants_gradient(value)]
        if number not in differentiable:
            return None
        at = differentiable.index(number)
        return self._shown.get(self._tangents[at]) if at < len(self._tangents) else None


def _wants_gradient(value: Any) -> bool:
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(found, torch.Tensor) and found.is_floating_point()


def _nested(output: fx.Node) -> bool:
    first = output.args[0]
    return isinstance(first, (list, tuple)) and bool(first) and isinstance(first[0], (list, tuple))


def _flat(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _readers(node: fx.Node) -> set[fx.Node]:
    """What reads the memory of ``node``: its users, and those of what only views it."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                if _name(user) in _VIEWS:
                    pending.append(user)
    return found


def _pruned(joint: fx.GraphModule, labels: Collection[int]) -> tuple[set[fx.Node], list[fx.Node | None]]:
    """The nodes that dropping the gates ``labels`` removes, and what is left of the outputs, gates looked through.

    Dead nodes and gates, which every variant loses, do not count as removed.
    """
    left, outputs = _survivors(joint, labels)
    always, _ = _survivors(joint, ())
    gone = {
        node
        for node in joint.graph.nodes
        if node not in left and (node in always or (node.target is GATE_BACKWARD and node.args[1] in labels))
    }
    return gone, outputs


def _survivors(joint: fx.GraphModule, labels: Collection[int]) -> tuple[set[fx.Node], list[fx.Node | None]]:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(joint.graph, copies))
    originals = {copied: node for node, copied in copies.items()}
    prune_joint_graph(graph, labels)
    (output,) = (node for node in graph.nodes if node.op == "output")
    outputs = [originals.get(item) if isinstance(item, fx.Node) else None for item in _flat(output.args)]
    return {originals[node] for node in graph.nodes if node in originals}, outputs


def _leading_to(joint: fx.GraphModule, label: int) -> set[fx.Node]:
    """The forward nodes of one branch: those its gates depend on and that depend on a tensor the branch alone reads.

    Counted from the stream on: what other branches read too (a shared norm) belongs to none.
    """
    gates = [node for node in joint.graph.nodes if node.target is GATE]
    reached: Mapping[int, set[fx.Node]] = {
        number: _ancestors([gate for gate in gates if gate.args[1] == number], number)
        for number in {int(gate.args[1]) for gate in gates}
    }
    mine = reached.get(label, set())
    others = set[fx.Node]().union(*(nodes for number, nodes in reached.items() if number != label))
    return {node for node in mine - others if node.op == "call_function"}


def _ancestors(gates: Sequence[fx.Node], label: int) -> set[fx.Node]:
    seen, pending = set(gates), list(gates)
    while pending:
        for parent in pending.pop().all_input_nodes:
            if parent not in seen and not (parent.target is GATE and parent.args[1] != label):
                seen.add(parent)
                pending.append(parent)
    return seen


def _name(node: fx.Node) -> str:
    if _torch.is_operator_overload(node.target):
        return str(node.target.overloadpacket).rpartition(".")[2]
    return str(getattr(node.target, "__name__", node.target))


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    return "gate" if node.target in (GATE, GATE_BACKWARD) else "operator"


def _shape(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = next((item for item in value if isinstance(item, torch.Tensor)), None)
    return "x".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else ""
