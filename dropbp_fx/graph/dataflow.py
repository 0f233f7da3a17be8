"""What is computed from what in one graph.

Sets of nodes are integers used as bit sets: graphs of big models have 10^4 nodes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.values import (
    cuts_gradient,
    example_value,
    is_constant_like,
    is_differentiable_value,
    mutated_by,
    storage_of,
)


class Dataflow:
    """The nodes of a graph by position, and what depends on what.

    Attributes:
        graph: a graph as Dynamo made it, or the body of an activation checkpoint.
        nodes: its nodes, in execution order.
        position: the index of each node.
        storage: for each node what identifies its memory, ``None`` where it has none of its own.
        last_write: for each memory the position of the last node that writes into it.
        differentiable: for each node whether a gradient can pass its value.
        reads: for each node the positions of what it is computed from.
        parents: those of its reads that a node's gradient goes to.
        ancestors: for each node, as bits, what its gradient goes to, itself among it.
        descendants: for each node, as bits, what a gradient of it comes from, itself among it.
        given: the memory of graph inputs.
        live: for each node whether a graph output, or what is left in a graph input's memory, depends on it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.storage = [storage_of(example_value(node)) for node in self.nodes]
        self.last_write: dict[int, int] = {}
        self.differentiable: list[bool] = []
        self.reads: list[list[int]] = []
        self.parents: list[list[int]] = []
        self._follow_values()
        self.ancestors = self._gradients_go_to()
        self.descendants = self._gradients_come_from()
        self.given = {self.storage[index] for index, node in enumerate(self.nodes) if node.op == "placeholder"} - {None}
        self.live = self._reaching_outputs()

    def _follow_values(self) -> None:
        enabled = True
        for index, node in enumerate(self.nodes):
            if node.op == "call_function" and node.target is _torch.SET_GRAD_ENABLED:
                enabled = bool(node.args[0])
            written = mutated_by(node)
            self.differentiable.append(is_differentiable_value(node) or any(map(is_differentiable_value, written)))
            carries = enabled and node.op != "output" and self.differentiable[index] and not cuts_gradient(node)
            self.reads.append(list(self._read_by(node)))
            self.parents.append(self.reads[index] if carries else [])
            for target in written:
                memory = self.storage[self.position[target]]
                if memory is not None:
                    self.last_write[memory] = index

    def _gradients_go_to(self) -> list[int]:
        ancestors: list[int] = []
        for index, parents in enumerate(self.parents):
            mine = 1 << index
            for parent in parents:
                if self.differentiable[parent]:
                    mine |= ancestors[parent]
            ancestors.append(mine)
        return ancestors

    def _gradients_come_from(self) -> list[int]:
        descendants = [1 << index for index in range(len(self.nodes))]
        for index in range(len(self.nodes) - 1, -1, -1):
            for parent in self.parents[index]:
                if self.differentiable[parent]:
                    descendants[parent] |= descendants[index]
        return descendants

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

    def reach_avoiding(self, start: int, avoid: int) -> int:
        """What gradients of ``start`` come from without passing ``avoid``, as bits, itself among it."""
        reached = 1 << start
        for index in range(start + 1, len(self.nodes)):
            if index != avoid and any(reached >> p & 1 for p in self.parents[index] if self.differentiable[p]):
                reached |= 1 << index
        return reached

    def members(self, bits: int) -> Iterator[fx.Node]:
        """The nodes of a set, in execution order."""
        return (self.nodes[index] for index in self.indices(bits))

    def as_read(self, reader: fx.Node, value: fx.Node) -> fx.Node:
        """``value``, or what was last written into its memory before ``reader`` read it."""
        memory = self.storage[self.position[value]]
        for index in self.reads[self.position[reader]]:
            written = (self.storage[self.position[target]] for target in mutated_by(self.nodes[index]))
            if memory is not None and index > self.position[value] and memory in written:
                return self.nodes[index]
        return value

    def is_constant_like(self, index: int) -> bool:
        """Whether the value at ``index`` is what a scale is made of."""
        return is_constant_like(self.nodes[index])

    def depends_on_inputs(self, index: int) -> bool:
        """Whether the value at ``index`` is made from a graph input, rather than of constants."""
        return any(self.nodes[k].op in ("placeholder", "get_attr") for k in self.indices(self.ancestors[index]))

    def leads_past(self, start: fx.Node, avoid: fx.Node) -> bool:
        """Whether a graph output depends on ``start`` in another way than through ``avoid``."""
        reached = self.reach_avoiding(self.position[start], self.position[avoid])
        return any(
            self.live[index] and any(user.op == "output" for user in self.nodes[index].users)
            for index in self.indices(reached)
        )

    @staticmethod
    def indices(bits: int) -> Iterator[int]:
        """The positions in a set, in execution order."""
        while bits:
            low = bits & -bits
            yield low.bit_length() - 1
            bits ^= low
