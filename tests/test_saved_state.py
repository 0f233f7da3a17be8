"""A saved state is gone on from exactly, by whatever way it came; or it is refused whole, and nothing has changed."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dropbp_fx import DropBPBackend, LateRamp, Ramp, Steps, dropbp_backend
from dropbp_fx.policy.sampler import PatternSampler
from dropbp_fx.sensitivity.running import Observed, RunningSensitivity
from tests.helpers import compile_model, dropped_in, make_backend
from tests.test_models import ResidualMLP, square_loss

NAN, INF = math.nan, math.inf
State = dict[str, Any]
DEPTH, STEPS, SAVED_AT = 4, 30, 6
INPUTS = torch.randn(STEPS, 5, 8, generator=torch.Generator().manual_seed(1))


def by_json(state: State) -> State:
    return json.loads(json.dumps(state, allow_nan=False))  # type: ignore[no-any-return]


def by_torch(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[State], State]] = {"plain": copy.deepcopy, "json": by_json, "torch": by_torch}


# ---- exact ----------------------------------------------------------------------------------------------------------


def late_ramp_of_my_own(progress: float) -> float:
    return 0.2 + 0.5 * progress**2


def calibrated(backend: DropBPBackend, run: Any) -> None:
    backend.calibrate(lambda: square_loss(run), progress_bar=False)


def by_hand(backend: DropBPBackend, run: Any) -> None:
    backend.rates["blocks.1"] = 0.9


def rescheduled(backend: DropBPBackend, run: Any) -> None:
    backend.schedule = Steps(((0.1, 0.3), (0.5, 0.75)))


def ramped_late(backend: DropBPBackend, run: Any) -> None:
    backend.schedule = LateRamp(0.1, 0.8)


def renamed(backend: DropBPBackend, run: Any) -> None:
    backend.schedule = "ramp_down"


def everything(backend: DropBPBackend, run: Any) -> None:
    """What a rollback must take back."""
    calibrated(backend, run)
    backend.rate = 0.3
    backend.rates["blocks.0"] = 0.1
    backend.rates["blocks.3"] = 0.8
    backend.progress = 0.9


RUNS: dict[str, tuple[dict[str, Any], Callable[[DropBPBackend, Any], None] | None]] = {
    "plain": ({}, None),
    "rate by hand": ({}, by_hand),
    "sensitivity": ({"allocation": "sensitivity"}, calibrated),
    "sensitivity, before it is known": ({"allocation": "sensitivity"}, None),
    "running estimate": ({"allocation": "sensitivity", "reallocate_every": 8}, None),
    "ramp": ({"schedule": "ramp_up"}, None),
    "schedule set later": ({}, rescheduled),
    "late ramp set later": ({"schedule": "ramp_up"}, ramped_late),
    "name set later": ({"schedule": Ramp(0.2, 0.6)}, renamed),
    "function": ({"schedule": late_ramp_of_my_own}, None),
    "window": ({"pattern": "window"}, None),
    "layer": ({"granularity": "layer"}, by_hand),
    "rescale": ({"pattern": "independent", "rescale": True}, by_hand),
    "progressive freezing": ({"policy": "progressive_freezing", "rate": 0.7}, None),
    "suffix below": ({"pattern": "suffix", "drop": "below"}, None),
    "no seed": ({"seed": None}, None),
}


def steps(backend: DropBPBackend, run: Any, first: int, last: int) -> list[Any]:
    """The patterns of some steps, each with the loss's input of its own, and the rates they were drawn at."""
    seen: list[Any] = []
    for step in range(first, last):
        backend.progress = step / STEPS

        def loss(model: Any, step: int = step) -> Tensor:
            return model(INPUTS[step]).square().mean()  # type: ignore[no-any-return]

        seen.append((dropped_in(backend, run, loss), dict(backend.rates)))
    return seen


