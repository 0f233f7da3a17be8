"""Where less is dropped than was asked for, one warning says why and what to do; where nothing is amiss, nobody warns."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from dropbp_fx import (
    DropBPBackend,
    LessDroppedWarning,
    NoResidualBranchWarning,
    explain,
)
from tests.helpers import make_backend
from tests.oracle import assert_equal, assert_exact, compiled, eager

X = torch.linspace(-1, 1, 32).reshape(4, 8).cos()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


class Cut(nn.Module):
    """A layer whose attention is cut through by a graph break, and whose MLP is not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention, self.projection, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        context = self.attention(self.norm(x)).tanh()
        torch._dynamo.graph_break()
        x = x + self.projection(context)
        return x + self.mlp(x).tanh()


class Gated(Block):
    """A layer with a stream and no residual add."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.linear(x))


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


def blocks(count: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(count)))


def backend_of(rate: float = 0.5, **options: Any) -> DropBPBackend:
    return make_backend(rate, **{"inner": "aot_eager", "seed": 0, **options})


def loss(model: Callable[..., Any]) -> Tensor:
    value: Tensor = model(X).square().sum()
    return value


def train(model: nn.Module, run: Any, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        loss(run).backward()
        optimizer.step()
        optimizer.zero_grad()


def said(do: Callable[[], Any]) -> list[str]:
    """The warnings of this package in ``do``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do()
    kinds = (LessDroppedWarning, NoResidualBranchWarning)
    return [str(warning.message) for warning in caught if issubclass(warning.category, kinds)]


def watched_steps() -> int:
    gc.collect()
    return len(optimizers._global_optimizer_post_hooks)


# ---- evaluation mode -------------------------------------------------------------------------------------------------


def test_training_in_evaluation_mode_is_said_once() -> None:
    model, backend = blocks().eval(), backend_of()
    run = torch.compile(model, backend=backend)
    (text,) = said(lambda: train(model, run, 12))
    assert "The model is in evaluation mode, in which nothing is dropped" in text
    assert "3 steps with its gradients" in text
    assert "Call model.train() before training: from_pretrained()" in text
    model.train()
    assert said(lambda: train(model, run, 3)) == []
    assert backend.stats.realised_rate == 0.5
    assert explain(backend).shortfall == (text,)


def test_strict_ends_training_in_evaluation_mode() -> None:
    model = blocks().eval()
    run = torch.compile(model, backend=backend_of(strict=True))
    train(model, run, 2)
    with pytest.raises(RuntimeError, match="The model is in evaluation mode"):
        train(model, run, 1)


def test_going_back_to_training_is_forgotten_after_an_evaluation_with_gradients() -> None:
    model = blocks()
    run = torch.compile(model, backend=backend_of())
    train(model, run, 2)
    model.eval()
    loss(run)
    (text,) = said(lambda: train(model, run, 5))
    assert "evaluation mode" in text


def test_evaluation_with_gradients_beside_training_is_nobodys_business() -> None:
    """Saliency maps, adversarial inputs, an evaluation without no_grad."""
    model = blocks()
    other = nn.Linear(8, 8)
    run = torch.compile(model, backend=backend_of())
    before = watched_steps()

    def work() -> None:
        model.eval()
        for _ in range(5):  # no optimizer
            x = X.clone().requires_grad_()
            run(x).sum().backward()
        model.zero_grad()
        adversary = torch.optim.SGD(other.parameters(), 1e-3)
        for _ in range(5):  # an optimizer of something else, through the model
            run(other(X)).sum().backward()
            adversary.step()
        model.zero_grad()
        for _ in range(5):  # and in each step beside a training forward
            model.eval()
            loss(run).backward()
            model.train()
            train(model, run, 1)
        loss(run)

    assert said(work) == []
    assert watched_steps() == before - 1, "whoever looked at steps has gone: for a call, and for idle steps"


def test_gradients_switched_on_inside_of_no_grad_are_dropped() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.tail = nn.Linear(8, 8), blocks(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            with torch.enable_grad():
                x = self.body(x)
                with torch.no_grad():
                    z = self.tail(x)
                x = x + z
            return x, self.tail(x)

    def inside(model: Any) -> Tensor:
        with torch.no_grad():
            body, tail = model(X)
        assert body.requires_grad
        assert not tail.requires_grad
        value: Tensor = body.square().sum()
        return value

    model, backend = Inside(), backend_of()
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, inside, [f"body.{i}.linear" for i in range(4)])
    for _ in range(4):
        inside(run).backward()
    assert torch.is_grad_enabled()
    assert [branch.times_dropped > 0 for branch in backend.branches] == [True] * 4
    with torch.no_grad():
        model.eval()
        run(X)
        assert not torch.is_grad_enabled()


# ---- layers compiled one by one --------------------------------------------------------------------------------------


def compile_each(model: nn.Module, backend: DropBPBackend) -> Any:
    for block in model.children():
        block.compile(backend=backend)
    return model


