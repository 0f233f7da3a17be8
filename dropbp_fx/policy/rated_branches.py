"""The branches of a backend as they are now: what can be dropped of them, what that saves, and the rate of each."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dropbp_fx.policy.branches import Branch, BranchTable
from dropbp_fx.policy.flops import BranchFlops
from dropbp_fx.policy.patterns import Pattern, frequencies
from dropbp_fx.policy.presence import PresentBranches
from dropbp_fx.policy.rates import Rates, check_attainable, without_unreached
from dropbp_fx.policy.schedules import RateSchedule, ScheduleName
from dropbp_fx.policy.units import Granularity, Unit, Units
from dropbp_fx.sensitivity.sensitivity import Sensitivity

#: A run whose schedule has not moved by this many forwards was probably never told of its progress.
_PROGRESS_EXPECTED_BY = 100


class RatedBranches:
    """Keeps every branch at the rate that is its due.

    Args:
        rates: how the branches get their rates.
        granularity: "branch" drops single branches; "layer" all branches of a layer together.
        pattern: which branches are dropped together.
        lock: held while anything changes.
    """

    def __init__(self, rates: Rates, granularity: Granularity, pattern: Pattern, lock: threading.RLock) -> None:
        self.table = BranchTable()
        self.present = PresentBranches(self.table)
        self.flops = BranchFlops(self.table)
        self.rates = rates
        self.granularity: Granularity = granularity
        self.pattern = pattern
        self.sensitivity: Sensitivity | None = None
        self.progress_told = False
        self._units = Units(granularity)
        self._scales: dict[int, float] | None = None  # by branch; forgotten, like the units, whenever a rate changes
        self._lock = lock

    # ---- what the user sets ----------------------------------------------------------------------------------------

    @property
    def rate(self) -> float:
        return self.rates.rate

    @rate.setter
    def rate(self, rate: float) -> None:
        """Give all branches one rate; rates that were set by hand are taken back."""
        check_attainable(rate, self.rates.allocation, self.rates.max_rate)
        self._change(rate=rate, by_hand={})

    def set_by_hand(self, by_hand: Mapping[str, float]) -> None:
        """Let these branches have rates of their own, and no others."""
        self._change(by_hand=by_hand)

    def reschedule(self, schedule: ScheduleName | RateSchedule) -> None:
        """Let the rate depend on progress in another way from now on."""
        self._change(schedule=schedule)

    @property
    def progress(self) -> float:
        return self.rates.progress

    @progress.setter
    def progress(self, progress: float) -> None:
        with self._lock:
            self._change(progress=progress)
            self.progress_told = True

    def set_sensitivities(self, sensitivity: Sensitivity) -> None:
        """Go by measured sensitivities from now on."""
        with self._lock:
            by_name = dict(zip(sensitivity.names, sensitivity.values, strict=True))
            known, measured = without_unreached(tuple(self.table), by_name, sensitivity)
            self._change(sensitivities=known)
            self.sensitivity = measured

    def expect_progress(self, rounds: int) -> None:
        """Warn once, where a schedule is never told of the run's progress."""
        schedule = self.rates.schedule
        if schedule != "constant" and not self.progress_told and rounds == _PROGRESS_EXPECTED_BY:
            warnings.warn(
                f"The schedule {schedule!r} has stayed at progress 0 for {_PROGRESS_EXPECTED_BY} forwards. Set "
                "backend.progress = step / total_steps in the training loop; the backend of a name is dropbp_fx.current().",
                stacklevel=2,
            )

    # ---- what graphs show ------------------------------------------------------------------------------------------

    def record_flops(self, index: int, backward_flops: int, *, trainable: bool) -> None:
        """Take note of what dropping a branch saves where it is trainable, or where it is not, unless that is known."""
        with self._lock:
            self.flops.record(index, backward_flops, trainable=trainable)

    def facts_changed(self) -> None:
        """Rates, units and scales are those of what can be dropped now."""
        with self._lock:
            self.flops.update_branches()
            known, self.sensitivity = without_unreached(tuple(self.table), self.rates.sensitivities, self.sensitivity)
            self._change(sensitivities=known)

    def assign(self) -> None:
        """Give every branch the rate that is its due now."""
        self._change()

    def become(
        self,
        branches: Sequence[Branch],
        rates: Rates,
        of_branches: Sequence[float],
        sensitivity: Sensitivity | None,
    ) -> None:
        """Hold exactly these, whose rates by ``rates`` are ``of_branches``."""
        with self._lock:
            self.sensitivity = sensitivity
            self.table.become(branches)
            self.flops.take_over(branch for branch in branches if branch.backward_flops)
            self.present.version += 1
            self._set_rates(rates, of_branches)

    def _change(self, **fields: Any) -> None:
        """Change these ``fields`` of the rates, and give every branch the rate that is then its due.

        Raises:
            TypeError, ValueError: there is none; then nothing has changed.
        """
        with self._lock:
            rates = dataclasses.replace(self.rates, **fields)
            self._set_rates(rates, rates.of(tuple(self.table)))

    def _set_rates(self, rates: Rates, of_branches: Sequence[float]) -> None:
        self.rates = rates
        for branch, rate in zip(self.table, of_branches, strict=True):
            branch.rate = rate
        self._scales = None
        self._units.forget()

    # ---- what patterns are sampled by ------------------------------------------------------------------------------

    def units(self, branches: Iterable[Branch]) -> list[tuple[Unit, list[int]]]:
        """What can be dropped of these branches as a whole, with the indices of each unit's branches."""
        return self._units.of([branch for branch in branches if branch.droppable])

    def scale(self, index: int) -> float:
        """1 / (1 - how often the branch is dropped): kept gradients times this are right on average."""
        if self._scales is None:
            often = self._frequencies()
            self._scales = {index: 1.0 / (1.0 - share) if share < 1 else 1.0 for index, share in often.items()}
        return self._scales.get(index, 1.0)

    def attainable_rate(self) -> float:
        """The share of droppable branches that the pattern drops in the long run."""
        often = self._frequencies()
        return sum(often.values()) / len(often) if often else 0.0

    def _frequencies(self) -> dict[int, float]:
        """How often the pattern drops each branch that is droppable now, by index."""
        found: dict[int, float] = {}
        for model in self.table.models:
            groups = self.units(self.table.of(model))
            often = frequencies(self.pattern, [unit for unit, _ in groups])
            found |= {index: share for share, (_, indices) in zip(often, groups, strict=True) for index in indices}
        return found
