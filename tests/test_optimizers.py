"""Training with every kind of optimizer step, against the detached eager model trained with the same patterns."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from dropbp_fx import DropBPBackend, dropbp_backend
from tests.matrix import GROUPED, IDS, LLAMA_LIKE
from tests.oracle import detached
from tests.test_models import ResidualMLP, X

pytestmark = pytest.mark.thorough

POINTS = ["blocks.0", "blocks.1", "blocks.2"]
PATTERNS: list[list[int]] = [[0], [1, 2], [], [2], [0, 1], [1], [0, 2], []]
STEPS = 5

#: What a recipe gets: the loss of its n-th forward, on a batch and with a pattern that depend on n alone.
Forward = Callable[[int], Tensor]
#: Trains a model; what it returns besides must be equal as well.
Recipe = Callable[[nn.Module, Forward], Any]


def batch_loss(model: Any, number: int) -> Tensor:
    return (model(X + 0.1 * number) - 0.3).square().mean()


def compiled_mlp() -> tuple[nn.Module, DropBPBackend, Any]:
    torch.manual_seed(0)
    model = ResidualMLP()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with backend.disabled():
        batch_loss(run, 0)  # finds the branches
    return model, backend, run


def assert_trains_equally(
    recipe: Recipe, around: Callable[[], Any] = contextlib.nullcontext, **tolerance: float
) -> None:
    model, backend, run = compiled_mlp()
    copied = copy.deepcopy(model)
    before = copy.deepcopy(model)

    def dropping(number: int) -> Tensor:
        with backend.pinned(PATTERNS[number]), around():
            return batch_loss(run, number)

    def detaching(number: int) -> Tensor:
        with detached(copied, [POINTS[index] for index in PATTERNS[number]]), around():
            return batch_loss(copied, number)

    actual, expected = recipe(model, dropping), recipe(copied, detaching)
    close = {"rtol": 1e-4, "atol": 1e-6, **tolerance}
    torch.testing.assert_close(dict(model.named_parameters()), dict(copied.named_parameters()), **close)
    torch.testing.assert_close(actual, expected, **close)
    for name, parameter in before.named_parameters():
        assert not torch.equal(parameter, model.get_parameter(name)), f"{name} was not trained"


def bitsandbytes_optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    """With moments in eight bits, however small the parameters are."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="eight-bit and paged optimizers need bitsandbytes")
    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(
        parameters, lr=1e-2, weight_decay=0.1, min_8bit_size=1
    )
    return made


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "SGD, Nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=0.1),
    "AdamW, 8 bits": lambda p: bitsandbytes_optimizer("AdamW8bit", p),
    "AdamW, 8 bits, paged": lambda p: bitsandbytes_optimizer("PagedAdamW8bit", p),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
}


