"""Functions that Dynamo traces once and calls from then on (``torch.compiler.nested_compile_region``): same gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from dropbp_fx import NoResidualBranchWarning, explain
from dropbp_fx.graph.inlining import inline_nested_regions
from dropbp_fx.graph.values import example_value, storage_of
from tests.helpers import compile_model
from tests.oracle import assert_equal, assert_exact, compiled, eager
from tests.selection import thorough

X = torch.linspace(-2, 2, 8 * 16).reshape(8, 16)
region = torch.compiler.nested_compile_region


class Block(nn.Module):
    """One branch; its add is inside of the module."""

    def __init__(self, function: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.function = function

    def branch(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


nested_branch = region(Block.branch)


class NestedBlock(Block):
    """A layer whose whole forward is a region."""

    @region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class NestedTwice(Block):
    @region
    def forward(self, x: Tensor) -> Tensor:
        return x + nested_branch(self, x)


class Around(Block):
    """A checkpoint around a region."""

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return x + nested_branch(self, x)

        found: Tensor = checkpoint(run, x, use_reentrant=False)
        return found


class Inside(Block):
    """A checkpoint inside of a region."""

    @region
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(lambda x: x + self.branch(x), x, use_reentrant=False)
        return found


class InPlace(Block):
    """A region that writes into its own values, and returns several."""

    @region
    def both(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        h = self.up(self.norm(x))
        flat = h.view(-1)
        flat += 1
        flat.mul_(0.5)
        return h.sin(), None, h.cos()

    def forward(self, x: Tensor) -> Tensor:
        h, nothing, scale = self.both(x)
        assert nothing is None
        return x + self.down(h * scale)


class Branching(Block):
    """Regions inside of what only one of two graphs runs."""

    def branch(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        h = torch.cond(h.sum() > -1e9, lambda h: squared(squared(h)), lambda h: squared(h), (h,))
        return self.down(h)


class Switching(Block):
    """A region that switches gradients off, and autocast on, for a part of what it does."""

    @region
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gain = squared(x)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.branch(x)
        return x + h * gain


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(block() for _ in range(count))

    def before(self, x: Tensor) -> Tensor:
        return x

    after = before

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.first(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.after(x))


@region
def squared(x: Tensor) -> Tensor:
    return x.sin().square()


@region
def grown(x: Tensor) -> Tensor:
    """Saves its output for the backward."""
    return (0.1 * x).exp()


def of_layer(layer: Block, x: Tensor) -> Tensor:
    return x + layer.branch(x)


class ByFunction(Model):
    """Its layers run in a function that is no module's own."""

    def __init__(self, function: Callable[..., Tensor] = region(of_layer)) -> None:  # noqa: B008 -- not called
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = self.function(layer, x)
        return self.head(x)


class Ends(Model):
    """Regions outside of the branches."""

    def before(self, x: Tensor) -> Tensor:
        return squared(x) + grown(squared(x))

    after = before