def check_run(name: str, ways: list[tuple[str, str]]) -> None:
    options, event = RUNS[name]
    model = ResidualMLP(DEPTH)
    backend, run = compile_model(model, **options)
    steps(backend, run, 0, 3)
    if event is not None:
        event(backend, run)
    steps(backend, run, 3, SAVED_AT)
    state = backend.state_dict()
    kept = copy.deepcopy(state)
    expected = steps(backend, run, SAVED_AT, STEPS)
    final = backend.state_dict()
    assert state == kept
    for way, where in ways:
        if where == "same process":
            other, again = backend, run
            everything(other, again)
            if name != "function":
                other.schedule = "step"
        else:
            torch._dynamo.reset()
            torch.manual_seed(99)
            other, again = compile_model(model, **options)
            if where == "new process, after a forward":
                square_loss(again).backward()
        other.load_state_dict(WAYS[way](state))
        assert other.state_dict() == state, (name, way, where)
        assert steps(other, again, SAVED_AT, STEPS) == expected, (name, way, where)
        assert other.state_dict() == final, (name, way, where)


PLACES = ("same process", "new process, before a forward", "new process, after a forward")


@pytest.mark.parametrize("name", ["sensitivity", "running estimate", "schedule set later"])
def test_a_state_is_gone_on_from_exactly(name: str) -> None:
    check_run(name, [("torch", "same process"), ("json", PLACES[1])])


@pytest.mark.thorough
@pytest.mark.parametrize("name", RUNS)
def test_every_way_and_place(name: str) -> None:
    check_run(name, list(itertools.product(WAYS, PLACES)))


def test_a_state_from_before_the_first_forward_takes_all_back() -> None:
    backend, run = compile_model(ResidualMLP(DEPTH), allocation="sensitivity")
    state = backend.state_dict()
    expected = steps(backend, run, 0, 5)
    everything(backend, run)
    backend.load_state_dict(state)
    assert backend.sensitivity is None
    assert set(backend.rates.values()) == {0.5}
    assert backend.progress == 0
    assert [branch.times_seen for branch in backend.branches] == [0] * DEPTH
    assert backend.stats.forwards == 0
    assert steps(backend, run, 0, 5) == expected


def test_what_was_observed_and_not_yet_averaged_is_in_the_state() -> None:
    backend, run = compile_model(ResidualMLP(DEPTH), allocation="sensitivity", reallocate_every=1000)
    with backend.pinned([]):
        square_loss(run)
    square_loss(run).backward()
    running = backend.state_dict()["running"]
    assert {entry[0] for entry in running} >= {"blocks.0"} or len(running) > 1
    assert backend.state_dict()["running"] == running, "and only once"


def test_observations_of_a_run_that_was_rolled_back_are_dropped() -> None:
    backend, run = compile_model(ResidualMLP(DEPTH), allocation="sensitivity", reallocate_every=1000)
    state = backend.state_dict()
    square_loss(run).backward()
    backend.load_state_dict(state)
    assert backend.state_dict()["running"] == []


def test_observations_that_are_not_finite_are_no_part_of_the_averages() -> None:
    running = RunningSensitivity()
    running.observe({"a": Observed(own=NAN, kept=INF)}, NAN)
    assert running.averages() == ()
    running.observe({"a": Observed(own=2.0, kept=NAN)}, None)
    assert [(average.name, average.field) for average in running.averages()] == [("a", "own")]


def test_a_state_holds_plain_numbers_whatever_it_was_given() -> None:
    backend = make_backend(np.float32(0.5), inner="aot_eager", seed=np.int64(3), schedule=Ramp(np.float64(0.25), 0))
    backend.progress = np.float64(0.5)  # type: ignore[assignment]
    state = backend.state_dict()
    assert by_torch(state) == by_json(state) == state
    assert type(state["seed"]) is int
    assert {type(state[key]) for key in ("rate", "progress")} == {float}


# ---- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "late_ramp", Ramp(0, 0.5), LateRamp(0.25, 0.9), Steps(((0.1, 0.2),))])
def test_a_schedule_is_in_the_state(schedule: Any) -> None:
    backend = dropbp_backend(inner="aot_eager")
    backend.schedule = schedule
    other = make_backend(inner="aot_eager", schedule="step")
    other.load_state_dict(by_json(backend.state_dict()))
    assert other.schedule == schedule
    assert other == backend, "its configuration has the schedule too"


