"""What the baseline, training without dropping, reaches in the same time: the one fair comparison where time is scarce."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from benchmarks.measure import Record

#: Times that differ by less, as a share, count as the same.
_SAME_TIME = 0.02


@dataclasses.dataclass(frozen=True)
class Result:
    """A method's runs at its best learning rate.

    Attributes:
        losses: held-out losses, one a seed: the mean of its runs, should there be several.
        time: of a run, as a share of that of "none" with all steps: measured, or by FLOPs. ``None`` where it was measured on
            a machine on which "none" was not.
        memory: peak of a step above what was held before it, as a share of that of "none"; ``None`` on a CPU.
        step_ms: a step's time, ``None`` where FLOPs stand for it.
        flops: of a run, as a share of those of "none".
    """

    method: str
    rate: float
    share: float
    lr: float
    losses: tuple[float, ...]
    time: float | None
    memory: float | None
    step_ms: float | None
    flops: float

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, ``None`` of a single one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


class Frontier:
    """Held-out loss of training without dropping as a function of time: runs with schedules of their own at each length."""

    def __init__(self, results: Iterable[Result]) -> None:
        points = sorted({result.time: result.loss for result in results if result.time is not None}.items())
        self._times, self._losses = (np.array(column) for column in zip(*points, strict=True)) if points else ((), ())
        self._first = (1 - _SAME_TIME) * points[0][0] if points else 0.0  # the shortest time that a loss is given for
        self._curve = PchipInterpolator(self._times, self._losses) if len(points) > 1 else None

    def loss(self, time: float) -> float | None:
        """The loss reached in a time, ``None`` where that lies outside of the measured ones (by more than 2 %)."""
        if self._curve is None or not self._first <= time <= (1 + _SAME_TIME) * self._times[-1]:
            return None
        return float(self._curve(min(max(time, self._times[0]), self._times[-1])))

    def least_loss(self, time: float) -> float | None:
        """What the loss reached in a time shorter than all measured ones is above: that of the shortest one."""
        if self._curve is None or time >= self._first:
            return None
        return float(self._losses[0])

    def time(self, loss: float) -> float | None:
        """The shortest time in which a loss is reached, ``None`` where it is not reached or lies beyond."""
        if self._curve is None or not min(self._losses) <= loss <= self._losses[0]:
            return None
        below = next(i for i, value in enumerate(self._losses) if value <= loss)
        if below == 0:
            return float(self._times[0])
        early, late = self._times[below - 1], self._times[below]
        if self._curve(late) >= loss:  # a point of the curve itself, but for rounding
            return float(late)
        return float(brentq(lambda time: self._curve(time) - loss, early, late))


def results_by_task(records: Sequence[Record], *, by_flops: Container[str] = ()) -> Iterator[tuple[str, list[Result]]]:
    """Each task's name and :func:`results`, for those tasks that have a run of "none" to compare with.

    Args:
        records: of any kind.
        by_flops: sizes of whose runs FLOPs stand for time.
    """
    sizes = {record["task"]: record["size"] for record in records if record["measurement"] == "quality"}
    for task, size in sizes.items():
        found = results([record for record in records if record["task"] == task], by_flops=size in by_flops)
        if found:
            yield task, found


def results(records: Sequence[Record], *, by_flops: bool = False) -> list[Result]:
    """Of one task: for each method the runs at the learning rate that was best with the first seed.

    Args:
        records: of any kind; those of trainings count. Measured times compare within one "machine" only.
        by_flops: let FLOPs stand for time. On a CPU, whose small models are limited by the host, they always do.
    """
    good = [record for record in records if record["measurement"] == "quality" and "error" not in record]
    baseline = [r for r in good if r["method"] == "none" and r["share"] == 1.0]
    if not baseline:
        return []
    step_ms = {
        machine: statistics.median(record["step_ms"] for record in baseline if record.get("machine") == machine)
        for machine in {record.get("machine") for record in baseline}
    }
    steps = baseline[0]["steps"]
    memory = statistics.median(record["activation_gib"] for record in baseline)
    timed = memory > 0 and not by_flops
    found = []
    for key in dict.fromkeys((r["method"], r["rate"], r["share"]) for r in good):
        mine = [r for r in good if (r["method"], r["rate"], r["share"]) == key]
        tuning = [r for r in mine if r["seed"] == 0]
        if not tuning:
            continue
        first = min(tuning, key=lambda r: r["eval_loss"])
        best = [r for r in mine if r["lr"] == first["lr"]]
        comparable = [r for r in best if r.get("machine") in step_ms] if timed else []
        shares = [r["step_ms"] / step_ms[r.get("machine")] for r in comparable]
        length = first["steps"] / steps
        flops = statistics.median(r["flops_share"] for r in best) * length
        found.append(
            Result(
                *key,
                lr=first["lr"],
                losses=tuple(
                    statistics.fmean(r["eval_loss"] for r in best if r["seed"] == seed)
                    for seed in sorted({r["seed"] for r in best})
                ),
                time=(statistics.median(shares) * length if shares else None) if timed else flops,
                memory=statistics.median(r["activation_gib"] for r in best) / memory if memory else None,
                step_ms=statistics.median(r["step_ms"] for r in comparable) if comparable else None,
                flops=flops,
            )
        )
    return found