def state_of(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = copy.deepcopy(optimizer.state_dict()["state"])
    return state


def steps(optimizer: torch.optim.Optimizer, forward: Forward, *, set_to_none: bool = True) -> dict[int, dict[str, Any]]:
    for number in range(STEPS):
        optimizer.zero_grad(set_to_none=set_to_none)
        forward(number).backward()
        optimizer.step()
    return state_of(optimizer)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_what_it_trains_in_the_detached_model(name: str, set_to_none: bool) -> None:
    make = OPTIMIZERS[name]
    assert_trains_equally(lambda model, forward: steps(make(model.parameters()), forward, set_to_none=set_to_none))


def test_clipped_gradients_have_the_norm_of_those_that_exist() -> None:
    def recipe(model: nn.Module, forward: Forward) -> list[Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        norms = []
        for number in range(STEPS):
            optimizer.zero_grad()
            forward(number).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
            optimizer.step()
        assert min(norms) > 0.05, "every step is clipped"
        return norms

    assert_trains_equally(recipe)


def test_accumulated_gradients_of_several_patterns() -> None:
    def recipe(model: nn.Module, forward: Forward) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for number in range(0, len(PATTERNS), 2):
            optimizer.zero_grad()
            for micro in (number, number + 1):
                (forward(micro) / 2).backward()
            optimizer.step()

    assert_trains_equally(recipe)


def autocast(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast(torch.get_default_device().type, dtype)


def test_autocast_to_bfloat16() -> None:
    # Adam divides by the gradient's size, so that rounding decides about elements near zero; SGD shows what there is.
    def recipe(model: nn.Module, forward: Forward) -> None:
        steps(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), forward)

    assert_trains_equally(recipe, autocast(torch.bfloat16), rtol=1e-2, atol=1e-3)


def test_a_gradient_scaler_skips_the_step_that_overflows_and_no_other() -> None:
    def recipe(model: nn.Module, forward: Forward) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**10, growth_interval=2)
        scales = []
        for number in range(STEPS):
            optimizer.zero_grad()
            loss = forward(number)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            scaler.scale(loss * (float("inf") if number == 2 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
            assert all(same) == (number == 2)
        return scales

    assert_trains_equally(recipe, autocast(torch.float16), rtol=1e-2, atol=1e-3)


def test_a_scaler_sees_an_overflow_only_in_gradients_that_exist() -> None:
    model, backend, run = compiled_mlp()
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.blocks[1][0].weight.register_hook(lambda gradient: gradient * float("inf"))
    for dropped, finite in (([1], True), ([0], False)):
        optimizer.zero_grad()
        with backend.pinned(dropped):
            scaler.scale(batch_loss(run, 0)).backward()
        before = model.head.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.head.weight) is not finite


@pytest.mark.parametrize("average", ["equal weights", "exponential"])
def test_averaged_weights_and_their_learning_rate(average: str) -> None:
    def recipe(model: nn.Module, forward: Forward) -> dict[str, Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        averaged = AveragedModel(model, multi_avg_fn=None if average == "equal weights" else get_ema_multi_avg_fn(0.8))
        schedule = SWALR(optimizer, swa_lr=5e-3, anneal_epochs=2)
        for number in range(STEPS):
            optimizer.zero_grad()
            forward(number).backward()
            optimizer.step()
            averaged.update_parameters(model)
            schedule.step()
        return dict(averaged.named_parameters())

    assert_trains_equally(recipe)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_dropped_branch_is_left_alone_by_the_optimizer(name: str) -> None:
    model, backend, run = compiled_mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    batch_loss(model, 0).backward()
    optimizer.step()  # every parameter has momentum now
    parameters = copy.deepcopy(dict(model.named_parameters()))
    states = state_of(optimizer)
    optimizer.zero_grad()
    with backend.pinned([1]):
        batch_loss(run, 1).backward()
    optimizer.step()
    for index, (key, parameter) in enumerate(model.named_parameters()):
        dropped = key.startswith("blocks.1.")
        assert torch.equal(parameter, parameters[key]) is dropped, f"weight decay and momentum of {key}"
        for kind, value in state_of(optimizer)[index].items():
            if isinstance(value, Tensor) and dropped:
                assert torch.equal(value, states[index][kind]), f"{kind} of {key}"


@pytest.mark.parametrize("name", ["AdamW", "SGD with momentum"])
def test_gradients_set_to_zero_let_momentum_and_decay_move_a_dropped_branch(name: str) -> None:
    model, backend, run = compiled_mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    with backend.disabled():
        batch_loss(run, 0).backward()
    optimizer.step()
    weight = model.blocks[1][0].weight
    before = weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    with backend.pinned([1]):
        batch_loss(run, 1).backward()
    optimizer.step()
    assert weight.grad is not None
    assert not weight.grad.any(), "a dropped branch adds nothing to the zeros"
    assert not torch.equal(weight, before)


def test_adam_counts_for_each_parameter_the_steps_it_took() -> None:
    model, backend, run = compiled_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    for number in range(STEPS):
        optimizer.zero_grad()
        with backend.pinned(PATTERNS[number]):
            batch_loss(run, number).backward()
        optimizer.step()
    taken = [int(optimizer.state[block[0].weight]["step"]) for block in model.blocks]
    assert taken == [3, 3, 3], "five steps, and each block was dropped in two of them"
    assert int(optimizer.state[model.head.weight]["step"]) == STEPS


def test_full_fine_tuning_of_a_llama() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)).train()
    copied = copy.deepcopy(model)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    patterns = [[0, 3], [1, 2], [], [3], [0, 1, 2]]
    points = list(LLAMA_LIKE.values())
    with backend.disabled():
        run(input_ids=IDS, labels=IDS)
    for trained, forward in ((model, run), (copied, copied)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for number, pattern in enumerate(patterns):
            ids = (IDS + number) % 64
            context = backend.pinned(pattern) if trained is model else detached(copied, [points[i] for i in pattern])
            optimizer.zero_grad()
            with context:
                loss = forward(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(copied.named_parameters()), rtol=1e-4, atol=1e-6)


def test_a_compiled_step_that_is_compiled_for_each_pattern_is_warned_of_once() -> None:
    model = nn.Sequential(*(Residue() for _ in range(6)))
    backend = dropbp_backend(rate=0.5, seed=0, inner="aot_eager")
    run = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
    step = torch.compile(optimizer.step, backend="eager")

    other = nn.Sequential(*(Residue() for _ in range(6)))  # whose backend has nothing to do with this step
    torch.compile(other, backend=dropbp_backend(rate=0.5, seed=0, inner="aot_eager"))(
        torch.randn(4, 8)
    ).sum().backward()

    def train() -> None:
        for _ in range(8):
            run(torch.randn(4, 8)).square().sum().backward()
            step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"compiled anew for each pattern .* fused=True") as caught:
        train()
    assert sum("compiled anew" in str(warning.message) for warning in caught) == 1


def test_several_backends_watch_one_compiled_step() -> None:
    """What one of them has to say, or that one of them is gone, changes nothing for Dynamo and the others."""
    models = [nn.Sequential(*(Residue() for _ in range(6))) for _ in range(3)]
    backends = [dropbp_backend(rate=0.5, seed=number, inner="aot_eager") for number in range(3)]
    runs = [torch.compile(model, backend=backend) for model, backend in zip(models, backends, strict=True)]
    parameters = [p for model in models for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=torch.tensor(1e-3))
    step = torch.compile(optimizer.step, backend="eager")

    def train() -> None:
        for _ in range(6):
            for run in runs:
                run(torch.randn(4, 8)).square().sum().backward()
            step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="compiled anew for each pattern") as caught:
        train()
    assert sum("compiled anew" in str(warning.message) for warning in caught) == 3


class Residue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()
