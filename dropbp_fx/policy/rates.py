"""The drop rate of every branch: asked for, scheduled, allocated by sensitivity, or set by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal

from dropbp_fx.policy.allocation import allocate
from dropbp_fx.policy.branches import Branch, BranchTable, unknown_name
from dropbp_fx.policy.schedules import RateSchedule, ScheduleName, checked_scheduled_rate, rate_schedule
from dropbp_fx.sensitivity.sensitivity import Sensitivity
from dropbp_fx.values import shown

Allocation = Literal["uniform", "sensitivity"]


@dataclasses.dataclass(frozen=True)
class Rates:
    """Computes the rates of branches. To change something, make another one, and compute by it before going by it.

    Attributes:
        rate: the drop rate of the whole model, in [0, 1), as it was asked for.
        allocation: "uniform" gives every branch the model's rate; "sensitivity" shares the model's backward FLOPs out by
            :func:`~dropbp_fx.policy.allocation.allocate`, as soon as sensitivities are known.
        schedule: how the model's rate depends on progress.
        max_rate: no allocated or scheduled rate is higher.
        rescale: gradients of kept branches are rescaled, which changes what allocation minimises.
        progress: share of the run that is done.
        by_hand: rates set by hand, by branch.
        sensitivities: by branch, once they are known.
    """

    rate: float
    allocation: Allocation = "uniform"
    schedule: ScheduleName | RateSchedule = "constant"
    max_rate: float = 0.95
    rescale: bool = False
    progress: float = 0.0
    by_hand: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sensitivities: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def current(self) -> float:
        """The model's rate at this point of the run."""
        if self.schedule == "constant":
            return self.rate
        return checked_scheduled_rate(
            rate_schedule(self.schedule, self.rate, self.max_rate)(self.progress), self.progress
        )

    def of(self, branches: Sequence[Branch]) -> list[float]:
        """The rate that is each branch's due.

        Raises:
            TypeError, ValueError: the schedule gives no rate at this progress.
        """
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
        factor = current / self.rate if self.rate else 1.0
        for name, by_hand in self.by_hand.items():
            if name in rates:
                rates[name] = min(by_hand * factor, max(self.max_rate, by_hand))
        return [rates[branch.name] for branch in branches]

    def _shares(self, branches: Sequence[Branch]) -> Iterable[list[Branch]]:
        """The branches that share out a model's budget: a branch that was never measured has the model's rate."""
        models: dict[int, list[Branch]] = {}
        for branch in branches:
            if branch.droppable and branch.name in self.sensitivities:
                models.setdefault(branch.model, []).append(branch)
        return models.values()


def check_attainable(rate: float, allocation: str, max_rate: float) -> None:
    """Refuse a rate that allocation by sensitivity cannot give.

    Raises:
        ValueError: it is above the highest rate of a branch.
    """
    if allocation == "sensitivity" and rate > max_rate:
        raise ValueError(
            f"With allocation='sensitivity' the rate cannot be above max_rate, but rate={rate} and max_rate={max_rate}: "
            "no allocation meets it. Lower the rate or raise max_rate."
        )


class RateView(MutableMapping[str, float]):
    """The branches' rates by name, in execution order; what is set takes effect at the next forward.

    ``rates[name] = 0.3`` sets one by hand; it then no longer follows the model's rate or an allocation, but still a
    schedule, in proportion. ``del rates[name]`` gives it back.
    """

    def __init__(
        self,
        table: BranchTable,
        by_hand: Callable[[], Mapping[str, float]],
        set_by_hand: Callable[[Mapping[str, float]], None],
        check: Callable[[Any], float],
    ) -> None:
        self._table = table
        self._by_hand = by_hand
        self._set_by_hand = set_by_hand
        self._check = check

    def __getitem__(self, name: str) -> float:
        return self._branch(name).rate

    def __setitem__(self, name: str, rate: float) -> None:
        self.replace({self._branch(name).name: rate})

    def __delitem__(self, name: str) -> None:
        name = self._branch(name).name
        self._set_by_hand({known: rate for known, rate in self._by_hand().items() if known != name})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._table.named(name) is not None

    def __iter__(self) -> Iterator[str]:
        return (branch.name for branch in self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return repr(dict(self))

    def replace(self, rates: Mapping[str, float]) -> None:
        """Set several, all or none of them."""
        if not isinstance(rates, Mapping):
            raise TypeError(
                f"rates must map names of branches to rates, not {shown(rates)}. To give every branch one rate, set "
                "backend.rate."
            )
        checked = {self._branch(name).name: self._check(rate) for name, rate in rates.items()}
        self._set_by_hand({**self._by_hand(), **checked})

    def update(self, other: Any = (), /, **rates: Any) -> None:
        """Set several, all or none of them."""
        try:
            several = dict(other, **rates)
        except (TypeError, ValueError):
            raise TypeError(f"rates must map names of branches to rates, not {shown(other)}.") from None
        self.replace(several)

    def clear(self) -> None:
        """Give back all rates that were set by hand; the branches stay."""
        self._set_by_hand({})

    def _branch(self, name: str) -> Branch:
        branch = self._table.named(name) if isinstance(name, str) else None
        if branch is None:
            if not len(self._table):
                raise KeyError(
                    f"There is no branch named {shown(name)} yet: branches are found when the model first runs. Set rates "
                    "after the first forward."
                )
            if not isinstance(name, str):
                raise KeyError(
                    f"There is no branch named {shown(name)}: rates go by the names of branches, which are strings, such as "
                    f"{self._table[0].name!r}. See backend.branches."
                )
            raise KeyError(unknown_name(name, [known.name for known in self._table]))
        return branch


def without_unreached(
    branches: Sequence[Branch], known: Mapping[str, float], measured: Sensitivity | None
) -> tuple[dict[str, float], Sensitivity | None]:
    """Known and measured sensitivities without those that say nothing: that of a branch that no gradient reaches is 0, which
    tells nothing of it once a gradient does.
    """
    left = dict(known)
    for branch in branches:
        if not branch.droppable and left.get(branch.name) == 0:
            del left[branch.name]
    if measured is not None:
        left_out = {branch.name for branch in branches if branch.droppable and branch.name not in left}
        if not left_out.isdisjoint(measured.names):
            pairs = zip(measured.names, measured.values, strict=True)
            kept = [(name, value) for name, value in pairs if name not in left_out]
            names, values = zip(*kept, strict=True) if kept else ((), ())
            measured = dataclasses.replace(measured, names=names, values=values)
    return left, measured
