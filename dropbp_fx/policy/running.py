"""A running estimate of the branches' sensitivities, from what ordinary steps compute anyway.

The exact measure (:meth:`DropBPBackend.calibrate`) needs a backward for every branch. Its terms can be estimated from one
step's own backward. For a branch i that the step keeps, with G_i the squared norm of its parameters' gradients, a the
gradient that arrives at its residual add and b = a + (what comes back through the branch) the one that goes on below it:

* its own parameters lose G_i altogether;
* everything below sees the gradient a instead of b. To first order all gradients below change in proportion, so their
  norms change by the factor ||a|| / ||b|| ("gradnorm"), and the gradients themselves by ||b - a|| / ||b|| ("gradient"):

    gradnorm:  s_i = G_i + (1 - ||a|| / ||b||)^2  sum_{k below i} G_k
    gradient:  s_i = G_i + (||b - a|| / ||b||)^2  sum_{k below i} G_k

Estimates are exponential moving averages over the steps that kept the branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dropbp_fx.policy.sensitivity import Metric


@dataclasses.dataclass(frozen=True)
class Observed:
    """What one step showed of one branch.

    Attributes:
        own: squared norm of the gradients of its parameters.
        ratio: ||a|| / ||b||, ``None`` where the region does not show it.
        change: ||b - a|| / ||b||.
    """

    own: float
    ratio: float | None = None
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
        return self.total / self.weight if self.weight else 0.0


class RunningSensitivity:
    """Averages what steps show, and estimates sensitivities from it.

    Args:
        decay: share of the old average that an observation leaves in place.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self._averages: dict[tuple[str, str], _Average] = {}
        self._stem = _Average()

    def observe(self, branches: Mapping[str, Observed], stem: float) -> None:
        """Take note of a step.

        Args:
            branches: what it showed of the branches it kept, by name.
            stem: squared norm of the gradients of parameters before the first branch.
        """
        self._stem.add(stem, self._decay)
        for name, observed in branches.items():
            for field in ("own", "ratio", "change"):
                value = getattr(observed, field)
                if value is not None:
                    self._averages.setdefault((name, field), _Average()).add(value, self._decay)

    def estimate(self, names: list[str], metric: Metric = "gradnorm") -> dict[str, float] | None:
        """Sensitivities of the branches ``names``, in execution order; ``None`` before each was kept in some step."""
        if any((name, "own") not in self._averages for name in names):
            return None
        below = self._stem.value
        found: dict[str, float] = {}
        for name in names:
            own = self._averages[name, "own"].value
            ratio, change = self._averages.get((name, "ratio")), self._averages.get((name, "change"))
            if metric == "gradnorm":
                factor = 0.0 if ratio is None else (1 - ratio.value) ** 2
            else:
                factor = 0.0 if change is None else change.value**2
            found[name] = own + factor * below
            below += own
        return found

    def state_dict(self) -> dict[str, Any]:
        """The averages in plain Python types."""
        return {
            "stem": [self._stem.total, self._stem.weight],
            "averages": [[name, field, a.total, a.weight] for (name, field), a in self._averages.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from averages that :meth:`state_dict` returned."""
        self._stem = _Average(*state["stem"])
        self._averages = {(name, field): _Average(*rest) for name, field, *rest in state["averages"]}
