"""Tell residual adds of streams that run side by side from adds that lie inside a branch.

In ``x = x + f(x, m); m = m + g(m, x)`` the sum of ``f`` is among what ``g`` is computed from, and so lies between ``m`` and
``g``'s output. Yet it is no part of ``g``: it carries a stream that came from elsewhere and goes on elsewhere. An adapter's
own residual, a recurrence's state or an attention mask lies between the two as well, and is part of the branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dropbp_fx.graph.candidates import Candidate
from dropbp_fx.graph.dataflow import Dataflow
from dropbp_fx.graph.residual_forms import form_of
from dropbp_fx.graph.sums import is_residual_shaped
from dropbp_fx.graph.values import example_value
from dropbp_fx.graph.work import does_work


@dataclasses.dataclass(frozen=True)
class Stream:
    """Residual adds in a row, each the skip of the next.

    Attributes:
        root: position of the value that the first add is added to, as far up as it is a function of one value.
        additions: positions of the adds, as bits.
    """

    root: int
    additions: int


def streams_of(flow: Dataflow, candidates: Sequence[Candidate]) -> dict[int, Stream]:
    """The stream of each candidate, by its ``id``."""
    roots: dict[int, int] = {}  # by position of an add
    for candidate in sorted(candidates, key=lambda c: flow.position[c.addition]):
        root = _source(flow, candidate, roots)
        roots.setdefault(flow.position[candidate.addition], roots.get(root, root))
    additions: dict[int, int] = {}  # by position of a root
    for addition, root in roots.items():
        additions[root] = additions.get(root, 0) | 1 << addition
    return {id(c): Stream(root, additions[root]) for c in candidates for root in [roots[flow.position[c.addition]]]}


def _source(flow: Dataflow, candidate: Candidate, adds: dict[int, int]) -> int:
    """Position of the add, or of the value that is a function of several, that the candidate's skip is made from."""
    at = flow.position[candidate.skip]
    while at not in adds:
        parents = {p for p in flow.parents[at] if flow.differentiable[p] and not flow.is_constant_like(p)}
        if len(parents) != 1:
            break
        (at,) = parents
    return at


def run_side_by_side(flow: Dataflow, inner: Candidate, outer: Candidate, streams: dict[int, Stream]) -> bool:
    """Whether ``inner``, whose add is among what ``outer`` is computed from, belongs to a stream of its own.

    Its stream must come from somewhere else than ``outer``'s skip and from data, and go on past ``outer``. Where the skip is
    a summand beside work in yet another add, it is a term shared by several sums (an attention mask, a position bias).
    """
    mine = streams[id(inner)]
    if flow.descendants[flow.position[outer.skip]] >> mine.root & 1 or not flow.depends_on_inputs(mine.root):
        return False
    goes_on = bool(mine.additions & ~outer.body) or flow.leads_past(inner.addition, outer.addition)
    return goes_on and not _is_shared_term(flow, inner)


def _is_shared_term(flow: Dataflow, candidate: Candidate) -> bool:
    """Whether the skip is added to the result of some work in yet another sum."""
    for user in candidate.skip.users:
        form = form_of(user)
        if user is candidate.addition or form is None or not is_residual_shaped(flow, user):
            continue
        others = [value for term in form.terms for value in term.values]
        if candidate.skip not in others:
            continue
        for other in others:
            value = example_value(other)
            made = flow.ancestors[flow.position[other]]
            if other is not candidate.skip and value.requires_grad and any(map(does_work, flow.members(made))):
                return True
    return False
