"""Layers that are compiled one by one: one graph serves them all, and the registered model tells their branches apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dropbp_fx import DropBPBackend, dropbp_backend, explain
from dropbp_fx.inspect import record_patterns
from tests.helpers import make_backend
from tests.oracle import assert_equal, assert_exact, compiled, detached, eager

pytestmark = pytest.mark.thorough

DEPTH = 4
X = torch.linspace(-1, 1, 24).reshape(3, 8).cos()


class Block(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x)).tanh()
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, depth: int = DEPTH, breaks: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(breaks) for _ in range(depth))
        self.head = nn.Linear(8, 4)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.head(x)


POINTS = [f"layers.{i}.{name}" for i in range(DEPTH) for name in ("attention", "mlp")]


def loss(model: Any) -> Tensor:
    value: Tensor = model(X).square().sum()
    return value


def make(rate: float = 0.5, model: Model | None = None, **options: Any) -> tuple[Model, DropBPBackend]:
    torch.manual_seed(0)
    model = model or Model()
    backend = make_backend(rate, inner="aot_eager", **{"seed": 0, **options})
    backend.register(model)
    for layer in model.layers:
        layer.compile(backend=backend)
    return model, backend


def test_every_layers_branches_have_names_layers_and_rates_of_their_own() -> None:
    model, backend = make()
    loss(model).backward()
    assert [branch.name for branch in backend.branches] == POINTS
    assert [branch.layer for branch in backend.branches] == [name.rpartition(".")[0] for name in POINTS]
    assert backend.stats.forwards == 1
    backend.rates["layers.2.mlp"] = 0.9
    assert [branch.rate for branch in backend.branches] == [0.5] * 5 + [0.9] + [0.5] * 2
    flops = {branch.name: branch.backward_flops for branch in backend.branches}
    assert flops["layers.3.mlp"] == flops["layers.1.mlp"] > flops["layers.1.attention"] > 0


def test_any_pattern_is_exact() -> None:
    model, backend = make()
    reference = copy.deepcopy(model)
    loss(model).backward()
    assert_exact_against(model, reference, backend, [[], [0], [1, 6], [0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5], [7]])


def assert_exact_against(model: Model, reference: Model, backend: DropBPBackend, patterns: list[list[int]]) -> None:
    for layer in reference.layers:
        layer._compiled_call_impl = None  # the copy is the eager one
    for pattern in patterns:
        with backend.pinned(pattern):
            actual = compiled(model, loss, model)
        assert_equal(actual, eager(reference, loss, [POINTS[i] for i in pattern]), what=f"pattern {pattern}")


def test_a_pattern_is_drawn_over_the_whole_model() -> None:
    """At rate 0.75, six of eight branches: one in every layer would have to stay if each layer drew for itself."""
    model, backend = make(0.75)
    loss(model).backward()  # layers are met one by one
    with record_patterns(backend) as history:
        for _ in range(40):
            loss(model).backward()
    assert {len(pattern) for pattern in history.patterns} == {6}
    assert any({2 * i, 2 * i + 1} <= pattern for pattern in history.patterns for i in range(DEPTH))
    assert len(set(history.patterns)) > 5
    for branch in backend.branches:
        assert branch.times_seen == 41
        assert abs(branch.realised_rate - 0.75) < 0.25, branch


def test_at_least_one_branch_of_the_model_is_kept() -> None:
    model, _ = make(0.95)
    for _ in range(8):
        model.zero_grad()
        loss(model).backward()
        assert any(model.get_submodule(point).get_parameter(name).grad is not None for point, name in WEIGHTS)


WEIGHTS = [(point, "weight" if point.endswith("attention") else "0.weight") for point in POINTS]


def test_random_patterns_are_exact_in_training() -> None:
    model, backend = make(0.5, pattern="independent")
    reference = copy.deepcopy(model)
    for layer in reference.layers:
        layer._compiled_call_impl = None
    with record_patterns(backend) as history:
        for _ in range(6):
            actual = compiled(model, loss, model)
            assert_equal(actual, eager(reference, loss, [POINTS[i] for i in sorted(history.patterns[-1])]))


def test_layer_granularity_drops_layers() -> None:
    model, backend = make(0.5, granularity="layer")
    loss(model).backward()
    with record_patterns(backend) as history:
        for _ in range(6):
            loss(model).backward()
    for pattern in history.patterns:
        assert len(pattern) == DEPTH
        assert all((2 * i in pattern) == (2 * i + 1 in pattern) for i in range(DEPTH))


def test_the_budget_holds_over_the_layers_and_calibration_is_that_of_the_whole_model() -> None:
    model, backend = make(0.5, allocation="sensitivity")
    found = backend.calibrate(lambda: loss(model))
    torch.manual_seed(0)
    whole = Model()
    other = make_backend(0.5, inner="aot_eager", allocation="sensitivity")
    run = torch.compile(whole, backend=other)
    expected = other.calibrate(lambda: loss(run))
    assert found.names == expected.names == tuple(POINTS)
    assert found.values == pytest.approx(expected.values, rel=1e-4)
    rates = {branch.name: branch.rate for branch in backend.branches}
    assert len(set(rates.values())) > 2
    assert rates == pytest.approx({branch.name: branch.rate for branch in other.branches}, rel=1e-3)
    budget = sum(branch.rate * branch.backward_flops for branch in backend.branches)
    assert budget == pytest.approx(0.5 * sum(branch.backward_flops for branch in backend.branches))


def test_a_resumed_run_draws_what_the_uninterrupted_one_would_have() -> None:
    model, backend = make()
    for _ in range(3):
        loss(model).backward()
    state = backend.state_dict()
    with record_patterns(backend) as expected:
        for _ in range(4):
            loss(model).backward()
    torch._dynamo.reset()
    again, other = make()
    other.load_state_dict(state)
    with record_patterns(other) as history:
        for _ in range(4):
            loss(again).backward()
    assert history.patterns == expected.patterns
    assert other.state_dict() == backend.state_dict()


def test_what_a_branch_saves_is_settled_before_the_first_draw_from_it() -> None:
    """Else draws would go by the order of past patterns, which a resumed run does not share.

    Above dropped lowest layers a layer's input needs no gradient, and it runs the first layer's code, whose FLOPs are fewer.
    """
    model = Model()
    for layer in model.layers:
        layer.norm.requires_grad_(False)  # else the input's gradient is needed for the norm's
    model, backend = make(model=model)
    loss(model).backward()
    flops = [branch.backward_flops for branch in backend.branches]
    assert flops[0] < flops[2]
    with backend.pinned([0, 1]):
        loss(model).backward()
    assert [branch.backward_flops for branch in backend.branches] == flops


def test_a_state_of_a_deeper_model_is_refused() -> None:
    model, backend = make(model=Model(DEPTH + 1))
    loss(model).backward()
    torch._dynamo.reset()
    shallower, other = make()
    other.load_state_dict(backend.state_dict())
    loss(shallower).backward()
    with pytest.raises(ValueError, match="2 of its 10 branches, such as 'layers.4.attention', are not in the model"):
        loss(shallower).backward()


def test_layers_share_their_code() -> None:
    counts = []
    for depth in (2, 6):
        torch._dynamo.reset()
        model, backend = make(model=Model(depth))
        loss(model).backward()
        backend.warmup()
        counts.append((backend.stats.graphs, backend.stats.unique_regions, backend.stats.compiled_variants))
    assert counts[0] == counts[1]


def test_checkpoints_around_the_layers_repeat_each_layers_pattern() -> None:
    model, backend = make(0.5, Model(checkpointed=True))
    reference = copy.deepcopy(model)
    for layer in reference.layers:
        layer._compiled_call_impl = None
    reference.checkpointed = False
    with record_patterns(backend) as history:
        for _ in range(6):
            actual = compiled(model, loss, model)
            assert_equal(actual, eager(reference, loss, [POINTS[i] for i in sorted(history.patterns[-1])]))
    assert backend.stats.forwards == 6


@pytest.mark.parametrize("registered_first", [True, False])
def test_layers_replaced_by_their_compiled_selves(registered_first: bool) -> None:
    """``model.layers[i] = torch.compile(layer)``: the wrapper does not show in the names."""
    model = Model()
    reference = copy.deepcopy(model)
    backend = dropbp_backend(inner="aot_eager", seed=0)
    if registered_first:
        backend.register(model)
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend=backend, fullgraph=True)  # type: ignore[assignment]
    if not registered_first:
        backend.register(model)
    loss(model).backward()
    assert [branch.name for branch in backend.branches] == POINTS
    with backend.pinned(["layers.1.mlp", "layers.2.attention"]):
        model.zero_grad()
        loss(model).backward()
    expected = eager(reference, loss, ["layers.1.mlp", "layers.2.attention"])
    for name, parameter in model.named_parameters():
        wanted = expected.gradients[name.replace("._orig_mod", "")]
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5)


def test_graph_breaks_inside_the_layers_of_a_registered_model() -> None:
    model = Model(breaks=True)
    backend = dropbp_backend(0.75, inner="aot_eager", seed=0)
    backend.register(model)
    run = torch.compile(model, backend=backend)
    loss(run).backward()
    assert sorted(branch.name for branch in backend.branches) == sorted(POINTS)
    assert_exact(
        model, run, backend, loss, [branch.name for branch in backend.branches], patterns=[[], [0, 3], [1, 2, 4, 5]]
    )
    with record_patterns(backend) as history:
        for _ in range(3):
            loss(run).backward()
    assert {len(pattern) for pattern in history.patterns} == {6}


def test_an_explanation_has_all_layers_once() -> None:
    model, backend = make()
    for _ in range(4):
        loss(model).backward()
    explanation = explain(backend)
    assert [branch.name for branch in explanation.branches] == POINTS
    whole = explain(Model(), X, backend=dropbp_backend(inner="aot_eager"))
    saved = explanation.cost_of([]).backward_flops - explanation.cost_of(["layers.3.mlp"]).backward_flops
    assert saved == whole.cost_of([]).backward_flops - whole.cost_of(["layers.3.mlp"]).backward_flops


def test_without_registration_the_model_that_calls_the_layers_tells_them_apart() -> None:
    model = Model()
    reference = copy.deepcopy(model)
    backend = dropbp_backend(inner="aot_eager", seed=0)
    for layer in model.layers:
        layer.compile(backend=backend)
    loss(model).backward()
    assert [branch.name for branch in backend.branches] == POINTS
    assert_exact_against(model, reference, backend, [[], [0], [1, 6], [2, 3, 4, 5]])


def test_layers_that_no_module_calls_are_models_of_their_own() -> None:
    model = Model()
    reference = copy.deepcopy(model)
    backend = dropbp_backend(inner="aot_eager", seed=0)
    for layer in model.layers:
        layer.compile(backend=backend)

    def run(x: Tensor) -> Tensor:
        for layer in model.layers:
            x = layer(x)
        return model.head(x)

    patterns: list[frozenset[int]] = []
    backend.on_sample(lambda _indices, dropped: patterns.append(dropped))
    actual = compiled(model, loss, run)
    numbers = ["", *(f"@{number}" for number in range(2, len(POINTS) // 2 + 1))]
    assert [branch.name for branch in backend.branches] == [f"{n}{k}" for k in numbers for n in ("attention", "mlp")]
    assert [len(dropped) for dropped in patterns] == [1] * len(numbers)
    points = [POINTS[index] for dropped in patterns for index in dropped]
    assert_equal(actual, eager(reference, loss, points))


def test_what_is_refused() -> None:
    with pytest.raises(
        TypeError, match="register\\(\\) takes the model that the compiled layers belong to, not 'model'"
    ):
        dropbp_backend().register("model")  # type: ignore[arg-type]
    model, backend = make()
    loss(model).backward()
    with pytest.raises(RuntimeError, match="has found 8 branches already, and named them"):
        backend.register(model)


def test_a_module_that_shares_a_parameter_is_told_apart_by_the_other() -> None:
    model = Model()
    for layer in model.layers[1:]:
        layer.norm.weight = model.layers[0].norm.weight  # the first parameter of each
    reference = copy.deepcopy(model)
    model, backend = make(model=model)
    loss(model).backward()
    assert [branch.name for branch in backend.branches] == POINTS
    assert_exact_against(model, reference, backend, [[], [1, 2, 4]])


def test_a_patterns_gradient_adds_up_over_micro_batches() -> None:
    model, backend = make()
    reference = copy.deepcopy(model)
    for layer in reference.layers:
        layer._compiled_call_impl = None
    loss(model).backward()
    model.zero_grad()
    with record_patterns(backend) as history:
        for _ in range(3):
            loss(model).backward()
    for pattern in history.patterns:
        with detached(reference, [POINTS[i] for i in sorted(pattern)]):
            loss(reference).backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
