"""Of candidates that lie inside of each other, take the innermost adds that carry the stream."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from dropbp_fx.graph.branch import RejectedAdd
from dropbp_fx.graph.candidates import Candidate
from dropbp_fx.graph.dataflow import Dataflow
from dropbp_fx.graph.residual_forms import is_piece, is_view
from dropbp_fx.graph.streams import run_side_by_side, streams_of
from dropbp_fx.graph.work import does_work


class Nesting:
    """Which of a graph's candidates lie inside of which.

    Args:
        flow: the graph.
        candidates: all there are.
    """

    def __init__(self, flow: Dataflow, candidates: Sequence[Candidate]) -> None:
        self._flow = flow
        self._streams = streams_of(flow, candidates)

    def innermost(self, candidates: Sequence[Candidate], rejected: list[RejectedAdd]) -> list[Candidate]:
        """Those of ``candidates`` that lie in no other one and go around none, or around an adapter's only."""
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

    def beside(
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
        return self.innermost(left, rejected)

    def _is_inside(self, inner: Candidate, outer: Candidate) -> bool:
        if inner is outer:
            return False
        if inner.addition is outer.addition:
            return inner.body != outer.body and inner.body & ~outer.body == 0
        between = bool(outer.body >> self._flow.position[inner.addition] & 1)
        return between and not run_side_by_side(self._flow, inner, outer, self._streams)

    def _carries_the_stream(self, candidate: Candidate) -> bool:
        """Whether nothing computed from the skip past the add joins anything computed from the sum again."""
        flow = self._flow
        at, add = flow.position[candidate.skip], flow.position[candidate.addition]
        after = flow.descendants[add]
        beside = flow.reach_avoiding(at, add)
        joined = 0
        for index in flow.indices(after & ~(1 << add)):
            for parent in flow.parents[index]:
                joined |= 1 << parent
        return not joined & beside & ~after

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
        flow = self._flow
        weights: set[fx.Node] = set()
        wholes: dict[fx.Node, fx.Node] = {}
        skip = flow.descendants[flow.position[candidate.skip]]
        for node in flow.members(candidate.body):
            for parent in node.all_input_nodes:
                if parent.op in ("placeholder", "get_attr"):
                    weights |= {parent} if does_work(node) else set()
                elif not skip >> flow.position[parent] & 1:
                    while (is_view(parent) or does_work(parent)) and parent.all_input_nodes:
                        parent = parent.all_input_nodes[0]
                    if parent.target is operator.getitem or is_piece(parent):
                        wholes[parent.all_input_nodes[0]] = parent
        return weights, wholes
