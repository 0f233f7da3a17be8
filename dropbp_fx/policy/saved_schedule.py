"""A schedule of rates in a saved state: its name, or the figures of a ramp. A function of the user's cannot be saved.

Of a function the state holds the name, for messages, and its rates at a few places of the run: a backend that goes on from
the state must have been given a function with these rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dropbp_fx.policy.schedules import (
    LateRamp,
    Ramp,
    RateSchedule,
    ScheduleName,
    Steps,
    checked_schedule,
    checked_scheduled_rate,
)
from dropbp_fx.values import as_float, shown

_KINDS = {"Ramp": Ramp, "LateRamp": LateRamp, "Steps": Steps}
_PLACES = tuple(k / 10 for k in range(11))


def schedule_as_data(schedule: ScheduleName | RateSchedule) -> Any:
    """``schedule`` in plain Python types."""
    if isinstance(schedule, str):
        return schedule
    if type(schedule) is Steps:
        return {"kind": "Steps", "rates": [list(pair) for pair in schedule.rates]}
    if type(schedule) in (Ramp, LateRamp):
        return {"kind": type(schedule).__name__, **dataclasses.asdict(schedule)}  # type: ignore[call-overload]
    return {"kind": "function", "name": _name_of(schedule), "rates": _rates_of(schedule)}


def restored_schedule(data: Any, present: ScheduleName | RateSchedule) -> ScheduleName | RateSchedule:
    """The schedule that ``data`` was made from.

    Args:
        data: what :func:`schedule_as_data` returned.
        present: the schedule of the backend that is to go on with it, which must be the function if it was one.

    Raises:
        TypeError, ValueError: ``data`` is no schedule, or a function, and ``present`` is not that one.
    """
    if isinstance(data, str):
        return _made(lambda: checked_schedule(data))
    if not isinstance(data, Mapping):
        raise TypeError(
            f"The state's 'schedule' must be a schedule's name or figures, not {shown(data)}. Pass what state_dict() "
            "returned."
        )
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in (*_KINDS, "function"):
        raise ValueError(
            f"The state's 'schedule' must be of the kind 'Ramp', 'LateRamp', 'Steps' or 'function', not {shown(kind)}. Pass "
            "what state_dict() returned."
        )
    fields = ("name", "rates") if kind == "function" else tuple(f.name for f in dataclasses.fields(_KINDS[kind]))
    odd = set(data) ^ {"kind", *fields}
    if odd:
        raise ValueError(
            f"The state's 'schedule' of the kind {kind!r} must have the entries {', '.join(map(repr, fields))}; it lacks, "
            f"or has beside them, {', '.join(sorted(map(shown, odd)))}. Pass what state_dict() returned."
        )
    if kind != "function":
        return _made(lambda: _KINDS[kind](**{field: data[field] for field in fields}))
    _check_function(data["name"], data["rates"], present)
    return present


def _made(make: Callable[[], ScheduleName | RateSchedule]) -> ScheduleName | RateSchedule:
    try:
        return checked_schedule(make())
    except (TypeError, ValueError) as error:
        raise type(error)(f"The state's 'schedule' is none: {error}") from None


def _check_function(name: Any, rates: Any, present: ScheduleName | RateSchedule) -> None:
    if not isinstance(name, str):
        raise TypeError(f"The state's 'schedule' must have the name of a function, not {shown(name)}.")
    if (
        not isinstance(rates, (list, tuple))
        or len(rates) != len(_PLACES)
        or not all(rate is None or as_float(rate) is not None for rate in rates)
    ):
        raise ValueError(f"The state's 'schedule' must have {len(_PLACES)} rates of a function, not {shown(rates)}.")
    remedy = (
        "A function cannot be saved: pass it to dropbp_backend as schedule=, or set backend.schedule to it, before "
        "load_state_dict()."
    )
    data = schedule_as_data(present)
    if isinstance(data, str) or data["kind"] != "function":
        raise ValueError(
            f"The state was saved with the schedule {name}, a function; this backend has the schedule {shown(present)}. "
            f"{remedy}"
        )
    differing = next((k for k, (a, b) in enumerate(zip(rates, data["rates"], strict=True)) if a != b), None)
    if differing is not None:
        raise ValueError(
            f"The state was saved with the schedule {name}, a function that returns {shown(rates[differing])} at progress "
            f"{_PLACES[differing]:g}; this backend's schedule {data['name']} returns {shown(data['rates'][differing])} "
            f"there. {remedy}"
        )


def _rates_of(schedule: RateSchedule) -> list[float | None]:
    """What the function returns at a few places; ``None`` where that is no rate."""
    found: list[float | None] = []
    for progress in _PLACES:
        try:
            found.append(checked_scheduled_rate(schedule(progress), progress))
        except Exception:  # a function of the user's own: whatever it raises, it gives no rate there
            found.append(None)
    return found


def _name_of(schedule: RateSchedule) -> str:
    name = getattr(schedule, "__qualname__", None)
    return name if isinstance(name, str) else shown(schedule)
