"""Several models under one backend are told apart by their modules."""

from __future__ import annotations

import copy
import gc
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dropbp_fx import DropBPBackend, dropbp_backend, explain
from tests.helpers import make_backend
from tests.test_trainability import Net, loss, make, step, train_only

NAMES = [f"blocks.{i}.inner" for i in range(4)]


def second(names: list[str], number: int = 2) -> list[str]:
    return [f"{name}@{number}" for name in names]


def two(rate: float, **options: Any) -> tuple[DropBPBackend, list[Net], list[Any]]:
    backend = make_backend(rate, **{"inner": "aot_eager", "seed": 0, **options})
    models = [Net(), Net()]
    return backend, models, [torch.compile(model, backend=backend) for model in models]


@pytest.mark.parametrize("alike", [True, False], ids=["one graph", "two graphs"])
def test_budgets_and_the_branch_that_is_kept_are_each_models_own(alike: bool) -> None:
    backend = dropbp_backend(0.75, inner="aot_eager", seed=0)
    models = [Net(), Net() if alike else Net(depth=8)]
    runs = [torch.compile(model, backend=backend) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(6):
            for model, run in zip(models, runs, strict=True):
                before = sum(branch.times_dropped for branch in backend.branches)
                step(model, backend, run)
                dropped = sum(branch.times_dropped for branch in backend.branches) - before
                assert dropped == 3 * len(model.blocks) // 4
            assert backend.stats.forwards == 2 * number + 2
    depth = len(models[1].blocks)
    assert [b.name for b in backend.branches] == NAMES + second([f"blocks.{i}.inner" for i in range(depth)])
    assert [b.layer for b in backend.branches][4:6] == ["blocks.0@2", "blocks.1@2"]
    assert [b.model for b in backend.branches] == [1] * 4 + [2] * depth
    assert all(branch.times_seen == 6 for branch in backend.branches)
    assert backend.stats.realised_rate == backend.stats.attainable_rate == 0.75


def test_freezing_one_model_says_nothing_of_the_other() -> None:
    backend, (teacher, student), (run_teacher, run_student) = two(0.9)
    step(teacher, backend, run_teacher)
    step(student, backend, run_student)
    teacher.requires_grad_(False)
    train_only(student, 3)
    for _ in range(4):
        run_teacher(torch.zeros(3, 8))
        assert step(student, backend, run_student) == ["blocks.3"]
    assert backend.stats.forwards == 6
    assert [branch.trainable for branch in backend.branches] == [False] * 7 + [True]


def test_a_pin_holds_in_every_model_and_an_object_or_a_full_name_in_one() -> None:
    backend, models, runs = two(0.5)
    for model, run in zip(models, runs, strict=True):
        step(model, backend, run)
    for chosen in ([0], ["blocks.0.inner"]):
        with backend.pinned(chosen):
            for model, run in zip(models, runs, strict=True):
                assert step(model, backend, run) == ["blocks.1", "blocks.2", "blocks.3"]
    for pins in ([backend.branches[0]], []), ([], ["blocks.0.inner@2"]), ([], [4]):
        with backend.pinned([*pins[0], *pins[1]]):
            for model, run, mine in zip(models, runs, pins, strict=True):
                assert ("blocks.0" in step(model, backend, run)) == (not mine)
    with backend.pinned(NAMES[:3] + second(NAMES)):
        assert step(models[0], backend, runs[0]) == ["blocks.3"]
        with pytest.raises(ValueError, match="drops all 4 branches that have trainable parameters"):
            loss(runs[1])
    with pytest.raises(ValueError, match="drops all 8 branches"), backend.pinned(NAMES):
        pytest.fail("the block must not be entered")


def test_the_same_model_seen_again_is_no_other_model() -> None:
    model, backend, run = make()
    step(model, backend, run)
    torch._dynamo.reset()
    step(model, backend, torch.compile(model, backend=backend))
    step(model, backend, torch.compile(model, backend=backend, dynamic=True))

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> Any:
            return self.module(x)

    loss(Wrapper(run)).backward()
    loss(Wrapper(Wrapper(run))).backward()
    assert [branch.name for branch in backend.branches] == NAMES
    assert [branch.times_seen for branch in backend.branches] == [5] * 4


def test_a_model_built_anew_takes_the_names_over() -> None:
    model, backend, run = make(depth=6)
    loss(run).backward()
    backend.rates["blocks.1.inner"] = 0.25
    del model, run
    gc.collect()
    torch._dynamo.reset()
    model = Net()
    run = torch.compile(model, backend=backend)
    for _ in range(3):
        step(model, backend, run)
    assert [branch.name for branch in backend.branches] == [f"blocks.{i}.inner" for i in range(6)]
    assert [branch.droppable for branch in backend.branches] == [True] * 4 + [False] * 2
    assert backend.branches[1].rate == 0.25
    assert [branch.times_seen for branch in backend.branches] == [4] * 4 + [1] * 2


def test_a_copy_of_a_model_is_a_model_of_its_own() -> None:
    model, backend, run = make()
    step(model, backend, run)
    copied = copy.deepcopy(model)
    step(copied, backend, torch.compile(copied, backend=backend))
    assert [branch.name for branch in backend.branches] == NAMES + second(NAMES)


def test_two_models_resume_from_one_state() -> None:
    backend, models, runs = two(0.5)

    def steps(backend: DropBPBackend, models: list[Net], runs: list[Any]) -> list[Any]:
        order = [0, 0, 1, 0, 1]
        return [step(models[k], backend, runs[k]) for k in order]

    steps(backend, models, runs)
    state = copy.deepcopy(backend.state_dict())
    expected = steps(backend, models, runs)
    torch._dynamo.reset()
    resumed, again, runs = two(0.5)
    for new, old in zip(again, models, strict=True):
        new.load_state_dict(old.state_dict())
    resumed.load_state_dict(state)
    assert steps(resumed, again, runs) == expected
    assert resumed.state_dict() == backend.state_dict()


class Critic(Net):
    """Another model that looks the same."""


def test_registered_models_keep_their_order_and_are_told_apart_inside_of_another() -> None:
    class Gan(nn.Module):
        def __init__(self, backend: DropBPBackend) -> None:
            super().__init__()
            self.generator, self.discriminator = Net(), Critic()
            for part in (self.generator, self.discriminator):
                part.compile(backend=backend)

        def forward(self, x: torch.Tensor) -> Any:
            return self.discriminator(self.generator(x))

    backend = dropbp_backend(0.5, inner="aot_eager", seed=0)
    gan = Gan(backend)
    with pytest.warns(UserWarning, match="if they are models of their own, register each of them"):
        loss(gan).backward()
    assert [branch.name for branch in backend.branches] == NAMES
    torch._dynamo.reset()
    backend = dropbp_backend(0.75, inner="aot_eager", seed=0)
    gan = Gan(backend)
    backend.register(gan.discriminator)
    backend.register(gan.generator)
    for _ in range(3):
        before = {branch.name: branch.times_dropped for branch in backend.branches}
        loss(gan).backward()
        now = [b.model for b in backend.branches if b.times_dropped > before.get(b.name, 0)]
        assert sorted(now) == [1] * 3 + [2] * 3
    assert [branch.name for branch in backend.branches] == second(NAMES) + NAMES, "in the order in which they ran"


class Pair(nn.Module):
    """Two models inside of one, each compiled by itself."""

    def __init__(self, backend: DropBPBackend) -> None:
        super().__init__()
        self.first, self.other = Net(depth=2), Critic(depth=3)
        self.first.compile(backend=backend)
        self.other.compile(backend=backend)

    def forward(self, x: torch.Tensor) -> Any:
        return self.first(x) + self.other(x)


NAMESAKES = "class Net and Critic have a branch named 'blocks.0.inner'.*count as the same ones"


def test_namesakes_of_two_graphs_inside_of_one_module_are_reported_once() -> None:
    backend = dropbp_backend(0.5, inner="aot_eager", seed=0)
    pair = Pair(backend)
    with pytest.warns(UserWarning, match=NAMESAKES):
        loss(pair).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch._dynamo.reset()
        loss(pair).backward()
    (text,) = explain(backend).shortfall
    assert re.search(NAMESAKES, text)


def test_strict_refuses_namesakes() -> None:
    pair = Pair(dropbp_backend(0.5, inner="aot_eager", seed=0, strict=True))
    with pytest.raises(Exception, match=NAMESAKES):
        loss(pair)


def test_sensitivities_are_shared_out_within_each_model() -> None:
    backend, models, runs = two(0.5, allocation="sensitivity")
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(3)
    backend.calibrate(lambda: loss(runs[0]) + loss(runs[1]))
    rates = [branch.rate for branch in backend.branches]
    assert sum(rates[:4]) == pytest.approx(2.0)
    assert sum(rates[4:]) == pytest.approx(2.0)
    assert len(set(rates)) > 2


def test_running_estimates_see_every_model() -> None:
    backend, _, runs = two(0.25, allocation="sensitivity", reallocate_every=10)
    for _ in range(40):
        for run in runs:
            loss(run).backward()
    assert backend.sensitivity is not None
    assert all(value > 0 for value in backend.sensitivity.values)
