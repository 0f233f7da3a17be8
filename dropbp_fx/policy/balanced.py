"""Sample which units to drop: balanced sampling with unequal probabilities.

Each sample is taken by the cube method (Deville and Tillé, Efficient balanced sampling, Biometrika 91, 2004; the fast
flight phase of Chauvet and Tillé, 2006). The units' chances are the coordinates of a point in the unit cube. The flight
moves it at random to a vertex, along directions that leave both the number of units and their FLOPs as they are, and as
likely forwards as backwards by length; so every unit's chance is exactly its rate, and a sample costs nearly what the rates
cost on average. The few coordinates for which no such direction is left land by giving up the FLOPs first, the count last.

The order of the units is shuffled anew each time, so their order carries no structure into the patterns.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from dropbp_fx.policy.units import Unit

_AT_THE_END = (
    1e-12  # a chance this close to 0 or 1 is there: far above what rounding leaves, far below any rate that matters
)


def effective_rates(units: Sequence[Unit], *, keep_one: bool = True) -> list[float]:
    """The rates that can be honoured while one trainable unit is always kept.

    With n trainable units at most n - 1 can be dropped at once; where their rates add up to more, they are scaled down
    by one common factor. Rates of other units are untouched.
    """
    trainable = [unit.rate for unit in units if unit.trainable]
    room = len(trainable) - 1
    total = math.fsum(trainable)
    scale = room / total if keep_one and trainable and total > room else 1.0
    return [unit.rate * scale if unit.trainable else unit.rate for unit in units]


def sample_dropped(units: Sequence[Unit], rng: random.Random, *, keep_one: bool = True) -> frozenset[int]:
    """Sample the indices of the units to drop.

    In every sample the number of trainable units dropped is the sum of their rates rounded up or down, and so is the
    number of all units dropped. With F the FLOPs of the largest unit, the dropped FLOPs are less than F away from their
    expectation where all units are trainable or none is, and less than 2 F otherwise. Proof: the flight keeps count and
    FLOPs of either kind and leaves at most two units a and b of it undecided, with chances p and q. Landing rounds p + q
    up or down. Where it drops neither, p + q < 1 and the FLOPs fall short by p F_a + q F_b < F; where it drops both,
    p + q > 1 and they exceed by (1 - p) F_a + (1 - q) F_b < F; where it drops a alone, the error lies between -q F_b and
    (1 - p) F_a. Two kinds add up to less than 2 F.

    Args:
        units: what may be dropped.
        rng: source of randomness; the sample is a function of ``units`` and its state, and of nothing else.
        keep_one: always keep at least one trainable unit, if there is any.

    Returns:
        Indices into ``units``. Unit i is in the set with probability ``effective_rates(units)[i]``.
    """
    chances = [_snapped(rate) for rate in effective_rates(units, keep_one=keep_one)]
    flops = [unit.flops for unit in units]
    trainable = [index for index, unit in enumerate(units) if unit.trainable]
    others = [index for index, unit in enumerate(units) if not unit.trainable]
    rng.shuffle(trainable)
    rng.shuffle(others)
    _land(chances, flops, _fly(chances, flops, trainable, rng), _fly(chances, flops, others, rng), rng)
    dropped = {index for index, chance in enumerate(chances) if chance == 1.0}
    if keep_one and trainable and dropped.issuperset(trainable):  # rounding errors of the sum, no more
        dropped.remove(trainable[0])
    return frozenset(dropped)


def _fly(chances: list[float], flops: Sequence[float], members: Sequence[int], rng: random.Random) -> list[int]:
    """Decide over all but at most two of ``members`` without changing their expected number and FLOPs.

    Three undecided units have one direction that changes neither, the cross product of (1, 1, 1) and their FLOPs. It is
    zero where the FLOPs are equal; then any two of the three may be moved against each other.

    Returns:
        The members that are still undecided.
    """
    undecided: list[int] = []
    for member in members:
        if 0.0 < chances[member] < 1.0:
            undecided.append(member)
        if len(undecided) == 3:
            a, b, c = (flops[index] for index in undecided)
            direction = (1.0, -1.0, 0.0) if a == b == c else (b - c, c - a, a - b)
            undecided = _move(chances, undecided, direction, rng)
    return undecided


def _land(
    chances: list[float], flops: Sequence[float], trainable: list[int], others: list[int], rng: random.Random
) -> None:
    """Decide over the at most two units left of either kind: keep FLOPs, then each kind's count, then the count."""
    if len(trainable) == len(others) == 2:
        (a, b), (c, d) = trainable, others
        first, second = flops[a] - flops[b], flops[c] - flops[d]
        if first or second:
            left = set(_move(chances, [a, b, c, d], (second, -second, -first, first), rng))
            trainable = [index for index in trainable if index in left]
            others = [index for index in others if index in left]
    last: list[int] = []
    for pair in (trainable, others):
        last += _move(chances, pair, (1.0, -1.0), rng) if len(pair) == 2 else pair
    if len(last) == 2:
        last = _move(chances, last, (1.0, -1.0), rng)
    for index in last:
        chances[index] = 1.0 if rng.random() < chances[index] else 0.0


def _move(chances: list[float], members: Sequence[int], direction: Sequence[float], rng: random.Random) -> list[int]:
    """Move the members' chances along ``direction`` or against it until one of them is 0 or 1.

    Which way is chosen so that no chance changes on average. ``direction`` is not all zero.

    Returns:
        The members that are still undecided: at least one fewer.
    """
    longest = max(max(direction), -min(direction))
    forward = backward = math.inf
    for index, entry in zip(members, direction, strict=True):
        if not entry:
            continue
        reach = longest / entry  # the way along which this chance changes by 1; infinite where it hardly changes
        chance = chances[index]
        ahead, behind = (1.0 - chance) * reach, chance * reach
        if reach < 0.0:
            ahead, behind = -behind, -ahead
        if ahead < forward:
            forward = ahead
        if behind < backward:
            backward = behind
    length = forward if rng.random() * (forward + backward) < backward else -backward
    undecided: list[int] = []
    for index, entry in zip(members, direction, strict=True):
        chance = chances[index] = _snapped(chances[index] + length * (entry / longest))
        if 0.0 < chance < 1.0:
            undecided.append(index)
    return undecided


def _snapped(chance: float) -> float:
    if chance < _AT_THE_END:
        return 0.0
    return 1.0 if chance > 1.0 - _AT_THE_END else chance
