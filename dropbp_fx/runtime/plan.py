"""Plan a pattern: decide for every region which variant runs.

Two sweeps over the regions settle what autograd would do with the pattern: forwards, which values require a gradient
(below the lowest kept branch of a model with a frozen embedding: none); backwards, which of them receive one (an
encoder whose every cross-attention is dropped: none). A region that no gradient enters, or that only hands its
gradient on, runs forward-only; every other region runs the training variant pruned for exactly this situation.
Consecutive regions that only hand their gradient on are one to autograd: a single link leads from the last one's output to
the first one's input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from dropbp_fx.graph.regions import RegionProgram
from dropbp_fx.runtime.undefined import UndefinedGradients
from dropbp_fx.runtime.variants import RegionVariants, VariantKey


@dataclasses.dataclass(frozen=True)
class Step:
    """One region's part in a plan.

    Attributes:
        run: the compiled variant.
        inputs: slots to read.
        outputs: slots to write.
        dead: slots nobody reads after this step.
        forward_only: run without recording gradients.
        links: pairs (output position, earlier slot): that output's gradient is that slot's gradient.
        region: number of the region in the program.
        key: what the training variant drops, ``None`` for a region that runs forward-only.
        undefined: tells gradients that do not exist from zero ones, where the caller may leave an output unused.
    """

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]
    forward_only: bool
    links: tuple[tuple[int, int], ...]
    region: int
    key: VariantKey | None
    undefined: UndefinedGradients | None


def requires_gradient(program: RegionProgram) -> list[bool]:
    """For every slot whether its value requires a gradient before any region has run."""
    required = [False] * program.slots
    for slot, example in zip(program.inputs, program.examples, strict=True):
        required[slot] = isinstance(example, torch.Tensor) and example.requires_grad
    return required


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one region does in a pattern, before anything is compiled for it.

    Attributes:
        key: the training variant to run, ``None`` to run forward-only.
        dropped: labels of the region's gates that are dropped.
        live: outputs that receive a gradient.
        links: pairs (output position, input slot) of a forward-only region: that output's gradient is that input's.
    """

    key: VariantKey | None
    dropped: frozenset[int]
    live: frozenset[int]
    links: tuple[tuple[int, int], ...]


def decide(
    program: RegionProgram, variants: Sequence[RegionVariants], dropped: Collection[int]
) -> tuple[Decision, ...]:
    """For every region what the pattern that drops the branches numbered ``dropped`` makes of it; compiles nothing."""
    labels = [
        frozenset(local for local, branch in enumerate(region.branches) if branch in dropped)
        for region in program.regions
    ]
    required = requires_gradient(program)
    reachable: list[list[frozenset[int]]] = []
    without: list[frozenset[int]] = []
    for region, variant, labelled in zip(program.regions, variants, labels, strict=True):
        sources = [
            frozenset(k for k in variant.flow.sources(j, labelled) if required[region.inputs[k]])
            for j in range(len(region.outputs))
        ]
        without.append(
            frozenset(
                k for k, slot in enumerate(region.inputs) if not required[slot] and _may_require(region.examples[k])
            )
        )
        for slot, inputs in zip(region.outputs, sources, strict=True):
            required[slot] = bool(inputs)
        reachable.append(sources)
    live = [False] * program.slots
    for returned in program.outputs:
        if isinstance(returned, int):
            live[returned] = required[returned]
    decisions: list[Decision] = []
    rows = list(zip(program.regions, variants, labels, reachable, without, strict=True))
    for region, variant, labelled, sources, ungraded in reversed(rows):
        mine = frozenset(j for j, slot in enumerate(region.outputs) if live[slot] and required[slot])
        for j in mine:
            for k in sources[j]:
                live[region.inputs[k]] = True
        links = _links(region.inputs, variant, labelled, mine)
        key = None if links is not None else (labelled, ungraded, variant.flow.differentiable - mine)
        decisions.append(Decision(key, labelled, mine, links or ()))
    return tuple(reversed(decisions))


def make_plan(
    program: RegionProgram, variants: Sequence[RegionVariants], dropped: Collection[int], *, repeatable: bool = False
) -> tuple[Step, ...]:
    """Plan the pattern that drops the branches numbered ``dropped``, compiling variants that are missing.

    Args:
        program: the graph's regions.
        variants: the variants of each region.
        dropped: numbers of branches (of ``Region.branches``).
        repeatable: the backward of every region may run more than once.
    """
    decisions = decide(program, variants, dropped)
    graded = {
        slot
        for region, decision in zip(program.regions, decisions, strict=True)
        for j, slot in enumerate(region.outputs)
        if j in decision.live
    }
    returned = {slot for slot in program.outputs if isinstance(slot, int)}
    required = requires_gradient(program)
    several_outputs = sum(slot in graded or required[slot] for slot in returned) > 1
    steps: list[Step] = []
    for number, (region, variant, decision) in enumerate(zip(program.regions, variants, decisions, strict=True)):
        undefined = None
        if decision.key is None:
            run = variant.forward_only()
        else:
            run = variant.training(decision.key, repeatable=repeatable)
            undefined = UndefinedGradients(variant.flow, decision.dropped, decision.live) if several_outputs else None
        steps.append(
            Step(
                run=run,
                inputs=region.inputs,
                outputs=region.outputs,
                dead=(),
                forward_only=decision.key is None,
                links=decision.links,
                region=number,
                key=decision.key,
                undefined=undefined,
            )
        )
    return _with_last_reads(program, _with_merged_links(program, steps))


def _with_merged_links(program: RegionProgram, steps: Sequence[Step]) -> list[Step]:
    """Lead links past the regions in between, and leave out those that no gradient-carrying region reads."""
    returned = {slot for slot in program.outputs if isinstance(slot, int)}
    carriers = returned.union(*(step.inputs for step in steps if not step.forward_only))
    origin: dict[int, int] = {}
    merged: list[Step] = []
    for step in steps:
        links = []
        for position, source in step.links:
            slot = step.outputs[position]
            origin[slot] = origin.get(source, source)
            if slot in carriers:
                links.append((position, origin[slot]))
                del origin[slot]  # from here on the slot carries its gradient itself
        merged.append(dataclasses.replace(step, links=tuple(links)))
    return merged


def _may_require(example: Any) -> bool:
    return isinstance(example, torch.Tensor) and example.is_floating_point()


def _links(
    inputs: Sequence[int], variant: RegionVariants, labelled: frozenset[int], live: frozenset[int]
) -> tuple[tuple[int, int], ...] | None:
    """How gradients go round a region that computes none; ``None`` if it has to compute some."""
    links: list[tuple[int, int]] = []
    for j in sorted(live):
        source = variant.flow.passes_through(j, labelled)
        if source is None:
            return None
        links.append((j, inputs[source]))
    return tuple(links)


def _with_last_reads(program: RegionProgram, steps: Sequence[Step]) -> tuple[Step, ...]:
    kept = {slot for slot in program.outputs if isinstance(slot, int)} | set(program.constants)
    freed: list[Step] = []
    for step in reversed(steps):
        dying = [slot for slot in (*step.inputs, *(s for _, s in step.links), *step.outputs) if slot not in kept]
        freed.append(dataclasses.replace(step, dead=tuple(dict.fromkeys(dying))))
        kept.update(dying)
    return tuple(reversed(freed))
