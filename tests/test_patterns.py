"""Patterns: each is honest about its frequencies, meets its budget and looks the way it says.

Statistical tests draw with fixed seeds and reject at p < 1e-6, so that a sound pattern fails none of them by chance.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import random
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dropbp_fx.policy.balanced import Unit, effective_rates, sample_dropped
from dropbp_fx.policy.patterns import (
    IndependentPattern,
    LayersPattern,
    LowestPattern,
    Pattern,
    RandomPattern,
    SuffixPattern,
    WindowPattern,
    checked_sample,
    frequencies,
    resolve_pattern,
)

P_VALUE = 1e-6


def model(
    layers: int,
    rate: Callable[[int, int], float] | float,
    *,
    flops: Callable[[int, int], float] = lambda layer, part: 1.0 + part,
    trainable: Callable[[int, int], bool] = lambda layer, part: True,
) -> list[Unit]:
    """Layers of attention (part 0) and MLP (part 1)."""
    return [
        Unit(
            rate(layer, part) if callable(rate) else rate,
            trainable(layer, part),
            flops(layer, part),
            f"layers.{layer}",
            f"layers.{layer}.{('attention', 'mlp')[part]}",
        )
        for layer in range(layers)
        for part in range(2)
    ]


UNEVEN_FLOPS = model(8, 0.4, flops=lambda layer, part: [3.0, 0.5, 1.0, 2.0, 0.0, 4.0, 1.0, 0.25][layer] * (1 + part))
MODELS = {
    "even": model(12, 0.5),
    "low": model(12, 0.2),
    "high": model(12, 0.8),
    "too high": model(12, 0.97),
    "uneven flops": UNEVEN_FLOPS,
    "falling": model(12, lambda layer, part: 0.9 - 0.06 * layer),
    "wild": model(
        9, lambda layer, part: (0.37 * (layer + 1) * (part + 2)) % 0.9, flops=lambda i, part: 1.0 + i % 4 * part
    ),
    "one trainable layer": model(6, 0.8, trainable=lambda layer, part: layer == 2 and part == 1),
    "few trainable layers": model(10, 0.6, trainable=lambda layer, part: layer in (3, 4, 8)),
    "two layers": model(2, 0.5, flops=lambda layer, part: 1.0 + 2 * layer),
    "one layer": model(1, 0.5),
    "frozen": model(6, 0.7, trainable=lambda layer, part: False),
    "no flops": model(6, 0.3, flops=lambda layer, part: 0.0),
    "no layers": [Unit(0.4, True) for _ in range(6)],
    "nothing dropped": model(4, 0.0),
}
PATTERNS: dict[str, Any] = {
    "random": RandomPattern(),
    "independent": IndependentPattern(),
    "lowest": LowestPattern(),
    "suffix": SuffixPattern(),
    "window": WindowPattern(),
    "window without wrap": WindowPattern(wrap=False),
    "first layers": LayersPattern(0, 2),
    "inner layers": LayersPattern(1, -1),
}
every_model = pytest.mark.parametrize("units", MODELS.values(), ids=MODELS.keys())
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
contiguous_patterns = pytest.mark.parametrize(
    "pattern",
    [LowestPattern(), SuffixPattern(), WindowPattern(), WindowPattern(wrap=False)],
    ids=["lowest", "suffix", "window", "no wrap"],
)


def samples(pattern: Pattern, units: Sequence[Unit], count: int, *, seed: int = 0) -> list[frozenset[int]]:
    rng = random.Random(seed)
    return [frozenset(pattern.sample(units, rng)) for _ in range(count)]


def layers_of(units: Sequence[Unit]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, unit in enumerate(units):
        if index and unit.layer and unit.layer == units[index - 1].layer:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def costs(units: Sequence[Unit]) -> list[float]:
    return [unit.flops for unit in units] if any(unit.flops for unit in units) else [1.0] * len(units)


def asked(units: Sequence[Unit]) -> float:
    """The FLOPs to drop."""
    return math.fsum(cost * unit.rate for cost, unit in zip(costs(units), units, strict=True))


def expected(pattern: Pattern, units: Sequence[Unit]) -> float:
    """The FLOPs dropped on average."""
    return math.fsum(cost * chance for cost, chance in zip(costs(units), frequencies(pattern, units), strict=True))


# ---- what all of them keep -------------------------------------------------------------------------------------------


@every_pattern
@every_model
def test_the_stated_frequencies_are_those_of_the_draws(pattern: Pattern, units: list[Unit]) -> None:
    count = 6_000
    hits = Counter(itertools.chain.from_iterable(samples(pattern, units, count)))
    for index, chance in enumerate(frequencies(pattern, units)):
        if chance < 1e-9 or chance > 1 - 1e-9:
            assert hits[index] == count * round(chance)
        else:
            p = stats.binomtest(hits[index], count, chance).pvalue
            assert p > P_VALUE, f"unit {index}: {hits[index]} of {count} at {chance:.4f}, p = {p:.1e}"


@every_pattern
@every_model
def test_a_trainable_unit_always_stays(pattern: Pattern, units: list[Unit]) -> None:
    trainable = {index for index, unit in enumerate(units) if unit.trainable}
    assert all(not trainable or trainable - dropped for dropped in samples(pattern, units, 1_000))


@every_pattern
def test_a_pattern_is_a_function_of_units_and_random_state(pattern: Pattern) -> None:
    units = MODELS["wild"]
    assert samples(pattern, units, 20) == samples(copy.deepcopy(pattern), list(units), 20)
    if isinstance(pattern, LayersPattern):
        assert len({*samples(pattern, units, 20), *samples(pattern, units, 20, seed=1)}) == 1
        return
    assert samples(pattern, units, 20) != samples(pattern, units, 20, seed=1)
    assert len(set(samples(pattern, units, 200))) > (1 if pattern == LowestPattern() else 5)


@every_pattern
def test_nothing_to_draw_from(pattern: Pattern) -> None:
    assert pattern.sample([], random.Random(0)) == frozenset()
    assert frequencies(pattern, []) == []


@every_pattern
def test_patterns_are_values(pattern: Pattern) -> None:
    assert frequencies(pattern, MODELS["wild"])  # what it remembers is no part of its value
    copied = pickle.loads(pickle.dumps(pattern))
    assert copied == pattern
    assert hash(copied) == hash(pattern)
    assert repr(copied) == repr(pattern)
    assert samples(copied, MODELS["wild"], 5) == samples(pattern, MODELS["wild"], 5)
    assert [other for other in PATTERNS.values() if other == pattern] == [pattern]


# ---- random and independent ------------------------------------------------------------------------------------------


def test_the_random_pattern_is_the_balanced_draw() -> None:
    units = MODELS["wild"]
    first, second = random.Random(3), random.Random(3)
    assert [RandomPattern().sample(units, first) for _ in range(9)] == [sample_dropped(units, second) for _ in range(9)]
    assert RandomPattern().frequencies(MODELS["one layer"]) == effective_rates(MODELS["one layer"])


def test_independent_coins_fall_independently() -> None:
    patterns = samples(IndependentPattern(), model(3, 0.4), 20_000)
    sizes = Counter(len(pattern) for pattern in patterns)
    law = [stats.binom(6, 0.4).pmf(k) * 20_000 for k in range(7)]
    law[5] += law.pop()  # where all six fell one is kept
    assert stats.chisquare([sizes[k] for k in range(6)], law).pvalue > P_VALUE
    both = sum(1 for pattern in patterns if {0, 1} <= pattern)
    spared = 0.4**6 / 6  # the two coins' units, of which one may be the one that is kept
    assert stats.binomtest(both, 20_000, 0.16 - 2 * spared).pvalue > P_VALUE


def test_keeping_one_costs_independent_units_their_chance_of_all_being_dropped() -> None:
    assert IndependentPattern().frequencies([Unit(0.5, True), Unit(0.8, True), Unit(0.3, False)]) == pytest.approx(
        [0.3, 0.6, 0.3]
    )
    assert IndependentPattern().frequencies([Unit(0.5, True)]) == [0.0]


# ---- suffix and window -----------------------------------------------------------------------------------------------


def is_run(flags: Sequence[bool], *, circle: bool) -> bool:
    ends = sum(a != b for a, b in itertools.pairwise(flags)) + (circle and flags[-1] != flags[0])
    return ends <= 2 if circle or not (flags[0] and flags[-1]) else ends == 0


@contiguous_patterns
@every_model
def test_layers_are_dropped_as_a_whole_and_in_one_run(pattern: Pattern, units: list[Unit]) -> None:
    for dropped in samples(pattern, units, 500):
        flags = [group[0] in dropped for group in layers_of(units)]
        assert dropped == {i for group, flag in zip(layers_of(units), flags, strict=True) if flag for i in group}
        assert is_run(flags, circle=pattern == WindowPattern())
        if pattern in (LowestPattern(), SuffixPattern()):
            assert flags == sorted(flags, reverse=True)


def test_what_counts_as_a_run() -> None:
    assert is_run([False, True, True, False], circle=False)
    assert is_run([True, True, False, False], circle=False)
    assert not is_run([True, False, False, True], circle=False)
    assert is_run([True, False, False, True], circle=True)
    assert not is_run([True, False, True, False], circle=True)


def test_patterns_that_are_not_hindered_drop_the_flops_asked_for_on_average() -> None:
    for name in ("even", "low", "high", "uneven flops", "falling", "wild", "frozen", "no flops", "no layers"):
        for pattern in (LowestPattern(), SuffixPattern(), WindowPattern(), WindowPattern(wrap=False)):
            assert expected(pattern, MODELS[name]) == pytest.approx(asked(MODELS[name])), (name, pattern)


def test_a_window_between_few_trainable_layers_keeps_its_budget() -> None:
    for name in ("one trainable layer", "few trainable layers", "two layers"):
        assert expected(WindowPattern(), MODELS[name]) == pytest.approx(asked(MODELS[name]))


@pytest.mark.parametrize("wrap", [True, False])
@every_model
def test_every_window_drops_its_budget_give_or_take_less_than_a_layer(wrap: bool, units: list[Unit]) -> None:
    price = costs(units)
    longest = max(math.fsum(price[i] for i in group) for group in layers_of(units))
    budget = expected(WindowPattern(wrap), units)
    for dropped in samples(WindowPattern(wrap), units, 1_000):
        assert abs(math.fsum(price[i] for i in dropped) - budget) < longest + 1e-9


@every_model
def test_depths_spread_around_the_budget_as_far_as_they_can(units: list[Unit]) -> None:
    """No deeper than twice the budget, and where that is more than all, no shallower than its distance from all."""
    price = costs(units)
    total, budget = math.fsum(price), expected(SuffixPattern(), units)
    longest = max(math.fsum(price[i] for i in group) for group in layers_of(units))
    depths = [math.fsum(price[i] for i in dropped) for dropped in samples(SuffixPattern(), units, 1_000)]
    assert max(depths) <= 2 * budget + longest + 1e-9
    assert min(depths) >= 2 * budget - total - longest - 1e-9
    if 3 * longest < budget < total - 3 * longest:
        spread = min(budget, total - budget)
        assert np.std(depths) == pytest.approx(spread / math.sqrt(3), rel=0.25)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.25, 0.5, 0.8])
def test_the_lowest_layers_are_the_same_ones_in_every_draw_but_for_one(rate: float) -> None:
    units = model(12, rate)
    whole = math.floor(12 * rate + 1e-9)
    seen = set(samples(LowestPattern(), units, 300))
    assert seen <= {frozenset(range(2 * whole)), frozenset(range(2 * whole + 2))}
    assert len(seen) == (1 if math.isclose(12 * rate, whole) else 2)
    expected_chances = [1.0] * whole + [12 * rate - whole] + [0.0] * (11 - whole)
    assert LowestPattern().frequencies(units) == pytest.approx([c for c in expected_chances for _ in range(2)])


def test_suffixes_are_nested_and_reach_every_depth() -> None:
    patterns = sorted(set(samples(SuffixPattern(), MODELS["even"], 2_000)), key=len)
    assert [len(pattern) for pattern in patterns] == list(range(0, 24, 2))
    assert all(a < b for a, b in itertools.pairwise(patterns))


def test_the_frequencies_of_a_suffix_in_closed_form() -> None:
    """Three layers of a third each at 1/4: P(depth > y) = 1 - 2 y up to 1/2, averaged over each layer."""
    units = [Unit(0.25, True, layer=str(i)) for i in range(3)]
    assert SuffixPattern().frequencies(units) == pytest.approx([2 / 3, 1 / 12, 0])


def test_the_last_trainable_layer_is_kept_at_full_budget() -> None:
    """At 1/2 the depth would reach into the last of three layers; the others take over what that would have dropped."""
    units = [Unit(0.5, True, layer=str(i)) for i in range(3)]
    chances = SuffixPattern().frequencies(units)
    assert chances[2] == 0
    assert math.fsum(chances) == pytest.approx(1.5)
    assert chances[0] > chances[1] > 0
    over = [Unit(0.9, True, layer=str(i)) for i in range(3)]
    assert SuffixPattern().frequencies(over) == LowestPattern().frequencies(over) == [1, 1, 0]


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.65])
@pytest.mark.parametrize("name", ["even", "uneven flops", "no layers"])
def test_with_equal_rates_a_circular_window_drops_every_layer_equally_often(rate: float, name: str) -> None:
    units = [dataclasses.replace(unit, rate=rate) for unit in MODELS[name]]
    assert WindowPattern().frequencies(units) == pytest.approx([rate] * len(units), abs=1e-12)


def test_a_layer_longer_than_what_a_window_leaves_makes_frequencies_unequal_but_keeps_the_budget() -> None:
    units = [Unit(0.75, True, flops) for flops in (1.0, 1.0, 3.0, 1.0, 1.0)]
    chances = WindowPattern().frequencies(units)
    assert expected(WindowPattern(), units) == pytest.approx(asked(units))
    assert chances == pytest.approx([0.75] * 5, abs=0.15)
    assert chances != pytest.approx([0.75] * 5, abs=0.01)


def test_with_more_asked_for_than_a_window_may_hold_all_but_one_layer_go() -> None:
    assert WindowPattern().frequencies(MODELS["too high"]) == pytest.approx([11 / 12] * 24)
    assert {len(dropped) for dropped in samples(WindowPattern(), MODELS["too high"], 500)} == {22}


def test_where_only_layers_of_rate_zero_may_be_dropped_a_window_falls_on_them() -> None:
    units = [Unit(0.0, False), Unit(0.5, True)]
    assert WindowPattern().frequencies(units) == pytest.approx([0.5, 0.0])


def test_without_wrap_layers_in_the_middle_are_dropped_more_often() -> None:
    units = [Unit(0.3, True) for _ in range(400)]
    formula = [min(x, 1 - x, 0.3, 0.7) / 0.7 for x in ((i + 0.5) / 400 for i in range(400))]
    assert WindowPattern(wrap=False).frequencies(units) == pytest.approx(formula, abs=2e-3)


def divergence(units: Sequence[Unit], chances: Sequence[float]) -> float:
    """What the placement of windows minimises; the smaller, the closer frequencies are to rates."""
    pairs = zip(units, chances, strict=True)
    return math.fsum(unit.flops * unit.rate * math.log(unit.rate / chance) for unit, chance in pairs)


def test_with_unequal_rates_a_window_goes_where_they_are_high() -> None:
    units = MODELS["falling"]
    even = [asked(units) / math.fsum(costs(units))] * len(units)
    fitted = WindowPattern().frequencies(units)
    assert divergence(units, fitted) < 0.25 * divergence(units, even)
    assert stats.spearmanr(fitted, [unit.rate for unit in units]).statistic > 0.9


def test_rates_that_a_window_can_have_are_met() -> None:
    """These are the frequencies of windows that begin in the first four layers only, none of them always dropped."""
    base = [Unit(0.5, True, layer=str(i)) for i in range(8)]
    weights = [0.4, 0.2, 0.3, 0.1, 0.0, 0.0, 0.0, 0.0]
    begin_after = [math.fsum(weights[:i]) for i in range(9)]

    def before(x: float) -> float:  # the chance that a window begins before x
        whole = min(max(int(x), 0), 8)
        return 0.0 if x < 0 else begin_after[whole] + (weights[whole] * (x - whole) if whole < 8 else 0.0)

    def chance(layer: int) -> float:
        points = np.linspace(layer, layer + 1, 2001)[:-1] + 1 / 4000
        inside = [before(p) - before(p - 4) for p in points]
        return float(np.mean(inside))

    units = [dataclasses.replace(unit, rate=chance(i)) for i, unit in enumerate(base)]
    assert math.fsum(unit.rate for unit in units) == pytest.approx(4)
    assert WindowPattern().frequencies(units) == pytest.approx([unit.rate for unit in units], abs=0.02)


# ---- anything goes ---------------------------------------------------------------------------------------------------


@st.composite
def any_units(draw: st.DrawFn) -> list[Unit]:
    """Layers of one to three units, some without FLOPs, some frozen."""
    units: list[Unit] = []
    flops = st.one_of(st.just(0.0), st.sampled_from([1.0, 2.0]), st.floats(0.01, 10))
    same = draw(st.booleans())
    rates = st.one_of(st.just(0.0), st.floats(0, 0.99))
    rate = draw(rates)
    for layer in range(draw(st.integers(1, 8))):
        units += [
            Unit(rate if same else draw(rates), draw(st.booleans()), draw(flops), f"layers.{layer}")
            for _ in range(draw(st.integers(1, 3)))
        ]
    return units


@contiguous_patterns
@settings(deadline=None, derandomize=True, max_examples=200)
@given(units=any_units(), seed=st.integers(0, 2**32))
def test_any_layers_are_dropped_in_a_run_within_budget(pattern: Pattern, units: list[Unit], seed: int) -> None:
    groups, price = layers_of(units), costs(units)
    total = math.fsum(price)
    sizes = [math.fsum(price[i] for i in group) for group in groups]
    trainable = {index for index, unit in enumerate(units) if unit.trainable}
    chances = frequencies(pattern, units)
    assert all(-1e-9 <= chance <= 1 + 1e-9 for chance in chances)
    budget = expected(pattern, units)
    assert budget <= asked(units) + 1e-6 * total
    if not trainable:
        assert budget == pytest.approx(asked(units), abs=1e-9 * total)
    rng = random.Random(seed)
    for dropped in (pattern.sample(units, rng) for _ in range(20)):
        flags = [group[0] in dropped for group in groups]
        assert dropped == {i for group, flag in zip(groups, flags, strict=True) if flag for i in group}
        assert is_run(flags, circle=pattern == WindowPattern())
        assert not trainable or trainable - set(dropped)
        assert all(chances[index] > 0 for index in dropped)
        if isinstance(pattern, WindowPattern):
            assert abs(math.fsum(price[i] for i in dropped) - budget) <= max(sizes) + 1e-9 * total


@settings(deadline=None, derandomize=True, max_examples=100)
@given(units=any_units())
def test_a_window_keeps_its_budget_wherever_a_long_enough_layer_can_stay(units: list[Unit]) -> None:
    groups, price = layers_of(units), costs(units)
    stays = [math.fsum(price[i] for i in group) for group in groups if any(units[i].trainable for i in group)]
    total = math.fsum(price)
    room = total - min(stays, default=0.0)
    if asked(units) < room - 1e-6 * total:
        assert expected(WindowPattern(), units) == pytest.approx(asked(units), abs=1e-9 * total)
    else:
        assert expected(WindowPattern(), units) >= min(asked(units), total - max(stays)) - 1e-9 * total


# ---- patterns of one's own -------------------------------------------------------------------------------------------


def documented_example() -> type[Any]:
    """The class that the docstring of Pattern shows, run as it stands there."""
    lines = (Pattern.__doc__ or "").splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith("::")) + 1
    body = itertools.takewhile(lambda line: not line.strip() or line.startswith(" " * 8), lines[first:])
    namespace: dict[str, Any] = {
        "dataclasses": dataclasses,
        "Sequence": Sequence,
        "Collection": Collection,
        "Unit": Unit,
        "random": random,
    }
    exec(textwrap.dedent("\n".join(body)), namespace)
    return namespace["EveryKthLayer"]  # type: ignore[no-any-return]


def test_the_documented_pattern_works_as_it_stands_there() -> None:
    pattern = resolve_pattern(documented_example()(3))
    units, rng = MODELS["even"], random.Random(0)
    sampled = {checked_sample(pattern, units, rng, keep_one=True) for _ in range(100)}
    assert sampled == {frozenset(i for i in range(24) if i // 2 % 3 == phase) for phase in range(3)}
    assert frequencies(pattern, units) == [0.5] * 24, "a pattern that does not tell is taken to honour the rates"


def lowest(units: Sequence[Unit], rng: random.Random) -> list[int]:
    return [0]


def test_names_objects_and_functions_are_patterns() -> None:
    names = {"random": RandomPattern(), "independent": IndependentPattern(), "suffix": SuffixPattern()}
    for name, pattern in {**names, "window": WindowPattern(wrap=True)}.items():
        assert resolve_pattern(name) == pattern
        assert resolve_pattern(pattern) is pattern
        assert isinstance(pattern, Pattern)
    plain = resolve_pattern(lowest)
    assert plain.sample(MODELS["even"], random.Random(0)) == [0]
    assert pickle.loads(pickle.dumps(plain)) == plain == resolve_pattern(lowest)


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no pattern named 'sufix'; the names are 'random', 'independent', 'lowest', 'suffix', 'wi"
    ):
        resolve_pattern("sufix")
    with pytest.raises(
        TypeError, match=r"pattern is 3, but must be one of the names .*, or a function of \(units, rng\)"
    ):
        resolve_pattern(3)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"pattern is the class WindowPattern, but must be an instance.*WindowPattern\(\.\."
    ):
        resolve_pattern(WindowPattern)  # type: ignore[arg-type]


def returning(value: object) -> Pattern:
    return resolve_pattern(lambda units, rng: value)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (None, TypeError, r"returned None, but must return a collection of the indices"),
        (1, TypeError, r"returned 1, but must return a collection"),
        ([1.0], TypeError, r"returned 1\.0 among the units to drop, but each must be an integer"),
        (["mlp"], TypeError, r"returned 'mlp' among the units to drop"),
        ([True, False], TypeError, r"returned True among the units to drop.*To turn a mask into indices"),
        ([0, 4], IndexError, r"returned the index 4, but there are 4 units, numbered from 0 to 3"),
        ([-1], IndexError, r"returned the index -1, but there are 4 units.*that sample\(\) was given"),
    ],
)
def test_what_a_pattern_returns_is_checked(value: object, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        checked_sample(returning(value), model(2, 0.5), random.Random(0), keep_one=True)


def test_an_index_into_no_units_is_refused() -> None:
    with pytest.raises(IndexError, match=r"the index 0, but there are 0 units, numbered from 0\. Return"):
        checked_sample(returning([0]), [], random.Random(0), keep_one=True)


@pytest.mark.parametrize("value", [[0, 2, 2], {0, 2}, (0, 2), np.array([2, 0]), range(0, 3, 2)])
def test_any_collection_of_integers_will_do(value: object) -> None:
    assert checked_sample(returning(value), model(2, 0.5), random.Random(0), keep_one=True) == {0, 2}


def test_one_trainable_unit_is_kept_whatever_a_pattern_drops_if_that_is_asked_for() -> None:
    units = [Unit(0.5, index != 1) for index in range(4)]
    everything, rng = returning(range(4)), random.Random(0)
    assert checked_sample(everything, units, rng, keep_one=False) == {0, 1, 2, 3}
    kept = Counter(frozenset(range(4)) - checked_sample(everything, units, rng, keep_one=True) for _ in range(3_000))
    assert set(kept) == {frozenset({0}), frozenset({2}), frozenset({3})}
    assert stats.chisquare(list(kept.values())).pvalue > P_VALUE
    frozen = [Unit(0.5, False)] * 4
    assert checked_sample(everything, frozen, rng, keep_one=True) == {0, 1, 2, 3}