def test_a_function_cannot_be_saved_and_a_state_says_so() -> None:
    state = by_json(make_backend(schedule=late_ramp_of_my_own).state_dict())
    assert state["schedule"]["name"] == "late_ramp_of_my_own"
    for schedule, text in (
        (
            "ramp_up",
            "saved with the schedule late_ramp_of_my_own, a function; this backend has the schedule 'ramp_up'.",
        ),
        (Ramp(0.2, 0.7), r"a function; this backend has the schedule Ramp\(start=0.2, end=0.7\)"),
        (
            lambda p: 0.2 + 0.5 * p,
            r"returns 0.205\d* at progress 0.1; this backend's schedule .*lambda> returns 0.25 there",
        ),
    ):
        backend = make_backend(schedule=schedule)
        before = backend.state_dict()
        with pytest.raises(ValueError, match=text) as caught:
            backend.load_state_dict(state)
        assert "set backend.schedule to it" in str(caught.value)
        assert backend.state_dict() == before
    equal = make_backend(schedule=lambda p: 0.2 + 0.5 * p**2)
    equal.load_state_dict({**state, "progress": 0.5})
    assert equal.progress == 0.5


# ---- refused --------------------------------------------------------------------------------------------------------

NO_NUMBERS = [None, "0.5", True, [0.5], {"a": 1}, 0.5j, Decimal("0.5"), torch.tensor(0.5), np.array([0.5]), b"1"]
RATES = [*NO_NUMBERS, 7.0, 1, 1.0, NAN, INF, -INF, -0.1, 10**400, 10**5000]
COUNTS = [*NO_NUMBERS, -1, 1.5, 3.0, NAN, INF, 2**63, 10**400, 10**5000]
NO_TEXTS = [None, 1, ["x"], {}, True]
NO_LISTS = [None, 1, "abc", {}, {"a": 1}, True]


def bad_states(state: State) -> list[tuple[str, Any]]:
    """Mutations of a state, each with what its refusal must name."""
    bad: list[tuple[str, Any]] = [
        (text, value) for text, value in (("mapping", None), ("mapping", []), ("mapping", "x"))
    ]
    bad += [("mapping", [("version", 3)]), ("version", {}), ("mapping", 5), ("mapping", torch.ones(2))]
    bad += [("version", {**state, "version": value}) for value in (None, 2, 4, "3", True, [3], NAN, 10**5000)]
    for key in state:
        bad.append((key if key != "version" else "version", {k: v for k, v in state.items() if k != key}))
    bad += [("'extra'", {**state, "extra": 1}), ("1", {**state, 1: 1})]

    def top(key: str, values: list[Any], names: str = "") -> None:
        bad.extend((names or repr(key), {**state, key: value}) for value in values)

    top("rate", RATES)
    top("progress", [*NO_NUMBERS, 1.5, NAN, INF, -0.1, 10**400])
    for key in ("rounds", "forwards", "reallocated"):
        top(key, COUNTS)
    top("reallocated", [state["rounds"] + 1])
    top("seed", ["0", True, [0.5], {"a": 1}, b"1", 1.5, 3.0, NAN, INF, 2**1001, 10**5000, [], {}])
    top("granularity", ["block", *NO_TEXTS])
    top("granularity", ["layer"], "granularity='layer'")
    top("schedule", [None, 5, [], True], "schedule")
    top("schedule", ["cosine", "", {}, {"kind": "Cosine"}, {"kind": ["Ramp"]}, {"kind": "Ramp"}], "schedule|kind")
    ramp = {"kind": "Ramp", "start": 0.1, "end": 0.5}
    top("schedule", [{**ramp, "end": value} for value in RATES if value not in (1,)], "Ramp|schedule")
    top("schedule", [{**ramp, "middle": 1}, {"kind": "LateRamp", "begin": 1.0, "end": 0.5}], "middle|begin")
    top("schedule", [{"kind": "Steps", "rates": value} for value in (None, 1, [1], [[0.1]], [[0.1, 2.0]])], "Steps")
    function = {"kind": "function", "name": "mine", "rates": [0.1] * 11}
    top(
        "schedule",
        [function, {**function, "name": 3}, {**function, "rates": [0.1]}, {**function, "rates": 3}],
        "function",
    )
    name = state["branches"][0]["name"]
    top("rates_by_hand", [None, [], "x", 3, [[name, 0.5]]])
    top("rates_by_hand", [{name: value} for value in RATES])
    top("rates_by_hand", [{"other": 0.5}, {0: 0.5}, {None: 0.5}])
    measured = state["sensitivity"]
    top("sensitivity", ["x", 1, [], {}, True], "sensitivity")
    for key, values in {
        "names": [*NO_LISTS, measured["names"][:-1], [name] * DEPTH, [1] * DEPTH, ["other", *measured["names"][1:]]],
        "values": [
            *NO_LISTS,
            measured["values"][:-1],
            *([value] * DEPTH for value in (None, "x", NAN, INF, -1.0, True)),
        ],
        "metric": ["norm", *NO_TEXTS],
        "batches": [*COUNTS, 0],
    }.items():
        top("sensitivity", [{**measured, key: value} for value in values], "sensitivity")
        top("sensitivity", [{k: v for k, v in measured.items() if k != key}, {**measured, f"{key}_": 1}], "sensitivity")
    entry = state["running"][0]
    top("running", [*NO_LISTS, [1], [None], ["abcd"], [[]], [entry[:3]], [[*entry, 1]], [entry, entry]])
    for place, values in enumerate(
        ([None, 1, "other"], [None, 1, "other"], [None, "x", NAN, INF, -1.0, True], [None, 0.0, 2.0, NAN, -1])
    ):
        top("running", [[[*entry[:place], value, *entry[place + 1 :]]] for value in values])
    top("running", [[["", "kept", 1.0, 1.0]]])
    records = state["branches"]

    def branches(value: Any, names: str = "branch") -> None:
        bad.append((names, {**state, "branches": value}))

    for value in (*NO_LISTS, [1], [None], [[]], records[::-1], records[1:], records[:-1], [*records, records[0]], []):
        branches(value)
    for key, record_values in {
        "index": [*COUNTS, 0, 5],
        "name": [*NO_TEXTS, "", "other", name],
        "layer": [*NO_TEXTS, "other"],
        "rate": RATES,
        "trainable": [None, 1, 0, "True", [], {}],
        "droppable": [None, 1, 0, "True", [], {}],
        "backward_flops": COUNTS,
        "times_seen": COUNTS,
        "times_dropped": [*COUNTS, records[1]["times_seen"] + 1],
    }.items():
        for value in record_values:
            branches([records[0], {**records[1], key: value}, *records[2:]])
        branches([records[0], {k: v for k, v in records[1].items() if k != key}, *records[2:]], repr(key))
    branches([records[0], {**records[1], "extra": 1}, *records[2:]], "'extra'")
    return bad


