"""Rates, schedules, allocation, patterns, rescaling and weights-only dropping, on compiled models."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dropbp_fx import (
    DropPolicy,
    LateRamp,
    LowestPattern,
    Ramp,
    RandomPattern,
    Steps,
    Unit,
    WindowPattern,
    allocate,
    dropbp_backend,
    explain,
)
from dropbp_fx.graph import gating
from dropbp_fx.graph.cost import node_flops
from dropbp_fx.policy import drop_policy
from dropbp_fx.policy.allocation import objective
from dropbp_fx.policy.drop_policy import PolicyName
from dropbp_fx.policy.patterns import PatternName, known_name, resolve_pattern
from dropbp_fx.policy.schedules import rate_schedule
from tests.flops import FlopCounter
from tests.helpers import compile_model, dropped_in, make_backend
from tests.oracle import Result, assert_equal, assert_exact, compiled, detached, eager, some_patterns
from tests.selection import sweep, thorough
from tests.test_allocation import greedy
from tests.test_calibration import LLAMA, llama
from tests.test_models import IDS, SMALL, ResidualMLP, X, language_loss, square_loss

MLP = [f"blocks.{i}" for i in range(3)]


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_branchs_backward_flops_are_what_dropping_it_saves() -> None:
    counter = FlopCounter()
    backend, run = compile_model(llama(), inner=counter.inner)
    with backend.disabled():
        language_loss(run).backward()

    def backward(pattern: list[int]) -> int:
        with backend.pinned(pattern):
            loss = language_loss(run)
        counter.reset()
        loss.backward()
        return counter.backward

    exact = backward([])
    for branch in backend.branches:
        assert exact - backward([branch.index]) == branch.backward_flops > 0, branch.name


@pytest.mark.thorough
def test_flops_are_those_of_torchs_own_counter() -> None:
    """The joint graphs of a model, summed, against what eager autograd does."""
    model = llama().float()
    counter = FlopCounter()
    backend, run = compile_model(model, inner=counter.inner)
    with backend.disabled():
        language_loss(run).backward()
    counter.reset()
    with backend.disabled():
        language_loss(run).backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the one whose products eager shows
        with FlopCounterMode(display=False) as forward:
            loss = language_loss(model)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert counter.forward == pytest.approx(forward.get_total_flops(), rel=0.02)
    assert counter.backward == pytest.approx(backward.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_whose_query_heads_share_keys_counts_as_if_they_did_not(backward: bool) -> None:
    name = "_scaled_dot_product_flash_attention" + "_backward" * backward
    graph = fx.Graph()

    def attention(key_heads: int) -> fx.Node:
        nodes = []
        for heads in [8] * backward + [8, key_heads, key_heads]:
            nodes.append(graph.placeholder("x"))
            nodes[-1].meta["val"] = torch.empty(2, heads, 16, 32, device="meta")
        return graph.call_function(getattr(torch.ops.aten, name).default, tuple(nodes))

    assert node_flops(attention(2)) == node_flops(attention(8)) > 0


def test_the_dropped_flops_are_budgeted_not_the_number_of_branches() -> None:
    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [8, 64, 16, 32, 8, 64, 16, 32]
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 16)) for width in widths
            )
            self.stem = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return x

    backend, run = compile_model(Unequal(), 0.4)
    square_loss(run)
    flops = [branch.backward_flops for branch in backend.branches]
    assert len(set(flops)) == 4
    target, largest = 0.4 * sum(flops), max(flops)
    for _ in range(40):
        assert abs(sum(flops[index] for index in dropped_in(backend, run)) - target) < largest
    assert backend.stats.realised_flops_rate == pytest.approx(0.4, abs=0.05)


# ---- rates -----------------------------------------------------------------------------------------------------------


def test_rates_are_read_and_set_by_name_and_take_effect_without_compiling() -> None:
    backend, run = compile_model(ResidualMLP(), 0.5)
    with pytest.raises(KeyError, match=r"no branch named 'blocks\.0' yet: .* Set rates after the first forward"):
        backend.rates["blocks.0"] = 0.1
    dropped_in(backend, run)
    assert dict(backend.rates) == dict.fromkeys(MLP, 0.5)
    backend.warmup()
    compiled_before = backend.stats.compiled_variants
    backend.rates["blocks.0"] = 0.0
    backend.rates = {"blocks.1": 0.7, "blocks.2": 0.0}
    drops = [dropped_in(backend, run) for _ in range(30)]
    assert {tuple(pattern) for pattern in drops} == {(), (1,)}
    assert 12 <= sum(map(len, drops)) < 28
    del backend.rates["blocks.0"]
    assert list(backend.rates.values()) == [0.5, 0.7, 0.0]
    backend.rate = 0.25
    assert list(backend.rates.values()) == [0.25] * 3, "a new rate takes back those set by hand"
    assert backend.stats.compiled_variants == compiled_before


def test_bad_rates_by_name_change_nothing() -> None:
    backend, run = compile_model(ResidualMLP())
    square_loss(run)
    with pytest.raises(KeyError, match=r"no branch named 'blocks\.9'; did you mean 'blocks\.\d'"):
        backend.rates = {"blocks.0": 0.1, "blocks.9": 0.1}
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), not 1\.5"):
        backend.rates = {"blocks.0": 0.1, "blocks.1": 1.5}
    assert dict(backend.rates) == dict.fromkeys(MLP, 0.5)


# ---- allocation ------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_allocation_by_sensitivity_follows_a_calibration_and_holds_the_flops_budget() -> None:
    backend, run = compile_model(llama(), 0.5, allocation="sensitivity", max_rate=0.9)
    language_loss(run)
    assert set(backend.rates.values()) == {0.5}, "uniform before anything is known"
    found = backend.calibrate(lambda: language_loss(run))
    rates = list(backend.rates.values())
    flops = [branch.backward_flops for branch in backend.branches]
    assert sum(r * f for r, f in zip(rates, flops, strict=True)) / sum(flops) == pytest.approx(0.5, rel=0.005)
    assert len(set(rates)) > 1
    assert max(rates) <= 0.9
    assert objective(found.values, rates) < objective(found.values, [0.5] * 4)
    for _ in range(300):
        dropped_in(backend, run, language_loss)
    for branch in backend.branches:
        assert branch.realised_rate == pytest.approx(branch.rate, abs=0.13)
    assert backend.stats.realised_flops_rate == pytest.approx(0.5, abs=0.05)


@pytest.mark.thorough
def test_on_measured_sensitivities_a_greedy_rule_of_tenths_is_never_better() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 6}))
    backend, run = compile_model(model)
    for metric in ("gradnorm", "gradient"):
        values = backend.calibrate(lambda: language_loss(run), metric=metric, batches=2).values  # type: ignore[arg-type]
        flops = [float(branch.backward_flops) for branch in backend.branches]
        for rate in (0.25, 0.5, 0.75):
            theirs = greedy(values, flops, rate)
            ours = allocate(values, flops, rate, max_rate=0.9)
            assert objective(values, ours) < objective(values, theirs)
            reached = sum(r * f for r, f in zip(theirs, flops, strict=True)) / sum(flops)
            equal = allocate(values, flops, reached, max_rate=0.9)
            assert objective(values, equal) <= objective(values, theirs) * (1 + 1e-9)


def test_an_explanation_of_a_backend_shows_measured_sensitivities_and_rates() -> None:
    backend, run = compile_model(ResidualMLP(), allocation="sensitivity")
    found = backend.calibrate(lambda: square_loss(run))
    explained = explain(backend).branches
    assert [branch.sensitivity for branch in explained] == list(found.values)
    assert [branch.rate for branch in explained] == list(backend.rates.values())


@pytest.mark.thorough
def test_allocation_survives_a_resume_and_a_new_rate() -> None:
    model = llama()
    backend, run = compile_model(model, 0.5, allocation="sensitivity")
    backend.calibrate(lambda: language_loss(run))
    dropped_in(backend, run, language_loss)
    other, run_other = compile_model(model, 0.5, allocation="sensitivity")
    other.load_state_dict(backend.state_dict())
    assert dict(other.rates) == dict(backend.rates)
    assert other.sensitivity == backend.sensitivity
    patterns = [[dropped_in(b, r, language_loss) for _ in range(10)] for b, r in ((backend, run), (other, run_other))]
    assert patterns[0] == patterns[1]
    backend.rate = 0.25
    flops = [branch.backward_flops for branch in backend.branches]
    spent = sum(r * f for r, f in zip(backend.rates.values(), flops, strict=True))
    assert spent / sum(flops) == pytest.approx(0.25, rel=0.005)


@pytest.mark.thorough
def test_running_estimates_reallocate_by_themselves() -> None:
    backend, run = compile_model(llama(), 0.4, allocation="sensitivity", reallocate_every=120)
    for _ in range(120):
        dropped_in(backend, run, language_loss)
    assert set(backend.rates.values()) == {0.4}
    dropped_in(backend, run, language_loss)
    estimate = backend.sensitivity
    assert estimate is not None, "six forwards are observed, and rate .4 leaves a branch out of two or three of them"
    assert len(set(backend.rates.values())) > 1
    exact = backend.calibrate(lambda: language_loss(run), metric="gradient")
    for source, values in (("estimated", estimate.values), ("exact", exact.values)):
        assert min(values[0], values[2]) > 4 * max(values[1], values[3]), f"attention matters more here ({source})"


@pytest.mark.thorough
def test_an_observed_step_has_the_gradients_of_any_other() -> None:
    model = llama()
    observing, run = compile_model(model, 0.25, allocation="sensitivity", reallocate_every=1000)
    _, run_plain = compile_model(model, 0.25)
    for number in range(64):
        actual, expected = compiled(model, language_loss, run), compiled(model, language_loss, run_plain)
        assert_equal(actual, expected, rtol=0, atol=0, what=f"forward {number}")
    assert observing.running_sensitivity is not None


def test_an_observed_step_may_keep_its_graph() -> None:
    model = ResidualMLP()
    backend, run = compile_model(model, 0.3, allocation="sensitivity", reallocate_every=1000)
    before = torch._functorch.config.donated_buffer
    torch._functorch.config.donated_buffer = False
    try:
        loss = square_loss(run)
        loss.backward(retain_graph=True)
        once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        loss.backward()
    finally:
        torch._functorch.config.donated_buffer = before
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient)
    assert backend.running_sensitivity is None or backend.running_sensitivity.values


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.3, 0.3, 0.3]),
        ("ramp_up", [0.0, 0.3, 0.6]),
        ("ramp_down", [0.6, 0.3, 0.0]),
        ("step", [0.0, 0.6, 0.6]),
        ("late_ramp", [0.0, 0.95 * (0.5 - (1 - 0.6 / 0.95)) / (0.6 / 0.95), 0.95]),
        (Ramp(0.1, 0.5), [0.1, 0.3, 0.5]),
        (Steps(((0.0, 0.2), (0.9, 0.7))), [0.2, 0.2, 0.7]),
        (lambda progress: 0.5 * progress**2, [0.0, 0.125, 0.5]),
    ],
)
def test_a_schedule_moves_with_progress_that_the_loop_sets(schedule: Any, expected: list[float]) -> None:
    backend, run = compile_model(ResidualMLP(), 0.3, schedule=schedule)
    square_loss(run)
    for progress, rate in zip((0.0, 0.5, 1.0), expected, strict=True):
        backend.progress = progress
        assert list(backend.rates.values()) == pytest.approx([rate] * 3)
        assert backend.rate == 0.3


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.475, 0.6, 0.9])
def test_a_late_ramp_has_the_rate_as_its_mean_and_ends_at_the_highest(rate: float) -> None:
    schedule = rate_schedule("late_ramp", rate, 0.95)
    values = [schedule((i + 0.5) / 10_000) for i in range(10_000)]
    assert sum(values) / len(values) == pytest.approx(rate, abs=1e-4)
    assert values == sorted(values)
    assert schedule(1.0) == pytest.approx(0.95)
    assert (schedule(0.0) == 0.0) == (rate <= 0.475)


def test_a_late_ramp_of_rate_zero_never_begins() -> None:
    backend, run = compile_model(ResidualMLP(), 0.25, policy="progressive_freezing")
    square_loss(run)
    backend.rate = 0.0
    for progress in (0.0, 0.5, 1.0):
        backend.progress = progress
        assert set(backend.rates.values()) == {0.0}
    with pytest.raises(ValueError, match=r"begin must be in \[0, 1\), not 1: it is the share of the run that is done"):
        LateRamp(1, 0.5)


def test_a_rate_above_the_highest_ends_a_late_ramp_there() -> None:
    schedule = rate_schedule("late_ramp", 0.99, 0.95)
    assert [schedule(progress) for progress in (0.0, 0.5, 1.0)] == [0.95] * 3


def test_progress_moves_a_schedule_and_a_resume_goes_on() -> None:
    model = ResidualMLP()
    options = {"schedule": Ramp(0.0, 0.8)}
    backend, run = compile_model(model, 0.4, **options)
    seen = []
    for step in range(6):
        backend.progress = step / 10
        dropped_in(backend, run)
        seen.append(backend.rates["blocks.0"])
    resumed, run_resumed = compile_model(model, 0.4, **options)
    resumed.load_state_dict(backend.state_dict())
    assert resumed.progress == backend.progress
    for step in range(6, 14):
        resumed.progress = min(step / 10, 1.0)
        dropped_in(resumed, run_resumed)
        seen.append(resumed.rates["blocks.0"])
    assert seen == pytest.approx([0.08 * i for i in range(11)] + [0.8] * 3)


@pytest.mark.filterwarnings("ignore:The rate asked for is 0.76")
def test_micro_batches_do_not_move_a_schedule_that_the_loop_advances() -> None:
    backend, run = compile_model(ResidualMLP(), schedule="ramp_up")
    for update in range(5):
        backend.progress = update / 5
        for _ in range(4):
            dropped_in(backend, run)
            assert backend.rates["blocks.1"] == pytest.approx(update / 5 * 0.95)


def test_a_rate_set_by_hand_follows_the_schedule_in_proportion() -> None:
    backend, run = compile_model(ResidualMLP(), 0.4, schedule="ramp_up")
    square_loss(run)
    backend.rates["blocks.1"] = 0.2
    backend.progress = 0.25
    assert list(backend.rates.values()) == pytest.approx([0.2, 0.1, 0.2])


def test_a_schedule_set_later_takes_effect_at_the_next_forward_and_bad_ones_change_nothing() -> None:
    backend, run = compile_model(ResidualMLP(), rate=0.4)
    square_loss(run).backward()
    backend.schedule = "ramp_up"
    backend.progress = 0.25
    assert backend.schedule == "ramp_up"
    assert [branch.rate for branch in backend.branches] == pytest.approx([0.2] * len(backend.branches))
    with pytest.raises(ValueError, match="schedule"):
        backend.schedule = "up"
    assert backend.schedule == "ramp_up"
    assert pickle.loads(pickle.dumps(backend)).schedule == "ramp_up"


def test_a_schedule_that_nobody_advances_warns() -> None:
    backend, run = compile_model(ResidualMLP(), schedule="ramp_up")
    for _ in range(99):
        square_loss(run)
    with pytest.warns(UserWarning, match=r"stayed at progress 0 for 100 forwards\. Set backend\.progress = step"):
        square_loss(run)
    assert backend.stats.realised_rate == 0


def test_a_callback_is_told_of_every_sample_until_it_is_ended() -> None:
    backend, run = compile_model(ResidualMLP())
    told: list[tuple[list[int], frozenset[int]]] = []
    end = backend.on_sample(lambda indices, dropped: told.append((list(indices), dropped)))
    expected = [frozenset(dropped_in(backend, run)) for _ in range(3)]
    with backend.pinned([1]):
        square_loss(run)
    with torch.no_grad():
        square_loss(run)
    assert told == [([0, 1, 2], dropped) for dropped in [*expected, frozenset({1})]]
    end()
    end()
    square_loss(run)
    assert len(told) == 4


def test_callbacks_may_end_themselves_or_one_another_and_what_they_raise_the_forward_raises() -> None:
    backend, run = compile_model(ResidualMLP())
    told: list[str] = []

    def once(*_: Any) -> None:
        told.append("once")
        end()

    def refuse(*_: Any) -> None:
        raise ZeroDivisionError("mine")

    backend.on_sample(lambda *_: told.append("always"))
    end = backend.on_sample(once)
    square_loss(run)
    square_loss(run)
    assert sorted(told) == ["always", "always", "once"]
    end = backend.on_sample(refuse)
    with pytest.raises(ZeroDivisionError, match="mine"):
        square_loss(run)
    end()
    square_loss(run)


# ---- policies by name ------------------------------------------------------------------------------------------------


def test_the_default_policy_is_the_papers() -> None:
    assert dropbp_backend()._config == dropbp_backend(policy="dropbp")._config
    policy = dropbp_backend().policy
    assert policy == DropPolicy() == DropPolicy.named("dropbp")
    assert (policy.rate, policy.resolved_pattern, policy.schedule, policy.allocation) == (
        0.5,
        RandomPattern(),
        "constant",
        "uniform",
    )


def test_a_policy_stands_in_for_what_is_not_given() -> None:
    policy = dropbp_backend(policy="progressive_freezing").policy
    assert (policy.rate, policy.resolved_pattern, policy.schedule) == (0.25, LowestPattern(), "late_ramp")
    mine = dataclasses.replace(policy, pattern="window", schedule=LateRamp(0.5, 0.8))
    policy = dropbp_backend(0.4, policy=mine).policy
    assert (policy.rate, policy.resolved_pattern, policy.schedule) == (0.4, WindowPattern(), LateRamp(0.5, 0.8))
    assert dropbp_backend(policy=mine).rate == 0.25
    assert dropbp_backend(0.0, policy="progressive_freezing").rate == 0.0  # zero is a rate that was given


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_every_policy_makes_a_backend_and_says_what_it_does(name: PolicyName) -> None:
    backend, run = compile_model(ResidualMLP(), rate=None, policy=name)
    backend.progress = 0.75
    square_loss(run).backward()
    assert backend.stats.realised_rate > 0
    assert DropPolicy.about(name).endswith(".")
    assert dataclasses.replace(DropPolicy.named(name), rate=0.7).name == name
    policy = DropPolicy.named(name)
    other: Any = {"branch": "layer", "layer": "branch"}[policy.granularity]
    assert dataclasses.replace(policy, granularity=other).name is None
    assert f'"{name}"' in str(dropbp_backend.__doc__)


def test_freezing_is_what_requires_grad_false_on_the_lowest_layers_and_the_embedding_is() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 4})).double()
    _, run = compile_model(model, None, policy="freezing")
    actual = compiled(model, language_loss, run)
    frozen = copy.deepcopy(model)
    frozen.model.layers[:2].requires_grad_(False)
    frozen.model.embed_tokens.requires_grad_(False)
    expected = eager(frozen, language_loss, ())
    everywhere = {name: expected.gradients.get(name) for name in actual.gradients}
    assert_equal(actual, Result(expected.loss, everywhere), rtol=1e-7, atol=1e-9)
    assert sum(gradient is None for gradient in everywhere.values()) == 1 + sum(
        1 for _ in frozen.model.layers[:2].parameters()
    )


def test_progressive_freezing_ends_layers_from_below_and_keeps_the_gradients_above_exact() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 4})).double()
    backend, run = compile_model(model, 0.25, policy="progressive_freezing")
    language_loss(run)  # branches are known from here on
    exact = eager(model, language_loss, ())
    frozen = []
    for step in range(21):
        backend.progress = step / 20
        before = [branch.times_dropped for branch in backend.branches]
        actual = compiled(model, language_loss, run)
        dropped = [b for b, was in zip(backend.branches, before, strict=True) if b.times_dropped > was]
        points = [branch.name for branch in dropped] + ["model.embed_tokens"] * bool(dropped)
        assert_equal(actual, eager(model, language_loss, points), rtol=1e-7, atol=1e-9)
        assert [branch.index for branch in dropped] == list(range(len(dropped)))
        frozen.append(len(dropped) // 2)
        for name, gradient in actual.gradients.items():
            if name.startswith("model.layers.") and int(name.split(".")[2]) >= frozen[-1]:
                torch.testing.assert_close(gradient, exact.gradients[name], msg=name)
    begin = 1 - 2 * 0.25 / 0.95
    depths = [4 * 0.95 * max(step / 20 - begin, 0) / (1 - begin) for step in range(21)]
    assert all(abs(layers - depth) < 1 for layers, depth in zip(frozen, depths, strict=True))
    assert (frozen[9], frozen[-1]) == (0, 3)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"policy": "freeze"},
            ValueError,
            r"no policy named 'freeze'; the names are 'dropbp', 'freezing', 'progressive_freezing', 'lisa'\. Pass one of "
            r"them, or a DropPolicy",
        ),
        (
            {"policy": None},
            TypeError,
            r"policy must be one of the names 'dropbp', 'freezing', 'progressive_freezing', 'lisa', or a DropPolicy, "
            r"not None",
        ),
        ({"pattern": "cyclic"}, ValueError, r"no pattern named 'cyclic'; the names are 'random', 'independent'"),
        ({"pattern": WindowPattern}, TypeError, r"pattern is the class WindowPattern, but must be an instance"),
        ({"allocation": "greedy"}, ValueError, r"allocation must be one of 'uniform', 'sensitivity', not 'greedy'"),
        ({"drop": "inputs"}, ValueError, r"drop must be one of 'branch', 'weights', 'below', not 'inputs'"),
        ({"max_rate": 1.0}, ValueError, r"max_rate must be in \(0, 1\), not 1\.0"),
        ({"max_rate": "1"}, TypeError, r"max_rate must be a number in \(0, 1\), not '1'"),
        (
            {"rate": 0.9, "max_rate": 0.8, "allocation": "sensitivity"},
            ValueError,
            r"rate=0\.9 and max_rate=0\.8: no allocation meets it\. Lower the rate or raise max_rate",
        ),
        ({"reallocate_every": 5}, ValueError, r"allocation='uniform' does not use\. Pass allocation='sensitivity'"),
        (
            {"reallocate_every": 0, "allocation": "sensitivity"},
            ValueError,
            r"reallocate_every must be at least 1, not 0",
        ),
        (
            {"activation_memory_budget": 1.5},
            ValueError,
            r"activation_memory_budget must be in \[0, 1\], not 1\.5: it is",
        ),
        (
            {"activation_memory_budget": True},
            TypeError,
            r"activation_memory_budget must be a number in \[0, 1\] or None",
        ),
        ({"hold": 0}, ValueError, r"hold must be at least 1, not 0"),
        ({"hold": 2.5}, TypeError, r"hold must be a whole number of forwards, not 2\.5"),
        ({"hold": None}, TypeError, r"hold must be a whole number of forwards, not None\."),
        ({"hold": True}, TypeError, r"hold must be a whole number of forwards, not True"),
        ({"pattern": "layers[:]"}, ValueError, r"LayersPattern needs a start or a stop: all layers of a model cannot"),
        ({"pattern": "layers[5:3]"}, ValueError, r"with start=5, stop=3 there are none\. Let stop be behind start"),
        ({"pattern": "layers[-4:0]"}, ValueError, r"with start=-4, stop=0 there are none\. Let stop be behind start"),
        ({"pattern": "layers[1:2:3]"}, ValueError, r"no pattern named .* and such as 'layers\[:8\]'"),
        ({"rescale": 1}, TypeError, r"rescale must be True or False, not 1"),
        ({"schedule": "cosine"}, ValueError, r"no schedule named 'cosine'; the names are 'constant', 'ramp_up'"),
        ({"schedule": 0.5}, TypeError, r"or a function from progress \(0 to 1\) to a rate, not 0\.5"),
        ({"schedule": Ramp(0, 1)}, ValueError, r"returned 1\.0 at progress 1; a rate must be in \[0, 1\)"),
        ({"schedule": lambda p: None}, TypeError, r"returned None at progress 0; it must return a rate"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make_backend(**options)


def test_equal_policies_are_those_that_do_the_same() -> None:
    assert DropPolicy(pattern=WindowPattern()) == DropPolicy(pattern="window")
    assert hash(DropPolicy(pattern=WindowPattern())) == hash(DropPolicy(pattern="window"))
    assert DropPolicy(rate=np.float32(0.5)) == DropPolicy()
    assert DropPolicy(pattern="lowest") != DropPolicy()
    assert pickle.loads(pickle.dumps(DropPolicy(schedule=Ramp(0.1, 0.2)))) == DropPolicy(schedule=Ramp(0.1, 0.2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        DropPolicy().rate = 0.3  # type: ignore[misc]


def test_a_policy_may_be_made_from_a_mapping_of_its_fields() -> None:
    assert DropPolicy.from_fields({"rate": 0.3, "pattern": "window"}) == DropPolicy(0.3, pattern="window")
    with pytest.raises(ValueError, match=r"A policy has no field 'patern'\. Did you mean 'pattern'\? Its fields are"):
        DropPolicy.from_fields({"patern": "window"})
    with pytest.raises(ValueError, match=r"A policy has no field 3\. Its fields are rate"):
        DropPolicy.from_fields({3: 4})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"A policy's fields must be a mapping from their names, not 'window'\."):
        DropPolicy.from_fields("window")  # type: ignore[arg-type]


def test_the_choices_of_graphs_and_policies_are_the_same() -> None:
    assert get_args(drop_policy.Drop) == get_args(gating.Drop)
    assert set(get_args(PatternName)) == {known_name(resolve_pattern(name)) for name in get_args(PatternName)}


def test_bad_progress_is_refused() -> None:
    backend = dropbp_backend()
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], not 1\.5: .* such as step / total"):
        backend.progress = 1.5
    with pytest.raises(TypeError, match=r"progress must be a number in \[0, 1\], not '1'"):
        backend.progress = "1"  # type: ignore[assignment]


# ---- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_suffix_and_window_drop_whole_contiguous_layers() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 6}))
    for pattern in ("suffix", "window"):
        backend, run = compile_model(model, 0.5, pattern=pattern)
        for _ in range(25):
            layers = {index // 2 for index in dropped_in(backend, run, language_loss)}
            dropped = dropped_in(backend, run, language_loss)
            layers = {index // 2 for index in dropped}
            assert len(dropped) == 2 * len(layers)
            borders = sum((i in layers) != ((i + 1) % 6 in layers) for i in range(6))
            assert borders <= 2, f"one run on the circle of layers: {layers}"
            if pattern == "suffix":
                assert layers == set(range(len(layers)))
            else:
                assert len(layers) == 3
        torch._dynamo.reset()


def test_a_pattern_of_ones_own_is_a_function() -> None:
    def lowest_layers(units: Sequence[Unit], rng: random.Random) -> Collection[int]:
        return range(rng.choice([1, 2]))

    backend, run = compile_model(ResidualMLP(), pattern=lowest_layers)
    assert {tuple(dropped_in(backend, run)) for _ in range(20)} == {(0,), (0, 1)}


def test_a_bad_pattern_of_ones_own_is_refused_at_its_first_draw() -> None:
    _, run = compile_model(ResidualMLP(), pattern=lambda units, rng: [len(units)])
    with pytest.raises(IndexError, match=r"returned the index 3, but there are 3 units, numbered from 0 to 2"):
        square_loss(run)


def backward_flops_of_eager(model: Any, points: list[str]) -> int:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), detached(model, points):
        loss = language_loss(model)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("lowest", sweep([0, 3, 7], [3]))
def test_below_the_lowest_kept_branch_of_a_model_frozen_below_no_gradient_work_is_done(lowest: int) -> None:
    """Adapters on a frozen model: not one operation below, and no input gradient at the lowest."""
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 4}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "up_proj" in name)
    points = [f"model.layers.{i}.{name}" for i in range(4) for name in ("self_attn", "mlp")]
    counter = FlopCounter()
    backend, run = compile_model(model, inner=counter.inner)
    pattern = [index for index in range(8) if index != lowest]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with backend.disabled():
            language_loss(run)
        with backend.pinned(pattern):
            loss = language_loss(run)
    counter.reset()
    loss.backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == {f"model.layers.{lowest // 2}.{'mlp.up_proj' if lowest % 2 else 'self_attn.q_proj'}.weight"}
    model.zero_grad()
    assert counter.backward == backward_flops_of_eager(model, [points[index] for index in pattern])


def test_saved_bytes_do_not_depend_on_how_deep_the_lowest_kept_branch_of_a_frozen_model_is() -> None:
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 4}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    backend, run = compile_model(model)

    def saved(kept: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with (
            backend.pinned([index for index in range(8) if index != kept]),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            language_loss(run)
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    saved(0)
    assert saved(0) == saved(4) == saved(6) > 0


# ---- rescaling -------------------------------------------------------------------------------------------------------


def test_kept_gradients_are_scaled_and_pinned_ones_are_not() -> None:
    model = ResidualMLP()
    backend, run = compile_model(model, 0.25, rescale=True, pattern=lambda units, rng: [0])
    exact = eager(model, square_loss, MLP[:1])
    with backend.pinned([0]):
        assert_equal(compiled(model, square_loss, run), exact)
    with backend.disabled():
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, []))
    scaled = compiled(model, square_loss, run).gradients
    # Behind the last block only the head: exact. The last block's own parameters: once scaled.
    torch.testing.assert_close(scaled["head.weight"], exact.gradients["head.weight"])
    wanted = exact.gradients["blocks.2.2.weight"]
    assert wanted is not None
    torch.testing.assert_close(scaled["blocks.2.2.weight"], wanted / 0.75)
    assert scaled["blocks.0.0.weight"] is None


def test_a_new_rate_changes_the_scale_without_compiling() -> None:
    model = ResidualMLP()
    backend, run = compile_model(model, 0.2, rescale=True, pattern=lambda units, rng: [])
    first = compiled(model, square_loss, run).gradients["blocks.2.2.bias"]
    variants = backend.stats.compiled_variants
    backend.rate = 0.6
    second = compiled(model, square_loss, run).gradients["blocks.2.2.bias"]
    assert first is not None
    assert second is not None
    torch.testing.assert_close(second / first, torch.full_like(first, 0.8 / 0.4))
    assert backend.stats.compiled_variants == variants


@pytest.mark.thorough
@pytest.mark.parametrize("inside", [False, True])
def test_rescaled_gradients_are_unbiased_under_independent_draws(inside: bool) -> None:
    """The mean over n draws comes to the exact gradient like 1 / sqrt(n); without rescaling it does not come at all."""
    model: Any = ResidualMLP(depth=8).double()
    if inside:  # each block in an activation checkpoint that Dynamo traces

        def forward(x: Tensor) -> Tensor:
            x = model.stem(x)
            for block in model.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return model.head(x)  # type: ignore[no-any-return]

        model.forward = forward
    x = X.double()

    def loss_of(run: Any) -> Tensor:
        return run(x).square().mean()

    exact = torch.cat([g.flatten() for g in eager(model, loss_of, []).gradients.values() if g is not None])

    def errors(rescale: bool) -> list[float]:
        torch._dynamo.reset()
        _, run = compile_model(model, 0.25, rescale=rescale, pattern="independent")
        loss_of(run)
        total = torch.zeros_like(exact)
        found = []
        for number in range(1, 1601):
            gradients = compiled(model, loss_of, run).gradients
            total += torch.cat(
                [
                    (torch.zeros_like(p) if gradients[n] is None else gradients[n]).flatten()
                    for n, p in model.named_parameters()
                ]
            )
            if number in (100, 400, 1600):
                found.append(float((total / number - exact).norm() / exact.norm()))
        return found

    unbiased, biased = errors(True), errors(False)
    assert unbiased[2] < 0.1
    slope = math.log(unbiased[2] / unbiased[0]) / math.log(16)
    assert -0.9 < slope < -0.2, f"errors {unbiased} should shrink like n^-0.5"
    assert biased[2] > 0.1
    assert biased[2] > 3 * unbiased[2]


def _dense(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


# ---- weights only ----------------------------------------------------------------------------------------------------


def weights_oracle(model: nn.Module, loss_of: Callable[[Any], Tensor], modules: Sequence[str]) -> Any:
    """Eager gradients with the parameters of ``modules`` detached where those modules use them."""
    frozen = [p for path in modules for p in model.get_submodule(path).parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = loss_of(model)
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    for parameter in frozen:
        parameter.requires_grad_(True)
    return loss.detach(), gradients


@pytest.mark.parametrize("make", [ResidualMLP, thorough(llama)], ids=["mlp", "llama"])
def test_dropping_weights_leaves_all_other_gradients_exact(make: Callable[[], nn.Module]) -> None:
    model = make()
    loss_of = square_loss if isinstance(model, ResidualMLP) else language_loss
    points = MLP if isinstance(model, ResidualMLP) else LLAMA
    norms = [] if isinstance(model, ResidualMLP) else ["input_layernorm", "post_attention_layernorm"]
    backend, run = compile_model(model, drop="weights")
    for pattern in some_patterns(len(points)):
        with backend.pinned(sorted(pattern)):
            actual = compiled(model, loss_of, run)
        dropped = [points[index] for index in sorted(pattern)]
        dropped += [f"model.layers.{index // 2}.{norms[index % 2]}" for index in pattern if norms]
        loss, expected = weights_oracle(model, loss_of, dropped)
        torch.testing.assert_close(actual.loss, loss)
        for name, gradient in actual.gradients.items():
            if name in expected:
                torch.testing.assert_close(gradient, expected[name])
            else:
                assert gradient is None, name


def below_oracle(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], pattern: Collection[int], points: Sequence[str], stem: str
) -> Result:
    """Where branch 0 is dropped, what lies below the first kept branch is the stem, so its output is detached, too."""
    return eager(model, loss_of, [points[index] for index in sorted(pattern)] + ([stem] if 0 in pattern else []))


@pytest.mark.parametrize(
    "case",
    sweep(["mlp", "llama", "llama, layers compiled", "llama, layers checkpointed"], ["mlp", "llama, layers compiled"]),
)
def test_nothing_below_the_first_kept_branch_is_trained(case: str) -> None:
    model = ResidualMLP() if case == "mlp" else llama()
    loss_of, points, stem = (
        (square_loss, MLP, "stem") if case == "mlp" else (language_loss, LLAMA, "model.embed_tokens")
    )
    reference = copy.deepcopy(model)
    if case.endswith("checkpointed"):  # the branches of a layer are then in one region
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    backend, run = compile_model(model, drop="below", pattern="lowest")
    if case.endswith("compiled"):
        backend.register(model)
        for layer in model.model.layers:
            layer.compile(backend=backend)
        run = model
    for pattern in some_patterns(len(points)):
        with backend.pinned(sorted(pattern)):
            actual = compiled(model, loss_of, run)
        assert len(backend.branches) == len(points)
        assert_equal(actual, below_oracle(reference, loss_of, pattern, points, stem), what=f"pattern {sorted(pattern)}")


@pytest.mark.thorough
def test_a_tied_embedding_is_trained_by_the_head_alone_where_the_lowest_layers_are_dropped() -> None:
    model = llama(tie_word_embeddings=True)
    backend, run = compile_model(model, drop="below", pattern="lowest")
    for pattern in ([], [0], [0, 1], [1, 2]):
        with backend.pinned(pattern):
            actual = compiled(model, language_loss, run)
        assert actual.gradients["model.embed_tokens.weight"] is not None
        assert_equal(
            actual, below_oracle(model, language_loss, pattern, LLAMA, "model.embed_tokens"), what=f"{pattern}"
        )


@pytest.mark.thorough
def test_steps_below_which_nothing_is_trained_need_nothing_that_warmup_did_not_compile() -> None:
    model = llama()
    backend, run = compile_model(model, drop="below", pattern="lowest")
    language_loss(run)
    backend.warmup()
    compiled_before = backend.stats.compiled_variants
    for count in range(len(LLAMA)):
        with backend.pinned(list(range(count))):
            language_loss(run).backward()
    assert backend.stats.compiled_variants == compiled_before


def test_a_weight_that_two_branches_share_keeps_the_other_branchs_share() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 16)
            self.block = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.block(x).tanh()
            return x + self.block(x).sin()

    model = Shared()
    backend, run = compile_model(model, drop="weights")
    x = model.stem(X)
    weight, bias = model.block.weight.detach(), model.block.bias.detach()
    first = x + nn.functional.linear(x, weight, bias).tanh()
    (first + model.block(first).sin()).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with backend.pinned([0]):
        actual = compiled(model, square_loss, run).gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


@pytest.mark.thorough
def test_dropping_weights_saves_the_weights_share_of_the_backward() -> None:
    whole, run_whole = compile_model(llama())
    weights, run_weights = compile_model(llama(), drop="weights")
    language_loss(run_whole)
    language_loss(run_weights)
    for branch, half in zip(whole.branches, weights.branches, strict=True):
        assert 0.3 * branch.backward_flops < half.backward_flops <= 0.5 * branch.backward_flops


def test_rescaled_weight_gradients_are_scaled_and_nothing_else_is() -> None:
    model = ResidualMLP()
    _, run = compile_model(model, 0.5, drop="weights", rescale=True, pattern=lambda units, rng: [1])
    actual = compiled(model, square_loss, run).gradients
    exact = eager(model, square_loss, []).gradients
    for name, gradient in exact.items():
        assert gradient is not None
        if name.startswith("blocks.1"):
            assert actual[name] is None
        else:
            torch.testing.assert_close(actual[name], gradient * (2 if name.startswith("blocks") else 1))


def test_calibration_of_dropped_weights_is_their_squared_norm() -> None:
    model = ResidualMLP().double()
    backend, run = compile_model(model, drop="weights")
    x = X.double()
    found = backend.calibrate(lambda: run(x).square().mean())
    exact = eager(model, lambda m: m(x).square().mean(), []).gradients
    for index, value in enumerate(found.values):
        mine = [g for name, g in exact.items() if name.startswith(f"blocks.{index}.") and g is not None]
        assert value == pytest.approx(sum(float(g.norm()) ** 2 for g in mine), rel=1e-6)


@pytest.mark.thorough
@pytest.mark.inductor
def test_inductor_rescales_and_drops_weights() -> None:
    for options in ({"rescale": True, "pattern": "independent"}, {"drop": "weights"}):
        torch._dynamo.reset()
        model = ResidualMLP()
        backend, run = compile_model(model, 0.5, inner="inductor", **options)
        reference, run_reference = compile_model(model, 0.5, **options)
        for _ in range(4):
            assert_equal(compiled(model, square_loss, run), compiled(model, square_loss, run_reference))
        assert backend.stats.realised_rate == reference.stats.realised_rate > 0
        assert IDS is not None


# ---- activation memory -------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, run: Any, loss_of: Callable[[Any], Tensor]) -> int:
    """What one forward keeps for its backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(run)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters)


