"""What a pattern costs: floating-point operations and bytes saved for the backward, nothing being compiled or run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

from dropbp_fx.captured import CapturedGraph
from dropbp_fx.graph.cost import SavedValues, graph_flops, memory_bytes, saved_values
from dropbp_fx.graph.values import storage_of
from dropbp_fx.runtime.dispatch import warmup_patterns
from dropbp_fx.runtime.variants import RegionVariants, VariantKey

_NOTHING_SAVED = SavedValues(0, frozenset(), ())


@dataclasses.dataclass(frozen=True)
class RegionCost:
    """One variant of a region: operations of its forward and its backward graph, and what it saves in between."""

    forward_flops: int
    backward_flops: int
    saved: SavedValues

    @property
    def saved_bytes(self) -> int:
        """What is saved of the region's own values, its outputs included."""
        return self.saved.inner_bytes + sum(size for _, size in self.saved.outputs)


@dataclasses.dataclass(frozen=True)
class PatternCost:
    """One pattern on a whole graph, in operations and in bytes that exist at the end of the forward for the backward."""

    forward_flops: int
    backward_flops: int
    saved_bytes: int

    def __add__(self, other: PatternCost) -> PatternCost:
        return PatternCost(
            self.forward_flops + other.forward_flops,
            self.backward_flops + other.backward_flops,
            self.saved_bytes + other.saved_bytes,
        )


class CostModel:
    """The costs of the variants of one backend's regions, each traced when it is first asked for.

    Args:
        decompositions: what the inner compiler takes operators apart into before it decides what to save.
    """

    def __init__(self, decompositions: Mapping[Any, Callable[..., Any]] | None) -> None:
        self._decompositions = decompositions
        self._regions: dict[tuple[RegionVariants, VariantKey | None], RegionCost] = {}
        self._memory: dict[int, dict[int, tuple[object, int]]] = {}

    def region(self, variants: RegionVariants, key: VariantKey | None) -> RegionCost:
        """The cost of one variant of a region; ``None`` is the forward-only variant."""
        if (variants, key) not in self._regions:
            self._regions[variants, key] = self._trace(variants, key)
        return self._regions[variants, key]

    def saved_bytes(self, variants: RegionVariants, key: VariantKey | None) -> int:
        """What one variant of a region saves; the forward-only variant saves nothing and is not traced for that."""
        return 0 if key is None else self.region(variants, key).saved_bytes

    def _trace(self, variants: RegionVariants, key: VariantKey | None) -> RegionCost:
        traced = variants.trace(key, self._decompositions)
        if isinstance(traced, fx.GraphModule):
            return RegionCost(graph_flops(traced.graph), 0, _NOTHING_SAVED)
        return RegionCost(
            forward_flops=graph_flops(traced.forward.graph),
            backward_flops=graph_flops(traced.backward.graph),
            saved=saved_values(traced.forward, traced.outputs),
        )

    def pattern(self, graph: CapturedGraph, dropped: Collection[int], *, below: bool) -> PatternCost:
        """The cost of the pattern that drops the branches numbered ``dropped`` within ``graph``; with ``below``, nothing
        that runs before the first kept one is trained.

        What one region makes and another saves counts once; parameters, buffers and graph inputs do not count.
        """
        program = graph.program
        if id(program) not in self._memory:
            self._memory[id(program)] = _slot_memory(graph)
        memory = self._memory[id(program)]
        given = {memory[slot][0] for slot in (*program.inputs, *program.constants) if slot in memory}
        shared: dict[object, int] = {}
        forward = backward = inner = 0
        for region, variants, decision in zip(
            program.regions, graph.variants, graph.planner.decide(dropped, below=below), strict=True
        ):
            cost = self.region(variants, decision.key)
            forward += cost.forward_flops
            backward += cost.backward_flops
            inner += cost.saved.inner_bytes
            slots = [(region.inputs[position], 0) for position in cost.saved.inputs]
            slots += [(region.outputs[position], size) for position, size in cost.saved.outputs]
            for slot, size in slots:
                identity, nbytes = memory.get(slot, (("slot", slot), size))
                if identity not in given:
                    shared[identity] = nbytes
        return PatternCost(forward, backward, inner + sum(shared.values()))

    def variants_to_compile(self, graph: CapturedGraph) -> frozenset[tuple[RegionVariants, VariantKey | None]]:
        """The variants that :meth:`DropBPBackend.warmup` compiles for ``graph``."""
        return frozenset(
            (variants, decision.key)
            for pattern, below in warmup_patterns(graph.program, below=graph.below)
            for variants, decision in zip(graph.variants, graph.planner.decide(pattern, below=below), strict=True)
        )


def _slot_memory(graph: CapturedGraph) -> dict[int, tuple[object, int]]:
    """For every slot that some region reads, and every graph input: which memory it is in, and the bytes of it."""
    memory: dict[int, tuple[object, int]] = {}
    program = graph.program
    pairs = [
        (slot, value) for region in program.regions for slot, value in zip(region.inputs, region.examples, strict=True)
    ]
    for slot, value in (*pairs, *zip(program.inputs, program.examples, strict=True)):
        if isinstance(value, torch.Tensor):
            storage = storage_of(value)
            memory[slot] = (("slot", slot) if storage is None else storage, memory_bytes(value))
    return memory
