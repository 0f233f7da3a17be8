"""Balanced sampling and the pattern sampler on their own: rates are honest, patterns are random, runs resume.

Statistical tests draw with fixed seeds and reject at p < 1e-6, so that a sound sampler fails none of them by chance.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import random
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dropbp_fx.policy.balanced import Unit, effective_rates, sample_dropped
from dropbp_fx.policy.sampler import PatternSampler

P_VALUE = 1e-6
Pattern = frozenset[int]


def units_of(rates: Iterable[float], *, frozen: Iterable[int] = ()) -> list[Unit]:
    return [Unit(rate, index not in set(frozen)) for index, rate in enumerate(rates)]


def samples(units: Sequence[Unit], count: int, *, seed: int = 0) -> list[Pattern]:
    rng = random.Random(seed)
    return [sample_dropped(units, rng) for _ in range(count)]


def assert_frequency(hits: int, trials: int, rate: float) -> None:
    if rate in (0.0, 1.0):
        assert hits == trials * rate
        return
    p = stats.binomtest(hits, trials, rate).pvalue
    assert p > P_VALUE, f"{hits} of {trials} at a rate of {rate:.4f}: p = {p:.1e}"


def assert_each_rate(patterns: Sequence[Pattern], rates: Sequence[float]) -> None:
    hits = Counter(itertools.chain.from_iterable(patterns))
    for index, rate in enumerate(rates):
        assert_frequency(hits[index], len(patterns), rate)


# ---- one sample ------------------------------------------------------------------------------------------------------

EQUAL = units_of([0.3] * 7)
UNEQUAL = units_of([0.0, 0.05, 0.9, 0.5, 0.5, 0.33, 0.71, 0.99])
MIXED = units_of([0.5, 0.25, 0.8, 0.1, 0.6, 0.6], frozen=(1, 4, 5))
CROWDED = units_of([0.9, 0.95, 0.6, 0.99])
CROWDED_MIXED = units_of([0.9, 0.9, 0.9, 0.7], frozen=(2,))
ALL_FROZEN = units_of([0.9, 0.9, 0.9], frozen=(0, 1, 2))
CASES = {
    "equal": EQUAL,
    "unequal": UNEQUAL,
    "mixed": MIXED,
    "crowded": CROWDED,
    "crowded_mixed": CROWDED_MIXED,
    "all_frozen": ALL_FROZEN,
}


@pytest.mark.parametrize("units", CASES.values(), ids=CASES.keys())
def test_every_units_long_run_frequency_is_its_effective_rate(units: list[Unit]) -> None:
    assert_each_rate(samples(units, 20_000), effective_rates(units))


def test_the_frequency_test_would_notice_a_rate_that_is_a_tenth_off() -> None:
    skewed = units_of([0.33] + [0.3] * 6)
    with pytest.raises(AssertionError, match=r"at a rate of 0\.3000"):
        assert_each_rate(samples(skewed, 20_000), [0.3] * 7)


@pytest.mark.parametrize("units", CASES.values(), ids=CASES.keys())
def test_the_number_dropped_is_the_sum_of_the_rates_rounded_up_or_down_in_every_draw(units: list[Unit]) -> None:
    rates = effective_rates(units)
    trainable = [index for index, unit in enumerate(units) if unit.trainable]
    for pattern in samples(units, 2_000):
        for members in (range(len(units)), trainable):
            total = math.fsum(rates[index] for index in members)
            assert math.floor(total + 1e-9) <= len(pattern.intersection(members)) <= math.ceil(total - 1e-9)


def test_a_whole_sum_of_rates_drops_the_same_number_every_time() -> None:
    assert {len(pattern) for pattern in samples(units_of([0.5] * 24), 2_000)} == {12}


def test_a_fractional_sum_of_rates_is_met_on_average() -> None:
    sizes = [len(pattern) for pattern in samples(units_of([0.45] * 5), 20_000)]
    assert set(sizes) == {2, 3}
    assert_frequency(sizes.count(3), len(sizes), 0.25)


@pytest.mark.parametrize("units", [CROWDED, CROWDED_MIXED, units_of([0.99]), units_of([0.999] * 2)])
def test_one_trainable_unit_is_always_kept(units: list[Unit]) -> None:
    trainable = {index for index, unit in enumerate(units) if unit.trainable}
    assert all(trainable - pattern for pattern in samples(units, 5_000))


def test_without_keep_one_everything_may_go() -> None:
    rng = random.Random(0)
    patterns = [sample_dropped(CROWDED, rng, keep_one=False) for _ in range(5_000)]
    assert frozenset(range(4)) in patterns
    assert_each_rate(patterns, [unit.rate for unit in CROWDED])


def test_effective_rates_are_the_rates_wherever_one_trainable_unit_stays_anyway() -> None:
    assert effective_rates(units_of([0.5, 0.25, 0.25])) == [0.5, 0.25, 0.25]
    assert effective_rates(MIXED) == [unit.rate for unit in MIXED]
    assert effective_rates([]) == []


def test_effective_rates_scale_the_trainable_units_by_one_factor_and_no_others() -> None:
    rates = effective_rates(units_of([0.9, 0.6, 0.8], frozen=(2,)))
    assert rates == pytest.approx([0.6, 0.4, 0.8])
    assert effective_rates(units_of([0.9])) == [0.0]
    assert effective_rates(units_of([0.9]), keep_one=False) == [0.9]
    assert effective_rates(ALL_FROZEN) == [0.9] * 3


def test_the_order_of_units_carries_no_structure() -> None:
    """24 attention (even) and MLP (odd) units at 0.5: the attention units among the 12 dropped are hypergeometric."""
    attention = Counter(sum(index % 2 == 0 for index in p) for p in samples(units_of([0.5] * 24), 20_000))
    law = stats.hypergeom(24, 12, 12)
    observed, expected = [], []
    for low, high in ((0, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (9, 12)):
        observed.append(sum(attention[k] for k in range(low, high + 1)))
        expected.append(20_000 * sum(law.pmf(k) for k in range(low, high + 1)))
    assert stats.chisquare(observed, expected).pvalue > P_VALUE
    assert attention[0] + attention[12] == 0, "all of one kind at once has a chance of 1 in 1.35 million"


def test_other_libraries_are_dropped_together_as_often_as_distant_units() -> None:
    patterns = samples(units_of([0.5] * 12), 20_000)
    together = Counter(pair for pattern in patterns for pair in itertools.combinations(sorted(pattern), 2))
    chance = 6 * 5 / (12 * 11)
    for distance in (1, 2, 6, 11):
        for first in range(12 - distance):
            assert_frequency(together[first, first + distance], len(patterns), chance)


def test_every_pattern_of_the_right_size_is_equally_likely() -> None:
    patterns = Counter(samples(units_of([0.5] * 6), 20_000))
    assert len(patterns) == math.comb(6, 3)
    assert stats.chisquare(list(patterns.values())).pvalue > P_VALUE


def test_draws_follow_one_another_independently() -> None:
    patterns = samples(units_of([0.5] * 4), 20_001)
    table = np.zeros((2, 2), dtype=int)
    for before, after in itertools.pairwise(patterns):
        table[0 in before, 0 in after] += 1
    assert stats.chi2_contingency(table).pvalue > P_VALUE


def test_equal_random_states_draw_equal_patterns() -> None:
    first, second = random.Random(5), random.Random(5)
    assert [sample_dropped(UNEQUAL, first) for _ in range(20)] == [sample_dropped(UNEQUAL, second) for _ in range(20)]
    second.setstate(first.getstate())
    assert sample_dropped(UNEQUAL, first) == sample_dropped(UNEQUAL, second)
    assert samples(UNEQUAL, 20, seed=5) != samples(UNEQUAL, 20, seed=6)


unit_lists = st.lists(
    st.builds(Unit, rate=st.floats(0, 1, exclude_max=True), trainable=st.booleans()), min_size=0, max_size=30
)


@settings(deadline=None, derandomize=True)
@given(units=unit_lists, seed=st.integers(0, 2**32))
def test_any_draw_drops_a_fitting_number_never_a_rate_of_zero_and_keeps_a_trainable_unit(
    units: list[Unit], seed: int
) -> None:
    rates = effective_rates(units)
    dropped = sample_dropped(units, random.Random(seed))
    assert dropped <= set(range(len(units)))
    assert all(rates[index] > 0 for index in dropped)
    total = math.fsum(rates)
    assert math.floor(total + 1e-9) - 1e-9 <= len(dropped) <= math.ceil(total - 1e-9) + 1e-9
    trainable = {index for index, unit in enumerate(units) if unit.trainable}
    assert not trainable or trainable - dropped


@settings(deadline=None, derandomize=True)
@given(units=unit_lists)
def test_effective_rates_leave_room_never_raise_a_rate_and_keep_proportions(units: list[Unit]) -> None:
    rates = effective_rates(units)
    trainable = [(unit.rate, rate) for unit, rate in zip(units, rates, strict=True) if unit.trainable]
    assert all(0 <= rate <= unit.rate for unit, rate in zip(units, rates, strict=True))
    assert all(rate == unit.rate for unit, rate in zip(units, rates, strict=True) if not unit.trainable)
    asked = math.fsum(asked for asked, _ in trainable)
    if trainable:
        assert math.fsum(rate for _, rate in trainable) == pytest.approx(min(asked, len(trainable) - 1), abs=1e-9)
    for (a, x), (b, y) in itertools.pairwise(trainable):
        assert a * y == pytest.approx(b * x, abs=1e-12)


# ---- balanced FLOPs --------------------------------------------------------------------------------------------------


def costing(flops: Sequence[float], rates: Sequence[float], *, frozen: Iterable[int] = ()) -> list[Unit]:
    pairs = enumerate(zip(flops, rates, strict=True))
    return [Unit(rate, index not in set(frozen), cost) for index, (cost, rate) in pairs]


ALTERNATING = costing([1.0, 2.5] * 12, [0.5] * 24)
SPREAD = costing([1.0, 3.0, 0.5, 2.0, 2.0, 7.0, 0.0, 1.5, 4.0], [0.3, 0.8, 0.1, 0.5, 0.6, 0.25, 0.9, 0.0, 0.45])
TWO_KINDS = costing([5.0, 1.0, 2.0, 8.0, 3.0, 1.0, 2.5], [0.3, 0.8, 0.6, 0.5, 0.7, 0.25, 0.9], frozen=(1, 3, 6))
BALANCED = {"alternating": ALTERNATING, "spread": SPREAD, "two kinds": TWO_KINDS}


def flops_error(units: Sequence[Unit], pattern: Pattern) -> float:
    """How far the dropped FLOPs are from their expectation."""
    expected = math.fsum(rate * unit.flops for rate, unit in zip(effective_rates(units), units, strict=True))
    return math.fsum(units[index].flops for index in pattern) - expected


def flops_bound(units: Sequence[Unit]) -> float:
    kinds = {unit.trainable for unit in units if unit.rate}
    return len(kinds) * max((unit.flops for unit in units if unit.rate), default=0.0)


@pytest.mark.parametrize("units", BALANCED.values(), ids=BALANCED.keys())
def test_unequal_flops_leave_every_frequency_as_it_is(units: list[Unit]) -> None:
    assert_each_rate(samples(units, 20_000), effective_rates(units))


@pytest.mark.parametrize("units", BALANCED.values(), ids=BALANCED.keys())
def test_every_draw_drops_nearly_the_flops_that_the_rates_ask_for(units: list[Unit]) -> None:
    errors = [flops_error(units, pattern) for pattern in samples(units, 5_000)]
    assert max(map(abs, errors)) < flops_bound(units)
    independent = math.fsum(unit.flops**2 * unit.rate * (1 - unit.rate) for unit in units)
    assert math.fsum(error**2 for error in errors) / len(errors) < independent / 2


def test_the_flops_of_many_units_vary_far_less_than_with_independent_or_merely_counted_draws() -> None:
    rng = random.Random(0)
    units = costing([rng.uniform(1, 3) for _ in range(64)], [0.5] * 64)
    balanced = [flops_error(units, pattern) for pattern in samples(units, 2_000)]
    indifferent = [Unit(unit.rate, True) for unit in units]
    counted = [flops_error(units, pattern) for pattern in samples(indifferent, 2_000)]
    independent = math.fsum(unit.flops**2 * 0.25 for unit in units)
    assert np.var(balanced) < 0.1 * np.var(counted)
    assert np.var(balanced) < 0.005 * independent


def test_among_alternating_kinds_balance_alone_decides_how_many_of_each_are_dropped() -> None:
    """12 of 24 at 0.5 with the FLOPs balanced are 6 of each kind: any 6, each equally likely, in whatever order."""
    patterns = samples(ALTERNATING, 20_000)
    assert {(sum(i % 2 == 0 for i in p), sum(i % 2 for i in p)) for p in patterns} == {(6, 6)}
    together = Counter(pair for p in patterns for pair in itertools.combinations(sorted(p), 2))
    for first, second in [(0, 1), (0, 3), (0, 23), (11, 12), (5, 20)]:
        assert_frequency(together[first, second], len(patterns), 0.25)
    for first, second in [(0, 2), (0, 22), (10, 12), (1, 3), (1, 23)]:
        assert_frequency(together[first, second], len(patterns), 6 * 5 / (12 * 11))


def test_kinds_in_blocks_are_drawn_like_kinds_that_alternate() -> None:
    blocks = samples(costing([1.0] * 6 + [2.5] * 6, [0.45] * 12), 20_000)
    alternating = samples(costing([1.0, 2.5] * 6, [0.45] * 12), 20_000, seed=1)
    table = Counter(sum(i < 6 for i in p) for p in blocks), Counter(sum(i % 2 == 0 for i in p) for p in alternating)
    seen = sorted(set(table[0]) | set(table[1]))
    assert len(seen) > 1
    assert stats.chi2_contingency([[counts[k] for k in seen] for counts in table]).pvalue > P_VALUE


def test_patterns_of_equal_count_and_flops_are_equally_likely() -> None:
    patterns = Counter(samples(costing([1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0], [1 / 3] * 3 + [0.5] * 4), 20_000))
    assert len(patterns) == 3 * math.comb(4, 2)
    assert stats.chisquare(list(patterns.values())).pvalue > P_VALUE


def test_units_without_any_flops_are_drawn_like_units_of_equal_flops() -> None:
    patterns = Counter(samples(costing([0.0] * 6, [0.5] * 6), 20_000))
    assert len(patterns) == math.comb(6, 3)
    assert stats.chisquare(list(patterns.values())).pvalue > P_VALUE


any_units = st.lists(
    st.builds(
        Unit,
        rate=st.one_of(st.just(0.0), st.just(0.5), st.floats(0, 1, exclude_max=True)),
        trainable=st.booleans(),
        flops=st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1e300)),
    ),
    max_size=30,
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(units=any_units, seed=st.integers(0, 2**32), keep_one=st.booleans())
def test_any_units_are_drawn_in_balance(units: list[Unit], seed: int, keep_one: bool) -> None:
    rates = effective_rates(units, keep_one=keep_one)
    dropped = sample_dropped(units, random.Random(seed), keep_one=keep_one)
    assert all(rates[index] > 0 for index in dropped)
    for members in (range(len(units)), [index for index, unit in enumerate(units) if unit.trainable]):
        total = math.fsum(rates[index] for index in members)
        assert math.floor(total + 1e-9) <= len(dropped.intersection(members)) <= math.ceil(total - 1e-9)
    largest = max((unit.flops for unit in units), default=0.0) or 1.0
    scaled = [
        dataclasses.replace(unit, rate=rate, flops=unit.flops / largest)
        for unit, rate in zip(units, rates, strict=True)
    ]
    expected = math.fsum(unit.rate * unit.flops for unit in scaled)
    error = abs(math.fsum(scaled[index].flops for index in dropped) - expected)
    assert error <= flops_bound(scaled) + 1e-9


# ---- the pattern sampler ------------------------------------------------------------------------------------------------


def names_of(layers: int) -> list[tuple[str, str]]:
    return [(f"layers.{i}.{kind}", f"layers.{i}") for i in range(layers) for kind in ("attention", "mlp")]


def add_branches(sampler: PatternSampler, branches: Iterable[tuple[str, str]], *, trainable: bool = True) -> list[int]:
    """A graph with these branches is compiled: their indices, which its forwards draw for."""
    return [sampler.add_branch(name, layer, trainable=trainable, droppable=True).index for name, layer in branches]


def sampler_of(
    layers: int, rate: float = 0.5, *, granularity: str = "branch", seed: int | None = 0
) -> tuple[PatternSampler, list[int]]:
    sampler = PatternSampler(rate, granularity, seed)  # type: ignore[arg-type]
    return sampler, add_branches(sampler, names_of(layers))


def state_of(sampler: PatternSampler) -> dict[str, Any]:
    return sampler.saved((), 0).as_dict()


def forwards(sampler: PatternSampler, pieces: Sequence[Sequence[int]], count: int) -> list[Pattern]:
    """Forwards of a model whose graphs hold ``pieces``."""
    return [frozenset[int]().union(*[sampler.sample(piece) for piece in pieces]) for _ in range(count)]


PIECES = {
    "one graph": [list(range(12))],
    "two graphs": [list(range(5)), list(range(5, 12))],
    "a graph a branch": [[index] for index in range(12)],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES.keys())
def test_a_model_in_any_number_of_graphs_drops_at_its_rate_and_evenly(pieces: list[list[int]]) -> None:
    sampler, _ = sampler_of(6, 0.35)
    patterns = forwards(sampler, pieces, 4_000)
    assert {len(pattern) for pattern in patterns} == {4, 5}
    assert_each_rate(patterns, [0.35] * 12)
    assert sampler.forwards == 4_000
    assert sampler.branches.realised_rate() == sum(map(len, patterns)) / (4_000 * 12)
    hits = Counter(itertools.chain.from_iterable(patterns))
    assert [branch.times_dropped for branch in sampler.branches] == [hits[index] for index in range(12)]
    assert all(branch.times_seen == 4_000 for branch in sampler.branches)


def test_a_round_does_not_depend_on_how_the_model_is_broken_into_graphs() -> None:
    found = [forwards(sampler_of(6)[0], pieces, 50) for pieces in PIECES.values()]
    assert found[0] == found[1] == found[2]


def test_a_graph_that_runs_twice_starts_a_new_round_each_time() -> None:
    sampler, _ = sampler_of(6)
    patterns = forwards(sampler, [list(range(6))], 2_000)
    assert len(set(patterns)) > 20
    assert_each_rate(patterns, [0.5] * 6)


def test_the_first_round_of_a_model_that_turns_up_graph_by_graph_keeps_its_rate_too() -> None:
    rounds = []
    for seed in range(2_000):
        sampler = PatternSampler(0.5, "branch", seed)
        names = names_of(4)
        first = sampler.sample(add_branches(sampler, names[:3]))
        second = sampler.sample(add_branches(sampler, names[3:]))
        assert first <= {0, 1, 2}
        assert second <= {3, 4, 5, 6, 7}
        rounds.append(first | second)
    assert_each_rate(rounds, [0.5] * 8)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_one_trainable_branch_survives_every_round_of_a_model_in_pieces(rate: float) -> None:
    sampler = PatternSampler(rate, "branch", 0)
    add_branches(sampler, [("frozen.a", "frozen"), ("frozen.b", "frozen")], trainable=False)
    trainable = add_branches(sampler, [("a", "top"), ("b", "top")])
    patterns = forwards(sampler, [[0, 2], [1, 3]], 1_000)
    assert all(not pattern.issuperset(trainable) for pattern in patterns)
    assert_each_rate(patterns, [rate, rate, 0.5, 0.5])
    assert sampler.rated.attainable_rate() == pytest.approx((rate * 2 + 1.0) / 4)


def test_branches_no_gradient_reaches_take_no_part() -> None:
    sampler = PatternSampler(0.5, "branch", 0)
    below = sampler.add_branch("below", "0", trainable=False, droppable=False)
    indices = add_branches(sampler, names_of(2))
    patterns = forwards(sampler, [indices], 1_000)
    assert {len(pattern) for pattern in patterns} == {2}
    assert (below.times_seen, below.times_dropped) == (0, 0)
    assert sampler.branches.realised_rate() == sampler.rated.attainable_rate() == 0.5


@pytest.mark.parametrize("pieces", [[list(range(12))], [list(range(4)), list(range(4, 12))]])
def test_layer_granularity_drops_all_branches_of_a_layer_or_none(pieces: list[list[int]]) -> None:
    sampler, _ = sampler_of(6, 0.4, granularity="layer")
    patterns = forwards(sampler, pieces, 2_000)
    for pattern in patterns:
        assert all((index in pattern) == (index + 1 in pattern) for index in range(0, 12, 2))
    assert {len(pattern) for pattern in patterns} == {4, 6}
    assert_each_rate(patterns, [0.4] * 12)


def test_branch_granularity_does_split_layers() -> None:
    sampler, indices = sampler_of(6, 0.4)
    patterns = forwards(sampler, [indices], 200)
    assert any((0 in pattern) != (1 in pattern) for pattern in patterns)


def test_the_attainable_rate_is_the_long_run_rate_where_one_unit_must_stay() -> None:
    sampler, indices = sampler_of(1, 0.9)
    forwards(sampler, [indices], 500)
    assert sampler.rated.attainable_rate() == sampler.branches.realised_rate() == 0.5
    single = PatternSampler(0.9, "branch", 0)
    forwards(single, [add_branches(single, [("only", "0")])], 50)
    assert single.rated.attainable_rate() == single.branches.realised_rate() == 0.0


# ---- seeds and other random streams ----------------------------------------------------------------------------------


def test_equal_seeds_draw_equal_patterns_and_unequal_ones_do_not() -> None:
    runs = {seed: forwards(sampler_of(6, seed=seed)[0], [list(range(12))], 30) for seed in (0, 1, -1, 2**80)}
    assert runs[0] == forwards(sampler_of(6, seed=0)[0], [list(range(12))], 30)
    for first, second in itertools.combinations(runs.values(), 2):
        assert first != second


def test_without_a_seed_torch_manual_seed_decides() -> None:
    def run(seed: int) -> list[Pattern]:
        sampler, indices = sampler_of(6, seed=None)
        torch.manual_seed(seed)  # after the sampler was made, before its first draw
        return forwards(sampler, [indices], 30)

    assert run(3) == run(3) != run(4)


def test_no_global_random_stream_is_read_or_moved() -> None:
    def state() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())

    before = state()
    sampler, indices = sampler_of(6, seed=None)
    expected = forwards(sampler, [indices], 10)
    with sampler.pinned([0]):
        sampler.sample(indices)
    sampler.load(state_of(sampler))
    assert state() == before
    torch.rand(3), random.random(), np.random.rand()
    assert forwards(sampler_of(6, seed=None)[0], [indices], 10) == expected


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["branch", "layer"])
@pytest.mark.parametrize("steps", [1, 7])
def test_a_loaded_state_goes_on_with_the_patterns_of_the_run_it_is_from(granularity: str, steps: int) -> None:
    pieces = [list(range(5)), list(range(5, 12))]
    run, _ = sampler_of(6, granularity=granularity, seed=7)
    forwards(run, pieces, steps)
    state = pickle.loads(pickle.dumps(state_of(run)))
    expected = forwards(run, pieces, 20)
    resumed, _ = sampler_of(6, 0.1, granularity=granularity, seed=99)
    resumed.load(state)
    assert forwards(resumed, pieces, 20) == expected
    assert state_of(resumed) == state_of(run)


def test_a_fresh_schedule_resumes_while_its_graphs_turn_up_one_by_one() -> None:
    run, _ = sampler_of(6, seed=7)
    pieces = [list(range(5)), list(range(5, 12))]
    forwards(run, pieces, 3)
    resumed = PatternSampler(0.9, "branch", None)
    resumed.load(state_of(run))
    assert resumed.rated.rate == 0.5
    names = names_of(6)
    first = resumed.sample(add_branches(resumed, names[:5])) | resumed.sample(add_branches(resumed, names[5:]))
    assert [first, *forwards(resumed, pieces, 10)] == forwards(run, pieces, 11)


def test_a_state_taken_before_the_first_forward_resumes_too() -> None:
    run = PatternSampler(0.5, "branch", 3)
    resumed = PatternSampler(0.2, "branch", 4)
    resumed.load(state_of(run))
    for sampler in (run, resumed):
        add_branches(sampler, names_of(6))
    assert forwards(resumed, [list(range(12))], 10) == forwards(run, [list(range(12))], 10)


def test_loading_in_mid_run_rewinds() -> None:
    sampler, indices = sampler_of(6)
    forwards(sampler, [indices], 3)
    state = state_of(sampler)
    expected = forwards(sampler, [indices], 5)
    forwards(sampler, [indices], 4)
    sampler.load(state)
    assert forwards(sampler, [indices], 5) == expected


def test_a_state_is_a_copy_that_later_forwards_do_not_change() -> None:
    sampler, indices = sampler_of(2)
    state = state_of(sampler)
    frozen = pickle.dumps(state)
    forwards(sampler, [indices], 3)
    assert pickle.dumps(state) == frozen


def test_a_state_may_be_loaded_within_a_pinned_block() -> None:
    sampler, indices = sampler_of(6)
    with sampler.pinned([2]):
        sampler.load(state_of(sampler))
        assert sampler.sample(indices) == {2}
    assert forwards(sampler, [indices], 5) == forwards(sampler_of(6)[0], [indices], 5)


def test_states_that_do_not_fit_are_refused_with_what_differs() -> None:
    state = state_of(sampler_of(6)[0])
    for version in (0, 1, None, "2"):
        with pytest.raises(ValueError, match=rf"no state of a dropbp_fx backend of version 3.*is {version!r}"):
            PatternSampler(0.5, "branch", 0).load({**state, "version": version})
    with pytest.raises(ValueError, match=r"granularity='branch', this backend has granularity='layer'"):
        PatternSampler(0.5, "layer", 0).load(state)
    smaller, indices = sampler_of(5)
    before = state_of(smaller)
    with pytest.raises(ValueError, match=r"12 branches, the model has 10; they differ in layers\.5\.attention"):
        smaller.load(state)
    assert state_of(smaller) == before, "a refused state changes nothing"
    reordered = PatternSampler(0.5, "branch", 0)
    add_branches(reordered, reversed(names_of(6)))
    with pytest.raises(ValueError, match=r"they differ in their order"):
        reordered.load(state)
    smaller.load(state, strict=False)
    smaller.sample(indices)


def test_a_graph_with_a_branch_the_loaded_state_lacks_is_refused_when_it_turns_up() -> None:
    sampler = PatternSampler(0.5, "branch", 0)
    sampler.load(state_of(sampler_of(2)[0]))
    with pytest.raises(ValueError, match=r"model has a branch named 'head\.mlp', the state has 4 branches \(layers\.0"):
        add_branches(sampler, [("head.mlp", "head")])
    lenient = PatternSampler(0.5, "branch", 0)
    lenient.load(state_of(sampler_of(2)[0]), strict=False)
    assert add_branches(lenient, [("head.mlp", "head")]) == [4]


def test_a_model_that_lacks_a_branch_of_the_loaded_state_is_refused_at_its_second_forward() -> None:
    sampler = PatternSampler(0.5, "branch", 0)
    sampler.load(state_of(sampler_of(3)[0]))
    indices = add_branches(sampler, names_of(2))
    sampler.sample(indices)
    with pytest.raises(ValueError, match=r"2 of its 6 branches, such as 'layers\.2\.attention', are not in the model"):
        sampler.sample(indices)


# ---- pins and rates --------------------------------------------------------------------------------------------------


def test_a_pinned_block_drops_exactly_what_it_names_and_uses_up_no_round() -> None:
    sampler, indices = sampler_of(6)
    branches = list(sampler.branches)
    first = forwards(sampler, [indices], 2)
    with sampler.pinned([1, "layers.2.mlp", branches[7]]):
        assert forwards(sampler, [indices], 3) == [{1, 5, 7}] * 3
        assert sampler.sample([0, 1, 2]) == {1}, "a graph gets its own part of the pattern"
        with sampler.pinned([]):
            assert sampler.sample(indices) == frozenset()
        assert sampler.sample(indices) == {1, 5, 7}
    assert first + forwards(sampler, [indices], 3) == forwards(sampler_of(6)[0], [indices], 5)


def test_a_pinned_block_ends_with_an_exception_too() -> None:
    sampler, indices = sampler_of(6)
    with pytest.raises(RuntimeError, match="mine"), sampler.pinned([0]):
        raise RuntimeError("mine")
    assert forwards(sampler, [indices], 5) == forwards(sampler_of(6)[0], [indices], 5)


def test_wrong_pins_are_refused_with_the_numbers_and_names_there_are() -> None:
    sampler, indices = sampler_of(2)
    cases: list[tuple[Any, type[Exception], str]] = [
        ([4], IndexError, r"no branch 4: the model has 4 residual branches, numbered 0 to 3"),
        ([-1], IndexError, r"no branch -1"),
        (["layers.0.mpl"], KeyError, r"no branch named 'layers\.0\.mpl'; did you mean 'layers\.0\.mlp'"),
        ([1.0], TypeError, r"by its index or its name, not by 1\.0"),
        ([True], TypeError, r"by its index or its name, not by True"),
        ([None], TypeError, r"by its index or its name, not by None"),
        (indices, ValueError, r"drops all 4 branches that have trainable parameters.*Keep at least one"),
    ]
    for chosen, kind, text in cases:
        with pytest.raises(kind, match=text), sampler.pinned(chosen):
            pytest.fail("the block must not be entered")
    assert sampler.sample(indices) == sampler_of(2)[0].sample(indices)


def test_frozen_branches_may_all_be_pinned_while_a_trainable_one_stays() -> None:
    sampler = PatternSampler(0.5, "branch", 0)
    frozen = add_branches(sampler, names_of(2), trainable=False)
    (trainable,) = add_branches(sampler, [("adapter", "adapter")])
    with sampler.pinned(frozen):
        assert sampler.sample([*frozen, trainable]) == set(frozen)
    with pytest.raises(ValueError, match=r"all 1 branches"), sampler.pinned([trainable]):
        pytest.fail("the block must not be entered")


def test_pins_made_before_the_branches_are_known_hold_for_every_graph_that_turns_up() -> None:
    sampler = PatternSampler(0.5, "branch", 0)
    names = names_of(2)
    with sampler.pinned(["layers.0.mlp", 2]):
        assert sampler.sample(add_branches(sampler, names[:2])) == {1}
        assert sampler.sample(add_branches(sampler, names[2:])) == {2}


@pytest.mark.parametrize(
    ("chosen", "kind", "text"),
    [(["layers.9.mlp"], KeyError, "no branch named 'layers.9.mlp'"), ([9], IndexError, "no branch 9")],
)
def test_pins_that_no_graph_met_are_refused_at_the_end_of_the_block(
    chosen: list[int | str], kind: type[Exception], text: str
) -> None:
    sampler = PatternSampler(0.5, "branch", 0)
    with pytest.raises(kind, match=text), sampler.pinned(chosen):
        assert sampler.sample(add_branches(sampler, names_of(2))) == frozenset()
    assert sampler.sample([0, 1, 2, 3]) == sampler_of(2)[0].sample([0, 1, 2, 3])


def test_pins_and_rounds_belong_to_their_thread() -> None:
    sampler, indices = sampler_of(6)
    entered, leave = threading.Event(), threading.Event()
    inside: list[Pattern] = []

    def pin() -> None:
        with sampler.pinned([3]):
            entered.set()
            leave.wait(10)
            inside.append(sampler.sample(indices))

    thread = threading.Thread(target=pin)
    thread.start()
    assert entered.wait(10)
    outside = sampler.sample(indices)
    leave.set()
    thread.join(10)
    assert inside == [{3}]
    assert outside == sampler_of(6)[0].sample(indices)


def test_two_threads_in_the_middle_of_a_forward_each_finish_their_own_round() -> None:
    rounds = forwards(sampler_of(6)[0], [list(range(12))], 2)
    sampler, _ = sampler_of(6)
    first_half = sampler.sample(range(6))
    other: list[Pattern] = []
    thread = threading.Thread(target=lambda: other.extend(forwards(sampler, [range(6), range(6, 12)], 1)))
    thread.start()
    thread.join(10)
    assert [first_half | sampler.sample(range(6, 12)), *other] == rounds


def test_many_threads_lose_no_count() -> None:
    sampler, indices = sampler_of(6)
    threads = [threading.Thread(target=forwards, args=(sampler, [indices], 200)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sampler.forwards == 800
    assert state_of(sampler)["rounds"] == 800
    assert {branch.times_seen for branch in sampler.branches} == {800}
    assert sampler.branches.realised_rate() == 0.5


def test_a_new_rate_holds_from_the_next_forward() -> None:
    sampler, indices = sampler_of(6)
    assert {len(pattern) for pattern in forwards(sampler, [indices], 20)} == {6}
    sampler.rated.rate = 0.25
    assert {len(pattern) for pattern in forwards(sampler, [indices], 20)} == {3}
    sampler.rated.rate = 0.0
    assert set(forwards(sampler, [indices], 20)) == {frozenset()}
    assert {branch.rate for branch in sampler.branches} == {0.0}
    assert add_branches(sampler, [("late", "late")]) == [12]
    assert sampler.branches[12].rate == 0.0


def test_branches_of_unequal_rates_are_each_dropped_at_their_own() -> None:
    sampler, indices = sampler_of(3)
    rates = [0.1, 0.9, 0.5, 0.0, 0.75, 0.33]
    for branch, rate in zip(sampler.branches, rates, strict=True):
        branch.rate = rate
    assert_each_rate(forwards(sampler, [indices], 8_000), rates)
    assert sampler.rated.attainable_rate() == pytest.approx(sum(rates) / 6)


def test_a_branch_met_again_is_the_same_entry_and_only_gains_abilities() -> None:
    sampler = PatternSampler(0.5, "branch", 0)
    first = sampler.add_branch("a", "0", trainable=False, droppable=True)
    again = sampler.add_branch("a", "0", trainable=True, droppable=False)
    assert first is again
    assert (again.trainable, again.droppable, len(sampler.branches)) == (True, True, 1)
