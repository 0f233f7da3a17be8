"""Patterns that a policy would sample, for predictions. The one place of this package that calls the policy."""

from __future__ import annotations

import random
from collections.abc import Iterable

from dropbp_fx.policy.branches import Branch
from dropbp_fx.policy.patterns import Pattern, checked_sample
from dropbp_fx.policy.units import Granularity, units_of


def sample_patterns(
    branches: Iterable[Branch], pattern: Pattern, granularity: Granularity, count: int
) -> tuple[frozenset[int], ...]:
    """``count`` samples of ``pattern``, as sets of branch indices; the same ones at every call.

    Args:
        branches: the droppable branches, in the order of execution, with the rates to drop them at.
        pattern: what chooses among them.
        granularity: what is dropped as a whole.
        count: how many samples.
    """
    units, members = zip(*units_of(branches, granularity), strict=True) if branches else ((), ())
    rng = random.Random(0)
    sampled = (checked_sample(pattern, units, rng, keep_one=True) for _ in range(count))
    return tuple(frozenset(index for unit in chosen for index in members[unit]) for chosen in sampled)
