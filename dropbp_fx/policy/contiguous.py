"""Patterns that drop neighbouring layers together: everything below a depth, fixed or random, or one window.

Layers lie end to end on a line in the order of execution, layer i on [x_i, x_i + F_i) with F_i its FLOPs. One random v,
uniform on [0, 1) and shared by all layers, gives each a point x_i + v F_i, and an interval of the line drops the layers
whose points it holds. Averaged over v, an interval of length B thus drops exactly B FLOPs, wherever it lies; and as
neighbouring points are never further apart than the longer of their layers, it drops B give or take less than the FLOPs of
one layer in every single sample.

Every frequency reported here is computed, not sampled: a layer's chance is a piecewise linear function of where the
interval begins or ends, and is integrated piece by piece.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterator, Sequence

from dropbp_fx.policy.balanced import Unit

_TINY = 1e-12  # lengths below this, as shares of the line, are rounding errors
_UPDATES = 200


@dataclasses.dataclass(frozen=True)
class Line:
    """The layers of a model, laid end to end.

    Attributes:
        members: for each layer the indices of its units.
        starts: where each layer begins, as a share of all FLOPs.
        lengths: each layer's share of all FLOPs; the same for all where no unit has any FLOPs.
        targets: each layer's rate, the mean of its units weighted by their FLOPs.
        trainable: whether a layer has a trainable unit.
    """

    members: tuple[tuple[int, ...], ...]
    starts: tuple[float, ...]
    lengths: tuple[float, ...]
    targets: tuple[float, ...]
    trainable: tuple[bool, ...]

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Line:
        """Neighbouring units of one layer become one layer of the line, and so does each unit whose layer is not known."""
        groups: list[list[int]] = []
        for index, unit in enumerate(units):
            if index and unit.layer and unit.layer == units[index - 1].layer:
                groups[-1].append(index)
            else:
                groups.append([index])
        largest = max((unit.flops for unit in units), default=0.0)
        costs = [unit.flops / largest if largest else 1.0 for unit in units]
        total = math.fsum(costs)
        sizes = [math.fsum(costs[index] for index in group) for group in groups]
        starts = list(itertools.accumulate((size / total for size in sizes), initial=0.0))[:-1]
        targets = []
        for group, size in zip(groups, sizes, strict=True):
            shares = [costs[index] / size if size else 1.0 / len(group) for index in group]
            targets.append(math.fsum(share * units[index].rate for share, index in zip(shares, group, strict=True)))
        return cls(
            tuple(map(tuple, groups)),
            tuple(starts),
            tuple(size / total for size in sizes),
            tuple(targets),
            tuple(any(units[index].trainable for index in group) for group in groups),
        )

    @property
    def rate(self) -> float:
        """The share of all FLOPs to drop."""
        return math.fsum(map(operator.mul, self.lengths, self.targets))

    def units_in(self, v: float, begin: float, end: float) -> frozenset[int]:
        """The units of the layers whose points lie in [begin, end), on the line or, going on beyond 1, on the circle."""
        return frozenset(
            index
            for start, length, group in zip(self.starts, self.lengths, self.members, strict=True)
            if begin <= start + v * length < end or begin <= start + v * length + 1.0 < end
            for index in group
        )

    def per_unit(self, per_layer: Sequence[float]) -> list[float]:
        """A value for each unit, that of its layer."""
        return [value for value, group in zip(per_layer, self.members, strict=True) for _ in group]


# ---- everything below a depth ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LowestPattern:
    """Drop the lowest layers, as many as the rate asks for: gradients of all layers above them are exact.

    With p the mean of the units' rates weighted by their FLOPs, the layers below the depth p of all FLOPs are dropped, the
    same ones in every sample but for the layer that the depth falls into, which is dropped in proportion. The last trainable
    layer and what follows it are never dropped. With a rate that grows over the run (the schedule "late_ramp") layers end
    their training one after the other, the lowest first: progressive freezing, as in FreezeOut (Brock et al., 2017).
    ``drop="below"`` ends the training of what lies below all layers, an embedding, with that of the first.

    Nested sets cannot honour the units' relative rates, only their sum. :meth:`frequencies` gives what they get.
    """

    def sample(self, units: Sequence[Unit], rng: random.Random) -> frozenset[int]:
        line = Line.of(units)
        return line.units_in(rng.random(), 0.0, min(line.rate, _room(line)))

    def frequencies(self, units: Sequence[Unit]) -> list[float]:
        line = Line.of(units)
        depth = min(line.rate, _room(line))
        layers = zip(line.starts, line.lengths, strict=True)
        return line.per_unit([_covered(start, length, depth, 0.0) for start, length in layers])


def _room(line: Line) -> float:
    """Where the last trainable layer begins."""
    return next((start for start, flag in zip(line.starts[::-1], line.trainable[::-1], strict=True) if flag), 1.0)


@dataclasses.dataclass(frozen=True)
class SuffixPattern:
    """Drop every layer below a random depth: gradients of all layers above it are exact, and the backward ends there.

    With p the mean of the units' rates weighted by their FLOPs, the depth is uniform on [max(0, 2 p - 1), min(1, 2 p)] of
    all FLOPs, so that the mean dropped share is exactly p. The last trainable layer and what follows it are never
    dropped; where the depth would reach into them, everything below them is dropped, and the interval goes on beyond
    1 as far as it takes for the mean to stay p. A p larger than the share c of the FLOPs below them drops c every time.

    Nested sets cannot honour the units' relative rates, only their sum: a layer is dropped whenever a later one is, so
    frequencies fall from the first layer to the last. :meth:`frequencies` gives them.
    """

    def sample(self, units: Sequence[Unit], rng: random.Random) -> frozenset[int]:
        line = Line.of(units)
        low, high, room = _depths(line)
        depth = min(low + rng.random() * (high - low), room)
        return line.units_in(rng.random(), 0.0, depth)

    def frequencies(self, units: Sequence[Unit]) -> list[float]:
        line = Line.of(units)
        low, high, room = _depths(line)
        chances = []
        for start, length in zip(line.starts, line.lengths, strict=True):
            cuts = _cuts(start, start + length, (low, high))
            chances.append(_mean(cuts, functools.partial(_exceeds, low, high)) if start < room else 0.0)
        return line.per_unit(chances)


def _depths(line: Line) -> tuple[float, float, float]:
    """The interval on which the depth is uniform before it is cut off, and where it is, in shares of all FLOPs.

    For a depth D uniform on [a, b] with b > c, the mean of min(D, c) is ((c^2 - a^2) / 2 + c (b - c)) / (b - a).
    """
    room = _room(line)
    mean = line.rate
    if mean >= room:
        return room, room, room
    low, high = max(0.0, 2.0 * mean - 1.0), min(1.0, 2.0 * mean)
    if high > room:
        high = ((room * room + low * low) / 2.0 - mean * low) / (room - mean)
    return low, high, room


def _exceeds(low: float, high: float, point: float) -> float:
    """The chance that a depth uniform on [low, high] lies above ``point``."""
    if point < low:
        return 1.0
    return (high - point) / (high - low) if point < high else 0.0


# ---- a window --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class WindowPattern:
    """Drop one contiguous run of layers that holds the share p of all FLOPs, at a random place.

    p is the mean of the units' rates weighted by their FLOPs. Every sample drops p of all FLOPs give or take less than the
    FLOPs of one layer, and exactly p on average, wherever the window is put. A window never holds all trainable layers;
    where p leaves no place for that, it is shortened: to all but the longest trainable layer with ``wrap``, to the
    longest that fits beside a trainable layer without.

    With ``wrap`` the layers form a circle: a window that runs off the end goes on at the first layer. Where all layers'
    rates are equal, it begins anywhere with equal chance and every layer's frequency is exactly p, unless a trainable
    layer is longer than what the window leaves and some places are ruled out. In these cases and with unequal rates it
    begins more often where that brings the frequencies f_i closer to the rates r_i: the density of its begin, constant
    on each layer, is fitted by multiplicative updates (Richardson, 1972; Lucy, 1974), which lower the divergence
    sum_i F_i r_i log(r_i / f_i). How close a window gets depends on the rates; :meth:`frequencies` tells.

    Without ``wrap`` the window begins anywhere in [0, 1 - p] with equal chance, whatever the rates. Layers in the middle
    are then dropped more often than those at the ends: with layers much shorter than the window the one at height x has
    the frequency min(x, 1 - x, p, 1 - p) / (1 - p).

    Attributes:
        wrap: whether the window may run off the end.
    """

    wrap: bool = True
    _placed: Callable[[tuple[Unit, ...]], _Placement] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Fitting a placement takes much longer than a sample, and units change seldom: each pattern remembers a few.
        object.__setattr__(self, "_placed", functools.lru_cache(maxsize=8)(functools.partial(_place, self.wrap)))

    def __reduce__(self) -> tuple[type[WindowPattern], tuple[bool]]:
        return WindowPattern, (self.wrap,)

    def sample(self, units: Sequence[Unit], rng: random.Random) -> frozenset[int]:
        placement = self._placed(tuple(units))
        if not placement.cells:
            return frozenset()
        (low, high), *_ = rng.choices(placement.cells, placement.weights)
        begin = low + rng.random() * (high - low)
        return placement.line.units_in(rng.random(), begin, begin + placement.window)

    def frequencies(self, units: Sequence[Unit]) -> list[float]:
        placement = self._placed(tuple(units))
        return placement.line.per_unit(placement.chances)


@dataclasses.dataclass(frozen=True)
class _Placement:
    """Where a window of a given length begins: in ``cells[j]`` with probability ``weights[j]``, there uniformly."""

    line: Line
    window: float
    cells: tuple[tuple[float, float], ...]
    weights: tuple[float, ...]

    @functools.cached_property
    def chances(self) -> list[float]:
        """How often each layer is dropped."""
        return [_dot(row, self.weights) for row in _reach(self.line, self.window, self.cells)]


def _place(wrap: bool, units: tuple[Unit, ...]) -> _Placement:
    line = Line.of(units)
    window = line.rate
    cells = _allowed(line, window, wrap) if window > _TINY else []
    if not cells and window > _TINY:
        window = min(window, _longest(line, wrap))
        cells = _allowed(line, window, wrap) if window > _TINY else []
    if not cells:
        return _Placement(line, 0.0, (), ())
    widths = [high - low for low, high in cells]
    total = math.fsum(widths)
    weights = [width / total if total else 1.0 / len(cells) for width in widths]
    everywhere = total > 1.0 - _TINY
    even = max(line.targets) - min(line.targets) <= _TINY
    if wrap and not (everywhere and even):
        weights = _fitted(weights, _reach(line, window, cells), line, window)
    return _Placement(line, window, tuple(cells), tuple(weights))


def _fitted(weights: list[float], reach: Sequence[Sequence[float]], line: Line, window: float) -> list[float]:
    """Weights of the cells under which layers are dropped about as often as their rates ask."""
    scale = window / line.rate
    asked = [length * target * scale for length, target in zip(line.lengths, line.targets, strict=True)]
    columns = list(zip(*reach, strict=True))
    for _ in range(_UPDATES):
        chances = [sum(map(operator.mul, row, weights)) for row in reach]
        ratios = [ask / chance if chance > 0.0 else 0.0 for ask, chance in zip(asked, chances, strict=True)]
        fitted = [
            weight * sum(map(operator.mul, column, ratios)) for weight, column in zip(weights, columns, strict=True)
        ]
        total = math.fsum(fitted)
        if total == 0.0:  # the only places that are allowed lie over layers of rate 0
            break
        weights = [weight / total for weight in fitted]
    return weights


def _reach(line: Line, window: float, cells: Sequence[tuple[float, float]]) -> list[list[float]]:
    """For each layer and each cell the chance that a window that begins in the cell drops the layer."""
    rows = []
    for start, length in zip(line.starts, line.lengths, strict=True):
        turns = (start, start + length, start + 1.0, start + length + 1.0)
        kinks = sorted([*turns, *(turn - window for turn in turns)])
        chance = functools.partial(_covered, start, length, window)
        rows.append([_mean(_cuts(low, high, kinks), chance) for low, high in cells])
    return rows


def _covered(start: float, length: float, window: float, begin: float) -> float:
    """The share of a layer that a window covers, on the circle: the chance that it holds the layer's point."""
    end = begin + window
    if length < _TINY:
        return float(begin <= start < end or begin <= start + 1.0 < end)
    overlap = max(min(end, start + length) - max(begin, start), 0.0)
    overlap += max(min(end, start + length + 1.0) - max(begin, start + 1.0), 0.0)
    return min(overlap / length, 1.0)


