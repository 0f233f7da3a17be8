"""Draw which units to drop: fixed-size sampling with unequal probabilities.

Each draw is a randomised systematic sample (Hartley and Rao, 1962): the units are put in random order, their drop rates
laid end to end on a line, and the units hit by a comb of spacing 1 and random offset are dropped. Every unit's chance is
exactly its rate, and the number dropped is the sum of the rates rounded up or down, never further from it. The order is
drawn anew each time: in a fixed order a comb of spacing two would drop all attention or all MLP branches at once.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Unit:
    """Something that is dropped as a whole: a branch, or a layer's branches together.

    Attributes:
        rate: its drop rate, in [0, 1).
        trainable: whether it has parameters that require a gradient.
    """

    rate: float
    trainable: bool


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


def draw_dropped(units: Sequence[Unit], rng: random.Random, *, keep_one: bool = True) -> frozenset[int]:
    """Draw the indices of the units to drop.

    Args:
        units: what may be dropped.
        rng: source of randomness; advanced by a number of calls that depends on ``len(units)`` alone.
        keep_one: always keep at least one trainable unit, if there is any.

    Returns:
        Indices into ``units``. Unit i is in the set with probability ``effective_rates(units)[i]``.
    """
    rates = effective_rates(units, keep_one=keep_one)
    trainable = [index for index, unit in enumerate(units) if unit.trainable]
    others = [index for index, unit in enumerate(units) if not unit.trainable]
    rng.shuffle(trainable)
    rng.shuffle(others)
    # The trainable units stay together on the line: their count is then their own sum of rates, rounded up or down.
    line = trainable + others if rng.random() < 0.5 else others + trainable
    tooth = rng.random()
    spare = rng.random()
    dropped: set[int] = set()
    end = 0.0
    for index in line:
        end += rates[index]
        if tooth < end:
            dropped.add(index)
            tooth += 1.0
    if keep_one and trainable and dropped.issuperset(trainable):  # rounding errors of the sum, no more
        dropped.remove(trainable[int(spare * len(trainable))])
    return frozenset(dropped)
