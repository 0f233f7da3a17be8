"""Drop rates that minimise the gradient's error under a budget: optimal, within bounds, sensible in every corner."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize

from dropbp_fx.policy.allocation import allocate, objective

OBJECTIVES: dict[str, dict[str, Any]] = {
    "one step": {"horizon": 1.0},
    "ten steps": {},
    "for ever": {"horizon": 1e9},
    "rescaled": {"rescale": True},
}
every_objective = pytest.mark.parametrize("kind", OBJECTIVES.values(), ids=OBJECTIVES.keys())
sizes = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[float], list[float], float, float]:
    """Sensitivities, FLOPs, rate, max_rate."""
    pairs = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=12))
    max_rate = draw(st.floats(0.05, 0.99))
    return [s for s, _ in pairs], [cost for _, cost in pairs], max_rate * draw(st.floats(0, 1)), max_rate


def spent(flops: Sequence[float], rates: Sequence[float]) -> float:
    return math.fsum(cost * rate for cost, rate in zip(flops, rates, strict=True))


def slope(kind: dict[str, Any], rate: float) -> float:
    """The derivative of a branch's error by its rate, at a sensitivity of 1."""
    if kind.get("rescale"):
        return 1 / (1 - rate) ** 2
    horizon = kind.get("horizon", 10.0)
    return 1 / horizon + 2 * (1 - 1 / horizon) * rate


# ---- what holds for every instance -----------------------------------------------------------------------------------


@every_objective
@settings(deadline=None, derandomize=True)
@given(instance=instances())
def test_the_budget_is_met_within_the_bounds(
    kind: dict[str, Any], instance: tuple[list[float], list[float], float, float]
) -> None:
    sensitivities, flops, rate, max_rate = instance
    rates = allocate(sensitivities, flops, rate, max_rate=max_rate, **kind)
    assert all(0 <= r <= max_rate for r in rates)
    assert spent(flops, rates) == pytest.approx(rate * math.fsum(flops), rel=1e-9)
    if any(flops):
        assert all(r == 0 for r, cost in zip(rates, flops, strict=True) if cost == 0)


@every_objective
@settings(deadline=None, derandomize=True)
@given(instance=instances())
def test_no_two_branches_could_trade_flops_at_a_profit(
    kind: dict[str, Any], instance: tuple[list[float], list[float], float, float]
) -> None:
    """The Karush-Kuhn-Tucker conditions: what can still fall costs no more per FLOP than what can still rise."""
    sensitivities, flops, rate, max_rate = instance
    assume(any(flops))
    rates = allocate(sensitivities, flops, rate, max_rate=max_rate, **kind)
    branches = [(s / cost * slope(kind, r), r) for s, cost, r in zip(sensitivities, flops, rates, strict=True) if cost]
    dearest_dropped = max((price for price, r in branches if r > 1e-9), default=0.0)
    cheapest_kept = min((price for price, r in branches if r < max_rate - 1e-9), default=math.inf)
    assert dearest_dropped <= cheapest_kept * (1 + 1e-6) + 1e-12


@every_objective
@settings(deadline=None, derandomize=True)
@given(instance=instances(), order=st.randoms(use_true_random=False))
def test_the_order_of_branches_does_not_matter(
    kind: dict[str, Any], instance: tuple[list[float], list[float], float, float], order: random.Random
) -> None:
    sensitivities, flops, rate, max_rate = instance
    permutation = list(range(len(flops)))
    order.shuffle(permutation)
    rates = allocate(sensitivities, flops, rate, max_rate=max_rate, **kind)
    moved = allocate(
        [sensitivities[i] for i in permutation], [flops[i] for i in permutation], rate, max_rate=max_rate, **kind
    )
    assert moved == pytest.approx([rates[i] for i in permutation], abs=1e-9)


@every_objective
@settings(deadline=None, derandomize=True)
@given(sensitivities=st.lists(sizes, min_size=2, max_size=12), rate=st.floats(0, 0.95))
def test_of_two_branches_of_equal_cost_the_more_sensitive_is_never_dropped_more(
    kind: dict[str, Any], sensitivities: list[float], rate: float
) -> None:
    rates = allocate(sensitivities, [2.0] * len(sensitivities), rate, **kind)
    ranked = [r for _, r in sorted(zip(sensitivities, rates, strict=True), key=lambda pair: pair[0])]
    assert ranked == sorted(ranked, reverse=True)


