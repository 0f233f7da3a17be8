"""The saved state of a backend's policy: read whole, or refused in a sentence, before anything goes by it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, get_args

from dropbp_fx.policy.branches import Branch
from dropbp_fx.policy.saved_schedule import restored_schedule, schedule_as_data
from dropbp_fx.policy.schedules import RateSchedule, ScheduleName
from dropbp_fx.policy.units import Granularity
from dropbp_fx.sensitivity.running import SavedAverage
from dropbp_fx.sensitivity.sensitivity import Metric, Sensitivity
from dropbp_fx.values import LARGEST_COUNT, SEED_BITS, as_float, as_int, shown

STATE_VERSION = 3
_REMEDY = "Pass what state_dict() returned, unchanged."


@dataclasses.dataclass(frozen=True)
class SavedState:
    """Everything that later patterns depend on, apart from the backend's configuration.

    Attributes:
        rate: the model's rate.
        progress: share of the run that is done.
        schedule: how the rate depends on it.
        rates_by_hand: by branch.
        sensitivity: what rates are allocated by.
        running: averages that a running estimate is made from.
        reallocated: the round at which rates were last re-allocated.
        granularity: of the backend.
        seed: ``None`` before the first pattern, if none was given.
        rounds: how many were sampled.
        forwards: how many there were.
        branches: in the order of their indices.
    """

    rate: float
    progress: float
    schedule: ScheduleName | RateSchedule
    rates_by_hand: Mapping[str, float]
    sensitivity: Sensitivity | None
    running: Sequence[SavedAverage]
    reallocated: int
    granularity: Granularity
    seed: int | None
    rounds: int
    forwards: int
    branches: Sequence[Branch]

    def as_dict(self) -> dict[str, Any]:
        """The state in plain Python types, which JSON and ``torch.load(weights_only=True)`` hold exactly."""
        measured = self.sensitivity
        return {
            "version": STATE_VERSION,
            "rate": self.rate,
            "progress": self.progress,
            "schedule": schedule_as_data(self.schedule),
            "rates_by_hand": dict(self.rates_by_hand),
            "sensitivity": None
            if measured is None
            else {
                "names": list(measured.names),
                "values": list(measured.values),
                "metric": measured.metric,
                "batches": measured.batches,
            },
            "running": [list(dataclasses.astuple(average)) for average in self.running],
            "reallocated": self.reallocated,
            "granularity": self.granularity,
            "seed": self.seed,
            "rounds": self.rounds,
            "forwards": self.forwards,
            "branches": [dataclasses.asdict(branch) for branch in self.branches],
        }

    @classmethod
    def parsed(cls, state: Any, present: ScheduleName | RateSchedule) -> SavedState:
        """The state that :meth:`as_dict` returned, perhaps by way of a file.

        Args:
            state: the state.
            present: the schedule of the backend that is to go on from it.

        Raises:
            TypeError: something in it is of another type.
            ValueError: something in it is missing, unknown, out of range, or does not go with the rest.
        """
        _check_entries(state)
        found = cls(
            rate=_rate("'rate'", state["rate"]),
            progress=_number("'progress'", state["progress"], "a number in [0, 1]", lambda x: 0 <= x <= 1),
            schedule=restored_schedule(state["schedule"], present),
            rates_by_hand={
                _text("'rates_by_hand'", name): _rate(f"'rates_by_hand' of {shown(name)}", rate)
                for name, rate in _mapping("'rates_by_hand'", state["rates_by_hand"]).items()
            },
            sensitivity=_sensitivity(state["sensitivity"]),
            running=_running(state["running"]),
            reallocated=_count("'reallocated'", state["reallocated"]),
            granularity=_name("'granularity'", state["granularity"], get_args(Granularity)),
            seed=None if state["seed"] is None else _whole("'seed'", state["seed"], "a whole number or None"),
            rounds=_count("'rounds'", state["rounds"]),
            forwards=_count("'forwards'", state["forwards"]),
            branches=tuple(
                _branch(index, record) for index, record in enumerate(_list("'branches'", state["branches"]))
            ),
        )
        found._check_together()
        return found

    @property
    def names(self) -> list[str]:
        """Of the branches."""
        return [branch.name for branch in self.branches]

    def _check_together(self) -> None:
        if self.reallocated > self.rounds:
            raise ValueError(
                f"The state's 'reallocated' must be at most its 'rounds', {self.rounds}, not {self.reallocated}. {_REMEDY}"
            )
        _check_distinct("'branches'", self.names)
        _check_known("'rates_by_hand'", self.rates_by_hand, self.names)
        _check_known("'running'", [average.name for average in self.running if not average.is_of_stem], self.names)
        if self.sensitivity is not None:
            _check_known("'sensitivity'", self.sensitivity.names, self.names)


def _check_entries(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"A state is the mapping that state_dict() returned, not {shown(state)}.")
    version = state.get("version")
    if as_int(version) != STATE_VERSION:
        raise ValueError(
            f"This is no state of a dropbp_fx backend of version {STATE_VERSION}: its version is {shown(version)}. Pass "
            "what state_dict() returned."
        )
    wanted = {"version", *(field.name for field in dataclasses.fields(SavedState))}
    _check_keys("The state", state, wanted)


def _check_keys(what: str, entries: Mapping[Any, Any], wanted: Collection[str]) -> None:
    missing = sorted(set(wanted) - set(entries))
    if missing:
        raise ValueError(f"{what} lacks {', '.join(map(repr, missing))}. Pass what state_dict() returned, whole.")
    unknown = sorted(shown(key) for key in set(entries) - set(wanted))
    if unknown:
        raise ValueError(f"{what} has an entry {unknown[0]}, which means nothing here. {_REMEDY}")


def _sensitivity(data: Any) -> Sensitivity | None:
    if data is None:
        return None
    entries = _mapping("'sensitivity'", data)
    _check_keys("The state's 'sensitivity'", entries, [field.name for field in dataclasses.fields(Sensitivity)])
    names = [_text("'sensitivity' names", name) for name in _list("'sensitivity' names", entries["names"])]
    values = [
        _number(f"'sensitivity' value {k}", value, "a finite number of at least 0", lambda x: 0 <= x < float("inf"))
        for k, value in enumerate(_list("'sensitivity' values", entries["values"]))
    ]
    if len(names) != len(values):
        raise ValueError(f"The state's 'sensitivity' has {len(names)} names and {len(values)} values. {_REMEDY}")
    _check_distinct("'sensitivity'", names)
    metric: Metric = _name("'sensitivity' metric", entries["metric"], get_args(Metric))
    batches = _count("'sensitivity' batches", entries["batches"])
    if not batches:
        raise ValueError(f"The state's 'sensitivity' batches must be at least 1, not 0. {_REMEDY}")
    return Sensitivity(tuple(names), tuple(values), metric, batches)


def _running(data: Any) -> tuple[SavedAverage, ...]:
    found: list[SavedAverage] = []
    for k, item in enumerate(_list("'running'", data)):
        where = f"'running' average {k}"
        parts = _list(where, item)
        if len(parts) != 4:
            raise ValueError(
                f"The state's {where} must be a name, a field, a total and a weight, not {shown(item)}. {_REMEDY}"
            )
        name, field = _text(where, parts[0]), _text(where, parts[1])
        total, weight = (_number(where, part, "a number in its total and weight", lambda _: True) for part in parts[2:])
        try:
            found.append(SavedAverage(name, field, total, weight))
        except ValueError as error:
            raise ValueError(f"The state's {where} is none. {error} {_REMEDY}") from None
    _check_distinct("'running'", [f"{average.field} of {average.name}" for average in found])
    return tuple(found)


def _branch(index: int, record: Any) -> Branch:
    """Read by the types that :class:`Branch` declares: counts, flags, texts, and its rate."""
    entries = _mapping(f"branch {index}", record)
    _check_keys(f"The state's branch {index}", entries, [field.name for field in dataclasses.fields(Branch)])
    readers: dict[Any, Callable[[str, Any], Any]] = {"int": _count, "bool": _flag, "str": _text, "float": _rate}
    found = Branch(
        **{
            field.name: readers[field.type](f"{field.name!r} of branch {index}", entries[field.name])
            for field in dataclasses.fields(Branch)
        }
    )
    if found.index != index:
        raise ValueError(
            f"The state's branch {index} has the index {found.index}: its branches are not in order. {_REMEDY}"
        )
    if not found.name:
        raise ValueError(f"The state's branch {index} must have a name, not ''. {_REMEDY}")
    if found.times_dropped > found.times_seen:
        raise ValueError(
            f"The state's branch {index} was dropped {found.times_dropped} times, which is more than the {found.times_seen} "
            f"forwards of its 'times_seen'. {_REMEDY}"
        )
    return found


# ---- values ----------------------------------------------------------------------------------------------------------


def _refused(where: str, wanted: str, value: Any) -> str:
    return f"The state's {where} must be {wanted}, not {shown(value)}. {_REMEDY}"


def _mapping(where: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(_refused(where, "a mapping", value))
    return value


def _list(where: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(_refused(where, "a list", value))
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(_refused(where, "a text", value))
    return str(value)


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(_refused(where, "True or False", value))
    return value


def _name(where: str, value: Any, valid: Sequence[str]) -> Any:
    if not isinstance(value, str):
        raise TypeError(_refused(where, f"one of {', '.join(map(repr, valid))}", value))
    if value not in valid:
        raise ValueError(_refused(where, f"one of {', '.join(map(repr, valid))}", value))
    return value


def _number(where: str, value: Any, wanted: str, is_valid: Callable[[float], bool]) -> float:
    number = as_float(value)
    if number is None:
        raise TypeError(_refused(where, wanted, value))
    if not is_valid(number):
        raise ValueError(_refused(where, wanted, value))
    return number


def _rate(where: str, value: Any) -> float:
    return _number(where, value, "a rate, a number in [0, 1)", lambda x: 0 <= x < 1)


def _whole(where: str, value: Any, wanted: str) -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(_refused(where, wanted, value))
    if number.bit_length() > SEED_BITS:
        raise ValueError(_refused(where, f"of at most {SEED_BITS} bits", value))
    return number


def _count(where: str, value: Any) -> int:
    wanted = "a whole number of at least 0 and less than 2**63"
    number = as_int(value)
    if number is None:
        raise TypeError(_refused(where, wanted, value))
    if not 0 <= number <= LARGEST_COUNT:
        raise ValueError(_refused(where, wanted, value))
    return number


def _check_distinct(where: str, names: Sequence[str]) -> None:
    counts = Counter(names)
    twice = next((name for name in names if counts[name] > 1), None)
    if twice is not None:
        raise ValueError(f"The state's {where} must be distinct, but {shown(twice)} is there twice. {_REMEDY}")


def _check_known(where: str, names: Collection[str], known: Sequence[str]) -> None:
    there = frozenset(known)
    unknown = next((name for name in names if name not in there), None)
    if unknown is not None:
        raise ValueError(
            f"The state's {where} has the branch {shown(unknown)}, which is not among its {len(known)} branches. {_REMEDY}"
        )
