"""Find the residual branches of a Dynamo graph.

A residual branch is the ``h`` of an add ``y = x + h`` where ``h`` is computed from ``x`` by real work (a matrix product,
a convolution, attention, an expert). Names play no part here: the graph is read, so that a family nobody listed works.
What is *not* a branch and why not:

* neither summand feeds the other: position embeddings, biases, rotary embeddings, LoRA's own add, projection shortcuts;
* no work between ``x`` and ``h``: gating, layer scale, DoRA's magnitude term;
* the branch contains other residual adds, or lies inside another branch: an attention mask or position bias that is
  shared by all layers is an ancestor of later scores, a state recurrence updates a state inside a mixer, a U-Net's skip
  goes around whole stages. The *innermost add that carries the stream* is taken: the one whose sum everything computed
  from ``x`` goes through.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.residual_forms import (
    OUT_OF_PLACE,
    Term,
    expanded,
    form_of,
    gated_mix,
    is_inplace,
    is_piece,
    is_view,
    mixed,
    scales_only,
    split_list_adds,
)
from dropbp_fx.graph.streams import Stream, run_side_by_side, streams_of

_WORK_FUNCTIONS = frozenset(
    {
        F.linear,
        F.bilinear,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        operator.matmul,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.mv,
        torch.addmm,
        torch.baddbmm,
        torch.addbmm,
        torch.einsum,
        torch.tensordot,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    }
)
_WORK_METHODS = frozenset({"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "addbmm"})
_CUTS_GRADIENT = frozenset(
    {
        *("detach", "detach_", "data", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    }
)


@dataclasses.dataclass(frozen=True)
class ResidualBranch:
    """One residual branch, located in a graph.

    Attributes:
        graph: the graph that holds it: the top graph, or the body of an activation checkpoint.
        skip: the node of ``x``, the stream the branch reads and is added to.
        outputs: the node of ``h`` and the add that takes it; several where ``h`` is itself a sum whose terms are added
            to the stream one by one (LoRA's update beside the frozen layer's output), or a product whose factors are
            handed to the add. See :mod:`~dropbp_fx.graph.residual_forms` for what takes ``h`` where it is no plain add.
        addition: the outermost add of the (possibly parallel) sum that ``h`` goes into.
        body: nodes from after ``skip`` to ``output``: descendants of the one and ancestors of the other, branches of other
            streams left out, and what is computed on the way for the branch alone (a cross-attention's keys and values of
            the encoder's output).
        escapes: pairs (node of the body, user outside of it) through which a value that the body's work reads is handed to
            the graph's outputs as it is, such as a key/value cache.
        anchor: the node of the *top* graph that holds the branch: ``addition``, or the checkpoint that contains it.
    """

    graph: fx.Graph
    skip: fx.Node
    outputs: tuple[tuple[fx.Node, fx.Node], ...]
    addition: fx.Node
    body: tuple[fx.Node, ...]
    escapes: tuple[tuple[fx.Node, fx.Node], ...]
    anchor: fx.Node

    def in_top_graph(self, node: fx.Node) -> fx.Node | None:
        """The node of the top graph that ``node`` of the branch's graph stands for, ``None`` if it is made inside of a
        checkpoint (or of one checkpoint inside another).
        """
        if self.graph is self.anchor.graph:
            return node
        inputs = [placeholder for placeholder in self.graph.nodes if placeholder.op == "placeholder"]
        operands = self.anchor.args[1:]
        if node not in inputs or len(inputs) != len(operands):
            return None
        operand = operands[inputs.index(node)]
        return operand if isinstance(operand, fx.Node) else None

    @property
    def readers(self) -> tuple[fx.Node, ...]:
        """The body, and an add that multiplies as well (``addmm``): what may read the branch's parameters."""
        return (*self.body, *(node for node in dict.fromkeys(user for _, user in self.outputs) if _is_fused(node)))

    @property
    def work(self) -> tuple[fx.Node, ...]:
        """The branch's matrix products, convolutions and the like, in execution order."""
        return tuple(node for node in self.readers if does_work(node))


@dataclasses.dataclass(frozen=True)
class RejectedAdd:
    """An add of two equally shaped activations that is no residual branch, and the reason."""

    addition: fx.Node
    reason: str


@dataclasses.dataclass(frozen=True)
class BranchSearch:
    """What :func:`find_branches` found: branches in execution order, and adds it looked at and did not take."""

    branches: tuple[ResidualBranch, ...]
    rejected: tuple[RejectedAdd, ...]


def find_branches(gm: fx.GraphModule) -> BranchSearch:
    """Find the residual branches of ``gm``, a graph as Dynamo hands it to a backend (nodes carry ``example_value``).

    Bodies of activation checkpoints are searched as graphs of their own. ``gm`` is not changed, but in-place adds must
    have been normalised first (:func:`normalise_inplace_adds`), or uses of the mutated operand hide the stream.
    """
    found: list[ResidualBranch] = []
    rejected: list[RejectedAdd] = []
    _search(gm, gm.graph, None, _returned(gm.graph), found, rejected)
    return BranchSearch(tuple(found), tuple(rejected))


def normalise_inplace_adds(gm: fx.GraphModule) -> int:
    """Rewrite ``x += h`` so that later uses of ``x`` read the sum's node, and as ``x + h`` where nobody can tell.

    An in-place add may become out of place when its operand is no graph input, no other node that shares its memory is
    used afterwards, and type promotion would not change the result's dtype. Every other form that adds in place
    (``x.addcmul_(g, h)``) likewise, and adds of whole lists become one add each. Numerics are preserved.

    Returns:
        The number of adds made out of place.
    """
    count = 0
    for module, graph in _graphs(gm):
        changed = split_list_adds(graph)
        position = {node: index for index, node in enumerate(graph.nodes)}
        aliases = _nodes_by_storage(graph)
        for node in list(graph.nodes):
            mutated = node.args[0] if node.args else None
            if not isinstance(mutated, fx.Node) or not is_inplace(node):
                continue
            if not isinstance(example_value(mutated), torch.Tensor):
                continue
            for user in list(mutated.users):
                if position[user] > position[node]:
                    user.replace_input_with(mutated, node)
                    changed = True
            storage = storage_of(example_value(mutated))
            sharing = aliases.get(storage, []) if storage is not None else []
            observed = any(
                other.op == "placeholder" or any(position[user] > position[node] for user in other.users)
                for other in sharing
                if other is not node and position[other] < position[node]
            )
            if observed or mutated.op == "placeholder" or _promotes(node):
                continue
            with graph.inserting_before(node):
                replacement = graph.call_function(OUT_OF_PLACE[node.target], node.args, dict(node.kwargs))
            replacement.meta = dict(node.meta)
            position[replacement] = position[node]
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            changed = True
            count += 1
        if changed:
            graph.lint()
            module.recompile()
    return count


def does_work(node: fx.Node) -> bool:
    """Whether a node is a matrix product, convolution, attention or an operator that PyTorch does not know."""
    if node.op == "call_method":
        return node.target in _WORK_METHODS
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    target: Any = node.target
    if target in _WORK_FUNCTIONS:
        return True
    if _torch.is_registered_operator(target):
        name = str(target)
        if not name.startswith(("aten.", "aten::", "prims.", "prim.", "dropbp_fx.")):
            return True
        return any(word in name for word in ("mm", "matmul", "linear", "conv", "einsum", "attention"))
    if _torch.is_higher_order_operator(target):
        forward = _autograd_function_body(node)
        if forward is not None:
            return any(does_work(inner) and (_is_known(inner) or _multiplies(node)) for inner in forward.nodes)
        return "autocast" not in target.name() and "grad_enabled" not in target.name()
    module = getattr(target, "__module__", None) or ""
    if module.startswith(_torch.FOURIER_MODULES):
        return True
    name = getattr(target, "__name__", "")
    return any(word in name for word in ("grouped_mm", "scaled_mm", "_rnn", "lstm", "gru", "fft"))


def _is_known(node: fx.Node) -> bool:
    """Whether PyTorch tells what a node that does work computes, as it does not of a kernel of somebody else's."""
    target: Any = node.target
    if _torch.is_higher_order_operator(target):
        return not target.name().startswith("triton_kernel_wrapper")
    return not _torch.is_registered_operator(target) or str(target).startswith("aten")


def _multiplies(node: fx.Node) -> bool:
    """Whether a node could be a product: two of its operands are matrices. A norm has one, and vectors for weights."""
    values = map(example_value, node.all_input_nodes)
    return sum(isinstance(value, torch.Tensor) and value.dim() > 1 for value in values) > 1


def _autograd_function_body(node: fx.Node) -> fx.Graph | None:
    """The forward of a ``torch.autograd.Function`` that Dynamo traced: it does work if what it runs does."""
    target: Any = node.target
    body = node.args[0] if node.args and target.name() == "autograd_function_apply" else None
    owner = node.graph.owning_module
    if not isinstance(body, fx.Node) or body.op != "get_attr" or owner is None:
        return None
    module = getattr(owner, str(body.target), None)
    return module.graph if isinstance(module, fx.GraphModule) else None


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


def _graphs(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Graph]]:
    yield gm, gm.graph
    for _, body in checkpoint_bodies(gm):
        yield from _graphs(body)


