"""Settle what belongs to each branch: its own work, and what is computed for it alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from dropbp_fx.graph.branch import RejectedAdd
from dropbp_fx.graph.candidates import Candidate
from dropbp_fx.graph.dataflow import Dataflow
from dropbp_fx.graph.residual_forms import is_fused
from dropbp_fx.graph.work import does_work


def with_own_work(flow: Dataflow, accepted: Sequence[Candidate], rejected: list[RejectedAdd]) -> list[Candidate]:
    """Settle what belongs to each branch; one whose work is all that of other streams' branches is none."""
    adds = 0
    for candidate in accepted:
        adds |= 1 << flow.position[candidate.addition]
    kept: list[Candidate] = []
    for candidate in accepted:
        foreign = adds & ~(1 << flow.position[candidate.addition])
        candidate.own = _own(flow, candidate, foreign)
        candidate.own |= _private(flow, candidate, foreign)
        fused = (user for _, user in candidate.outputs if is_fused(user))
        if any(does_work(node) for node in (*flow.members(candidate.own), *fused)):
            kept.append(candidate)
        else:
            rejected.append(RejectedAdd(candidate.addition, "all work before it is that of other branches"))
    return kept


def _own(flow: Dataflow, candidate: Candidate, foreign: int) -> int:
    """What of the body leads to the branch's outputs without passing a sum in ``foreign``."""
    inside = candidate.body & ~foreign
    reached = 0
    for output, _ in candidate.outputs:  # a sum of several terms is an output, and no part of the body
        reached |= 1 << flow.position[output] & ~foreign
    for index in range(reached.bit_length() - 1, -1, -1):
        if reached >> index & 1:
            for parent in flow.parents[index]:
                reached |= inside & 1 << parent
    return reached & inside


def _private(flow: Dataflow, candidate: Candidate, foreign: int) -> int:
    """What is computed after the skip for the branch alone: every use is inside it or leads to outputs only."""
    start = flow.position[candidate.skip]
    above = 0
    for output, _ in candidate.outputs:
        above |= flow.ancestors[flow.position[output]]
    above &= ~candidate.body & ~((2 << start) - 1) & ~foreign
    members = candidate.own
    after = flow.descendants[flow.position[candidate.addition]]
    for index in sorted(flow.indices(above), reverse=True):
        if flow.nodes[index].op not in ("placeholder", "get_attr") and all(
            members >> flow.position[user] & 1 or _leads_out(flow, user, after) for user in flow.nodes[index].users
        ):
            members |= 1 << index
    return members


def _leads_out(flow: Dataflow, user: fx.Node, after: int) -> bool:
    """Whether everything computed from ``user`` goes to graph outputs without what follows the add."""
    index = flow.position[user]
    return user.op == "output" or bool(flow.parents[index] and not flow.descendants[index] & after)
