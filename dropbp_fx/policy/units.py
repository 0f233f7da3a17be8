"""Units: what is dropped as a whole, a branch or a layer's branches together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

from dropbp_fx.policy.branches import Branch

Granularity = Literal["branch", "layer"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Something that is dropped as a whole: a branch, or a layer's branches together.

    Attributes:
        rate: its drop rate, in [0, 1).
        trainable: whether it has parameters that require a gradient.
        flops: the FLOPs of its backward, which dropping it saves; finite, at least 0, in any unit of measure.
        layer: the layer it belongs to; empty where that is not known.
        name: what it is called.
    """

    rate: float
    trainable: bool
    flops: float = 1.0
    layer: str = ""
    name: str = ""


class Units:
    """The units of branches, with the indices of their branches; made once for the same branches and rates.

    Args:
        granularity: "branch" or "layer".
    """

    def __init__(self, granularity: Granularity) -> None:
        self._granularity: Granularity = granularity
        self._known: dict[tuple[int, ...], list[tuple[Unit, list[int]]]] = {}

    def of(self, branches: Sequence[Branch]) -> list[tuple[Unit, list[int]]]:
        """Those of these branches, in the order of execution."""
        key = tuple([branch.index for branch in branches])
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = units_of(branches, self._granularity)
        return found

    def forget(self) -> None:
        """A rate or another fact of a branch has changed."""
        self._known.clear()


def units_of(branches: Iterable[Branch], granularity: Granularity) -> list[tuple[Unit, list[int]]]:
    """What is dropped as a whole, in the order of execution, with the indices of its branches."""
    groups: dict[str, list[Branch]] = {}
    for branch in branches:
        groups.setdefault(branch.name if granularity == "branch" else branch.layer, []).append(branch)
    return [(_unit(group), [branch.index for branch in group]) for group in groups.values()]


def _unit(group: Sequence[Branch]) -> Unit:
    """Branches that are dropped together: their rate is the mean, weighted by what dropping each saves."""
    flops = float(sum(branch.backward_flops for branch in group))
    weights = [branch.backward_flops / flops if flops else 1 / len(group) for branch in group]
    mean = sum(branch.rate * weight for branch, weight in zip(group, weights, strict=True))
    return Unit(
        rate=min(mean, max(branch.rate for branch in group)),  # rounding must not lift it above its parts
        trainable=any(branch.trainable for branch in group),
        flops=flops,
        layer=group[0].layer,
        name=group[0].name if len(group) == 1 else group[0].layer,
    )
