"""The drop rate of every branch: asked for, scheduled, allocated by sensitivity, or set by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal

from dropbp_fx.policy.allocation import allocate
from dropbp_fx.policy.branches import Branch, BranchTable, unknown_name
from dropbp_fx.policy.ramps import RateSchedule, checked_scheduled_rate, rate_schedule

Allocation = Literal["uniform", "sensitivity"]


class Rates:
    """Settles the rate of every branch whenever something it depends on has changed.

    Args:
        rate: the drop rate of the whole model, in [0, 1).
        allocation: "uniform" gives every branch the model's rate; "sensitivity" shares the model's backward FLOPs out by
            :func:`~dropbp_fx.policy.allocation.allocate`, as soon as sensitivities are known.
        schedule: how the model's rate depends on progress.
        max_rate: no allocated or scheduled rate is higher.
        rescale: gradients of kept branches are rescaled, which changes what allocation minimises.
    """

    def __init__(
        self,
        rate: float,
        *,
        allocation: Allocation = "uniform",
        schedule: str | RateSchedule = "constant",
        max_rate: float = 0.95,
        rescale: bool = False,
    ) -> None:
        self._rate = rate
        self.allocation = allocation
        self.schedule = schedule
        self.max_rate = max_rate
        self.rescale = rescale
        self.progress = 0.0
        self.by_hand: dict[str, float] = {}
        self.sensitivities: dict[str, float] = {}

    @property
    def rate(self) -> float:
        """The model's rate as it was asked for; setting it takes back rates that were set by hand."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate = rate
        self.by_hand.clear()

    @property
    def current(self) -> float:
        """The model's rate at this point of the run."""
        if self.schedule == "constant":
            return self._rate
        return checked_scheduled_rate(
            rate_schedule(self.schedule, self._rate, self.max_rate)(self.progress), self.progress
        )

    def assign(self, branches: Sequence[Branch]) -> None:
        """Give every branch its rate."""
        current = self.current
        rates = dict.fromkeys((branch.name for branch in branches), current)
        if self.allocation == "sensitivity":
            for shares in self._shares(branches):
                allocated = allocate(
                    [self.sensitivities[branch.name] for branch in shares],
                    [float(branch.backward_flops) for branch in shares],
                    min(current, self.max_rate),
                    max_rate=self.max_rate,
                    rescale=self.rescale,
                )
                rates.update(zip((branch.name for branch in shares), allocated, strict=True))
        factor = current / self._rate if self._rate else 1.0
        for branch in branches:
            by_hand = self.by_hand.get(branch.name)
            branch.rate = rates[branch.name] if by_hand is None else min(by_hand * factor, max(self.max_rate, by_hand))

    def _shares(self, branches: Sequence[Branch]) -> Iterable[list[Branch]]:
        """The branches that share out a model's budget: a branch that was never measured has the model's rate."""
        models: dict[int, list[Branch]] = {}
        for branch in branches:
            if branch.droppable and branch.name in self.sensitivities:
                models.setdefault(branch.model, []).append(branch)
        return models.values()


class RateView(MutableMapping[str, float]):
    """The branches' rates by name, in execution order; what is set takes effect at the next forward.

    ``rates[name] = 0.3`` sets one by hand; it then no longer follows the model's rate or an allocation, but still a
    schedule, in proportion. ``del rates[name]`` gives it back.
    """

    def __init__(self, table: BranchTable, rates: Rates, changed: Any, check: Any) -> None:
        self._table = table
        self._rates = rates
        self._changed = changed
        self._check = check

    def __getitem__(self, name: str) -> float:
        return self._branch(name).rate

    def __setitem__(self, name: str, rate: float) -> None:
        self._rates.by_hand[self._branch(name).name] = self._check(rate)
        self._changed()

    def __delitem__(self, name: str) -> None:
        self._rates.by_hand.pop(self._branch(name).name, None)
        self._changed()

    def __iter__(self) -> Iterator[str]:
        return (branch.name for branch in self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return repr(dict(self))

    def replace(self, rates: Mapping[str, float]) -> None:
        """Set several, all or none of them."""
        checked = {self._branch(name).name: self._check(rate) for name, rate in rates.items()}
        self._rates.by_hand.update(checked)
        self._changed()

    def _branch(self, name: str) -> Branch:
        branch = self._table.named(name)
        if branch is None:
            if not len(self._table):
                raise KeyError(
                    f"There is no branch named {name!r} yet: branches are found when the model first runs. Set rates after "
                    "the first forward."
                )
            raise KeyError(unknown_name(name, [known.name for known in self._table]))
        return branch
