"""Split a budget of dropped FLOPs among branches so that the gradient suffers least.

Let s_i be the squared change of the gradient when branch i alone is dropped and r_i the branch's drop rate, and let the
branches' effects be orthogonal and the patterns of different steps independent. At step t branch i is missing with the
indicator d_ti, of mean r_i and variance r_i (1 - r_i), so the error of the gradient averaged over T steps is

    E ||(1/T) sum_t g_t - g||^2 = sum_i s_i E[((1/T) sum_t d_ti)^2] = sum_i s_i (r_i (1 - r_i) / T + r_i^2)
                                = sum_i s_i (r_i / T + (1 - 1/T) r_i^2),

variance plus squared bias. T = 1 is the error of a single step, sum_i s_i r_i: the objective of DropBP (Woo et al., NeurIPS
2024, section 3.2), whose minimum drops branches one after another in the order of s_i / F_i. A larger T spreads the drops,
because what is always missing is never averaged out. The default of 10 is the span over which Adam's first moment averages,
1 / (1 - beta_1) for beta_1 = 0.9.

Where kept branches' gradients are multiplied by 1 / (1 - r_i) the gradient has no bias, and the variance alone counts:
sum_i s_i r_i / (1 - r_i), whatever T is but for a factor.

Subject to sum_i F_i r_i = rate * sum_i F_i and 0 <= r_i <= max_rate, both are solved exactly by water-filling. The
stationary r_i are functions of one multiplier m, zero up to m = s_i / F_i and then growing until max_rate:

    r_i = (m F_i / s_i - 1) / (2 (T - 1))        or, rescaled,        r_i = 1 - sqrt(s_i / (m F_i)).

Between two neighbouring values of m at which some rate starts or stops growing, all rates are affine in m, or in
1 / sqrt(m), and so is what they spend. The rates that spend the budget therefore are an interpolation between those at the
two values that enclose it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

_TIE = 1e-12  # logarithms of s / F this close are one value: the ratio of floats of any size is known no better
_FOREVER = 1e18  # from here on a longer horizon changes no rate by more than rounding does


def allocate(
    sensitivities: Sequence[float],
    flops: Sequence[float],
    rate: float,
    *,
    max_rate: float = 0.95,
    rescale: bool = False,
    horizon: float = 10.0,
) -> list[float]:
    """The drop rates that minimise :func:`objective` while the dropped FLOPs are ``rate`` of all FLOPs.

    Branches with a sensitivity of 0 are dropped as far as they can be before any other is touched. A branch without FLOPs
    gets rate 0, since dropping it saves nothing; where no branch has any, all get ``rate``. Branches that are equally
    cheap per FLOP share evenly. Only the ratios of the sensitivities matter, and only those of the FLOPs.

    Args:
        sensitivities: for each branch the squared norm of the change of the gradient when it alone is dropped.
        flops: for each branch the FLOPs of its backward, in any unit of measure.
        rate: the share of all FLOPs to drop, in [0, 1).
        max_rate: the largest rate a branch may get, in (0, 1).
        rescale: the gradients of kept branches are multiplied by 1 / (1 - rate).
        horizon: number T of steps over which the gradient's error is averaged, at least 1; no effect with ``rescale``.

    Returns:
        One rate in [0, max_rate] for each branch, the budget met but for rounding.

    Raises:
        ValueError: a value is not finite, negative or out of its range, the lengths differ, or ``rate`` exceeds
            ``max_rate``.
    """
    _check_values("sensitivity", sensitivities)
    _check_values("cost in FLOPs", flops)
    _check_lengths("sensitivities", len(sensitivities), "FLOPs", len(flops))
    _check_horizon(horizon)
    if not 0.0 < max_rate < 1.0:
        raise ValueError(f"max_rate is {max_rate!r}, but must be greater than 0 and less than 1; the default is 0.95.")
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate is {rate!r}, but must be at least 0 and less than 1: the share of all FLOPs to drop.")
    if rate > max_rate:
        raise ValueError(
            f"rate is {rate!r} and max_rate {max_rate!r}, but branches that are each dropped at no more than max_rate "
            "cannot save a larger share than that. Lower rate or raise max_rate."
        )
    largest = max(flops, default=0.0)
    if largest == 0.0:
        return [rate] * len(flops)
    weights = [cost / largest for cost in flops]  # neither their sum nor a product with a rate can overflow
    prices = [_log_ratio(s, cost) for s, cost in zip(sensitivities, flops, strict=True)]
    active = [index for index, weight in enumerate(weights) if weight > 0.0]
    steps = min(horizon, _FOREVER)

    def at(multiplier: float) -> list[float]:
        """The stationary rates at the logarithm of a multiplier; never less at a larger one, in floats too."""
        rates = [0.0] * len(weights)
        for index in active:
            rates[index] = _stationary(multiplier, prices[index], max_rate, rescale, steps)
        return rates

    def spent(rates: Sequence[float]) -> float:
        return math.fsum(weight * rate for weight, rate in zip(weights, rates, strict=True))

    lengths = (0.0, _saturation(max_rate, rescale, steps))
    breaks = sorted({prices[index] + length for index in active for length in lengths})
    budget = rate * math.fsum(weights)
    full = [max_rate if weight > 0.0 else 0.0 for weight in weights]
    low, high = _enclosing([0.0] * len(weights), full, breaks, at, spent, budget)
    before, after = spent(low), spent(high)
    share = min(max((budget - before) / (after - before), 0.0), 1.0) if after > before else 0.0
    return [min(a * (1.0 - share) + b * share, max_rate) for a, b in zip(low, high, strict=True)]


def objective(
    sensitivities: Sequence[float], rates: Sequence[float], *, rescale: bool = False, horizon: float = 10.0
) -> float:
    """The expected squared error of the gradient that drop rates cause, in the unit of the sensitivities.

    ``sum_i s_i (r_i / T + (1 - 1/T) r_i^2)``, or with ``rescale`` ``sum_i s_i r_i / (1 - r_i)``; the module's docstring
    derives both. Infinite where it exceeds the largest float.

    Args:
        sensitivities: for each branch the squared norm of the change of the gradient when it alone is dropped.
        rates: each branch's drop rate, in [0, 1]; less than 1 with ``rescale``.
        rescale: the gradients of kept branches are multiplied by 1 / (1 - rate).
        horizon: number T of steps over which the gradient's error is averaged, at least 1; no effect with ``rescale``.

    Raises:
        ValueError: a value is not finite, negative or out of its range, or the lengths differ.
    """
    _check_values("sensitivity", sensitivities)
    _check_lengths("sensitivities", len(sensitivities), "rates", len(rates))
    _check_horizon(horizon)
    for index, rate in enumerate(rates):
        if not 0.0 <= rate <= 1.0 or (rescale and rate == 1.0):
            valid = "at least 0 and less than 1" if rescale else "from 0 to 1"
            raise ValueError(f"The rate of branch {index} is {rate!r}, but a drop rate must be {valid}.")
    largest = max(sensitivities, default=0.0)
    if largest == 0.0:
        return 0.0
    if rescale:
        errors = [rate / (1.0 - rate) for rate in rates]
    else:
        errors = [rate / horizon + (1.0 - 1.0 / horizon) * rate * rate for rate in rates]
    return largest * math.fsum(s / largest * error for s, error in zip(sensitivities, errors, strict=True))


def _log_ratio(sensitivity: float, flops: float) -> float:
    """log(s / F), also where the ratio itself is no float; minus infinity where dropping costs nothing."""
    if sensitivity == 0.0 or flops == 0.0:
        return -math.inf
    return math.log(sensitivity) - math.log(flops)


def _stationary(multiplier: float, price: float, max_rate: float, rescale: bool, steps: float) -> float:
    """The rate of a branch of log(s / F) = ``price`` at the logarithm of a multiplier."""
    if multiplier < price - _TIE:
        return 0.0
    linear = steps == 1.0 and not rescale
    if price == -math.inf or linear or multiplier >= price + _saturation(max_rate, rescale, steps):
        return max_rate
    above = max(multiplier - price, 0.0)
    return min(-math.expm1(-above / 2.0) if rescale else math.expm1(above) / (2.0 * (steps - 1.0)), max_rate)


def _saturation(max_rate: float, rescale: bool, steps: float) -> float:
    """How far the logarithm of the multiplier grows from where a branch is first dropped to where it is at max_rate."""
    return -2.0 * math.log1p(-max_rate) if rescale else math.log1p(2.0 * (steps - 1.0) * max_rate)


def _enclosing(
    none: list[float],
    full: list[float],
    breaks: Sequence[float],
    at: Callable[[float], list[float]],
    spent: Callable[[Sequence[float]], float],
    budget: float,
) -> tuple[list[float], list[float]]:
    """The rates at two neighbouring values of ``breaks``, or before or after all, between which the budget is spent."""
    low, high, below, above = none, full, -1, len(breaks)
    while above - below > 1:
        middle = (below + above) // 2
        rates = at(breaks[middle])
        if spent(rates) <= budget:
            low, below = rates, middle
        else:
            high, above = rates, middle
    return low, high


def _check_values(what: str, values: Sequence[float]) -> None:
    for index, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(
                f"The {what} of branch {index} is {value!r}, but must be a finite number of at least 0. Check how it was "
                "measured, or leave the branch out."
            )


def _check_lengths(first: str, count: int, second: str, other: int) -> None:
    if count != other:
        raise ValueError(f"There are {count} {first} and {other} {second}, but each branch needs one of both.")


def _check_horizon(horizon: float) -> None:
    if not horizon >= 1.0:
        raise ValueError(
            f"horizon is {horizon!r}, but must be at least 1: the number of steps over which the error is averaged. "
            "The default is 10."
        )
