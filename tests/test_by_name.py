"""A backend that torch.compile is given by name: what configures it, who finds it, and how long it lives."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import os
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropbp_fx
from dropbp_fx import DropPolicy
from dropbp_fx.entry import dropbp
from dropbp_fx.named import NamedBackends
from tests.oracle import assert_equal, compiled, detached, eager
from tests.test_per_layer import POINTS, Model, X, loss

OPTIONS = {"inner": "aot_eager", "seed": 0}
TWO_LAYERS = POINTS[:4]


@pytest.fixture(autouse=True)
def _nothing_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DROPBP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(dropbp, "_known", weakref.WeakValueDictionary())


def make_model(**options: Any) -> tuple[Model, Any]:
    torch.manual_seed(0)
    model = Model(2)
    return model, torch.compile(model, backend=dropbp, options={**OPTIONS, **options})


# ---- how long a backend lives, and who finds it --------------------------------------------------------------------------


def test_dynamo_finds_it_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.list_backends()
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "dropbp", dropbp)
    monkeypatch.setenv("DROPBP_INNER", "aot_eager")
    model = Model(2)
    loss(torch.compile(model, backend="dropbp")).backward()
    assert dropbp_fx.current().stats.forwards == 1


def test_names_take_no_arguments() -> None:
    """Should Dynamo come to take some, the documentation says otherwise."""
    with pytest.raises(torch._dynamo.exc.InvalidBackend):
        torch.compile(nn.Linear(2, 2), backend="dropbp:rate=0.3")


def test_current_is_the_backend_in_use() -> None:
    with pytest.raises(RuntimeError, match=r"No backend is in use by its name: .* Call dropbp_fx\.current\(\) after"):
        dropbp_fx.current()
    model, run = make_model()
    reference = copy.deepcopy(model)
    loss(run).backward()
    backend = dropbp_fx.current()
    assert [branch.name for branch in backend.branches] == TWO_LAYERS
    backend.rate = 0.0
    model.zero_grad()
    loss(run).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert backend.state_dict()["forwards"] == 2
    assert dropbp_fx.backends() == (backend,)
    assert dropbp_fx.named_backend(**OPTIONS) is backend
    for pattern in ([], [0], [1, 2], [0, 2, 3]):
        with backend.pinned(pattern):
            actual = compiled(model, loss, run)
        assert_equal(actual, eager(reference, loss, [TWO_LAYERS[i] for i in pattern]), what=f"pattern {pattern}")


def test_it_lives_as_long_as_its_model_and_its_state_as_long_as_the_code() -> None:
    model, run = make_model()
    loss(run).backward()
    backend = dropbp_fx.current()
    state, branches = weakref.ref(backend._state), len(backend.branches)
    end = backend.on_sample(lambda _indices, _dropped: None)
    backend.calibrate(functools.partial(loss, run), progress_bar=False)
    backend.schedule, backend.progress = "ramp_up", 0.25
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss(run).backward()
    optimizer.step()
    assert backend._state.runners
    del backend, end
    torch._dynamo.reset()
    gc.collect()
    assert not dropbp_fx.current()._state.runners
    assert dropbp_fx.current().progress == 0.25
    loss(run).backward()
    assert len(dropbp_fx.current()._state.runners) == 1
    assert dropbp_fx.current().stats.forwards == 3
    assert len(dropbp_fx.current().branches) == branches
    del model, run, optimizer
    gc.collect()
    assert dropbp_fx.backends() == ()
    assert state() is not None
    torch._dynamo.reset()
    gc.collect()
    gc.collect()
    assert state() is None


def test_a_function_of_no_module_has_one_while_its_code_lives() -> None:
    weight = torch.eye(8).requires_grad_()
    run = torch.compile(lambda x: x + (x @ weight).tanh() + (x @ weight.T), backend=dropbp, options=OPTIONS)
    run(X).sum().backward()
    dropbp_fx.current().schedule = "ramp_up"
    gc.collect()
    assert dropbp_fx.current().schedule == dropbp_fx.current().policy.schedule == "ramp_up"
    assert dropbp_fx.current().stats.forwards == 1
    torch._dynamo.reset()
    gc.collect()
    assert dropbp_fx.backends() == ()


def test_a_model_that_runs_by_the_code_of_one_that_is_no_more_goes_on_with_its_backend() -> None:
    for forwards in (1, 2, 3):
        model, run = make_model()
        model.__dict__["itself"] = [model]  # it goes with the next one's garbage
        with warnings.catch_warnings():
            warnings.simplefilter("error", dropbp_fx.LessDroppedWarning)
            loss(run).backward()
        assert dropbp_fx.current().stats.forwards == forwards
        assert [branch.name for branch in dropbp_fx.current().branches] == TWO_LAYERS
        if forwards == 2:
            del model.__dict__["itself"]
        del model, run
    gc.collect()
    assert dropbp_fx.backends() == ()


def test_copies_of_what_dynamo_holds_are_the_one_that_is_asked() -> None:
    assert copy.deepcopy(dropbp) is copy.copy(dropbp) is dropbp
    assert pickle.loads(pickle.dumps(dropbp)) is dropbp


def test_a_run_goes_on_after_a_reset_as_if_there_had_been_none() -> None:
    def dropped(reset: bool) -> tuple[list[list[bool]], dict[str, Any]]:
        model, run = make_model(rate=0.4)
        found = []
        for step in range(8):
            if step == 4 and reset:
                torch._dynamo.reset()
                gc.collect()
            model.zero_grad()
            loss(run).backward()
            if step == 2:
                dropbp_fx.current().rates[POINTS[1]] = 0.9
            found.append([p.grad is None for p in model.parameters()])
        return found, dropbp_fx.current().state_dict()

    before = dropped(reset=False)
    torch._dynamo.reset()
    assert dropped(reset=True) == before
    assert any(map(any, before[0]))


def test_models_of_equal_options_share_one() -> None:
    first, run_first = make_model()
    second, run_second = make_model()
    loss(run_first).backward()
    loss(run_second).backward()
    backend = dropbp_fx.current()
    assert [branch.name for branch in backend.branches] == [*TWO_LAYERS, *(f"{name}@2" for name in TWO_LAYERS)]
    del first, run_first, backend
    gc.collect()
    assert len(dropbp_fx.backends()) == 1
    loss(run_second).backward()
    assert dropbp_fx.current().stats.forwards == 3
    del second, run_second
    gc.collect()
    assert dropbp_fx.backends() == ()


def test_the_next_model_gets_a_new_one_whether_or_not_garbage_was_collected() -> None:
    model, run = make_model()
    gc.disable()
    try:
        for _ in range(5):
            loss(run).backward()
        del model, run
        torch._dynamo.reset()
        _model, run = make_model()
        loss(run).backward()
        assert dropbp_fx.current().stats.forwards == 1
    finally:
        gc.enable()


def test_graphs_of_one_model_share_one_also_after_its_schedule_was_set() -> None:
    model = Model(1, breaks=True)
    run = torch.compile(model, backend=dropbp, options=OPTIONS)
    loss(run).backward()
    dropbp_fx.current().schedule = "ramp_up"
    torch._dynamo.reset()
    loss(run).backward()
    assert len(dropbp_fx.backends()) == 1
    assert dropbp_fx.current().stats.forwards == 2
    assert len(dropbp_fx.current().branches) == 2


def test_other_options_make_another_one() -> None:
    backends = dropbp_fx.named_backend(**OPTIONS, rate=0.25), dropbp_fx.named_backend(**OPTIONS, rate=0.75)
    assert dropbp_fx.backends() == backends
    with pytest.raises(
        RuntimeError, match=r"2 backends are in use by their name, of the rates 0\.25, 0\.75: .*backends"
    ):
        dropbp_fx.current()
    assert dropbp_fx.named_backend(**OPTIONS, rate=0.75) is backends[1]


def test_one_made_before_the_first_forward_is_the_models() -> None:
    backend = dropbp_fx.named_backend(**OPTIONS)
    assert dropbp_fx.current() is backend
    backend.rate = 0.25
    _model, run = make_model()
    loss(run).backward()
    assert dropbp_fx.backends() == (backend,)
    assert {branch.rate for branch in backend.branches} == {0.25}


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"The backend 'dropbp' has no option 'rates'; its options are rate, policy"):
        dropbp_fx.named_backend(rates=0.5)


# ---- the environment -----------------------------------------------------------------------------------------------------


def test_variables_give_what_options_leave_open(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RATE": "0.25", "POLICY": "freezing", "SEED": "7", "STRICT": "1", "INNER": "aot_eager"}
    for name, value in {**values, "ACTIVATION_MEMORY_BUDGET": "0.5"}.items():
        monkeypatch.setenv(f"DROPBP_{name}", value)
    config = dropbp_fx.named_backend()._config
    assert config.policy == DropPolicy(rate=0.25, pattern="lowest", drop="below")
    assert (config.seed, config.strict, config.inner, config.activation_memory_budget) == (7, True, "aot_eager", 0.5)
    given = dropbp_fx.named_backend(rate=0.75, seed=None, strict=False)._config
    assert given.policy == DropPolicy(rate=0.75, pattern="lowest", drop="below")
    assert (given.seed, given.strict, given.inner) == (None, False, "aot_eager")
    assert dropbp_fx.dropbp_backend()._config.policy == DropPolicy()  # not by name


def test_a_policy_that_was_given_keeps_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPBP_RATE", "0.25")
    assert dropbp_fx.named_backend(policy={"rate": 0.75}).rate == 0.75
    assert dropbp_fx.named_backend(policy="freezing").rate == 0.5


def test_a_policys_fields_are_a_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPBP_POLICY", ' {"pattern": "suffix", "rate": 0.4, "rescale": true} ')
    assert dropbp_fx.named_backend().policy == DropPolicy(pattern="suffix", rate=0.4, rescale=True)
    monkeypatch.setenv("DROPBP_RATE", "0.25")
    assert dropbp_fx.named_backend().policy == DropPolicy(pattern="suffix", rate=0.25, rescale=True)


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROPBP_RATE", " ")
    assert dropbp_fx.named_backend().rate == 0.5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RATE", "half", r"DROPBP_RATE is 'half'\. rate must be a number, such as 0\.5\."),
        ("RATE", "1", r"DROPBP_RATE is '1'\. rate must be in \[0, 1\), not 1\.0"),
        ("RATE", "nan", r"DROPBP_RATE is 'nan'\. rate must be in"),
        (
            "POLICY",
            "freezin",
            r"DROPBP_POLICY is 'freezin'\. There is no policy named 'freezin'; the names are 'dropbp'",
        ),
        ("POLICY", '{"rat": 1}', r"DROPBP_POLICY is .* A policy has no field 'rat'\. Did you mean 'rate'\?"),
        ("POLICY", '{"rate": "x"}', r"DROPBP_POLICY is .* rate must be a number"),
        ("POLICY", '{"rate": 0.1, "rate": 0.2}', r"has 'rate' more than once"),
        ("POLICY", '{"rate": 0.1', r"or a JSON object of its fields, such as .* this is no JSON"),
        ("POLICY", "[1]", r"A policy's fields must be a mapping"),
        ("SEED", "1.5", r"DROPBP_SEED is '1\.5'\. seed must be a whole number"),
        ("SEED", "9" * 400, r"DROPBP_SEED is .* seed must have at most 1000 bits"),
        ("SEED", "9" * 5000, r"DROPBP_SEED is .* seed must be a whole number, such as 1234, of at most 1000 bits"),
        ("STRICT", "yes", r"DROPBP_STRICT is 'yes'\. strict must be 1 or true, or 0 or false"),
        ("INNER", "eager", r"DROPBP_INNER is 'eager'\. inner must be 'inductor' or 'aot_eager'"),
        ("ACTIVATION_MEMORY_BUDGET", "2", r"activation_memory_budget must be in \[0, 1\]"),
        (
            "RAET",
            "0.5",
            r"variable DROPBP_RAET is none that .* Did you mean DROPBP_RATE\? It knows DROPBP_RATE, ",
        ),
        ("rate", "0.5", r"variable DROPBP_rate is none that .* Did you mean DROPBP_RATE\?"),
        ("WANDB", "", r"variable DROPBP_WANDB is none that the backend 'dropbp' knows\. It knows"),
    ],
)
def test_bad_variables_are_refused(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"DROPBP_{name}", value)
    with pytest.raises(ValueError, match=message) as refused:
        dropbp_fx.named_backend()
    assert f"The environment variable DROPBP_{name}" in str(refused.value)
    assert dropbp_fx.backends() == ()


def test_variables_that_take_effect_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DROPBP_RATE", "0.25")
    monkeypatch.setenv("DROPBP_SEED", "3")
    with caplog.at_level(logging.INFO, logger="dropbp_fx"):
        backend = dropbp_fx.named_backend(**OPTIONS)
        assert dropbp_fx.named_backend(**OPTIONS) is backend
    assert [record.getMessage() for record in caplog.records] == [
        "DROPBP_RATE=0.25 takes effect for the backend 'dropbp'",
        "DROPBP_SEED=3 is replaced by the options of the backend 'dropbp'",
    ]
    assert backend.rate == 0.25


def test_the_name_is_known_to_torch() -> None:
    assert isinstance(dropbp, NamedBackends)
    assert dropbp.__name__ == "dropbp"


# ---- layers that are compiled one by one ---------------------------------------------------------------------------------


def per_layer(rate: float) -> Model:
    torch.manual_seed(0)
    model = Model()
    for layer in model.layers:
        layer.compile(backend=dropbp, options={**OPTIONS, "rate": rate})
    return model


def called_by_a_function(model: Model) -> Tensor:
    x = X
    for layer in model.layers:
        x = layer(x)
    result: Tensor = model.head(x).square().sum()
    return result


def counts(model: Model, run: Any) -> list[int]:
    """How many branches each forward drops, but the first, in which layers are met one by one."""
    run(model).backward()
    found = []
    for _ in range(24):
        model.zero_grad()
        run(model).backward()
        weights = [part.weight.grad for layer in model.layers for part in (layer.attention, layer.mlp[0])]  # type: ignore[union-attr, index]
        found.append(sum(grad is None for grad in weights))
    return found


def test_the_rate_holds_over_the_model_that_calls_its_layers() -> None:
    model = per_layer(0.875)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dropbp_fx.LessDroppedWarning)
        assert set(counts(model, loss)) == {7}
    assert [branch.name for branch in dropbp_fx.current().branches] == POINTS


def test_where_no_module_calls_them_the_remedy_is_one_that_the_user_has() -> None:
    model = per_layer(0.875)
    with pytest.warns(dropbp_fx.LessDroppedWarning, match=r"named_backend\(\)\.register\(model\)") as caught:
        assert max(counts(model, called_by_a_function)) < 7
    assert "later dropbp_fx.current() is the backend" in str(caught[0].message)


def test_the_remedy_helps() -> None:
    model = per_layer(0.875)
    reference = copy.deepcopy(model)
    dropbp_fx.named_backend(**OPTIONS, rate=0.875).register(model)
    gc.collect()  # the registered model holds it
    with warnings.catch_warnings():
        warnings.simplefilter("error", dropbp_fx.LessDroppedWarning)
        assert set(counts(model, called_by_a_function)) == {7}
    for layer in reference.layers:
        layer._compiled_call_impl = None
    with dropbp_fx.current().pinned(POINTS[2:5]), detached(reference, POINTS[2:5]):
        assert_equal(compiled(model, called_by_a_function, model), compiled(reference, called_by_a_function, reference))