def a_sentence(error: BaseException) -> bool:
    text = str(error)
    return (
        type(error) in (TypeError, ValueError)
        and text[0].isupper()
        and text.endswith(".")
        and "\n" not in text
        and " at 0x" not in text
        and 30 < len(text) < 700
    )


def refusal(backend: DropBPBackend, state: Any) -> Exception | None:
    try:
        backend.load_state_dict(state)
    except Exception as error:
        return error
    return None


def test_bad_states_are_refused_whole_with_a_sentence() -> None:
    options = {"allocation": "sensitivity", "reallocate_every": 1000, "schedule": "ramp_up"}
    backend, run = compile_model(ResidualMLP(DEPTH), **options)
    steps(backend, run, 0, 3)
    calibrated(backend, run)
    by_hand(backend, run)
    state = backend.state_dict()
    assert all(state[key] for key in ("running", "sensitivity", "rates_by_hand", "branches"))
    expected = steps(backend, run, 3, 23)
    backend.load_state_dict(state)
    cases = bad_states(by_json(state))
    assert len(cases) > 300
    step, seen, wrong = 3, [], []
    for number, (named, bad) in enumerate(cases):
        if number % 25 == 0 and step < 23:
            seen += steps(backend, run, step, step + 1)
            step += 1
        before, config = backend.state_dict(), backend._config
        refused = refusal(backend, bad)
        if refused is None:
            wrong.append((named, str({k: bad[k] for k in bad if bad[k] != state[k]}), "accepted"))
            backend.load_state_dict(before)
        elif not a_sentence(refused) or not any(part in str(refused) for part in named.split("|")):
            wrong.append((named, repr(refused), ""))
        assert backend.state_dict() == before
        assert backend._config == config
    assert wrong == []
    assert seen == expected[: len(seen)]
    for strict in (1, None, "yes"):
        with pytest.raises(TypeError, match="strict must be True or False, not"):
            backend.load_state_dict(state, strict=strict)  # type: ignore[arg-type]