@pytest.mark.parametrize(
    "compile_it",
    [
        lambda model, backend: model.compile(backend=backend),
        compile_each,
        lambda model, backend: nn.Sequential(*(torch.compile(block, backend=backend) for block in model)),
    ],
    ids=["Sequential.compile", "each block's compile", "blocks put in place of others"],
)
def test_blocks_of_a_sequential_are_told_apart_without_being_registered(compile_it: Any) -> None:
    model, backend = blocks(8), backend_of()
    reference = copy.deepcopy(model)
    run = compile_it(model, backend) or model
    assert said(lambda: [loss(run).backward() for _ in range(41)]) == []
    points = [f"{i}.linear" for i in range(8)]
    assert [branch.name for branch in backend.branches] == points
    assert backend.stats.attainable_rate == 0.5
    assert backend.stats.realised_rate == pytest.approx(0.5, abs=0.02)
    for pattern in ([], [0, 5], [1, 2, 3, 4, 5, 6, 7]):
        with backend.pinned(pattern):
            actual = compiled(model, loss, run)
        assert_equal(actual, eager(reference, loss, [points[i] for i in pattern]))


def test_blocks_of_several_classes_in_a_sequential_are_told_apart() -> None:
    class Other(Block):
        pass

    model, backend = nn.Sequential(Block(), Other()), backend_of()
    reference = copy.deepcopy(model)
    model.compile(backend=backend)
    assert said(lambda: [loss(model).backward() for _ in range(25)]) == []
    assert [branch.name for branch in backend.branches] == ["0.linear", "1.linear"]
    with backend.pinned([1]):
        actual = compiled(model, loss, model)
    assert_equal(actual, eager(reference, loss, ["1.linear"]))


def test_two_models_that_no_module_holds_are_not_taken_for_layers_of_one() -> None:
    models, backend = [Model(Block(), Block()), Model(Block(), Block())], backend_of()
    for model in models:
        model.compile(backend=backend)
    assert said(lambda: [loss(model).backward() for model in models]) == []
    names = ["layers.0.linear", "layers.1.linear"]
    assert [branch.name for branch in backend.branches] == [*names, *(f"{name}@2" for name in names)]


def test_a_whole_model_beside_another_one_keeps_its_names() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.reference = Model(Block(), Block()), Model(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.policy(x) - self.reference(x).detach()

    pair, backend = Pair(), backend_of()
    pair.policy.compile(backend=backend)
    loss(pair).backward()
    assert [branch.name for branch in backend.branches] == ["layers.0.linear", "layers.1.linear"]


@pytest.mark.parametrize("strict", [False, True])
def test_layers_that_no_module_calls_are_models_of_their_own_and_that_is_said(strict: bool) -> None:
    layers, backend = [Block(), Block()], backend_of(strict=strict)
    for layer in layers:
        layer.compile(backend=backend)

    def train() -> None:
        for _ in range(15):
            for layer in layers:
                loss(layer).backward()

    match = r"drops 0 of the branches.*2 models.*call backend\.register\(model\)"
    with pytest.raises(RuntimeError, match=match) if strict else pytest.warns(LessDroppedWarning, match=match):
        train()


# ---- graph breaks ----------------------------------------------------------------------------------------------------


def test_a_break_inside_of_branches_is_named_with_its_place() -> None:
    model, backend = Model(*(Cut() for _ in range(3))), backend_of()
    run = torch.compile(model, backend=backend)
    (text,) = said(lambda: [loss(run).backward() for _ in range(3)])
    assert "1 residual add of Cut cannot be dropped: Dynamo breaks the graph between" in text
    line = Cut.forward.__code__.co_firstlineno + 2
    assert f"{__file__}:{line} (Call to `torch._dynamo.graph_break()`)" in text
    assert "Take the break out of the layer" in text
    assert [branch.name for branch in backend.branches] == [f"layers.{i}.mlp" for i in range(3)]


def test_strict_refuses_a_break_inside_of_branches() -> None:
    run = torch.compile(Model(*(Cut() for _ in range(3))), backend=backend_of(strict=True))
    with pytest.raises(Exception, match=r"cannot be dropped: Dynamo breaks.*test_shortfall\.py:"):
        loss(run)


def test_breaks_in_every_branch_are_one_warning() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            torch._dynamo.graph_break()
            return x + self.down(h)

    model = nn.Sequential(*(Halves() for _ in range(3)))
    run = torch.compile(model, backend=backend_of())
    (text,) = said(lambda: loss(run).backward())
    assert "1 residual add of Halves cannot be dropped" in text
    assert f"It breaks at {__file__}:" in text


def test_a_break_that_hides_nothing_is_no_cause() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places, self.layers = nn.Linear(8, 8), nn.Linear(8, 8), blocks()

        def forward(self, x: Tensor) -> Tensor:
            tokens, places = self.tokens(x), self.places(x)
            torch._dynamo.graph_break()
            x = places + tokens.tanh()
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model, backend = Embedding(), backend_of()
    run = torch.compile(model, backend=backend)
    assert said(lambda: [loss(run).backward() for _ in range(30)]) == []
    assert len(backend.branches) == 4


def test_a_model_without_branches_that_ends_in_a_break_is_found_out_by_its_steps() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            torch._dynamo.graph_break()
            return y

    model = Plain()
    run = torch.compile(model, backend=backend_of())
    (text,) = said(lambda: train(model, run, 6))
    assert "No residual branch was found" in text
    assert f"The graph breaks at {__file__}:" in text


# ---- layers of which some hold no branch -----------------------------------------------------------------------------


def test_layers_without_a_branch_are_named_beside_layers_that_hold_one() -> None:
    model = Model(Block(), Gated(), Block(), Gated())
    run = torch.compile(model, backend=backend_of())
    (text,) = said(lambda: loss(run).backward())
    assert "2 layers hold no residual branch" in text
    assert "layers.1 (Gated), layers.3 (Gated), but there is one in layers.0" in text
    torch._dynamo.reset()
    with pytest.raises(Exception, match="2 layers hold no residual branch"):
        loss(torch.compile(model, backend=backend_of(strict=True)))


def test_layers_compiled_one_by_one_that_hold_no_branch_are_named() -> None:
    model = Model(Block(), Block(), Gated(), Gated())
    backend = backend_of()
    for layer in model.layers:
        layer.compile(backend=backend)
    (text,) = said(lambda: loss(model).backward())
    assert "none was found in layers.2 (Gated), but there is one in layers.0" in text


def test_stems_heads_and_changes_of_shape_are_no_layers_without_a_branch() -> None:
    widening = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(inner)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    def model() -> nn.Sequential:
        head = Model(nn.Linear(8, 8))
        return nn.Sequential(nn.Linear(8, 8), Block(), widening, Wide(), Wide(), nn.Linear(16, 8), head)

    assert said(lambda: loss(torch.compile(model(), backend=backend_of())).backward()) == []
    torch._dynamo.reset()
    parts = model()
    parts.compile(backend=backend_of())
    assert said(lambda: loss(parts).backward()) == []


# ---- a backend that nobody calls -------------------------------------------------------------------------------------


def test_a_backend_that_no_model_calls_says_so_after_twenty_steps() -> None:
    model, backend = blocks(), backend_of()
    torch.compile(model, backend=backend)  # and the result is thrown away
    watching = watched_steps()
    assert said(lambda: train(model, model, 19)) == []
    (text,) = said(lambda: train(model, model, 10))
    assert (
        "Optimizers have taken 20 steps since this backend (of rate 0.5) was made, and no model has called it" in text
    )
    assert "Train the module that torch.compile(model, backend=backend) returns" in text
    assert "torch.compiler.set_stance" in text
    assert "If nothing is meant to use this backend yet, all is well." in text
    loss(torch.compile(model, backend=backend)).backward()
    assert watched_steps() == watching - 1


def test_compiling_that_is_switched_off_is_found_out() -> None:
    model, backend = blocks(), backend_of(strict=True)
    run = torch.compile(model, backend=backend)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="no model has called it"):
        train(model, run, 20)