def checkpoint_bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """The activation checkpoints of a graph: the call and the body it runs."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is _torch.checkpoint_operator():
            body = node.args[0]
            if isinstance(body, fx.Node) and body.op == "get_attr":
                yield node, getattr(gm, str(body.target))


def _search(
    gm: fx.GraphModule,
    graph: fx.Graph,
    anchor: fx.Node | None,
    stored: Collection[fx.Node],
    found: list[ResidualBranch],
    rejected: list[RejectedAdd],
) -> None:
    bodies = dict(checkpoint_bodies(gm))
    search = GraphSearch(graph, stored)
    own, refused = search.run()
    rejected.extend(refused)
    by_addition: dict[fx.Node, list[ResidualBranch]] = {}
    for branch in own:
        by_addition.setdefault(branch.addition, []).append(branch)
    for node in graph.nodes:
        if node in bodies:
            inner = bodies[node].graph
            returned = _returned(inner)
            used = {value for at, value in enumerate(returned) if not search.stores_item(node, at)}
            _search(bodies[node], inner, anchor or node, set(returned) - used, found, rejected)
        mine = by_addition.get(node, ())
        found.extend(mine if anchor is None else (dataclasses.replace(branch, anchor=anchor) for branch in mine))


def _returned(graph: fx.Graph) -> list[Any]:
    """What a graph returns, in order; constants among it are ``None``."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    values = output.args[0] if isinstance(output.args[0], (list, tuple)) else [output.args[0]]
    return [value if isinstance(value, fx.Node) else None for value in values]