def test_bad_states_are_refused_by_a_backend_that_has_not_met_its_model() -> None:
    backend, run = compile_model(ResidualMLP(DEPTH), allocation="sensitivity", reallocate_every=1000)
    steps(backend, run, 0, 3)
    calibrated(backend, run)
    by_hand(backend, run)
    state = by_json(backend.state_dict())
    fresh = dropbp_backend(inner="aot_eager", seed=5)
    before = fresh.state_dict()
    fits_another_model = 0
    for _, bad in bad_states(state):
        refused = refusal(fresh, bad)
        if refused is None:
            fits_another_model += 1  # of other names and layers, as far as such a backend can tell
            fresh = dropbp_backend(inner="aot_eager", seed=5)
        else:
            assert a_sentence(refused), repr(refused)
            assert fresh.state_dict() == before
    assert fits_another_model <= 2


def test_a_rate_that_allocation_cannot_give_is_refused() -> None:
    state = dropbp_backend(0.9).state_dict()
    backend = make_backend(0.5, allocation="sensitivity", max_rate=0.8)
    before = backend.state_dict()
    with pytest.raises(ValueError, match=r"rate cannot be above max_rate, but rate=0.9 and max_rate=0.8"):
        backend.load_state_dict(state)
    with pytest.raises(ValueError, match=r"rate cannot be above max_rate"):
        backend.rate = 0.85
    assert backend.state_dict() == before


# ---- states of other models -----------------------------------------------------------------------------------------


def state_of(sampler: PatternSampler) -> dict[str, Any]:
    return sampler.saved((), 0).as_dict()


def sampler_with(*names: str) -> PatternSampler:
    sampler = PatternSampler(0.5, "branch", 0)
    for name in names:
        sampler.add_branch(name, name, trainable=True, droppable=True)
    return sampler


def test_a_state_of_other_layers_is_refused() -> None:
    state = state_of(sampler_with("a", "b"))
    other = PatternSampler(0.5, "branch", 0)
    for name in ("a", "b"):
        other.add_branch(name, "elsewhere", trainable=True, droppable=True)
    with pytest.raises(ValueError, match="they differ in a, b"):
        other.load(state)


def test_another_state_may_be_loaded_before_any_graph_is_met() -> None:
    sampler = PatternSampler(0.5, "branch", 0)
    sampler.load(state_of(sampler_with("a", "b", "c")))
    sampler.load(state_of(sampler_with("d")))
    assert [branch.name for branch in sampler.branches] == ["d"]
    assert sampler.add_branch("d", "d", trainable=True, droppable=True).index == 0
    sampler.load(state_of(sampler_with("d")))
    assert len(sampler.branches) == 1


def test_branches_that_only_the_state_has_take_no_part_in_draws() -> None:
    """Else a draw could keep one of them as the one trainable branch that is always kept."""
    for met_first in (True, False):
        sampler = sampler_with("a", "b") if met_first else PatternSampler(0.5, "branch", 0)
        sampler.load(state_of(sampler_with(*"abcdefgh")), strict=False)
        for name in ("a", "b"):
            sampler.add_branch(name, name, trainable=True, droppable=True)
        sampler.sample([0, 1])
        for _ in range(40):
            assert len(sampler.sample([0, 1])) == 1
        assert [branch.name for branch in sampler.branches if branch.droppable] == ["a", "b"]


def test_branches_that_the_state_does_not_know_count_from_0() -> None:
    sampler = sampler_with("a", "b", "c")
    sampler.sample([0, 1, 2])
    saved = sampler_with("a", "c")
    saved.sample([0, 1])
    saved.sample([0, 1])
    sampler.load(state_of(saved), strict=False)
    assert [(b.name, b.index, b.times_seen) for b in sampler.branches] == [("a", 0, 2), ("b", 1, 0), ("c", 2, 2)]


# ---- all or nothing -------------------------------------------------------------------------------------------------