def test_backends_that_ask_for_nothing_or_are_gone_say_nothing() -> None:
    model, nothing = blocks(), backend_of(0.0)
    for _ in range(3):
        backend_of()
    assert said(lambda: train(model, model, 25)) == []
    del nothing


def test_a_backend_may_be_collected_while_an_optimizer_goes_through_its_hooks() -> None:
    backends: list[DropBPBackend] = []

    def let_go(*_: Any) -> None:
        backends.clear()
        gc.collect()

    optimizers.register_optimizer_step_post_hook(let_go)
    backends.append(backend_of())
    torch.optim.SGD(blocks().parameters(), 1e-3).step()
    assert not backends


def test_the_first_graph_ends_the_watch_over_steps() -> None:
    before = watched_steps()
    model, backend = blocks(), backend_of()
    copied = copy.deepcopy(backend)
    assert watched_steps() == before + 1
    loss(torch.compile(model, backend=copied)).backward()
    assert watched_steps() == before


# ---- rates that cannot be reached ------------------------------------------------------------------------------------


def test_a_rate_above_what_can_be_reached_says_what_can_be() -> None:
    model, backend = blocks(2), backend_of(0.875)
    run = torch.compile(model, backend=backend)
    (text,) = said(lambda: [loss(run).backward() for _ in range(40)])
    assert "The rate asked for is 0.875, but in the long run the pattern drops 0.5 of the branches." in text
    assert "2 of them can be dropped, 2 have something to train" in text
    assert "one that has is always kept. Set a rate of at most 0.5" in text
    assert backend._state.listeners == []
    torch._dynamo.reset()
    run = torch.compile(model, backend=backend_of(0.875, strict=True))
    with pytest.raises(RuntimeError, match="The rate asked for is 0.875"):
        [loss(run).backward() for _ in range(20)]


@pytest.mark.parametrize(("count", "rate"), [(8, 0.875), (2, 0.5), (4, 0.75), (1, 0.0)])
def test_a_rate_that_is_reached_is_not_remarked_on(count: int, rate: float) -> None:
    run = torch.compile(blocks(count), backend=backend_of(rate))
    assert said(lambda: [loss(run).backward() for _ in range(25)]) == []
