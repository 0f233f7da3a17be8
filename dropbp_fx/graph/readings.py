"""The ways to read a sum: which summand is the stream, and what it is as far up as it is only scaled or mixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from torch import fx

from dropbp_fx.graph.dataflow import Dataflow
from dropbp_fx.graph.mixes import expanded, gated_mix, mixed
from dropbp_fx.graph.residual_forms import Term, form_of, is_piece, scales_only
from dropbp_fx.graph.values import is_constant_like, is_differentiable_value


@dataclasses.dataclass(frozen=True)
class Reading:
    """A way to read a sum: the stream, and the summands that may be branches of it."""

    skip: fx.Node
    added: tuple[Term, ...]
    plain: bool


def readings(flow: Dataflow, term: Term, others: Sequence[Term]) -> Iterator[Reading]:
    """The ways to read a sum with ``term`` for the stream, the plainest first."""
    others = [other for other in others if other.may_be_branch]
    root = _skip_root(flow, term.value)
    added, kept = _mixed_with(term, others)
    if kept is not None:  # the weights are the stream's as well: only what they scale is the branch
        for skip in (kept, _skip_root(flow, kept)):
            yield Reading(skip, added, term.plain and root is not term.value)
        return
    for skip in (term.value, root):
        yield Reading(skip, tuple(others), term.plain)
    scaled = tuple(single for other in others for single in expanded(other))
    node = root
    while is_piece(node) or _looks_through(flow, node):
        node = flow.as_read(node, node.all_input_nodes[0]) if is_piece(node) else _skip_root(flow, node)
        yield Reading(node, scaled if scaled and mixed(node) else tuple(others), False)
    for stream in mixed(node):
        for single in scaled:
            yield Reading(_skip_root(flow, stream), (single,), False)


def _mixed_with(term: Term, others: Sequence[Term]) -> tuple[tuple[Term, ...], fx.Node | None]:
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


def _skip_root(flow: Dataflow, node: fx.Node) -> fx.Node:
    """Look through what only scales or casts the skip, or adds a bias: ``alpha * x``, dropout, a view, ``x + 1``."""
    while _looks_through(flow, node):
        node = flow.as_read(node, _activations_of(flow, node)[0])
    return node


def _looks_through(flow: Dataflow, node: fx.Node) -> bool:
    if len(_activations_of(flow, node)) != 1 or not flow.parents[flow.position[node]]:
        return False
    form = form_of(node)
    return scales_only(node) or (form is not None and form.opens and not form.fused)


def _activations_of(flow: Dataflow, node: fx.Node) -> list[fx.Node]:
    return [p for p in node.all_input_nodes if is_differentiable_value(p) and not is_constant_like(p)]