def broken_between(progress: float) -> float:
    return NAN if 0.6 < progress < 1 else 0.3


def test_setters_that_are_refused_change_nothing() -> None:
    backend, run = compile_model(ResidualMLP(DEPTH), schedule=broken_between)
    square_loss(run)
    backend.rates["blocks.0"] = 0.4
    before, rates = backend.state_dict(), dict(backend.rates)
    with pytest.raises(ValueError, match=r"The schedule returned nan at progress 0.7; a rate must be in \[0, 1\)"):
        backend.progress = 0.7
    assert backend.state_dict() == before
    with pytest.raises(ValueError, match="returned nan at progress 0.7"):
        backend.load_state_dict({**before, "progress": 0.7})
    for several in ({"blocks.1": 0.2, "blocks.0": 7.0}, {"blocks.1": 0.2, "blocks.9": 0.5}):
        with pytest.raises((ValueError, KeyError)):
            backend.rates = several
        with pytest.raises((ValueError, KeyError)):
            backend.rates.update(several)
    with pytest.raises(ValueError, match="returned 2.0 at progress 0.5"):
        backend.schedule = lambda p: 4 * p
    assert backend.state_dict() == before
    assert dict(backend.rates) == rates


def test_a_schedule_that_fails_at_the_present_progress_is_refused_by_every_setter() -> None:
    backend, run = compile_model(ResidualMLP(DEPTH))
    square_loss(run)
    backend.progress = 0.7
    before = backend.state_dict()
    with pytest.raises(ValueError, match="returned nan at progress 0.7"):
        backend.schedule = broken_between
    assert backend.state_dict() == before
    assert backend.schedule == backend.policy.schedule == "constant"


def test_rates_by_hand_are_given_back_at_once() -> None:
    backend, run = compile_model(ResidualMLP(DEPTH))
    square_loss(run)
    backend.rates = dict.fromkeys(backend.rates, 0.1)
    view = backend.rates
    view.clear()
    assert dict(view) == dict.fromkeys(view, 0.5)
    assert "blocks.0" in view
    assert 0 not in view


class Moody:
    """A pattern that raises, or returns what is none, when it is told to."""

    answer: Any = ()

    def sample(self, units: Any, rng: Any) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return [rng.randrange(len(units))] if self.answer == () else self.answer


@pytest.mark.parametrize("answer", [ZeroDivisionError("mine"), KeyboardInterrupt(), None, 5, [99], [-1], [0.0], "01"])
@pytest.mark.parametrize("seed", [0, None])
def test_a_draw_that_fails_does_not_count(answer: Any, seed: int | None) -> None:
    for before_first in (True, False):
        pattern = Moody()
        sampler = PatternSampler(0.5, "branch", seed, pattern=pattern)
        sampler.rated.reschedule("ramp_up")
        for name in "abcd":
            sampler.add_branch(name, name, trainable=True, droppable=True)
        if not before_first:
            sampler.sample(range(4))
        before = state_of(sampler)
        expected = sampler.sample(range(4))
        sampler.load(before)
        pattern.answer = answer
        kind = type(answer) if isinstance(answer, BaseException) else (TypeError, IndexError)
        for _ in range(3):
            with pytest.raises(kind):
                sampler.sample(range(4))
            assert state_of(sampler) == before
        pattern.answer = ()
        assert sampler.sample(range(4)) == expected
        assert state_of(sampler)["rounds"] == before["rounds"] + 1


def test_a_pattern_of_other_arguments_is_refused_at_its_draw() -> None:
    backend, run = compile_model(ResidualMLP(DEPTH), pattern=lambda units: [0])
    with pytest.raises(TypeError, match=r"The pattern <function .*> cannot be called with \(units, rng\)"):
        square_loss(run)
    assert backend.state_dict()["rounds"] == backend.stats.forwards == 0


def test_a_forward_that_is_refused_after_its_draw_does_not_count() -> None:
    sampler = sampler_with(*"abcd")
    sampler.sample(range(4))
    before = state_of(sampler)

    def refuse(dropped: frozenset[int]) -> None:
        raise RuntimeError("not these")

    with pytest.raises(RuntimeError, match="not these"):
        sampler.sample(range(4), check=refuse)
    assert state_of(sampler) == before