@dataclasses.dataclass
class Candidate:
    """What may be a residual branch; attributes as in :class:`ResidualBranch`.

    Attributes:
        body: positions of what is computed from ``skip`` and leads to an output, as bits.
        plain: a sum of equals; any other form is taken only where it neither lies in nor goes around such a one.
        own: those of them that are no part of a branch of another stream, and what is computed for this one alone.
    """

    skip: fx.Node
    outputs: tuple[tuple[fx.Node, fx.Node], ...]
    addition: fx.Node
    body: int
    plain: bool
    own: int = 0


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A way to read a sum: the stream, and the summands that may be branches of it."""

    skip: fx.Node
    added: tuple[Term, ...]
    plain: bool


class GraphSearch:
    """The search in one graph. Sets of nodes are integers used as bit sets: graphs of big models have 10^4 nodes.

    Args:
        graph: a graph as Dynamo made it, or the body of an activation checkpoint.
        stored: those of the graph's outputs that whoever runs it only stores.
    """

    def __init__(self, graph: fx.Graph, stored: Collection[fx.Node]) -> None:
        self.graph = graph
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.storage = [storage_of(example_value(node)) for node in self.nodes]
        self.last_write: dict[int, int] = {}
        self.differentiable: list[bool] = []
        self.reads: list[list[int]] = []
        self.parents: list[list[int]] = []  # those of its reads that a node's gradient goes to
        enabled = True
        for index, node in enumerate(self.nodes):
            if node.op == "call_function" and node.target is _torch.SET_GRAD_ENABLED:
                enabled = bool(node.args[0])
            written = mutated_by(node)
            self.differentiable.append(_is_differentiable_value(node) or any(map(_is_differentiable_value, written)))
            carries = enabled and node.op != "output" and self.differentiable[index] and not _cuts_gradient(node)
            self.reads.append(list(self._read_by(node)))
            self.parents.append(self.reads[index] if carries else [])
            for target in written:
                memory = self.storage[self.position[target]]
                if memory is not None:
                    self.last_write[memory] = index
        self.ancestors: list[int] = []
        for index, parents in enumerate(self.parents):
            mine = 1 << index
            for parent in parents:
                if self.differentiable[parent]:
                    mine |= self.ancestors[parent]
            self.ancestors.append(mine)
        self.descendants = [1 << index for index in range(len(self.nodes))]
        for index in range(len(self.nodes) - 1, -1, -1):
            for parent in self.parents[index]:
                if self.differentiable[parent]:
                    self.descendants[parent] |= self.descendants[index]

        self.given = {self.storage[index] for index, node in enumerate(self.nodes) if node.op == "placeholder"} - {None}
        self.live = self._reaching_outputs()
        self.stored = stored
        self._streams: dict[int, Stream] = {}

    def _reaching_outputs(self) -> list[bool]:
        """Which nodes a graph output, or what is left in a graph input's memory, depends on."""
        live = [False] * len(self.nodes)
        for index in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[index]
            live[index] |= node.op == "output"
            live[index] |= any(self.storage[self.position[target]] in self.given for target in mutated_by(node))
            if live[index]:
                for source in self.reads[index]:
                    live[source] = True
        return live

    def _read_by(self, node: fx.Node) -> Iterator[int]:
        """Positions of what ``node`` is computed from: its operands, and what was last written into their memory."""
        for parent in node.all_input_nodes:
            yield self.position[parent]
            memory = self.storage[self.position[parent]]
            if memory in self.last_write:
                yield self.last_write[memory]

    def run(self) -> tuple[list[ResidualBranch], list[RejectedAdd]]:
        candidates: list[Candidate] = []
        rejected: list[RejectedAdd] = []
        absorbed: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node in absorbed or not self._is_sum(node):
                continue
            terms = list(self._terms(node, absorbed))
            mine = [c for c in self._branches_of(node, terms) if not self._is_an_error(c, terms)]
            if not mine and self._is_residual_shaped(node):
                rejected.append(RejectedAdd(node, "neither summand is computed from the other by a matrix product"))
            candidates.extend(mine)
        self._streams = streams_of(self, candidates)
        accepted = self._innermost_stream_adds([c for c in candidates if c.plain], rejected)
        accepted += self._beside(accepted, [c for c in candidates if not c.plain], rejected)
        accepted.sort(key=lambda c: (self.position[c.addition], self.position[c.outputs[0][0]]))
        accepted = self._with_own_work(accepted, rejected)
        branches = [
            ResidualBranch(
                graph=self.graph,
                skip=c.skip,
                outputs=c.outputs,
                addition=c.addition,
                body=tuple(self._members(c.own)),
                escapes=tuple(self._escapes(c)),
                anchor=c.addition,
            )
            for c in accepted
        ]
        return branches, rejected

    def _is_sum(self, node: fx.Node) -> bool:
        """Whether a node is a differentiable sum that is used, some summand of which could be a stream."""
        form, index = form_of(node), self.position[node]
        if form is None or not self.parents[index] or not self.live[index] or not _is_activation(node):
            return False
        if not all(_is_activation(value, scalar=True) for term in form.terms for value in term.values):
            return False
        return any(term.may_be_stream and _have_one_shape(term.value, node) for term in form.terms)

    def _is_residual_shaped(self, node: fx.Node) -> bool:
        """Whether a node is a sum of activations of one shape."""
        form = form_of(node)
        if form is None or len(form.terms) < 2 or form.fused or not self._is_sum(node):
            return False
        return all(_have_one_shape(term.value, node) for term in form.terms)

    def _terms(self, node: fx.Node, absorbed: set[fx.Node], plain: bool = True) -> Iterator[Term]:
        """The summands of a sum; sums used by nothing else are part of it."""
        form = form_of(node)
        for term in form.terms if form is not None else ():
            operand = term.value
            inner = form_of(operand) if form is not None and form.opens and len(term.values) == 1 else None
            if inner is not None and inner.opens and self._may_open(operand, node):
                absorbed.add(operand)
                yield from self._terms(operand, absorbed, plain and term.plain)
            else:
                equal = all(_have_one_shape(value, node) for value in term.values)
                yield dataclasses.replace(term, plain=plain and term.plain and equal)

    def _may_open(self, operand: fx.Node, total: fx.Node) -> bool:
        one_use = len(operand.users) == 1 and not is_inplace(operand)
        return one_use and self._is_sum(operand) and _have_one_shape(operand, total)

    def _branches_of(self, addition: fx.Node, terms: Sequence[Term]) -> Iterator[Candidate]:
        """For every term that others are computed from: those others, in groups that belong together."""
        seen: set[fx.Node] = set()
        for term in terms:
            if not term.may_be_stream or not _have_one_shape(term.value, addition):
                continue
            for reading in self._readings(term, [other for other in terms if other is not term]):
                at = self.position[reading.skip]
                dependent = [
                    other
                    for other in reading.added
                    if reading.skip not in other.values
                    and any(self.ancestors[self.position[v]] >> at & 1 for v in other.values if _is_activation(v))
                ]
                if not dependent or reading.skip in seen:
                    continue
                found = False
                for group in self._together(reading.skip, dependent):
                    body = 0
                    for value in (value for member in group for value in member.values):
                        body |= self.descendants[at] & self.ancestors[self.position[value]]
                    body &= ~(1 << at)
                    works = any(does_work(node) for node in self._members(body))
                    if works or any(_is_fused(member.consumer) and does_work(member.consumer) for member in group):
                        found = True
                        plain = reading.plain and all(member.plain for member in group)
                        kept = [other for other in terms if other in dependent and other not in group]
                        edges = self._collapsed(addition, terms, group, kept)
                        yield Candidate(reading.skip, edges, addition, body, plain)
                if found or reading.plain:
                    seen.add(reading.skip)
                    break

    def _readings(self, term: Term, others: Sequence[Term]) -> Iterator[_Reading]:
        """The ways to read a sum with ``term`` for the stream, the plainest first."""
        others = [other for other in others if other.may_be_branch]
        root = self._skip_root(term.value)
        added, kept = self._mixed_with(term, others)
        if kept is not None:  # the weights are the stream's as well: only what they weigh is the branch
            for skip in (kept, self._skip_root(kept)):
                yield _Reading(skip, added, term.plain and root is not term.value)
            return
        for skip in (term.value, root):
            yield _Reading(skip, tuple(others), term.plain)
        weighed = tuple(single for other in others for single in expanded(other))
        node = root
        while is_piece(node) or self._looks_through(node):
            node = self._as_read(node, node.all_input_nodes[0]) if is_piece(node) else self._skip_root(node)
            yield _Reading(node, weighed if weighed and mixed(node) else tuple(others), False)
        for stream in mixed(node):
            for single in weighed:
                yield _Reading(self._skip_root(stream), (single,), False)

    def _mixed_with(self, term: Term, others: Sequence[Term]) -> tuple[tuple[Term, ...], fx.Node | None]:
        """The summands, those of a mix ``x * g + h * (1 - g)`` without their weight, and ``x`` if there is such a mix."""
        added: list[Term] = []
        stream: fx.Node | None = None
        for other in others:
            mix = gated_mix(term.value, other.value) if len(other.value.users) == 1 else None
            if mix is not None and len(other.values) == 1:
                stream = mix[0]
                other = Term((mix[1],), other.value, plain=other.plain)
            added.append(other)
        return tuple(added), stream

    def _is_an_error(self, candidate: Candidate, terms: Sequence[Term]) -> bool:
        """Whether the sum is what a prediction misses its target by: a difference from data that only a loss is made of."""
        forms = [form_of(term.consumer) for term in terms]
        value = example_value(candidate.skip)
        if not any(form is not None and form.difference for form in forms) or getattr(value, "requires_grad", True):
            return False
        after = list(self._members(self.descendants[self.position[candidate.addition]]))
        returned = (node for node in after if any(user.op == "output" for user in node.users))
        return not any(map(does_work, after)) and not any(
            _have_one_shape(node, candidate.addition) for node in returned
        )

    def _beside(
        self, taken: Sequence[Candidate], others: Sequence[Candidate], rejected: list[RejectedAdd]
    ) -> list[Candidate]:
        """Those of ``others`` that neither lie in branches that are ``taken`` nor go around them, innermost ones."""
        left: list[Candidate] = []
        for candidate in others:
            if any(self._is_inside(other, candidate) for other in taken):
                rejected.append(RejectedAdd(candidate.addition, "it goes around other residual adds"))
            elif any(self._is_inside(candidate, other) for other in taken):
                rejected.append(RejectedAdd(candidate.addition, "it lies inside a residual branch"))
            elif self._is_a_step(candidate, others):
                rejected.append(RejectedAdd(candidate.addition, "it is a step of a recurrence"))
            else:
                left.append(candidate)
        return self._innermost_stream_adds(left, rejected)

    def _is_a_step(self, candidate: Candidate, others: Sequence[Candidate]) -> bool:
        """Whether another candidate has the same weights and reads another piece of the same value: another time step."""
        weights, wholes = self._read_from_outside(candidate)
        for other in others:
            if other is not candidate and wholes:
                mine, pieces = self._read_from_outside(other)
                common = [(wholes[whole], piece) for whole, piece in pieces.items() if whole in wholes]
                if weights & mine and any(one.args[1:] != another.args[1:] for one, another in common):
                    return True
        return False

    def _read_from_outside(self, candidate: Candidate) -> tuple[set[fx.Node], dict[fx.Node, fx.Node]]:
        """The graph inputs that a candidate's work reads, and for values of which it reads a piece that piece."""
        weights: set[fx.Node] = set()
        wholes: dict[fx.Node, fx.Node] = {}
        skip = self.descendants[self.position[candidate.skip]]
        for node in self._members(candidate.body):
            for parent in node.all_input_nodes:
                if parent.op in ("placeholder", "get_attr"):
                    weights |= {parent} if does_work(node) else set()
                elif not skip >> self.position[parent] & 1:
                    while (is_view(parent) or does_work(parent)) and parent.all_input_nodes:
                        parent = parent.all_input_nodes[0]
                    if parent.target is operator.getitem or is_piece(parent):
                        wholes[parent.all_input_nodes[0]] = parent
        return weights, wholes

    def _together(self, skip: fx.Node, terms: Sequence[Term]) -> list[list[Term]]:
        """Group terms that are one branch: they share work, or are linear functions of one value (LoRA's add)."""
        below = self.descendants[self.position[skip]]
        groups: list[tuple[list[Term], set[fx.Node]]] = []
        for term in terms:
            marks: set[fx.Node] = set(term.values)
            for value in term.values:
                body = below & self.ancestors[self.position[value]]
                marks |= {node for node in self._members(body) if does_work(node) and node is not skip}
                marks.add(self._linear_root(value, below))
            joined = [group for group in groups if group[1] & marks]
            for group in joined:
                groups.remove(group)
                marks |= group[1]
            groups.append(([*(other for group in joined for other in group[0]), term], marks))
        return [group for group, _ in groups]

    def _linear_root(self, node: fx.Node, below: int) -> fx.Node:
        """The value that ``node`` is a linear function of, following nodes computed from the skip."""
        while True:
            parents = [p for p in node.all_input_nodes if below >> self.position[p] & 1]
            if len(parents) != 1 or not (scales_only(node) or does_work(node)):
                return node
            (node,) = parents

    def _collapsed(
        self, addition: fx.Node, terms: Sequence[Term], group: Sequence[Term], kept: Sequence[Term]
    ) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """The group as one inner sum where there is one: ``x + (a + b)`` hands on ``a + b``, and so does ``x + (a + bias)``,
        but not if one of the summands is the stream, a value of its shape, or of a branch of its own (``kept``).
        """
        edges = dict.fromkeys(edge for term in group for edge in term.edges)
        biases = {
            edge
            for other in terms
            if other not in kept and (not _have_one_shape(other.value, addition) or _is_constant_like(other.value))
            for edge in other.edges
        }
        while True:
            for _, consumer in edges:
                inner = next(iter(consumer.users)) if consumer.target is torch.stack else consumer
                form = form_of(inner)
                if inner is addition or form is None:
                    continue
                summed = [edge for term in form.terms for edge in term.edges]
                if any(edge not in edges and edge not in biases for edge in summed):
                    continue
                (user,) = inner.users
                for edge in summed:
                    edges.pop(edge, None)
                edges[inner, user] = None
                break
            else:
                return tuple(sorted(edges, key=lambda edge: self.position[edge[0]]))

    def _skip_root(self, node: fx.Node) -> fx.Node:
        """Look through what only scales or casts the skip, or adds a bias: ``alpha * x``, dropout, a view, ``x + 1``."""
        while self._looks_through(node):
            node = self._as_read(node, self._activations_of(node)[0])
        return node

    def _as_read(self, reader: fx.Node, value: fx.Node) -> fx.Node:
        """``value``, or what was last written into its memory before ``reader`` read it."""
        memory = self.storage[self.position[value]]
        for index in self.reads[self.position[reader]]:
            written = (self.storage[self.position[target]] for target in mutated_by(self.nodes[index]))
            if memory is not None and index > self.position[value] and memory in written:
                return self.nodes[index]
        return value

    def _looks_through(self, node: fx.Node) -> bool:
        if len(self._activations_of(node)) != 1 or not self.parents[self.position[node]]:
            return False
        form = form_of(node)
        return scales_only(node) or (form is not None and form.opens and not form.fused)

    def _activations_of(self, node: fx.Node) -> list[fx.Node]:
        return [p for p in node.all_input_nodes if _is_differentiable_value(p) and not _is_constant_like(p)]

    def _innermost_stream_adds(self, candidates: Sequence[Candidate], rejected: list[RejectedAdd]) -> list[Candidate]:
        ordered = sorted(candidates, key=lambda c: c.body.bit_count())
        inside = {id(outer): [c for c in ordered if self._is_inside(c, outer)] for outer in ordered}
        if any(inside.values()):  # only nested adds need telling apart
            carriers = {id(c) for c in ordered if self._carries_the_stream(c)}
            ordered.sort(key=lambda c: id(c) not in carriers)
            for outer in [c for c in ordered if id(c) in carriers]:
                alone = [c for c in inside[id(outer)] if id(c) in carriers]
                if len(alone) == 1 and alone[0] in ordered:  # an adapter's own residual inside of a branch
                    ordered.remove(alone[0])
                    rejected.append(RejectedAdd(alone[0].addition, "it lies inside a residual branch"))
        accepted: list[Candidate] = []
        for candidate in ordered:
            if any(other in inside[id(candidate)] for other in accepted):
                rejected.append(RejectedAdd(candidate.addition, "it goes around other residual adds"))
            elif any(candidate in inside[id(other)] for other in accepted):
                rejected.append(RejectedAdd(candidate.addition, "it lies inside a residual branch"))
            else:
                accepted.append(candidate)
        return accepted

    def _is_inside(self, inner: Candidate, outer: Candidate) -> bool:
        if inner is outer:
            return False
        if inner.addition is outer.addition:
            return inner.body != outer.body and inner.body & ~outer.body == 0
        between = bool(outer.body >> self.position[inner.addition] & 1)
        return between and not run_side_by_side(self, inner, outer, self._streams)

    def _carries_the_stream(self, candidate: Candidate) -> bool:
        """Whether nothing computed from the skip past the add meets anything computed from the sum again."""
        at, add = self.position[candidate.skip], self.position[candidate.addition]
        after = self.descendants[add]
        beside = self._reach_avoiding(at, add)
        meets = 0
        for index in self._indices(after & ~(1 << add)):
            for parent in self.parents[index]:
                meets |= 1 << parent
        return not meets & beside & ~after

    def _reach_avoiding(self, start: int, avoid: int) -> int:
        reached = 1 << start
        for index in range(start + 1, len(self.nodes)):
            if index != avoid and any(reached >> p & 1 for p in self.parents[index] if self.differentiable[p]):
                reached |= 1 << index
        return reached

    def _with_own_work(self, accepted: Sequence[Candidate], rejected: list[RejectedAdd]) -> list[Candidate]:
        """Settle what belongs to each branch; one whose work is all that of other streams' branches is none."""
        adds = 0
        for candidate in accepted:
            adds |= 1 << self.position[candidate.addition]
        kept: list[Candidate] = []
        for candidate in accepted:
            foreign = adds & ~(1 << self.position[candidate.addition])
            candidate.own = self._own(candidate, foreign)
            candidate.own |= self._private(candidate, foreign)
            fused = (user for _, user in candidate.outputs if _is_fused(user))
            if any(does_work(node) for node in (*self._members(candidate.own), *fused)):
                kept.append(candidate)
            else:
                rejected.append(RejectedAdd(candidate.addition, "all work before it is that of other branches"))
        return kept

    def _own(self, candidate: Candidate, foreign: int) -> int:
        """What of the body leads to the branch's outputs without passing a sum in ``foreign``."""
        inside = candidate.body & ~foreign
        reached = 0
        for output, _ in candidate.outputs:  # a sum of several terms is an output, and no part of the body
            reached |= 1 << self.position[output] & ~foreign
        for index in range(reached.bit_length() - 1, -1, -1):
            if reached >> index & 1:
                for parent in self.parents[index]:
                    reached |= inside & 1 << parent
        return reached & inside

    def _private(self, candidate: Candidate, foreign: int) -> int:
        """What is computed after the skip for the branch alone: every use is inside it or leads to outputs only."""
        start = self.position[candidate.skip]
        above = 0
        for output, _ in candidate.outputs:
            above |= self.ancestors[self.position[output]]
        above &= ~candidate.body & ~((2 << start) - 1) & ~foreign
        members = candidate.own
        after = self.descendants[self.position[candidate.addition]]
        for index in sorted(self._indices(above), reverse=True):
            if self.nodes[index].op not in ("placeholder", "get_attr") and all(
                members >> self.position[user] & 1 or self._leads_out(user, after) for user in self.nodes[index].users
            ):
                members |= 1 << index
        return members

    def _leads_out(self, user: fx.Node, after: int) -> bool:
        """Whether everything computed from ``user`` goes to graph outputs without meeting what follows the add."""
        index = self.position[user]
        return user.op == "output" or bool(self.parents[index] and not self.descendants[index] & after)

    def _escapes(self, candidate: Candidate) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Edges out of the branch through which a value that a matrix product of it reads is stored: keys and values for
        a cache, attention weights. Nothing is computed from the value outside of the branch.

        A value nobody reads in the end needs no gate, and a gate may not part a view from the memory it stands for.
        """
        after = self.descendants[self.position[candidate.addition]]
        read = self._read_by_work(candidate.own)
        for node in self._members(candidate.own & read):
            for user in node.users:
                index = self.position[user]
                inside = candidate.own >> index & 1 or (node, user) in candidate.outputs
                if inside or after >> index & 1 or not self.live[index] or self._is_written_through(node, user):
                    continue
                if self._is_stored(node, user):
                    yield node, user

    def _read_by_work(self, own: int) -> int:
        """Those of a branch's values that its work has made and that more of its work reads, as they are or after functions
        of one value (a softmax, a view).
        """
        made = read = 0
        for index in self._indices(own):
            if does_work(self.nodes[index]) or any(made >> parent & 1 for parent in self.parents[index]):
                made |= 1 << index
        for index in sorted(self._indices(own), reverse=True):
            node = self.nodes[index]
            if does_work(node) or (read >> index & 1 and self._is_function_of_one_value(index)):
                for parent in self.reads[index]:
                    read |= 1 << parent
        return made & read

    def _is_function_of_one_value(self, index: int) -> bool:
        return sum(self.differentiable[p] and not self.is_constant_like(p) for p in set(self.reads[index])) <= 1

    def stores_item(self, call: fx.Node, at: int) -> bool:
        """Whether item ``at`` of what a checkpoint returns is only stored."""
        if any(user.target is not operator.getitem for user in call.users):
            return False
        items = [user for user in call.users if user.args[1] == at]
        return all(self._is_stored(item, user) for item in items for user in item.users)

    def _is_stored(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether ``user`` hands ``node`` to the graph's outputs, or to a graph input's memory, and does no more than that:
        joins it to what was stored before, views it, scales it.
        """
        if user.op == "output":
            return node in self.stored
        index = self.position[user]
        if any(self.storage[self.position[target]] in self.given for target in mutated_by(user)):
            return True
        moves = scales_only(user) or _moves_only(user)
        others = [p for p in self.reads[index] if self.differentiable[p] and p != self.position[node]]
        given = all(self.nodes[p].op in ("placeholder", "get_attr") or not self.parents[p] for p in others)
        return (
            moves and given and bool(user.users) and all(self._is_stored(user, following) for following in user.users)
        )

    def _is_written_through(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether ``user`` is the way, or a view on the way, of a write into ``node``'s memory: it needs that memory."""
        memory, index = self.storage[self.position[node]], self.position[user]
        if memory is None or user.op == "output" or self.last_write.get(memory, -1) < index:
            return False
        return self.storage[index] == memory or node in mutated_by(user)

    def _members(self, bits: int) -> Iterator[fx.Node]:
        return (self.nodes[index] for index in self._indices(bits))

    def is_constant_like(self, index: int) -> bool:
        """Whether the value at ``index`` is what a scale is made of."""
        return _is_constant_like(self.nodes[index])

    def depends_on_inputs(self, index: int) -> bool:
        """Whether the value at ``index`` is made from a graph input, rather than of constants."""
        return any(self.nodes[k].op in ("placeholder", "get_attr") for k in self._indices(self.ancestors[index]))

    def leads_past(self, start: fx.Node, avoid: fx.Node) -> bool:
        """Whether a graph output depends on ``start`` in another way than through ``avoid``."""
        reached = self._reach_avoiding(self.position[start], self.position[avoid])
        return any(
            self.live[index] and any(user.op == "output" for user in self.nodes[index].users)
            for index in self._indices(reached)
        )

    def is_shared_term(self, candidate: Candidate) -> bool:
        """Whether the skip is added to the result of some work in yet another sum."""
        for user in candidate.skip.users:
            form = form_of(user)
            if user is candidate.addition or form is None or not self._is_residual_shaped(user):
                continue
            others = [value for term in form.terms for value in term.values]
            if candidate.skip not in others:
                continue
            for other in others:
                value = example_value(other)
                made = self.ancestors[self.position[other]]
                if other is not candidate.skip and value.requires_grad and any(map(does_work, self._members(made))):
                    return True
        return False

    @staticmethod
    def _indices(bits: int) -> Iterator[int]:
        while bits:
            low = bits & -bits
            yield low.bit_length() - 1
            bits ^= low


def _is_fused(node: fx.Node) -> bool:
    form = form_of(node)
    return form is not None and form.fused


def _is_activation(node: fx.Node, *, scalar: bool = False) -> bool:
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and (scalar or value.ndim >= 1)


def _have_one_shape(left: fx.Node, right: fx.Node) -> bool:
    return _is_activation(left) and _is_activation(right) and same_shape(example_value(left), example_value(right))


def _promotes(addition: fx.Node) -> bool:
    """Whether out of place the sum's type could be another than that of its first operand, which it is written into."""
    first, *others = (example_value(operand) for operand in addition.all_input_nodes)
    if not isinstance(first, torch.Tensor):
        return True
    return any(
        not isinstance(other, torch.Tensor) or torch.promote_types(first.dtype, other.dtype) != first.dtype
        for other in others
    )


def _cuts_gradient(node: fx.Node) -> bool:
    """Whether a node's output is no differentiable function of its inputs, whatever requires a gradient in this run."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _CUTS_GRADIENT


def _is_differentiable_value(node: fx.Node) -> bool:
    value = example_value(node)
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, torch.Tensor) and item.is_floating_point() for item in value)
    return False


def _is_constant_like(node: fx.Node) -> bool:
    """A number or a vector made of graph inputs that are one too, parameters and buffers: what a scale is made of."""
    value = example_value(node)
    if not isinstance(value, torch.Tensor) or value.ndim > 1:
        return False
    sources = node.all_input_nodes
    return node.op in ("placeholder", "get_attr") or (bool(sources) and all(map(_is_constant_like, sources)))


_MOVING_FUNCTIONS = frozenset({operator.getitem, torch.cat, torch.concat, torch.stack})
_MOVING_METHODS = frozenset({"detach", "expand", "select", "narrow", "index_select", "chunk", "split", "movedim"})


def _moves_only(node: fx.Node) -> bool:
    """Whether a node joins its operands or takes a part of one; views are among what :func:`scales_only` knows."""
    if node.op == "call_function":
        return node.target in _MOVING_FUNCTIONS
    return node.op == "call_method" and node.target in _MOVING_METHODS


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


def _nodes_by_storage(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    groups: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        storage = storage_of(example_value(node))
        if storage is not None:
            groups.setdefault(storage, []).append(node)
    return groups
