"""Patterns that are held for several forwards, and layers that are dropped by their places."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropbp_fx import DropBPBackend, DropPolicy, LayersPattern, LessDroppedWarning
from tests.helpers import compile_model
from tests.oracle import assert_equal, compiled, eager


class SixLayers(nn.Module):
    """Twelve branches, an embedding of sorts below and a head above."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(6))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


class Work(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.work = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.work(x).tanh()
        return result


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Work()
        self.second = Work()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def six_loss(model: Any) -> Tensor:
    result: Tensor = model(torch.linspace(-1, 1, 12).reshape(3, 4)).square().sum()
    return result


def six_layers(**options: Any) -> tuple[SixLayers, DropBPBackend, Any]:
    torch.manual_seed(0)
    model = SixLayers()
    return model, *compile_model(model, **options)


def kept_layers(model: SixLayers, run: Any, loss: Any = six_loss) -> frozenset[int]:
    model.zero_grad()
    loss(run).backward()
    kept = [layer.first.work.weight.grad is not None for layer in model.layers]
    assert kept == [layer.second.work.weight.grad is not None for layer in model.layers]
    return frozenset(index for index, flag in enumerate(kept) if flag)


def test_a_pattern_is_held_for_so_many_forwards_also_by_a_run_that_is_resumed_in_the_middle() -> None:
    options: dict[str, Any] = {"granularity": "layer", "drop": "weights", "hold": 5}
    model, backend, run = six_layers(rate=0.5, **options)
    seen, state = [], {}
    for forward in range(40):
        if forward == 12:
            state = backend.state_dict()
        seen.append(kept_layers(model, run))
    assert {len(kept) for kept in seen} == {3}
    held = [set(seen[start : start + 5]) for start in range(0, 40, 5)]
    assert all(len(choice) == 1 for choice in held)
    assert len(set.union(*held)) > 4
    torch._dynamo.reset()
    model, backend, run = six_layers(rate=0.5, **options)
    backend.load_state_dict(state)
    assert [kept_layers(model, run) for _ in range(12, 40)] == seen[12:]


def test_without_hold_patterns_are_those_of_before() -> None:
    """A pattern goes by the number of its forward."""
    found = []
    for hold in (1, 3):
        torch._dynamo.reset()
        model, _, run = six_layers(rate=0.5, granularity="layer", hold=hold)
        found.append([kept_layers(model, run) for _ in range(9)])
    every, held = found
    assert held[::3] == every[:3]


def test_all_graphs_of_a_forward_hold_together_and_micro_batches_count() -> None:
    model, backend, _ = six_layers(rate=0.5, granularity="layer", hold=4)
    for layer in model.layers:
        layer.compile(backend=backend)
    kept_layers(model, model)  # layers are met one by one
    seen = []
    for _ in range(11):
        model.zero_grad()
        seen.append(kept_layers(model, model))
    assert [len(set(seen[start : start + 4])) for start in (3, 7)] == [1, 1]
    assert len(set(seen[:3])) == 1
    assert backend.stats.forwards == 12


def test_lisa_trains_the_weights_of_few_layers_exactly_and_all_else() -> None:
    model, _, run = six_layers(rate=2 / 3, policy="lisa")
    reference = copy.deepcopy(model)
    six_loss(reference).backward()
    exact = {name: p.grad for name, p in reference.named_parameters()}
    seen = [kept_layers(model, run) for _ in range(60)]
    assert [len(set(seen[start : start + 20])) for start in (0, 20, 40)] == [1, 1, 1]
    assert {len(kept) for kept in seen} == {2}
    assert len(set(seen)) > 1
    missing = {f"layers.{layer}" for layer in range(6)} - {f"layers.{layer}" for layer in seen[-1]}
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name.rpartition(".")[0][:8] in missing), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, exact[name])


def test_moments_of_layers_that_are_not_trained_are_freed_by_hand() -> None:
    model, _, run = six_layers(rate=2 / 3, policy="lisa")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(45):
        kept = kept_layers(model, run)
        optimizer.step()
    held = sum(p in optimizer.state for p in model.layers.parameters())
    assert held > 4 * len(kept)
    for p in model.parameters():
        if p.grad is None:
            optimizer.state.pop(p, None)
    assert sum(p in optimizer.state for p in model.layers.parameters()) == 4 * len(kept)
    kept_layers(model, run)
    optimizer.step()


@pytest.mark.parametrize(
    ("pattern", "dropped"),
    [
        ("layers[:2]", {0, 1}),
        (LayersPattern(None, -2), {0, 1, 2, 3}),
        ("layers[-2:]", {4, 5}),
        ("layers[1:-1]", {1, 2, 3, 4}),
        ("layers[4:100]", {4, 5}),
        ("layers[:100]", {0, 1, 2, 3, 4}),  # the last that can be trained stays
    ],
)
def test_layers_are_dropped_by_their_places(pattern: Any, dropped: set[int]) -> None:
    model, backend, run = six_layers(rate=0.5, pattern=pattern)
    reference = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LessDroppedWarning)
        for _ in range(22):
            assert kept_layers(model, run) == set(range(6)) - dropped
    points = [f"layers.{layer}.{part}.work" for layer in dropped for part in ("first", "second")]
    actual = compiled(model, six_loss, run)
    assert_equal(actual, eager(reference, six_loss, points), what=str(pattern))
    assert backend.stats.attainable_rate == pytest.approx(len(dropped) / 6)


def test_the_first_layers_dropped_with_all_below_are_as_if_frozen() -> None:
    model, _, run = six_layers(policy=DropPolicy(pattern=LayersPattern(0, 2), drop="below"), rate=None)
    assert kept_layers(model, run) == {2, 3, 4, 5}
    assert model.embed.weight.grad is None
    frozen = SixLayers()
    frozen.load_state_dict(model.state_dict())
    frozen.layers[:2].requires_grad_(False)
    frozen.embed.requires_grad_(False)
    six_loss(frozen).backward()
    for mine, other in zip(model.parameters(), frozen.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None and other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def test_layers_of_rate_zero_are_not_dropped() -> None:
    model, backend, run = six_layers(rate=0.25, pattern="layers[:3]", schedule="step")
    assert kept_layers(model, run) == set(range(6))
    backend.progress = 0.75
    assert kept_layers(model, run) == {3, 4, 5}


def test_a_range_of_layers_has_one_name() -> None:
    assert DropPolicy(pattern=LayersPattern(0, 8)) == DropPolicy.from_fields({"pattern": "layers[ 0 : 8 ]"})
    assert DropPolicy(pattern=LayersPattern(0, 8)).pattern == "layers[:8]"
    with pytest.raises(TypeError, match=r"stop must be a whole number, the place of a layer, or None, not 'two'\."):
        LayersPattern(0, "two")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stop must be the place of a layer, at most 999999999, not 1000000000\."):
        LayersPattern(0, 10**9)
    farthest = LayersPattern(-(10**9) + 1, 10**9 - 1)
    assert DropPolicy(pattern=farthest).resolved_pattern == farthest
