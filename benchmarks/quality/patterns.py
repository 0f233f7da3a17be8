"""Patterns that are on trial: they remember what they drew last, which a pattern of the package's own must not."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Sequence

from dropbp_fx.policy.balanced import Unit
from dropbp_fx.policy.contiguous import Line
from dropbp_fx.policy.patterns import Pattern


@dataclasses.dataclass
class CyclicWindow:
    """A window like ``WindowPattern``'s whose place moves on by a fixed part of the model instead of at random.

    Steps of the golden ratio spread places evenly, however many there are.
    """

    step: float = 0.6180339887498949
    _place: float = dataclasses.field(default=0.0, init=False)

    def sample(self, units: Sequence[Unit], rng: random.Random) -> Collection[int]:
        line = Line.of(units)
        self._place = (self._place + self.step) % 1.0
        return line.units_in(rng.random(), self._place, self._place + line.rate)


@dataclasses.dataclass
class Windows:
    """``count`` windows, evenly spaced, that share the rate; where they all begin is random."""

    count: int

    def sample(self, units: Sequence[Unit], rng: random.Random) -> Collection[int]:
        line, begin, v = Line.of(units), rng.random(), rng.random()
        length = line.rate / self.count
        starts = [(begin + number / self.count) % 1.0 for number in range(self.count)]
        return frozenset().union(*(line.units_in(v, start, start + length) for start in starts))


@dataclasses.dataclass
class FixedWindow:
    """A window that is always at the same place: at 0 it begins with the first layer, at 1 it ends with the last."""

    place: float

    def sample(self, units: Sequence[Unit], rng: random.Random) -> Collection[int]:
        line = Line.of(units)
        begin = self.place * (1.0 - line.rate)
        return line.units_in(rng.random(), begin, begin + line.rate)


@dataclasses.dataclass
class Sometimes:
    """Another pattern in a share of the forwards, at a rate so much higher; all others are exact.

    Attributes:
        pattern: at most at the rate ``high``.
        high: the rate in the forwards that drop.
    """

    pattern: Pattern
    high: float

    def sample(self, units: Sequence[Unit], rng: random.Random) -> Collection[int]:
        mean = Line.of(units).rate
        if rng.random() * self.high >= mean:
            return ()
        return self.pattern.sample([dataclasses.replace(unit, rate=self.high) for unit in units], rng)
