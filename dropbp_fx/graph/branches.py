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
from collections.abc import Collection
from typing import Any

from torch import fx

from dropbp_fx.graph.branch import BranchSearch, RejectedAdd, ResidualBranch
from dropbp_fx.graph.candidates import Candidate, candidates_of, is_an_error
from dropbp_fx.graph.checkpoints import checkpoint_bodies
from dropbp_fx.graph.dataflow import Dataflow
from dropbp_fx.graph.nesting import Nesting
from dropbp_fx.graph.owned import with_own_work
from dropbp_fx.graph.stored import StoredValues
from dropbp_fx.graph.sums import is_residual_shaped, is_sum, terms_of


def find_branches(gm: fx.GraphModule) -> BranchSearch:
    """Find the residual branches of ``gm``, a graph as Dynamo hands it to a backend (nodes carry ``example_value``).

    Bodies of activation checkpoints are searched as graphs of their own. ``gm`` is not changed, but in-place adds must
    have been normalised first (:func:`~dropbp_fx.graph.normalise.normalise_inplace_adds`), or uses of the mutated operand
    hide the stream.
    """
    found: list[ResidualBranch] = []
    rejected: list[RejectedAdd] = []
    _search(gm, gm.graph, None, _returned(gm.graph), found, rejected)
    return BranchSearch(tuple(found), tuple(rejected))


def _search(
    gm: fx.GraphModule,
    graph: fx.Graph,
    anchor: fx.Node | None,
    stored: Collection[fx.Node],
    found: list[ResidualBranch],
    rejected: list[RejectedAdd],
) -> None:
    bodies = dict(checkpoint_bodies(gm))
    flow = Dataflow(graph)
    values = StoredValues(flow, stored)
    own, refused = _branches_of(flow, values)
    rejected.extend(refused)
    by_addition: dict[fx.Node, list[ResidualBranch]] = {}
    for branch in own:
        by_addition.setdefault(branch.addition, []).append(branch)
    for node in graph.nodes:
        if node in bodies:
            inner = bodies[node].graph
            returned = _returned(inner)
            used = {value for at, value in enumerate(returned) if not values.stores_item(node, at)}
            _search(bodies[node], inner, anchor or node, set(returned) - used, found, rejected)
        mine = by_addition.get(node, ())
        found.extend(mine if anchor is None else (dataclasses.replace(branch, anchor=anchor) for branch in mine))


def _branches_of(flow: Dataflow, stored: StoredValues) -> tuple[list[ResidualBranch], list[RejectedAdd]]:
    """The branches of one graph, checkpoints in it left out."""
    candidates: list[Candidate] = []
    rejected: list[RejectedAdd] = []
    absorbed: set[fx.Node] = set()
    for node in reversed(flow.nodes):
        if node in absorbed or not is_sum(flow, node):
            continue
        terms = list(terms_of(flow, node, absorbed))
        mine = [c for c in candidates_of(flow, node, terms) if not is_an_error(flow, c, terms)]
        if not mine and is_residual_shaped(flow, node):
            rejected.append(RejectedAdd(node, "neither summand is computed from the other by a matrix product"))
        candidates.extend(mine)
    nesting = Nesting(flow, candidates)
    accepted = nesting.innermost([c for c in candidates if c.plain], rejected)
    accepted += nesting.beside(accepted, [c for c in candidates if not c.plain], rejected)
    accepted.sort(key=lambda c: (flow.position[c.addition], flow.position[c.outputs[0][0]]))
    accepted = with_own_work(flow, accepted, rejected)
    branches = [
        ResidualBranch(
            graph=flow.graph,
            skip=c.skip,
            outputs=c.outputs,
            addition=c.addition,
            body=tuple(flow.members(c.own)),
            escapes=tuple(stored.escapes(c)),
            anchor=c.addition,
        )
        for c in accepted
    ]
    return branches, rejected


def _returned(graph: fx.Graph) -> list[Any]:
    """What a graph returns, in order; constants among it are ``None``."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    values = output.args[0] if isinstance(output.args[0], (list, tuple)) else [output.args[0]]
    return [value if isinstance(value, fx.Node) else None for value in values]
