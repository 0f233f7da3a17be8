"""How much each branch contributes to the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from tabulate import tabulate

from dropbp_fx.values import checked_count, shown

Metric = Literal["gradnorm", "gradient"]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What dropping each branch, alone, changes in the parameter gradients.

    Attributes:
        names: the branches, in the order of ``backend.branches``.
        values: one figure a branch, averaged over the batches; 0 for a branch no gradient reaches.
        metric: "gradnorm", the sum over parameters of (||g|| - ||g_i||)^2 with g the gradient and g_i the gradient without
            branch i (Woo et al., NeurIPS 2024, the memory-saving form of section 3.2), or "gradient", the sum of
            ||g - g_i||^2.
        batches: how many steps were averaged.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]
    metric: Metric
    batches: int

    def __post_init__(self) -> None:
        """Refuse what no rates can be made from."""
        for name, value in zip(self.names, self.values, strict=True):
            if not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"The sensitivity of {name!r} is {value}: a loss or gradient was not finite. Calibrate on steps whose "
                    "gradients are finite (with fp16, scale the loss down)."
                )

    def __str__(self) -> str:
        """A table of the branches."""
        total = math.fsum(self.values) or 1.0
        rows = [(name, value, value / total) for name, value in zip(self.names, self.values, strict=True)]
        return tabulate(rows, ("branch", f"sensitivity ({self.metric})", "share"), floatfmt=("", ".3e", ".1%"))

    @classmethod
    def mean(cls, samples: Sequence[Sensitivity]) -> Sensitivity:
        """The average of samples of equal branches, each counting as often as it has batches."""
        batches = sum(sample.batches for sample in samples)
        values = tuple(
            math.fsum(sample.values[i] * sample.batches for sample in samples) / batches
            for i in range(len(samples[0].values))
        )
        return cls(samples[0].names, values, samples[0].metric, batches)


def check_calibration(metric: Any, batches: Any) -> None:
    """Refuse what is no metric, and no number of batches.

    Raises:
        TypeError, ValueError: what is wrong, and what would do.
    """
    if not isinstance(metric, str) or metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {', '.join(map(repr, get_args(Metric)))}, not {shown(metric)}.")
    checked_count("batches", batches, least=1, meaning=": there is nothing to measure without a step")
