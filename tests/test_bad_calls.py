"""Every argument and setter, given what it cannot take: a sentence, and nothing has changed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dropbp_fx
from dropbp_fx import DropBPBackend, DropPolicy, LateRamp, Ramp, Steps, dropbp_backend, explain
from dropbp_fx.distributed import agree_across, check_ranks
from dropbp_fx.inspect import cli
from tests.helpers import compile_model, dropped_in, make_backend
from tests.test_models import ResidualMLP, square_loss

NAN, INF = float("nan"), float("inf")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ARRAYS = [np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), torch.tensor(0.5), np.array(["branch"]), np.ones((3, 3))]
ODD = [None, "x", True, [], {}, b"1", 1j, Decimal("0.5"), Unprintable(), object(), lambda: 1, *ARRAYS]
NO_RATES = [
    *ODD,
    -0.1,
    1,
    1.5,
    NAN,
    INF,
    -INF,
    10**400,
    -(10**400),
    10**5000,
    Fraction(10**20 - 1, 10**20),
    Fraction(3),
]
NO_COUNTS = [*[value for value in ODD if value is not None], 0, -1, 1.0, 0.5, NAN, INF, Fraction(3), 10**400, 10**5000]
NO_NAMES = [5, "Branch", "", True, [], {}, b"branch", Unprintable(), object(), *ARRAYS]
NO_FLAGS = [None, 0, 1, "True", [], np.True_, *ARRAYS]


def without(values: list[Any], *taken: Any) -> list[Any]:
    return [value for value in values if not any(value is known for known in taken)]


ARGUMENTS: dict[str, list[Any]] = {
    "rate": without(NO_RATES, None),
    "policy": [*NO_NAMES, None, DropPolicy, {"rate": 0.5}],
    "strict": NO_FLAGS,
    "activation_memory_budget": [*without(ODD, None), -0.1, 1.1, NAN, INF, 10**400],
    "inner": [*NO_NAMES, None, ("inductor", "inductor"), (len,), (len, None)],
    "options": [5, "x", True, [], [("a", 1)], {1: 2}, {"no_such_option": 1}, *ARRAYS],
    "seed": [*without(NO_COUNTS, 0, -1, 10**400), 2**1001],
}
FIELDS: dict[str, list[Any]] = {
    "rate": [*NO_RATES, None],
    "max_rate": [*NO_RATES, 0, 0.0],
    "granularity": [*NO_NAMES, None],
    "allocation": [*NO_NAMES, None],
    "drop": [*NO_NAMES, None],
    "pattern": [*NO_NAMES, None, Ramp],
    "schedule": [
        *NO_NAMES,
        Ramp,
        lambda: 0.5,
        lambda p: None,
        lambda p: torch.tensor(0.5),
        lambda p: 10**400,
        Ramp(0, 1),
        None,
    ],
    "reallocate_every": [*NO_COUNTS, 10],
    "hold": [None, *NO_COUNTS],
    "rescale": NO_FLAGS,
}


def a_sentence(error: BaseException) -> bool:
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    return (
        isinstance(error, (TypeError, ValueError, KeyError, IndexError, RuntimeError))
        and text.endswith(".")
        and "\n" not in text
        and " at 0x" not in text
        and 30 < len(text) < 600
        and len(text.split()) > 6
    )


def refusal(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def test_every_argument_is_covered() -> None:
    assert set(ARGUMENTS) == set(inspect.signature(dropbp_backend).parameters)
    assert len(ARGUMENTS) == 7
    assert set(FIELDS) == {field.name for field in dataclasses.fields(DropPolicy)}
    assert sum(map(len, [*ARGUMENTS.values(), *FIELDS.values()])) > 250


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_bad_arguments(argument: str) -> None:
    for value in ARGUMENTS[argument]:
        check_refused(argument, value, functools.partial(dropbp_backend, **{argument: value}))


@pytest.mark.parametrize("field", FIELDS)
def test_bad_fields_of_a_policy(field: str) -> None:
    for value in FIELDS[field]:
        check_refused(field, value, functools.partial(DropPolicy, **{field: value}))
        check_refused(
            field, value, functools.partial(dataclasses.replace, DropPolicy.named("freezing"), **{field: value})
        )
        check_refused(field, value, functools.partial(DropPolicy.from_fields, {field: value}))


def check_refused(name: str, value: Any, call: Callable[[], Any]) -> None:
    refused = refusal(call)
    assert refused is not None, (name, type(value))
    assert isinstance(refused, (TypeError, ValueError)), repr(refused)
    assert a_sentence(refused), repr(refused)
    named = "Inductor|allocation" if name in ("options", "reallocate_every") else "max_rate|rate"
    assert re.search(rf"{name}|{named}", str(refused)), str(refused)


@pytest.mark.parametrize(
    ("value", "rate"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.array(0.25), 0.25),
        (Fraction(1, 4), 0.25),
        (np.int64(0), 0.0),
    ],
)
def test_numbers_of_other_kinds_are_numbers(value: Any, rate: float) -> None:
    backend = make_backend(value, max_rate=np.float32(0.75), seed=np.int64(3))
    backend.progress = value
    assert (backend.rate, backend.progress, type(backend.rate)) == (rate, rate, float)
    assert backend._config.seed == 3
    backend = make_backend(schedule=lambda p: np.float32(p) / 2)
    backend.progress = 1
    assert backend.state_dict()["schedule"]["rates"][-1] == 0.5


@pytest.fixture(scope="module")
def met() -> tuple[DropBPBackend, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    backend, run = compile_model(ResidualMLP(), allocation="sensitivity", max_rate=0.9)
    square_loss(run).backward()
    return backend, run


def calls(backend: DropBPBackend) -> list[tuple[str, Callable[[], Any]]]:
    """Bad uses of a backend that has seen its model."""
    found: list[tuple[str, Callable[[], Any]]] = []

    def sets(attribute: str, values: list[Any], text: str) -> None:
        found.extend((text, functools.partial(setattr, backend, attribute, value)) for value in values)

    sets("rate", [*NO_RATES, 0.95], "rate")
    sets("progress", [*ODD, -0.1, 1.0001, 2, NAN, INF, -INF, 10**400, 10**5000, Fraction(3)], "progress")
    sets("schedule", FIELDS["schedule"], "schedule|progress")
    names = [branch.name for branch in backend.branches]
    good = dict.fromkeys(names, 0.25)
    sets(
        "rates",
        [None, 5, "x", [], [0.5], [("blocks.0", 0.5)], np.ones(3), torch.ones(3), Unprintable()],
        "rates must map",
    )
    sets("rates", [{**good, names[-1]: rate} for rate in NO_RATES], "rate must be")
    sets(
        "rates",
        [{**good, key: 0.5} for key in ("other", 0, None, ("blocks.0",), backend.branches[0].index)],
        "no branch named",
    )
    for key in (
        "other",
        0,
        -1,
        None,
        1.5,
        [0],
        {},
        slice(0, 1),
        ("blocks.0",),
        np.array([0, 1]),
        torch.tensor([0, 1]),
        Unprintable(),
    ):
        found.append(("no branch named", functools.partial(backend.rates.__getitem__, key)))
        found.append(("no branch named", functools.partial(backend.rates.__setitem__, key, 0.5)))
        found.append(("no branch named", functools.partial(backend.rates.__delitem__, key)))
    found += [("rate", functools.partial(backend.rates.__setitem__, names[0], rate)) for rate in NO_RATES]
    found += [("rates must map", functools.partial(backend.rates.update, value)) for value in (5, "x", [1])]

    def pinned(chosen: Any) -> None:
        with backend.pinned(chosen):
            pass

    for chosen in (
        None,
        5,
        "blocks.0",
        0.5,
        [0.5],
        [None],
        [[0]],
        [True],
        [3],
        [-1],
        [10**400],
        [10**5000],
        ["other"],
        [b"x"],
    ):
        found.append(("[Bb]ranch", functools.partial(pinned, chosen)))
    for chosen in (
        [Unprintable()],
        torch.tensor([0, 1]),
        torch.tensor(0),
        np.array([0.5]),
        np.array(0),
        range(3),
        names,
        [{}],
    ):
        found.append(("[Bb]ranch", functools.partial(pinned, chosen)))
    for step in (None, 5, "x", lambda x: x, Unprintable(), torch.ones(1)):
        found.append(("step", functools.partial(backend.calibrate, step)))
    for metric in (None, 5, "norm", [], np.array(["gradnorm", "gradient"]), Unprintable()):
        found.append(("metric", functools.partial(backend.calibrate, lambda: None, metric=metric)))
    for batches in NO_COUNTS:
        found.append(("batches", functools.partial(backend.calibrate, lambda: None, batches=batches)))
    for progress_bar in (None, 1, "x"):
        found.append(("progress_bar", functools.partial(backend.calibrate, lambda: None, progress_bar=progress_bar)))
    for callback in (None, 5, "x", [len], Unprintable()):
        found.append(("callback", functools.partial(backend.on_sample, callback)))
    for other in (None, "dropbp", DropBPBackend, Unprintable()):
        found.append(("backend must be", functools.partial(agree_across, other)))
        found.append(("backend must be", functools.partial(check_ranks, other)))
    for group in (5, "x", [0], True, object(), Unprintable(), np.ones(2), -100):
        found.append(("group", functools.partial(agree_across, backend, group)))
    for every in without(NO_COUNTS, 0):
        found.append(("every", functools.partial(agree_across, backend, every=every)))
    for timeout in (None, "1", True, [], 0, -1, NAN, INF, -INF, 10**400, np.ones(2), torch.ones(1), Decimal(1)):
        found.append(("timeout_s", functools.partial(agree_across, backend, timeout_s=timeout)))
    for model in (None, 5, "x", nn.Linear, torch.ones(2), Unprintable()):
        found.append(("register", functools.partial(backend.register, model)))
    found.append(("Call register", functools.partial(backend.register, ResidualMLP())))
    found.append(("explain", functools.partial(explain, backend, 1)))
    found.append(("explain", functools.partial(explain, backend, backend=backend)))
    found += [("backend must be", functools.partial(explain, ResidualMLP(), backend=value)) for value in (5, "dropbp")]
    found += [("explain|model", functools.partial(explain, value)) for value in (None, 5, "llama", nn.Linear)]
    return found


def test_bad_calls_change_nothing(met: tuple[DropBPBackend, Any]) -> None:
    backend, run = met
    state, config = backend.state_dict(), backend._config
    expected = [dropped_in(backend, run) for _ in range(5)]
    backend.load_state_dict(state)
    bad = calls(backend)
    assert len(bad) > 200
    wrong = []
    for text, call in bad:
        refused = refusal(call)
        if refused is None or not a_sentence(refused) or not re.search(text, str(refused)):
            wrong.append((text, call.func if isinstance(call, functools.partial) else call, repr(refused)))  # type: ignore[attr-defined]
        if backend.state_dict() != state or backend._config != config:
            wrong.append((text, repr(refused), "changed"))
            backend.load_state_dict(state)
    assert not wrong, "\n".join(map(str, wrong))
    assert [dropped_in(backend, run) for _ in range(5)] == expected


def test_schedules_of_figures_check_them() -> None:
    for make in (Ramp, LateRamp):
        for bad in (None, "x", True, NAN, INF, 10**400, torch.tensor(0.5), np.ones(2)):
            for arguments in ((bad, 0.5), (0.5, bad)):
                refused = refusal(functools.partial(make, *arguments))
                assert refused is not None
                assert a_sentence(refused), repr(refused)
    for pairs in (
        None,
        5,
        "ab",
        [1],
        [(0.5,)],
        [(0.5, 1.0)],
        [(0.5, -0.1)],
        [(NAN, 0.5)],
        [("a", 0.5)],
        ((0.1, 0.2, 0.3),),
    ):
        refused = refusal(functools.partial(Steps, pairs))
        assert refused is not None
        assert a_sentence(refused), repr(refused)
    assert Steps([[0.5, 0.25]]) == Steps(((0.5, 0.25),))  # type: ignore[arg-type]


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_steps_that_calibrate_cannot_use_change_nothing() -> None:
    model = ResidualMLP()
    backend, run = compile_model(model, allocation="sensitivity")
    square_loss(run).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    def backward() -> Tensor:
        loss = square_loss(run)
        loss.backward()
        return loss

    def grad() -> Tensor:
        torch.autograd.grad(square_loss(run), [model.head.weight])
        torch.autograd.grad(square_loss(run), [model.stem.weight])
        return square_loss(run)

    def both() -> Tensor:
        square_loss(run).backward()
        return square_loss(run)

    state = backend.state_dict()
    steps: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (backward, RuntimeError, r"step\(\) ran a backward itself.*Return the loss"),
        (grad, RuntimeError, r"step\(\) ran a backward itself"),
        (both, RuntimeError, r"step\(\) ran a backward itself"),
        (lambda: square_loss(run) * (1 + 1j), TypeError, r"a loss of real numbers, not of torch\.complex64\."),
        (lambda: square_loss(run).long(), TypeError, r"a loss of real numbers, not of torch\.int64\."),
        (lambda: [square_loss(run)], TypeError, r"step\(\) must return the loss, a tensor of one element, not \["),
    ]
    for step, kind, text in steps:
        with pytest.raises(kind, match=text) as caught:
            backend.calibrate(step, progress_bar=False)
        assert "\n" not in str(caught.value)
        after = backend.state_dict()
        assert (after["sensitivity"], after["rounds"], after["rates_by_hand"]) == (None, state["rounds"], {})
        assert dict(backend.rates) == dict.fromkeys(backend.rates, 0.5)
        for before, parameter in zip(gradients, model.parameters(), strict=True):
            assert (before is None) == (parameter.grad is None)
            assert before is None or torch.equal(before, parameter.grad)
    assert len(backend.calibrate(lambda: square_loss(run), progress_bar=False).values) == 3


# ---- the package and its command line --------------------------------------------------------------------------------


def test_dir_shows_all_that_is_public() -> None:
    assert set(dropbp_fx.__all__) <= set(dir(dropbp_fx))
    out = subprocess.run(
        [sys.executable, "-c", "import dropbp_fx; print('explain' in dir(dropbp_fx), 'explain' in vars(dropbp_fx))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == ["True", "False"]


@pytest.mark.thorough
def test_the_package_is_the_command_line() -> None:
    out = subprocess.run([sys.executable, "-m", "dropbp_fx", "--version"], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == f"dropbp-fx {dropbp_fx.__version__}"
    out = subprocess.run(
        [sys.executable, "-m", "dropbp_fx", "explain", "lama"], capture_output=True, text=True, check=False
    )
    assert out.returncode == 2
    assert out.stderr.startswith("dropbp-fx explain: error: ")
    assert out.stderr.count("\n") == 1


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "text"),
    [
        *[
            ({name: -3}, f"configuration's {name} is -3, but a size cannot be negative; llama has")
            for name in ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "vocab_size")
        ],
        ({"hidden_size": -64}, "hidden_size is -64, but a size cannot be negative"),
        ({"num_attention_heads": -3}, "is not a multiple of the number of attention heads (-3). Correct it there."),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"num_attention_heads": 0}, "integer division or modulo by zero. Correct it there."),
        ({"hidden_size": "a"}, "is no configuration of llama that transformers"),
        ({"num_hidden_layers": 2.5}, "is no configuration of llama"),
        ({"num_hidden_layers": None}, "is no configuration of llama"),
        ({"hidden_size": 10**30}, "No LlamaForCausalLM can be built from this configuration"),
        ({"hidden_act": "foo"}, "No LlamaForCausalLM can be built from this configuration: KeyError 'foo'."),
        ({"model_type": ["llama"]}, "has the model_type ['llama'], which transformers"),
        ({"model_type": -1}, "has the model_type -1, which transformers"),
    ],
)
def test_configurations_that_cannot_be(
    change: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **change}))
    assert cli.main(["explain", str(tmp_path), "--seq", "8", "--inner", "aot_eager"]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert error.endswith(".")
    assert "\n" not in error
