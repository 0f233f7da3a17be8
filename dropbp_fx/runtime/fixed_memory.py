"""Memory that stays where it is, for the values and gradients of a program whose regions run as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from dropbp_fx.graph.regions import RegionProgram
from dropbp_fx.runtime.placement import Layout
from dropbp_fx.runtime.plan import Planner

#: A value that more regions than this read is kept until the backward, instead of a copy for each of them.
_FEW_READERS = 2


class ValueBuffers:
    """Buffers of the values that recorded regions read and write. Values that are never needed at one time share one.

    Args:
        program: the regions.
        recordable: numbers of those that may be recorded.
        device: where they run.
    """

    def __init__(self, program: RegionProgram, recordable: Collection[int], device: torch.device) -> None:
        self._device = device
        first: dict[int, int] = {}
        last: dict[int, float] = {}
        readers: dict[int, int] = {}
        for number, region in enumerate(program.regions):
            for slot in {*region.inputs, *region.outputs}:
                if number in recordable:
                    first.setdefault(slot, number)
                last[slot] = number
            for slot in set(region.inputs):
                readers[slot] = readers.get(slot, 0) + (number in recordable)
        #: Values that stay until the backward has read them.
        self.lasting = frozenset(slot for slot, count in readers.items() if count > _FEW_READERS)
        last.update(dict.fromkeys(self.lasting, math.inf))
        self._needed = {slot: (first[slot], last[slot]) for slot in first}
        self._buffers: list[tuple[Tensor, set[int]]] = []
        self._of: dict[tuple[int, Layout], Tensor] = {}

    def buffer(self, slot: int, layout: Layout) -> Tensor:
        """The memory of one value."""
        known = self._of.get((slot, layout))
        if known is None:
            known = self._of[slot, layout] = self._found(slot, layout)
        return known

    def _found(self, slot: int, layout: Layout) -> Tensor:
        begin, end = self._needed[slot]
        for buffer, slots in self._buffers:
            spans = (self._needed[other] for other in slots)
            if Layout.of(buffer) == layout and all(e < begin or end < b for b, e in spans):
                slots.add(slot)
                return buffer
        buffer = layout.empty(self._device)
        self._buffers.append((buffer, {slot}))
        return buffer


class GradientBuffers:
    """Buffers of the gradients that recorded regions hand to each other.

    The gradients of one residual stream, from region to region, share one: where a dropped branch hands its gradient on, it
    stays where it is.

    Args:
        planner: knows what regions hand on.
        device: where they run.
    """

    def __init__(self, planner: Planner, device: torch.device) -> None:
        self._device = device
        self._stream = list(range(planner.program.slots))
        for region, variants in zip(planner.program.regions, planner.variants, strict=True):
            everything = frozenset(range(len(region.branches)))
            for output, slot in enumerate(region.outputs):
                source = variants.flow.passes_through(output, everything) if region.branches else None
                if source is not None:
                    self._stream[self._root(slot)] = self._root(region.inputs[source])
        self._buffers: dict[tuple[int, Layout], Tensor] = {}

    def buffer(self, slot: int, layout: Layout) -> Tensor:
        """The memory of one value's gradient."""
        key = self._root(slot), layout
        known = self._buffers.get(key)
        if known is None:
            known = self._buffers[key] = layout.empty(self._device)
        return known

    def _root(self, slot: int) -> int:
        while self._stream[slot] != slot:
            slot = self._stream[slot]
        return slot


def matched(wanted: Sequence[Sequence[int]], slots: int) -> list[int]:
    """Give each of several regions a slot of its own, to as many as possible one of those it wants.

    Args:
        wanted: for each region the numbers of the slots it wants.
        slots: how many there are: enough for all regions.
    """
    found: list[int] = []
    taken: set[int] = set()
    for mine in wanted:  # where the first free one will do for all, which is often, that is quicker
        number = next((number for number in mine if number not in taken), -1)
        taken.add(number)
        found.append(number)
    if -1 in taken:
        found = _maximum_matching(wanted, slots)
        free = sorted(set(range(slots)).difference(found), reverse=True)
        found = [number if number >= 0 else free.pop() for number in found]
    return found


def _maximum_matching(wanted: Sequence[Sequence[int]], slots: int) -> list[int]:
    import networkx  # PyTorch needs it too

    graph = networkx.Graph()
    regions = [(region, "region") for region in range(len(wanted))]
    graph.add_nodes_from(regions)
    graph.add_nodes_from(range(slots))
    graph.add_edges_from((region, number) for region, mine in zip(regions, wanted, strict=True) for number in mine)
    matching = networkx.bipartite.hopcroft_karp_matching(graph, regions)
    return [matching.get(region, -1) for region in regions]
