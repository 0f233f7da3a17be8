"""Plan a pattern: decide for every region which variant runs.

Two sweeps over the regions find out what autograd would do with the pattern: forwards, which values require a gradient
(below the lowest kept branch of a model with a frozen embedding: none); backwards, which of them receive one (an
encoder whose every cross-attention is dropped: none). A region that no gradient enters, or that only hands its
gradient on, runs forward-only; every other region runs the training variant pruned for exactly this situation.
Consecutive regions that only hand their gradient on are one to autograd: a single link leads from the last one's output to
the first one's input.

A run samples a new pattern at nearly every step, so plans have to be cheap: what a region makes of the situation it is in
(which of its branches are dropped, which inputs require a gradient, which outputs receive one) is remembered, for all
regions of one structure together.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

from dropbp_fx import _torch
from dropbp_fx.graph.gradflow import GradientFlow
from dropbp_fx.graph.regions import RegionProgram
from dropbp_fx.runtime.stored import StoredValue
from dropbp_fx.runtime.undefined import UndefinedGradients
from dropbp_fx.runtime.variants import RegionVariants, VariantKey

#: From a region's output and its dropped branches to those of its inputs that get a gradient.
Sources = Callable[[int, frozenset[int]], frozenset[int]]


class Step(NamedTuple):
    """One region's part in a plan.

    Attributes:
        run: the compiled variant.
        inputs: slots to read.
        outputs: slots to write.
        dead: slots nobody reads after this step.
        forward_only: run without recording gradients.
        passed: pairs (output position, earlier slot): that output's gradient is that slot's gradient.
        region: number of the region in the program.
        key: what the training variant drops, ``None`` for a region that runs forward-only.
        undefined: tells gradients that do not exist from zero ones, where the caller may leave an output unused.
        flat: the variant's code alone, where it needs nothing of what AOTAutograd puts around it.
    """

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]
    forward_only: bool
    passed: tuple[tuple[int, int], ...]
    region: int
    key: VariantKey | None
    undefined: UndefinedGradients | None
    flat: _torch.FlatCode | None


class Decision(NamedTuple):
    """What one region does in a pattern, before anything is compiled for it.

    Attributes:
        key: the training variant to run, ``None`` to run forward-only.
        dropped: labels of the region's gates that are dropped.
        live: outputs that receive a gradient.
        passed: pairs (output position, input slot) of a forward-only region: that output's gradient is that input's.
    """

    key: VariantKey | None
    dropped: frozenset[int]
    live: frozenset[int]
    passed: tuple[tuple[int, int], ...]


class _Flow(NamedTuple):
    """Where gradients can go in a region some of whose inputs require one.

    Attributes:
        sources: for each output the inputs that get a gradient from it.
        without: inputs that could require a gradient and do not.
        required: for each output whether it requires one.
    """

    sources: tuple[frozenset[int], ...]
    without: frozenset[int]
    required: tuple[bool, ...]


class _Role(NamedTuple):
    """What a region does where some of its outputs receive a gradient.

    Attributes:
        key: the training variant, ``None`` for forward-only.
        live: the outputs that do.
        passed: pairs (output, input) of a forward-only region: gradients that it hands on.
        reached: the inputs that get a gradient.
    """

    key: VariantKey | None
    live: frozenset[int]
    passed: tuple[tuple[int, int], ...]
    reached: frozenset[int]


class _Situations:
    """What regions of one structure make of the situations they have been in."""

    def __init__(self, variants: RegionVariants, examples: Sequence[Any]) -> None:
        self._flow = variants.flow
        self.hands_out = variants.flow.hands_out
        self._may_require = [isinstance(e, torch.Tensor) and e.is_floating_point() for e in examples]
        self._flows: dict[tuple[frozenset[int], tuple[bool, ...]], _Flow] = {}
        self._roles: dict[tuple[frozenset[int], tuple[bool, ...], tuple[bool, ...]], _Role] = {}

    def flow(self, dropped: frozenset[int], required: tuple[bool, ...], outputs: int) -> _Flow:
        """Args are the dropped labels, whether each input requires a gradient, and the number of outputs."""
        found = self._flows.get((dropped, required))
        if found is None:
            sources = tuple(frozenset(k for k in self._flow.sources(j, dropped) if required[k]) for j in range(outputs))
            without = frozenset(k for k, may in enumerate(self._may_require) if may and not required[k])
            found = self._flows[dropped, required] = _Flow(sources, without, tuple(map(bool, sources)))
        return found

    def role(self, dropped: frozenset[int], required: tuple[bool, ...], live: tuple[bool, ...]) -> _Role:
        """Args are the dropped labels, whether each input requires a gradient, and whether each output gets one."""
        found = self._roles.get((dropped, required, live))
        if found is None:
            flow = self.flow(dropped, required, len(live))
            mine = frozenset(j for j, gets in enumerate(live) if gets and flow.required[j])
            passed = self._passed(dropped, mine)
            key = None if passed is not None else (dropped, flow.without, self._flow.differentiable - mine)
            reached = frozenset[int]().union(*(flow.sources[j] for j in mine))
            found = self._roles[dropped, required, live] = _Role(key, mine, passed or (), reached)
        return found

    def _passed(self, dropped: frozenset[int], live: frozenset[int]) -> tuple[tuple[int, int], ...] | None:
        """How gradients go round a region that computes none; ``None`` if it has to compute some."""
        passed: list[tuple[int, int]] = []
        for j in sorted(live):
            source = self._flow.passes_through(j, dropped)
            if source is None:
                return None
            passed.append((j, source))
        return tuple(passed)


class Planner:
    """Plans patterns of one program.

    Args:
        program: the graph's regions.
        variants: the variants of each region; equal regions share one object.
    """

    def __init__(self, program: RegionProgram, variants: Sequence[RegionVariants]) -> None:
        self.program = program
        self.variants = tuple(variants)
        situations: dict[int, _Situations] = {}
        for region, variant in zip(program.regions, self.variants, strict=True):
            situations.setdefault(id(variant), _Situations(variant, region.examples))
        self._situations = [situations[id(variant)] for variant in self.variants]
        self._required = [False] * program.slots
        for slot, example in zip(program.inputs, program.examples, strict=True):
            self._required[slot] = isinstance(example, torch.Tensor) and example.requires_grad
        self._returned = program.returned
        self._last_reads, self._dying = _last_reads(program, self._returned)
        self._undefined: dict[tuple[int, frozenset[int], frozenset[int]], UndefinedGradients] = {}

    def decide(self, dropped: Collection[int], *, below: bool = False) -> tuple[Decision, ...]:
        """For every region what the pattern makes of it (arguments as in :meth:`plan`); compiles nothing."""
        labels, roles, _ = self._roles(dropped, below)
        return tuple(
            Decision(role.key, label, role.live, tuple((j, region.inputs[k]) for j, k in role.passed))
            for region, label, role in zip(self.program.regions, labels, roles, strict=True)
        )

    def reached(self, dropped: Collection[int]) -> tuple[int, ...]:
        """For each value that the graph returns, in order of slots, which graph inputs that require a gradient get one from
        it in the pattern that drops the branches numbered ``dropped``: a set as bits, by position among the inputs.
        """
        reach = self._reach(self._labels(dropped), lambda flow: flow.sources)
        return tuple(reach[slot] for slot in sorted(self._returned))

    def stored(self, dropped: Collection[int], *, below: bool = False) -> tuple[StoredValue, ...]:
        """The values that the graph returns and that get no gradient in this pattern (arguments as in :meth:`plan`), though
        they would if the branches' outputs were detached and nothing else.
        """
        if not any(situations.hands_out for situations in self._situations):
            return ()
        labels = self._labels(dropped)
        untrained = self._untrained(labels) if below else 0
        before = self._reach(labels, lambda flow: flow.detached_sources, untrained)
        after = self._reach(labels, lambda flow: flow.sources, untrained)
        inputs = self.program.inputs
        return tuple(
            StoredValue(slot, tuple(inputs[k] for k in range(len(inputs)) if lost >> k & 1))
            for slot in sorted(self._returned)
            if (lost := before[slot] & ~after[slot])
        )

    def _labels(self, dropped: Collection[int]) -> list[frozenset[int]]:
        """For each region the branches of its own that are dropped."""
        return [
            frozenset(local for local, branch in enumerate(region.branches) if branch in dropped)
            for region in self.program.regions
        ]

    def _reach(
        self, labels: Sequence[frozenset[int]], sources: Callable[[GradientFlow], Sources], untrained: int = 0
    ) -> list[int]:
        """For each slot which graph inputs that require a gradient get one from it: bits, by position among the inputs.

        Args:
            labels: for each region its dropped branches.
            sources: what tells the inputs of a region that get a gradient from one of its outputs.
            untrained: how many of the first regions hand on none.
        """
        reach = [0] * self.program.slots
        for position, slot in enumerate(self.program.inputs):
            reach[slot] = 1 << position if self._required[slot] else 0
        for number, (region, variant, label) in enumerate(
            zip(self.program.regions, self.variants, labels, strict=True)
        ):
            found = sources(variant.flow)
            for output, slot in enumerate(region.outputs):
                inputs = found(output, label) if number >= untrained else ()
                reach[slot] = functools.reduce(operator.or_, [reach[region.inputs[k]] for k in inputs], 0)
        return reach

    def plan(self, dropped: Collection[int], *, below: bool = False, repeatable: bool = False) -> tuple[Step, ...]:
        """Plan the pattern that drops the branches numbered ``dropped``, compiling variants that are missing.

        Args:
            dropped: numbers of branches (of ``Region.branches``).
            below: where the first branch is dropped, train nothing that runs before the first one that is kept.
            repeatable: the backward of every region may run more than once.
        """
        regions = self.program.regions
        labels, roles, live = self._roles(dropped, below)
        several_outputs = sum(live[slot] or self._required[slot] for slot in self._returned) > 1
        passed = self._merged_passed(roles)
        dead = self._dead(passed)
        steps: list[Step] = []
        for number, (region, variant, label, role) in enumerate(
            zip(regions, self.variants, labels, roles, strict=True)
        ):
            undefined = None
            if role.key is None:
                compiled = variant.forward_only()
            else:
                compiled = variant.training(role.key, repeatable=repeatable)
                if several_outputs:
                    undefined = self._undefined_gradients(number, label, role.live)
            steps.append(
                Step(
                    compiled.run,
                    region.inputs,
                    region.outputs,
                    dead[number],
                    role.key is None,
                    passed.get(number, ()),
                    number,
                    role.key,
                    undefined,
                    compiled.flat,
                )
            )
        return tuple(steps)

    def _roles(self, dropped: Collection[int], below: bool) -> tuple[list[frozenset[int]], list[_Role], list[bool]]:
        """For each region its dropped labels and its role; for each slot whether it receives a gradient."""
        regions = self.program.regions
        labels = self._labels(dropped)
        required = self._required.copy()
        untrained = self._untrained(labels) if below else 0
        needs: list[tuple[bool, ...]] = []
        for number, (region, situations, label) in enumerate(zip(regions, self._situations, labels, strict=True)):
            mine = tuple([required[slot] for slot in region.inputs])
            needs.append(mine)
            flow = situations.flow(label, mine, len(region.outputs))
            for slot, requires in zip(region.outputs, flow.required, strict=True):
                required[slot] = requires and number >= untrained
        live = [False] * self.program.slots
        for slot in self._returned:
            live[slot] = required[slot]
        roles: list[_Role] = []
        for number in range(len(regions) - 1, -1, -1):
            region = regions[number]
            gets = tuple([live[slot] for slot in region.outputs])
            role = self._situations[number].role(labels[number], needs[number], gets)
            for k in role.reached:
                live[region.inputs[k]] = True
            roles.append(role)
        roles.reverse()
        return labels, roles, live

    def _untrained(self, labels: Sequence[frozenset[int]]) -> int:
        """How many regions come before the one of the first kept branch; none if the lowest branch of all is kept."""
        regions = self.program.regions
        holding = [number for number, region in enumerate(regions) if region.branches]
        if not holding or 0 not in labels[holding[0]]:
            return 0
        kept = (number for number in holding if len(labels[number]) < len(regions[number].branches))
        return next(kept, holding[-1] + 1)

    def _merged_passed(self, roles: Sequence[_Role]) -> dict[int, tuple[tuple[int, int], ...]]:
        """Lead gradients past the regions in between, and leave out those that no gradient-carrying region reads."""
        regions = self.program.regions
        carriers = set(self._returned)
        for region, role in zip(regions, roles, strict=True):
            if role.key is not None:
                carriers.update(region.inputs)
        origin: dict[int, int] = {}
        merged: dict[int, tuple[tuple[int, int], ...]] = {}
        for number, (region, role) in enumerate(zip(regions, roles, strict=True)):
            passed: list[tuple[int, int]] = []
            for position, source in role.passed:
                slot, source_slot = region.outputs[position], region.inputs[source]
                origin[slot] = origin.get(source_slot, source_slot)
                if slot in carriers:
                    passed.append((position, origin.pop(slot)))  # from here on the slot carries its gradient itself
            if passed:
                merged[number] = tuple(passed)
        return merged

    def _dead(self, passed: dict[int, tuple[tuple[int, int], ...]]) -> list[tuple[int, ...]]:
        """The slots that die at each step; the source of a passed gradient lives until it is connected."""
        dead = list(self._dying)
        for number in sorted(passed):
            for _, slot in passed[number]:
                before = self._last_reads.get(slot)
                if before is not None and before < number:
                    at = next(n for n in range(before, number) if slot in dead[n])
                    dead[at] = tuple(other for other in dead[at] if other != slot)
                    dead[number] = (*dead[number], slot)
        return dead

    def _undefined_gradients(self, number: int, label: frozenset[int], live: frozenset[int]) -> UndefinedGradients:
        found = self._undefined.get((number, label, live))
        if found is None:
            found = UndefinedGradients(self.variants[number].flow, label, live)
            self._undefined[number, label, live] = found
        return found


def _last_reads(program: RegionProgram, returned: Collection[int]) -> tuple[dict[int, int], list[tuple[int, ...]]]:
    """For every slot that dies the region after which it does; for every region the slots that die after it."""
    kept = set(returned) | set(program.constants)
    last: dict[int, int] = {}
    dying: list[tuple[int, ...]] = []
    for number in range(len(program.regions) - 1, -1, -1):
        region = program.regions[number]
        mine = tuple(dict.fromkeys(slot for slot in (*region.inputs, *region.outputs) if slot not in kept))
        last.update(dict.fromkeys(mine, number))
        kept.update(mine)
        dying.append(mine)
    dying.reverse()
    return last, dying
