"""Patterns that a policy would draw, for predictions. The one place of this package that calls the policy."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from dropbp_fx.policy.sampling import Unit, draw_dropped


@dataclasses.dataclass(frozen=True)
class Droppable:
    """What the draw needs to know of a branch."""

    index: int
    name: str
    layer: str
    trainable: bool
    flops: int


def sample_patterns(
    branches: Sequence[Droppable], rate: float, granularity: str, count: int
) -> tuple[frozenset[int], ...]:
    """``count`` patterns, as sets of branch indices, that random dropping at ``rate`` draws; the same at every call."""
    groups: dict[str, list[Droppable]] = {}
    for branch in branches:
        groups.setdefault(branch.layer if granularity == "layer" else branch.name, []).append(branch)
    units = [_unit(rate, name, group) for name, group in groups.items()]
    members = [[branch.index for branch in group] for group in groups.values()]
    rng = random.Random(0)
    drawn = (draw_dropped(units, rng) for _ in range(count if rate else 1))
    return tuple(frozenset(index for unit in pattern for index in members[unit]) for pattern in drawn)


def _unit(rate: float, name: str, group: Sequence[Droppable]) -> Unit:
    return Unit(
        rate=rate,
        trainable=any(branch.trainable for branch in group),
        flops=float(sum(branch.flops for branch in group)),
        layer=group[0].layer,
        name=name,
    )
