"""The autograd graph of one step: which isolated regions and eager operations lead to which, and to which leaves."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dropbp_fx.sensitivity.isolated import RegionRecord, record_of
from dropbp_fx.sensitivity.sensitivity import Metric


class StepGraph:
    """The step's autograd graph: isolated regions, and what eager code does between them.

    Attributes:
        runs: for every branch the records it ran in.
        uses: for every leaf (by ``id``) how many uses contribute to its gradient.
        outer_leaves: leaves that eager code uses.
    """

    def __init__(self, loss: Tensor, records: Sequence[RegionRecord]) -> None:
        self.runs: dict[int, list[RegionRecord]] = collections.defaultdict(list)
        for record in records:
            for branch in record.branches:
                self.runs[branch].append(record)
        order = _topological(loss.grad_fn)
        number = {node: index for index, node in enumerate(order)}
        below = _reachable(order, number)
        self._node_of: dict[int, Any] = {}
        self._outer: list[tuple[Any, int, Tensor]] = []
        self._leaves: dict[int, Tensor] = {}
        self.uses: dict[int, int] = collections.Counter()
        leaf_users: dict[int, list[int]] = collections.defaultdict(list)
        self._users: dict[Any, set[int]] = collections.defaultdict(set)
        edges: dict[Any, set[int]] = collections.defaultdict(set)
        for index, node in enumerate(order):
            made = record_of(node)
            if made is not None:
                self._node_of[id(made)] = node
                for leaf in made.weights.values():
                    self._use(leaf, index, leaf_users)
            elif node.name() == "CheckpointFunctionBackward":
                raise RuntimeError(
                    "The step uses reentrant activation checkpointing, whose inside cannot be seen before its backward "
                    "runs, so it cannot be calibrated. Use checkpoint(..., use_reentrant=False)."
                )
            for position, (following, output) in enumerate(node.next_functions):
                variable = getattr(following, "variable", None)
                if following in number:
                    self._users[following].add(index)
                    edges[following].add(output)
                elif variable is not None and made is None:
                    self._outer.append((node, position, variable))
                    self._use(variable, index, leaf_users)
        self.outer_leaves = list({id(leaf): leaf for _, _, leaf in self._outer}.values())
        self._senders = [order[index] for index in {u for node in self._users for u in self._users[node]}]
        self._affected: dict[int, list[int]] = {}
        self._side_edges: dict[int, list[tuple[Any, int]]] = {}
        self._in_order: dict[int, bool] = {}
        for branch, runs in self.runs.items():
            here = [number[self._node_of[id(record)]] for record in runs if id(record) in self._node_of]
            reached = 0
            for index in here:
                reached |= below[index]

            def passed_or_below(users: Iterable[int], here: Sequence[int] = here, reached: int = reached) -> bool:
                """Whether each user is below the branch, or certain to have been passed by the exact backward."""
                return all(reached >> u & 1 or all(below[u] >> index & 1 for index in here) for u in users)

            self._affected[branch] = [key for key in self._leaves if any(reached >> u & 1 for u in leaf_users[key])]
            shared = [leaf_users[key] for key in self._affected[branch] if self.uses[key] > 1]
            sideways = [
                node
                for node, users in self._users.items()
                if reached >> number[node] & 1 and number[node] not in here and not all(reached >> u & 1 for u in users)
            ]
            self._side_edges[branch] = [(node, output) for node in sideways for output in sorted(edges[node])]
            self._in_order[branch] = all(map(passed_or_below, [*shared, *(self._users[node] for node in sideways)]))

    def _use(self, leaf: Tensor, user: int, users: dict[int, list[int]]) -> None:
        self._leaves[id(leaf)] = leaf
        self.uses[id(leaf)] += 1
        users[id(leaf)].append(user)

    def is_all_below(self, branch: int, metric: Metric) -> bool:
        """Whether the branch can be measured from the one place where it ran."""
        return len(self.runs[branch]) == 1 and (metric == "gradient" or self._in_order[branch])

    def has_fallbacks(self, metric: Metric) -> bool:
        """Whether some branch has to be measured from the loss."""
        return not all(self.is_all_below(branch, metric) for branch in self.runs)

    def node_of(self, record: RegionRecord) -> Any:
        """The autograd node in front of a record."""
        return self._node_of[id(record)]

    def has_several_users(self, node: Any) -> bool:
        """Whether gradients come to ``node`` from several others."""
        return len(self._users[node]) > 1

    def side_edges(self, branch: int) -> list[tuple[Any, int]]:
        """Places below the branch (node and output) to which gradients also come past it."""
        return self._side_edges[branch]

    def affected(self, branch: int) -> list[int]:
        """Leaves (by ``id``), parameters wherever there are any, whose gradient dropping the branch may change."""
        keys = self._affected[branch]
        if not any(isinstance(leaf, torch.nn.Parameter) for leaf in self._leaves.values()):
            return keys
        return [key for key in keys if isinstance(self._leaves[key], torch.nn.Parameter)]

    @contextlib.contextmanager
    def watched(
        self,
        contribute: Callable[[Tensor, Tensor], None],
        flow_in: Callable[[Any, int, Tensor], None],
        arrived: Callable[[Any], None],
    ) -> Iterator[None]:
        """Within the block, tell what eager code does.

        Args:
            contribute: gets the gradients it computes for leaves.
            flow_in: gets those it sends to nodes that have several users.
            arrived: called when a node with several users gets its gradient.
        """
        handles = []
        leaves: dict[Any, dict[int, Tensor]] = collections.defaultdict(dict)
        for node, position, leaf in self._outer:
            leaves[node][position] = leaf
        for node in {*leaves, *self._senders}:
            if record_of(node) is not None:
                continue
            onward = {
                position: following
                for position, following in enumerate(node.next_functions)
                if following[0] in self._users and self.has_several_users(following[0])
            }
            if not onward and node not in leaves:
                continue

            def observe(
                gradients: Any,
                _: Any,
                mine: dict[int, Tensor] = leaves.get(node, {}),  # noqa: B008
                onward: dict[int, Any] = onward,
            ) -> None:
                for position, leaf in mine.items():
                    if gradients[position] is not None:
                        contribute(leaf, gradients[position])
                for position, (following, output) in onward.items():
                    if gradients[position] is not None:
                        flow_in(following, output, gradients[position])

            handles.append(node.register_hook(observe))
        handles.extend(
            node.register_prehook(functools.partial(_tell, arrived, node))
            for node in self._users
            if record_of(node) is None and self.has_several_users(node)
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _tell(arrived: Callable[[Any], None], node: Any, _: Any) -> None:
    arrived(node)


def _topological(root: Any) -> list[Any]:
    """The autograd nodes behind ``root``, each before the nodes it leads to; leaves are left out."""
    order: list[Any] = []
    seen = {root}
    stack = [(root, iter(root.next_functions))]
    while stack:
        node, following = stack[-1]
        for successor, _ in following:
            if successor is not None and successor not in seen and getattr(successor, "variable", None) is None:
                seen.add(successor)
                stack.append((successor, iter(successor.next_functions)))
                break
        else:
            order.append(node)
            stack.pop()
    return order[::-1]


def _reachable(order: Sequence[Any], number: Mapping[Any, int]) -> list[int]:
    """For each node the bit set of the nodes that it leads to, itself included."""
    below = [0] * len(order)
    for index in range(len(order) - 1, -1, -1):
        below[index] = 1 << index
        for successor, _ in order[index].next_functions:
            if successor in number:
                below[index] |= below[number[successor]]
    return below
