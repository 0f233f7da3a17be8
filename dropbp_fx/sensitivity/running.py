"""A running estimate of the branches' sensitivities, from what ordinary steps compute anyway.

The exact measure (:meth:`DropBPBackend.calibrate`) needs a backward for every branch. Its terms can be estimated from the
backwards of ordinary steps, whatever they drop and however large the loss of their batch is, because ratios depend on
neither. Where the gradient a arrives at the region of branch i and b leaves it for what lies below, let

* w_i = G_i / ||a||^2, where G_i is the squared norm of the gradients of the branch's own parameters;
* k_i = ||b|| / ||a|| when the branch is kept, and l_i the same when it is dropped (1 where the gradient then passes
  unchanged);
* c_i = ||b - a|| / ||b||, where it does.

From the top, where ||a|| = 1, down, an exact backward then arrives at each branch with ||a_i|| = product of the k above it,
and G_i = w_i ||a_i||^2. Dropping branch i takes G_i away and changes what all below receives; to first order gradients below
change in proportion, so their norms change by the factor l_i / k_i and the gradients themselves by c_i:

    gradnorm:  s_i = G_i + (1 - l_i / k_i)^2  sum_{j below i} G_j
    gradient:  s_i = G_i + c_i^2              sum_{j below i} G_j

All are in units of the squared gradient at the top. The ratios are exponential moving averages over the steps that show
them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from dropbp_fx.sensitivity.sensitivity import Metric


@dataclasses.dataclass(frozen=True)
class Observed:
    """What one step showed of one branch; ``None`` for what it did not.

    Attributes:
        own: w, squared norm of its parameters' gradients over that of the gradient arriving.
        kept: k, norm of the gradient leaving over that of the one arriving, with the branch kept.
        lost: l, the same with the branch dropped.
        change: c, norm of the difference of the two gradients over that of the one leaving.
    """

    own: float | None = None
    kept: float | None = None
    lost: float | None = None
    change: float | None = None


@dataclasses.dataclass
class _Average:
    """An exponential moving average without the bias of its start."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, decay: float) -> None:
        self.total = decay * self.total + (1 - decay) * value
        self.weight = decay * self.weight + (1 - decay)

    @property
    def value(self) -> float:
        return self.total / self.weight


@dataclasses.dataclass(frozen=True)
class SavedAverage:
    """One average of a state, of one field of :class:`Observed`; the stem's has no name.

    Raises:
        ValueError: no observations come to it.
    """

    name: str
    field: str
    total: float
    weight: float

    @property
    def is_of_stem(self) -> bool:
        """Whether it is of what lies before the branches of a model."""
        return self.name.partition("@")[0] == ""

    def __post_init__(self) -> None:
        fields = [field.name for field in dataclasses.fields(Observed)] if not self.is_of_stem else ["own"]
        if self.field not in fields:
            raise ValueError(
                f"The average of {self.name!r} must be of {' or '.join(map(repr, fields))}, not {self.field!r}."
            )
        if not (math.isfinite(self.total) and self.total >= 0):
            raise ValueError(f"The total of an average must be finite and at least 0, not {self.total}.")
        if not 0 < self.weight <= 1 + 1e-9:
            raise ValueError(f"The weight of an average must be in (0, 1], not {self.weight}.")


class RunningSensitivity:
    """Averages what steps show, and estimates sensitivities from it.

    Args:
        decay: share of the old average that an observation leaves in place.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self._averages: dict[tuple[str, str], _Average] = {}

    def observe(self, branches: Mapping[str, Observed], stem: float | None, stem_name: str = "") -> None:
        """Take note of a step.

        Args:
            branches: what it showed of branches, by name.
            stem: w of everything before the first branch, taken together.
            stem_name: tells the stems of several models apart.
        """
        for name, observed in {**branches, stem_name: Observed(own=stem)}.items():
            for field, value in dataclasses.asdict(observed).items():
                if value is not None and math.isfinite(value):  # under fp16 the gradients of a skipped step are not
                    self._averages.setdefault((name, field), _Average()).add(value, self._decay)

    def estimate(
        self, names: Sequence[str], metric: Metric = "gradient", stem_name: str = ""
    ) -> dict[str, float] | None:
        """Sensitivities of the branches ``names`` of one model, in execution order; ``None`` before each was kept in some
        step.
        """
        if any((name, "own") not in self._averages for name in names):
            return None
        arriving, own = 1.0, dict.fromkeys(names, 0.0)
        for name in reversed(names):
            own[name] = self._ratio(name, "own", 0.0) * arriving**2
            arriving *= self._ratio(name, "kept", 1.0)
        below = self._ratio(stem_name, "own", 0.0) * arriving**2
        found: dict[str, float] = {}
        for name in names:
            kept = self._ratio(name, "kept", 1.0)
            if metric == "gradnorm":
                effect = (1 - self._ratio(name, "lost", kept) / kept) ** 2 if kept else 1.0
            else:
                effect = self._ratio(name, "change", 0.0) ** 2
            found[name] = own[name] + effect * below
            below += own[name]
        return found

    def _ratio(self, name: str, field: str, otherwise: float) -> float:
        average = self._averages.get((name, field))
        return otherwise if average is None else average.value

    def averages(self) -> tuple[SavedAverage, ...]:
        """The averages, to go on from."""
        return tuple(SavedAverage(name, field, a.total, a.weight) for (name, field), a in self._averages.items())

    def load(self, averages: Sequence[SavedAverage]) -> None:
        """Go on from these averages, and no others."""
        self._averages = {(a.name, a.field): _Average(a.total, a.weight) for a in averages}