@every_objective
@settings(deadline=None, derandomize=True)
@given(instance=instances(), scale=st.sampled_from([1e-290, 3.0, 1e290]))
def test_only_ratios_matter(
    kind: dict[str, Any], instance: tuple[list[float], list[float], float, float], scale: float
) -> None:
    sensitivities, flops, rate, max_rate = instance
    rates = allocate(sensitivities, flops, rate, max_rate=max_rate, **kind)
    scaled = allocate([s * scale for s in sensitivities], flops, rate, max_rate=max_rate, **kind)
    assert scaled == pytest.approx(rates, abs=1e-9)
    scaled = allocate(sensitivities, [cost * scale for cost in flops], rate, max_rate=max_rate, **kind)
    assert scaled == pytest.approx(rates, abs=1e-9)


# ---- against other solvers -------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=50)
@given(instance=instances())
def test_a_single_steps_error_is_that_of_a_linear_programme(
    instance: tuple[list[float], list[float], float, float],
) -> None:
    sensitivities, flops, rate, max_rate = instance
    rates = allocate(sensitivities, flops, rate, max_rate=max_rate, horizon=1)
    found = optimize.linprog(
        sensitivities, A_eq=[flops], b_eq=[rate * math.fsum(flops)], bounds=[(0, max_rate)] * len(flops)
    )
    assert found.success
    expected = found.fun if any(flops) else rate * math.fsum(sensitivities)  # without FLOPs the budget asks for nothing
    assert objective(sensitivities, rates, horizon=1) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", [OBJECTIVES[name] for name in ("ten steps", "for ever", "rescaled")])
