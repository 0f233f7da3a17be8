"""How the drop rate changes over a run: functions from progress, 0 at the start and 1 at the end, to a rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from dropbp_fx.values import as_float, checked_number, shown, takes

#: From progress in [0, 1] to the drop rate of the whole model, in [0, 1).
RateSchedule = Callable[[float], float]

ScheduleName = Literal["constant", "ramp_up", "ramp_down", "step", "late_ramp"]
_NAMES: tuple[str, ...] = get_args(ScheduleName)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A straight line from ``start`` to ``end``.

    Raises:
        TypeError, ValueError: one of them is no finite number.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        for field in ("start", "end"):
            object.__setattr__(self, field, _finite(f"Ramp.{field}", getattr(self, field)))

    def __call__(self, progress: float) -> float:
        """The rate at ``progress``."""
        return self.start + (self.end - self.start) * progress


@dataclasses.dataclass(frozen=True)
class LateRamp:
    """Nothing until ``begin``, a progress in [0, 1), then a straight line to ``end``, the rate at the end of the run.

    Raises:
        TypeError, ValueError: one of them is no finite number, or ``begin`` is out of range.
    """

    begin: float
    end: float

    def __post_init__(self) -> None:
        begin, end = _finite("LateRamp.begin", self.begin), _finite("LateRamp.end", self.end)
        if not 0 <= begin < 1:
            raise ValueError(
                f"begin must be in [0, 1), not {shown(self.begin)}: it is the share of the run that is done when the ramp "
                "begins."
            )
        object.__setattr__(self, "begin", begin)
        object.__setattr__(self, "end", end)

    def __call__(self, progress: float) -> float:
        """The rate at ``progress``."""
        return self.end * max(progress - self.begin, 0.0) / (1.0 - self.begin)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Constant pieces: ``rates`` are pairs (progress from which it holds, rate); the rate before the first is 0.

    Raises:
        TypeError, ValueError: they are no pairs of finite numbers, or a rate is not in [0, 1).
    """

    rates: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rates, (list, tuple)) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in self.rates
        ):
            raise TypeError(
                f"Steps takes pairs (progress from which it holds, rate), such as ((0.5, 0.2), (0.9, 0.7)), not "
                f"{shown(self.rates)}."
            )
        pairs = tuple((_finite("A progress in Steps", at), _finite("A rate in Steps", rate)) for at, rate in self.rates)
        for _, rate in pairs:
            if not 0 <= rate < 1:
                raise ValueError(f"A rate in Steps must be in [0, 1), not {shown(rate)}.")
        object.__setattr__(self, "rates", pairs)

    def __call__(self, progress: float) -> float:
        """The rate at ``progress``."""
        return max((pair for pair in self.rates if pair[0] <= progress), default=(0.0, 0.0))[1]


def rate_schedule(schedule: ScheduleName | RateSchedule, rate: float, max_rate: float) -> RateSchedule:
    """The function behind a schedule's name.

    ``"constant"`` is ``rate`` throughout. The others average ``rate`` as long as ``max_rate`` leaves them room:
    ``"ramp_up"`` climbs from 0 to 2 ``rate``, ``"ramp_down"`` falls from there to 0, ``"step"`` drops nothing in the first
    half of the run and 2 ``rate`` in the second, "late_ramp" nothing at first and then climbs to ``max_rate``: from where it
    must begin for the mean to be ``rate``, or, where that is before the run, from a rate above 0.
    """
    if not isinstance(schedule, str):
        return schedule
    if schedule == "late_ramp":
        begin = 1.0 - 2.0 * rate / max_rate
        if begin == 1.0:
            return Ramp(0.0, 0.0)
        return LateRamp(begin, max_rate) if begin >= 0.0 else Ramp(min(2.0 * rate - max_rate, max_rate), max_rate)
    top = min(2 * rate, max_rate)
    return {"constant": Ramp(rate, rate), "ramp_up": Ramp(0.0, top), "ramp_down": Ramp(top, 0.0)}.get(
        schedule, Steps(((0.5, top),))
    )


def checked_schedule(schedule: Any) -> ScheduleName | RateSchedule:
    """A schedule's name, or a function that gives rates at the start, in the middle and at the end.

    Raises:
        TypeError: neither a name nor callable, or its values are no numbers.
        ValueError: an unknown name, or a value out of range.
    """
    if isinstance(schedule, str):
        if schedule not in _NAMES:
            raise ValueError(
                f"There is no schedule named {schedule!r}; the names are {', '.join(map(repr, _NAMES))}. Pass one of them, "
                "or a function from progress (0 to 1) to a rate."
            )
        return schedule  # type: ignore[return-value]
    if isinstance(schedule, type):
        raise TypeError(
            f"schedule is the class {schedule.__name__}, but must be an instance of it: pass {schedule.__name__}(...)."
        )
    if not callable(schedule):
        raise TypeError(
            f"schedule must be one of {', '.join(map(repr, _NAMES))}, or a function from progress (0 to 1) to a rate, not "
            f"{shown(schedule)}."
        )
    if not takes(schedule, 0.0):
        raise TypeError(
            f"The schedule {shown(schedule)} cannot be called with one number; it must be a function from progress (0 to 1) "
            "to a rate."
        )
    for progress in (0.0, 0.5, 1.0):
        checked_scheduled_rate(schedule(progress), progress)
    return schedule  # type: ignore[no-any-return]


def checked_scheduled_rate(rate: Any, progress: float) -> float:
    """What a schedule returned, as a rate.

    Raises:
        TypeError: it is no number.
        ValueError: it is not in [0, 1).
    """
    number = as_float(rate)
    if number is None:
        raise TypeError(
            f"The schedule returned {shown(rate)} at progress {progress:g}; it must return a rate in [0, 1), a number."
        )
    if not 0 <= number < 1:
        raise ValueError(f"The schedule returned {shown(rate)} at progress {progress:g}; a rate must be in [0, 1).")
    return number


def checked_progress(progress: Any) -> float:
    """``progress`` as a float in [0, 1].

    Raises:
        TypeError, ValueError: it is none.
    """
    meaning = "it is the share of the run that is done, such as step / total"
    return checked_number("progress", progress, low=0, high=1, includes="both", meaning=meaning)


def _finite(what: str, value: Any) -> float:
    number = as_float(value)
    if number is None:
        raise TypeError(f"{what} must be a number, not {shown(value)}.")
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number, not {shown(value)}.")
    return number
