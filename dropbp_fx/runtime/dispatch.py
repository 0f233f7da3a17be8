"""Run a graph region by region, each in the variant that the forward's pattern asks for."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.graph.regions import RegionProgram
from dropbp_fx.runtime.plan import Step, make_plan
from dropbp_fx.runtime.recompute import PatternMemory
from dropbp_fx.runtime.variants import RegionVariants

#: Plans are a few microseconds to look up and a few hundred to make; random patterns of deep models seldom recur.
_PLANS_KEPT = 256
#: Regions with more branches than this are not compiled for every subset in advance.
_EXHAUSTIVE_BRANCHES = 3


class _GradientLink(torch.autograd.Function):
    """``output`` carries ``source``'s gradient: what a region whose branches are all dropped does in the backward."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class RegionRunner:
    """The callable that Dynamo runs in place of a training graph.

    Args:
        program: the graph's regions.
        variants: the compiled variants of each region, in the same order; equal regions share one object.
        draw: called once a forward; returns the numbers of the branches to drop (of ``Region.branches``).
    """

    def __init__(
        self,
        program: RegionProgram,
        variants: Sequence[RegionVariants],
        draw: Callable[[], frozenset[int]],
    ) -> None:
        self._program = program
        self._variants = tuple(variants)
        self._draw = draw
        self._memory = PatternMemory(program.examples)
        self._plans: collections.OrderedDict[frozenset[int], tuple[Step, ...]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        key = self._memory.key(arguments)
        pattern = self._pattern(key)
        steps = self._plan(pattern)
        values: list[Any] = [None] * self._program.slots
        for slot, value in zip(self._program.inputs, arguments, strict=True):
            values[slot] = value
        for slot, value in self._program.constants.items():
            values[slot] = value
        del arguments
        for step in steps:
            _run_step(step, values)
        outputs = tuple(values[slot] if isinstance(slot, int) else slot[0] for slot in self._program.outputs)
        self._memory.remember(key, outputs, pattern)
        return outputs

    def _pattern(self, key: Hashable) -> frozenset[int]:
        if _torch.in_backward():
            repeated = self._memory.recall(key)
            if repeated is not None:
                return repeated
            if _torch.in_checkpoint_recomputation():
                raise RuntimeError(
                    "A checkpointed block is being recomputed on other tensors than its forward read, so the pattern of "
                    "that forward cannot be told. Do not move a checkpoint's inputs between forward and backward, or "
                    "compile the model with the checkpoints inside."
                )
        return self._draw()

    def warmup(self) -> None:
        """Compile the variants of every region for every subset of its branches, the rest of the model kept."""
        for pattern in warmup_patterns(self._program):
            self._plan(frozenset(pattern))

    def _plan(self, dropped: frozenset[int]) -> tuple[Step, ...]:
        with self._lock:
            plan = self._plans.get(dropped)
            if plan is None:
                plan = make_plan(self._program, self._variants, dropped)
                if len(self._plans) >= _PLANS_KEPT:
                    self._plans.popitem(last=False)
                self._plans[dropped] = plan
            return plan


def warmup_patterns(program: RegionProgram) -> Iterator[Collection[int]]:
    """The patterns whose variants :meth:`RegionRunner.warmup` compiles."""
    yield ()
    for region in program.regions:
        exhaustive = len(region.branches) <= _EXHAUSTIVE_BRANCHES
        sizes = range(1, len(region.branches) + 1) if exhaustive else (1, len(region.branches))
        for size in sizes:
            yield from itertools.combinations(region.branches, size)


def _run_step(step: Step, values: list[Any]) -> None:
    inputs = [values[slot] for slot in step.inputs]
    sources = [values[slot] for _, slot in step.links]
    for slot in step.dead:
        values[slot] = None
    if not step.forward_only:
        outputs = step.run(*inputs)
    else:
        with torch.no_grad():
            outputs = step.run(*inputs)
    if step.undefined is not None:
        step.undefined.watch(inputs, outputs)
    for slot, value in zip(step.outputs, outputs, strict=True):
        values[slot] = value
    for (position, _), source in zip(step.links, sources, strict=True):
        values[step.outputs[position]] = _GradientLink.apply(source, outputs[position])
    for slot in step.dead:
        if slot in step.outputs:
            values[slot] = None