@pytest.mark.parametrize("seed", range(10))
def test_a_general_convex_solver_finds_the_same_rates(kind: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    sensitivities = [rng.uniform(0.2, 5) for _ in range(6)]
    flops = [rng.uniform(0.5, 2) for _ in range(6)]
    rate = rng.uniform(0.1, 0.7)
    budget = rate * math.fsum(flops)
    rates = allocate(sensitivities, flops, rate, max_rate=0.9, **kind)
    found = optimize.minimize(
        lambda x: objective(sensitivities, list(np.clip(x, 0, 0.9)), **kind),
        [rate] * 6,
        jac=lambda x: [s * slope(kind, r) for s, r in zip(sensitivities, x, strict=True)],
        bounds=[(0, 0.9)] * 6,
        constraints={"type": "eq", "fun": lambda x: np.dot(flops, x) - budget, "jac": lambda x: flops},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    assert found.success
    assert objective(sensitivities, rates, **kind) <= found.fun * (1 + 1e-9)
    assert rates == pytest.approx(list(found.x), abs=1e-4)


def greedy(sensitivities: Sequence[float], flops: Sequence[float], rate: float) -> list[float]:
    """The rule of the paper's implementation: a tenth at a time to whichever branch this costs least.

    It does not look at what a tenth saves, and stops once the budget is reached or passed.
    """
    tenths = [0] * len(flops)
    while spent(flops, [1 - t / 10 for t in tenths]) > (1 - rate) * math.fsum(flops):
        open_ = [i for i, t in enumerate(tenths) if t < 9]
        cheapest = min(open_, key=lambda i: sensitivities[i] * (tenths[i] + 1) / 10)
        tenths[cheapest] += 1
    return [t / 10 for t in tenths]


@pytest.mark.parametrize("horizon", [1.0, 10.0, 1e9])
@pytest.mark.parametrize("count", [1, 2, 5, 24, 96])
def test_a_greedy_rule_of_tenths_is_never_better(horizon: float, count: int) -> None:
    better_by = []
    for seed in range(20):
        rng = random.Random(seed)
        sensitivities = [math.exp(rng.gauss(0, 2)) for _ in range(count)]
        flops = [rng.choice([1.0, 2.0, rng.uniform(0.1, 5)]) for _ in range(count)]
        rate = rng.uniform(0.05, 0.88)
        theirs = greedy(sensitivities, flops, rate)
        reached = min(spent(flops, theirs) / math.fsum(flops), 0.9)
        assert reached >= rate - 1e-9
        error = objective(sensitivities, theirs, horizon=horizon)
        for budget in (reached, rate):
            ours = allocate(sensitivities, flops, budget, max_rate=0.9, horizon=horizon)
            assert objective(sensitivities, ours, horizon=horizon) <= error * (1 + 1e-9)
        better_by.append(error / objective(sensitivities, ours, horizon=horizon))
    assert max(better_by) > 1.01


# ---- corners ---------------------------------------------------------------------------------------------------------


@every_objective
def test_equal_branches_get_equal_rates(kind: dict[str, Any]) -> None:
    for rate in (0.0, 0.1, 0.5, 0.95):
        assert allocate([3.0] * 7, [2.0] * 7, rate, **kind) == pytest.approx([rate] * 7, abs=1e-12)


@every_objective
def test_without_any_sensitivity_all_are_dropped_alike(kind: dict[str, Any]) -> None:
    assert allocate([0.0] * 3, [1.0, 5.0, 2.0], 0.4, **kind) == pytest.approx([0.4] * 3)
    assert allocate([0.0] * 3, [1.0, 0.0, 2.0], 0.4, **kind) == pytest.approx([0.4, 0.0, 0.4])


@every_objective
def test_branches_that_cost_nothing_go_first_and_share_evenly(kind: dict[str, Any]) -> None:
    assert allocate([0, 1e-300, 0, 7], [1, 1, 1, 1], 0.4, **kind) == pytest.approx([0.8, 0, 0.8, 0])
    rates = allocate([0, 2.0, 0, 2.0], [1, 1, 1, 1], 0.6, **kind)
    assert rates == pytest.approx([0.95, 0.25, 0.95, 0.25])


def test_a_single_steps_error_drops_in_order_of_the_sensitivity_per_flop_and_ties_evenly() -> None:
    assert allocate([1, 2, 3], [1, 1, 1], 0.5, horizon=1) == pytest.approx([0.95, 0.55, 0])
    assert allocate([3, 2, 1], [9, 1, 1], 9 * 0.5 / 11, horizon=1) == pytest.approx([0.5, 0, 0])
    assert allocate([0.3, 0.1, 0.2, 9], [3, 1, 2, 1], 3 / 7, horizon=1) == pytest.approx([0.5, 0.5, 0.5, 0])


def test_the_rates_of_a_worked_example() -> None:
    """Slopes s (0.1 + 1.8 r) are equal: 0.1 + 1.8 r = m / s for s = 1 and 2 with r_1 + r_2 = 0.8 gives m = 1.64 / 1.5."""
    m = (0.8 * 1.8 + 0.2) / 1.5
    assert allocate([1, 2], [1, 1], 0.4) == pytest.approx([(m - 0.1) / 1.8, (m / 2 - 0.1) / 1.8])
    root = 1.2 / (1 + math.sqrt(2))  # rescaled, 1 - r is proportional to the square root of s
    assert allocate([1, 2], [1, 1], 0.4, rescale=True) == pytest.approx([1 - root, 1 - math.sqrt(2) * root])


@every_objective
def test_a_branch_that_dominates_is_kept(kind: dict[str, Any]) -> None:
    rates = allocate([1.0, 1e12, 1.0, 1.0], [1.0] * 4, 0.5, **kind)
    assert rates == pytest.approx([2 / 3, 0, 2 / 3, 2 / 3], abs=1e-6)


@every_objective
@pytest.mark.parametrize("flops", [[1.0] * 4, [1e300, 1e300, 1e-300, 1e300], [1e-300] * 4, [5e-324, 5e-324, 1, 1]])
def test_numbers_of_any_size_neither_overflow_nor_underflow(kind: dict[str, Any], flops: list[float]) -> None:
    sensitivities = [1e300, 1e-300, 1.0, 5e-324]
    rates = allocate(sensitivities, flops, 0.5, **kind)
    assert all(0 <= r <= 0.95 for r in rates)
    largest = max(flops)
    shares = [cost / largest for cost in flops]
    assert spent(shares, rates) == pytest.approx(0.5 * math.fsum(shares))
    if flops == [1.0] * 4:
        assert rates == pytest.approx([0, 0.95, 0.1, 0.95])
    assert math.isfinite(objective(sensitivities, rates, **kind))


@pytest.mark.parametrize("horizon", [1 + 1e-15, 1 + 1e-9, 1e18, 1e300, math.inf])
def test_horizons_close_to_one_and_without_end_go_over_into_their_limits(horizon: float) -> None:
    sensitivities, flops = [1.0, 2.0, 3.0], [1.0, 1.5, 1.0]
    limit = allocate(sensitivities, flops, 0.5, horizon=1.0 if horizon < 2 else 1e15)
    assert allocate(sensitivities, flops, 0.5, horizon=horizon) == pytest.approx(limit, abs=1e-7)


def test_the_horizon_means_nothing_to_rescaled_gradients() -> None:
    arguments = ([1.0, 2.0, 3.0], [1.0, 1.5, 1.0], 0.5)
    expected = allocate(*arguments, rescale=True)
    assert len(set(expected)) == 3
    for horizon in (1.0, 1e9):
        assert allocate(*arguments, rescale=True, horizon=horizon) == expected


def test_nothing_to_allocate() -> None:
    assert allocate([], [], 0.5) == []
    assert allocate([1.0, 2.0], [0.0, 0.0], 0.5) == [0.5, 0.5]
    assert allocate([1.0, 2.0], [1.0, 1.0], 0.0) == [0.0, 0.0]
    assert allocate([1.0, 2.0], [1.0, 3.0], 0.95) == pytest.approx([0.95, 0.95])


def test_the_objective_is_variance_plus_squared_bias() -> None:
    assert objective([2.0, 4.0], [0.5, 0.25], horizon=1) == 2.0
    expected = 2 * (0.25 / 10 + 0.25) + 4 * (0.25 * 0.75 / 10 + 0.0625)
    assert objective([2.0, 4.0], [0.5, 0.25]) == pytest.approx(expected)
    assert objective([2.0, 4.0], [0.5, 0.25], rescale=True) == pytest.approx(2 + 4 / 3)
    assert objective([], []) == objective([0.0], [0.9]) == 0.0
    assert objective([1e308, 1e308], [1.0, 1.0], horizon=1) == math.inf


def test_the_objective_is_the_error_that_simulated_draws_have() -> None:
    rng = np.random.default_rng(0)
    sensitivities, rates, steps = np.array([1.0, 4.0, 9.0]), np.array([0.2, 0.5, 0.7]), 5
    missing = rng.random((40_000, steps, 3)) < rates
    for rescale in (False, True):
        kept = (1 - missing) / (1 - rates) if rescale else 1 - missing
        errors = ((kept.mean(axis=1) - 1) ** 2 * sensitivities).sum(axis=1)
        expected = objective(list(sensitivities), list(rates), rescale=rescale, horizon=steps) / (
            steps if rescale else 1
        )
        assert abs(errors.mean() - expected) < 5 * errors.std() / math.sqrt(len(errors))


# ---- what is refused -------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "nan": (lambda: allocate([1, math.nan], [1, 1], 0.5), r"The sensitivity of branch 1 is nan, but must be a finite"),
    "infinite": (lambda: allocate([math.inf], [1], 0.5), r"The sensitivity of branch 0 is inf, .*Check how"),
    "negative": (lambda: allocate([1, 1, -2.0], [1, 1, 1], 0.5), r"The sensitivity of branch 2 is -2\.0.*at least 0"),
    "flops": (
        lambda: allocate([1, 1], [1, -1], 0.5),
        r"The cost in FLOPs of branch 1 is -1, but must be a finite number",
    ),
    "lengths": (lambda: allocate([1, 1], [1], 0.5), r"There are 2 sensitivities and 1 FLOPs, but each branch needs"),
    "rate": (lambda: allocate([1], [1], 1.0), r"rate is 1\.0, but must be at least 0 and less than 1"),
    "nan rate": (lambda: allocate([1], [1], math.nan), r"rate is nan, but must be at least 0 and less than 1"),
    "negative rate": (lambda: allocate([], [], -0.1), r"rate is -0\.1, but must be at least 0"),
    "budget": (
        lambda: allocate([1], [1], 0.96),
        r"rate is 0\.96 and max_rate 0\.95, but branches .* cannot save a larger share.*Lower rate or raise max_rate",
    ),
    "max_rate": (
        lambda: allocate([1], [1], 0.5, max_rate=1.0),
        r"max_rate is 1\.0, but must be greater than 0 and less",
    ),
    "no max_rate": (lambda: allocate([1], [1], 0.0, max_rate=0.0), r"max_rate is 0\.0.*the default is 0\.95"),
    "horizon": (
        lambda: allocate([1], [1], 0.5, horizon=0.5),
        r"horizon is 0\.5, but must be at least 1: .*default is 10",
    ),
    "nan horizon": (lambda: objective([1], [0.5], horizon=math.nan), r"horizon is nan, but must be at least 1"),
    "rates": (
        lambda: objective([1, 1], [0.5, 1.5]),
        r"The rate of branch 1 is 1\.5, but a drop rate must be from 0 to 1",
    ),
    "rescaled": (lambda: objective([1], [1.0], rescale=True), r"branch 0 is 1\.0, .* at least 0 and less than 1"),
    "counts": (lambda: objective([1], []), r"There are 1 sensitivities and 0 rates"),
}


@pytest.mark.parametrize(("call", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_values_that_make_no_sense_are_refused(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
