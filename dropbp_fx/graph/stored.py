"""What leaves a branch to be stored: keys and values for a cache, attention weights."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

import torch
from torch import fx

from dropbp_fx.graph.candidates import Candidate
from dropbp_fx.graph.dataflow import Dataflow
from dropbp_fx.graph.residual_forms import scales_only
from dropbp_fx.graph.values import mutated_by
from dropbp_fx.graph.work import does_work

_MOVING_FUNCTIONS = frozenset({operator.getitem, torch.cat, torch.concat, torch.stack})
_MOVING_METHODS = frozenset({"detach", "expand", "select", "narrow", "index_select", "chunk", "split", "movedim"})


class StoredValues:
    """Which of a graph's values are stored.

    Args:
        flow: the graph.
        stored: those of its outputs that whoever runs it only stores.
    """

    def __init__(self, flow: Dataflow, stored: Collection[fx.Node]) -> None:
        self._flow = flow
        self._stored = stored

    def escapes(self, candidate: Candidate) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Edges out of the branch through which a value that a matrix product of it reads is stored: keys and values for
        a cache, attention weights. Nothing is computed from the value outside of the branch.

        A value nobody reads in the end needs no gate, and a gate may not part a view from the memory it stands for.
        """
        flow = self._flow
        after = flow.descendants[flow.position[candidate.addition]]
        read = self._read_by_work(candidate.own)
        for node in flow.members(candidate.own & read):
            for user in node.users:
                index = flow.position[user]
                inside = candidate.own >> index & 1 or (node, user) in candidate.outputs
                if inside or after >> index & 1 or not flow.live[index] or self._is_written_through(node, user):
                    continue
                if self._is_stored(node, user):
                    yield node, user

    def stores_item(self, call: fx.Node, at: int) -> bool:
        """Whether item ``at`` of what a checkpoint returns is only stored."""
        if any(user.target is not operator.getitem for user in call.users):
            return False
        items = [user for user in call.users if user.args[1] == at]
        return all(self._is_stored(item, user) for item in items for user in item.users)

    def _read_by_work(self, own: int) -> int:
        """Those of a branch's values that its work has made and that more of its work reads, as they are or after functions
        of one value (a softmax, a view).
        """
        flow = self._flow
        made = read = 0
        for index in flow.indices(own):
            if does_work(flow.nodes[index]) or any(made >> parent & 1 for parent in flow.parents[index]):
                made |= 1 << index
        for index in sorted(flow.indices(own), reverse=True):
            node = flow.nodes[index]
            if does_work(node) or (read >> index & 1 and self._is_function_of_one_value(index)):
                for parent in flow.reads[index]:
                    read |= 1 << parent
        return made & read

    def _is_function_of_one_value(self, index: int) -> bool:
        flow = self._flow
        return sum(flow.differentiable[p] and not flow.is_constant_like(p) for p in set(flow.reads[index])) <= 1

    def _is_stored(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether ``user`` hands ``node`` to the graph's outputs, or to a graph input's memory, and does no more than that:
        joins it to what was stored before, views it, scales it.
        """
        flow = self._flow
        if user.op == "output":
            return node in self._stored
        index = flow.position[user]
        if any(flow.storage[flow.position[target]] in flow.given for target in mutated_by(user)):
            return True
        moves = scales_only(user) or _moves_only(user)
        others = [p for p in flow.reads[index] if flow.differentiable[p] and p != flow.position[node]]
        given = all(flow.nodes[p].op in ("placeholder", "get_attr") or not flow.parents[p] for p in others)
        return (
            moves and given and bool(user.users) and all(self._is_stored(user, following) for following in user.users)
        )

    def _is_written_through(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether ``user`` is the way, or a view on the way, of a write into ``node``'s memory: it needs that memory."""
        flow = self._flow
        memory, index = flow.storage[flow.position[node]], flow.position[user]
        if memory is None or user.op == "output" or flow.last_write.get(memory, -1) < index:
            return False
        return flow.storage[index] == memory or node in mutated_by(user)


def _moves_only(node: fx.Node) -> bool:
    """Whether a node joins its operands or takes a part of one; views are among what :func:`scales_only` knows."""
    if node.op == "call_function":
        return node.target in _MOVING_FUNCTIONS
    return node.op == "call_method" and node.target in _MOVING_METHODS
