"""Find what may be a residual branch: summands that are computed from another one by real work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from dropbp_fx.graph.dataflow import Dataflow
from dropbp_fx.graph.readings import readings
from dropbp_fx.graph.residual_forms import Term, form_of, is_fused, scales_only
from dropbp_fx.graph.values import example_value, have_one_shape, is_activation, is_constant_like
from dropbp_fx.graph.work import does_work


@dataclasses.dataclass
class Candidate:
    """What may be a residual branch; attributes as in :class:`~dropbp_fx.graph.branch.ResidualBranch`.

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


def candidates_of(flow: Dataflow, addition: fx.Node, terms: Sequence[Term]) -> Iterator[Candidate]:
    """For every term that others are computed from: those others, in groups that belong together."""
    seen: set[fx.Node] = set()
    for term in terms:
        if not term.may_be_stream or not have_one_shape(term.value, addition):
            continue
        for reading in readings(flow, term, [other for other in terms if other is not term]):
            at = flow.position[reading.skip]
            dependent = [
                other
                for other in reading.added
                if reading.skip not in other.values
                and any(flow.ancestors[flow.position[v]] >> at & 1 for v in other.values if is_activation(v))
            ]
            if not dependent or reading.skip in seen:
                continue
            found = False
            for group in _together(flow, reading.skip, dependent):
                body = 0
                for value in (value for member in group for value in member.values):
                    body |= flow.descendants[at] & flow.ancestors[flow.position[value]]
                body &= ~(1 << at)
                works = any(does_work(node) for node in flow.members(body))
                if works or any(is_fused(member.consumer) and does_work(member.consumer) for member in group):
                    found = True
                    plain = reading.plain and all(member.plain for member in group)
                    kept = [other for other in terms if other in dependent and other not in group]
                    edges = _collapsed(flow, addition, terms, group, kept)
                    yield Candidate(reading.skip, edges, addition, body, plain)
            if found or reading.plain:
                seen.add(reading.skip)
                break


def _together(flow: Dataflow, skip: fx.Node, terms: Sequence[Term]) -> list[list[Term]]:
    """Group terms that are one branch: they share work, or are linear functions of one value (LoRA's add)."""
    below = flow.descendants[flow.position[skip]]
    groups: list[tuple[list[Term], set[fx.Node]]] = []
    for term in terms:
        marks: set[fx.Node] = set(term.values)
        for value in term.values:
            body = below & flow.ancestors[flow.position[value]]
            marks |= {node for node in flow.members(body) if does_work(node) and node is not skip}
            marks.add(_linear_root(flow, value, below))
        joined = [group for group in groups if group[1] & marks]
        for group in joined:
            groups.remove(group)
            marks |= group[1]
        groups.append(([*(other for group in joined for other in group[0]), term], marks))
    return [group for group, _ in groups]


def _linear_root(flow: Dataflow, node: fx.Node, below: int) -> fx.Node:
    """The value that ``node`` is a linear function of, following nodes computed from the skip."""
    while True:
        parents = [p for p in node.all_input_nodes if below >> flow.position[p] & 1]
        if len(parents) != 1 or not (scales_only(node) or does_work(node)):
            return node
        (node,) = parents


def _collapsed(
    flow: Dataflow, addition: fx.Node, terms: Sequence[Term], group: Sequence[Term], kept: Sequence[Term]
) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """The group as one inner sum where there is one: ``x + (a + b)`` hands on ``a + b``, and so does ``x + (a + bias)``,
    but not if one of the summands is the stream, a value of its shape, or of a branch of its own (``kept``).
    """
    edges = dict.fromkeys(edge for term in group for edge in term.edges)
    biases = {
        edge
        for other in terms
        if other not in kept and (not have_one_shape(other.value, addition) or is_constant_like(other.value))
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
            return tuple(sorted(edges, key=lambda edge: flow.position[edge[0]]))


def is_an_error(flow: Dataflow, candidate: Candidate, terms: Sequence[Term]) -> bool:
    """Whether the sum is what a prediction misses its target by: a difference from data that only a loss is made of."""
    forms = [form_of(term.consumer) for term in terms]
    value = example_value(candidate.skip)
    if not any(form is not None and form.difference for form in forms) or getattr(value, "requires_grad", True):
        return False
    after = list(flow.members(flow.descendants[flow.position[candidate.addition]]))
    returned = (node for node in after if any(user.op == "output" for user in node.users))
    return not any(map(does_work, after)) and not any(have_one_shape(node, candidate.addition) for node in returned)