class Counting(Model):
    """A region that writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def before(self, x: Tensor) -> Tensor:
        return counted(x, self.total)

    after = before


@region
def counted(x: Tensor, total: Tensor) -> Tensor:
    total.add_(x.detach().mean())
    return x.sin()


def loss_of(model: Callable[..., Tensor]) -> Tensor:
    return model(X).square().mean()


DOWN = [f"layers.{k}.down" for k in range(3)]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "in branches": lambda: Model(lambda: Block(squared)),
    "in branches, saving outputs": lambda: Model(lambda: Block(grown)),
    "outside": lambda: Ends(),
    "everywhere": lambda: Ends(lambda: Block(squared)),
    "layers": lambda: Model(NestedBlock),
    "in layers": lambda: Model(NestedTwice),
    "layers of a function": lambda: ByFunction(),
    "layers with regions inside and outside": lambda: Ends(lambda: NestedBlock(squared)),
    "in checkpoints": lambda: Model(Around),
    "around checkpoints": lambda: Model(Inside),
    "in two graphs": lambda: Model(Branching),
    "switching": lambda: Model(Switching),
    "with a buffer": lambda: Counting(),
    "written into": lambda: Model(InPlace),
}


@pytest.mark.parametrize("name", [thorough(name) if name == "in two graphs" else name for name in MODELS])
def test_whatever_is_a_region_gradients_are_those_of_the_detached_model(name: str) -> None:
    model = MODELS[name]()
    backend, run = compile_model(model, 0.0)
    assert_exact(model, run, backend, loss_of, DOWN)
    assert [branch.name.startswith(f"layers.{k}.") for k, branch in enumerate(backend.branches)] == [True] * 3


@pytest.mark.inductor
@pytest.mark.parametrize("budget", [None, thorough(0.3)])
def test_generated_code_reuses_nothing_that_a_region_saved(budget: float | None) -> None:
    for name in ("in branches", "in branches, saving outputs", "everywhere", "layers"):
        torch._dynamo.reset()
        model = MODELS[name]()
        backend, run = compile_model(model, 0.0, inner="inductor", activation_memory_budget=budget)
        assert_exact(model, run, backend, loss_of, DOWN, patterns=[(), (0,), (1, 2)], what=f"{name}: ")


@pytest.mark.inductor
def test_a_graph_without_branches_is_compiled_right_too() -> None:
    model = Ends(lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
    _, run = compile_model(model, 0.0, inner="inductor")
    with pytest.warns(NoResidualBranchWarning):
        actual = compiled(model, loss_of, run)
    assert_equal(actual, eager(model, loss_of, []))


def test_branches_are_called_as_without_regions() -> None:
    for nested, plain in (
        (Model(NestedBlock), Model(Block)),
        (Model(NestedTwice), Model(Block)),
        (ByFunction(), ByFunction(of_layer)),
        (Model(lambda: Block(squared)), Model(Block)),
    ):
        found = []
        for model in (nested, plain):
            torch._dynamo.reset()
            backend, run = compile_model(model)
            loss_of(run).backward()
            found.append([(branch.name, branch.layer) for branch in backend.branches])
        assert found[0] == found[1]


def test_layers_that_are_regions_are_compiled_once() -> None:
    counts = []
    for block in (NestedBlock, Block):
        torch._dynamo.reset()
        model = Model(block, 4)
        backend, run = compile_model(model, 0.0)
        loss_of(run).backward()
        counts.append((backend.stats.unique_regions, backend.stats.compiled_variants))
    assert counts[0] == counts[1]


def test_a_layer_that_runs_twice_has_two_branches() -> None:
    model = Model(NestedBlock)
    model.layers[2] = model.layers[0]
    backend, run = compile_model(model, 0.0)
    points = [("layers.0.down", 0), "layers.1.down", ("layers.0.down", 1)]
    assert_exact(model, run, backend, loss_of, points)
    assert [branch.name for branch in backend.branches] == [
        *("layers.0.up+down#1", "layers.1.up+down", "layers.0.up+down#2")
    ]


def test_sizes_that_change() -> None:
    model = Model(lambda: NestedBlock(squared))
    backend, run = compile_model(model, 0.0)
    for rows in (8, 5, 6):
        for pattern in ((), (0, 2), (1,)):
            with backend.pinned(pattern):
                actual = compiled(model, lambda model, rows=rows: model(X[:rows]).square().mean(), run)
            expected = eager(
                model, lambda model, rows=rows: model(X[:rows]).square().mean(), [DOWN[index] for index in pattern]
            )
            assert_equal(actual, expected, what=f"{rows} rows, {pattern}")


def test_without_gradients_and_in_evaluation() -> None:
    model = Model(lambda: NestedBlock(squared))
    _, run = compile_model(model)
    loss_of(run).backward()
    with torch.no_grad():
        torch.testing.assert_close(run(X), model(X))
    model.eval()
    torch.testing.assert_close(run(X), model(X))


def test_rescaled_branches_in_regions() -> None:
    results = []
    for block in (NestedBlock, Block):
        torch._dynamo.reset()
        model = Model(block)
        backend, run = compile_model(model, 0.5, rescale=True)
        results.append(compiled(model, loss_of, run))
        assert len(backend.branches) == 3
    assert_equal(results[0], results[1])


def test_explanations_look_into_regions() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explain(Model(NestedBlock), X)
    assert [branch.name for branch in found.branches] == [f"layers.{k}.up+down" for k in range(3)]


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The graph that Dynamo makes of a function."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _inputs: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*inputs)
    return found[0]


def test_each_call_has_memory_of_its_own() -> None:
    @region
    def views(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.view(-1).sin()
        return h.view(8, 16) * 2, torch.view_as_complex(x.view(8, 8, 2)).abs()

    def calls(x: Tensor) -> Tensor:
        for _ in range(3):
            x, size = views(x)
            x = x + size.repeat(1, 2).view(8, 16)
        return x

    gm = graph_of(calls, X.clone())
    assert inline_nested_regions(gm) >= 2
    assert not [name for name, module in gm.named_modules() if name and isinstance(module, fx.GraphModule)]
    torch.testing.assert_close(gm(X)[0], calls(X))
    views_of = {name: [] for name in ("view", "view_as_complex", "sin")}  # type: dict[str, list[fx.Node]]
    for node in gm.graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if name in views_of:
            views_of[name].append(node)
    for node in (*views_of["view"], *views_of["view_as_complex"]):
        assert storage_of(example_value(node)) == storage_of(example_value(node.all_input_nodes[0])), node
    assert len({storage_of(example_value(node)) for node in views_of["sin"]}) == 3


def test_a_view_of_what_a_region_returned_is_written_into() -> None:
    def calls(x: Tensor) -> Tensor:
        for _ in range(3):
            x = squared(x)
            x.view(-1).add_(1)
            x = x * 2
        return x

    model = Model()
    model.after = calls  # type: ignore[method-assign, assignment]
    _, run = compile_model(model)
    with torch.no_grad():
        torch.testing.assert_close(run(X), model(X))


def test_outputs_that_are_no_tensors() -> None:
    @region
    def both(x: Tensor) -> tuple[Tensor, int, None]:
        return x.sin(), 3, None

    def calls(x: Tensor) -> Tensor:
        for _ in range(3):
            x, three, nothing = both(x)
            assert nothing is None
            x = x * three
        return x

    gm = graph_of(calls, X.clone())
    inline_nested_regions(gm)
    assert inline_nested_regions(gm) == 0
    torch.testing.assert_close(gm(X)[0], calls(X))