def _allowed(line: Line, window: float, wrap: bool) -> list[tuple[float, float]]:
    """The cells in which a window may begin: none from which it could drop all trainable layers.

    Cells end at the ends of layers. They have no length where only single places are allowed.
    """
    limit = 1.0 if wrap else math.nextafter(1.0 - window, 0.0)  # rounding must not let a window run off the end
    forbidden = list(_forbidden(line, 1.0 - window))
    ends = {end % 1.0 for interval in forbidden for end in interval}
    edges = sorted({0.0, limit, *(edge for edge in (*line.starts, *ends) if edge < limit)})

    def is_allowed(place: float) -> bool:
        return not any(
            low + _TINY < place + turn < high - _TINY for low, high in forbidden for turn in (-1.0, 0.0, 1.0)
        )

    cells = [(a, b) for a, b in itertools.pairwise(edges) if b - a > _TINY and is_allowed((a + b) / 2.0)]
    if cells:
        return cells
    places = [place for place in edges if is_allowed(place)]
    return [(b, b) for a, b in itertools.pairwise([-1.0, *places]) if b - a > _TINY]


def _forbidden(line: Line, kept: float) -> Iterator[tuple[float, float]]:
    """Open intervals in which a window must not begin, on a circle of length 1, each somewhere in [-1, 2].

    What a window leaves is an arc of length ``kept`` that begins where the window ends. No trainable layer is left where
    that arc lies between the points of two neighbouring trainable layers t and u, for some v:
    x_t + v F_t < arc and arc + kept <= x_u + v F_u. Both bounds grow with v, and the v for which they leave room for an
    arc are an interval, so the places where an arc must not begin are one, too.
    """
    trainable = [index for index, flag in enumerate(line.trainable) if flag]
    for position, t in enumerate(trainable):
        u = trainable[(position + 1) % len(trainable)]
        ahead = line.starts[u] - line.starts[t] + (1.0 if position == len(trainable) - 1 else 0.0)
        room, growth = ahead - kept, line.lengths[u] - line.lengths[t]  # there is an arc where room + v * growth > 0
        if max(room, room + growth) <= _TINY:
            continue
        zero = -room / growth if growth else 0.0
        first = zero if room < 0.0 else 0.0
        last = zero if room + growth < 0.0 else 1.0
        low = line.starts[t] + first * line.lengths[t]
        high = line.starts[t] + ahead + last * line.lengths[u]
        yield low + kept - 1.0, high - 1.0


def _longest(line: Line, wrap: bool) -> float:
    """A length for which there is a place where a window leaves a trainable layer."""
    layers = [
        (start, length)
        for start, length, trainable in zip(line.starts, line.lengths, line.trainable, strict=True)
        if trainable
    ]
    if wrap:
        return 1.0 - max((length for _, length in layers), default=0.0)
    return max((max(start, 1.0 - start - length) for start, length in layers), default=1.0)


# ---- integration -----------------------------------------------------------------------------------------------------


def _cuts(low: float, high: float, kinks: Sequence[float]) -> list[float]:
    """The interval [low, high], cut at the ``kinks`` inside of it, which are in order."""
    return [low, *(kink for kink in kinks if low < kink < high), high]


def _mean(cuts: Sequence[float], function: Callable[[float], float]) -> float:
    """The mean over an interval of a function that is linear between the ``cuts``; its value on an empty one."""
    if cuts[-1] - cuts[0] < _TINY:
        return function(cuts[0])
    pieces = [(b - a) * function((a + b) / 2.0) for a, b in itertools.pairwise(cuts)]
    return math.fsum(pieces) / (cuts[-1] - cuts[0])


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(map(operator.mul, a, b))