@pytest.mark.thorough
def test_a_memory_budget_recomputes_within_kept_branches_and_changes_no_gradient() -> None:
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).train()
    names = [f"model.layers.{i}.{part}" for i in range(SMALL["num_hidden_layers"]) for part in ("self_attn", "mlp")]
    saved: list[int] = []
    for budget in (None, 0.5, 0.0):
        torch._dynamo.reset()
        backend, run = compile_model(model, activation_memory_budget=budget)
        assert_exact(model, run, backend, language_loss, names, patterns=[set(), {1}, {0, 3}])
        with backend.disabled():
            saved.append(saved_bytes(model, run, language_loss))
    assert saved[2] < saved[1] < saved[0], saved


@pytest.mark.thorough
def test_the_head_and_the_loss_are_not_recomputed_for_a_memory_budget() -> None:
    """They would cost much and save next to nothing: FLOPs of the backward grow by the branches' forwards at most."""

    def backward_flops(budget: float | None) -> int:
        torch._dynamo.reset()
        model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "vocab_size": 4096})).train()
        counter = FlopCounter()
        _, run = compile_model(model, rate=0.0, activation_memory_budget=budget, inner=counter.inner)
        language_loss(run).backward()
        return counter.backward

    head = 2 * IDS.numel() * SMALL["hidden_size"] * 4096
    assert 0 < backward_flops(0.0) - backward_flops(None) < head
