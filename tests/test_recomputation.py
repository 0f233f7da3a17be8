"""Whatever a backward recomputes, for a memory budget or by itself, has the values of the forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from tests.helpers import compile_model
from tests.oracle import assert_equal, assert_exact, compiled
from tests.selection import thorough

TOKENS = torch.arange(160).reshape(8, 20) % 13


@torch.library.custom_op("dropbp_fx_tests::noise", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def noise(x: Tensor) -> Tensor:
    """A random operator of a library that says so."""
    return torch.rand_like(x)


@noise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dropbp_fx_tests::kernel", mutates_args=())
def kernel(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """A kernel with dropout inside that, like those of libraries for attention, does not say that it is random."""
    mask = (torch.rand_like(x) >= dropout_p).to(x.dtype)
    return x * mask, mask


@kernel.register_fake
def _(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


kernel.register_autograd(
    lambda ctx, gradient, _: (gradient * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.rand_like(x)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.saved_tensors[0]


@torch.compiler.nested_compile_region
def nested(x: Tensor) -> Tensor:
    return F.dropout(x.sin(), 0.5).square()


def attention(x: Tensor, dropout_p: float = 0.3) -> Tensor:
    query = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(query, query.sin(), query.cos(), dropout_p=dropout_p)
    return mixed.transpose(1, 2).reshape(x.shape)


def branching(x: Tensor) -> Tensor:
    kept: Tensor = torch.cond(x.sum() > -1e9, lambda y: F.dropout(y.sin(), 0.5), lambda y: y.cos(), (x,))
    return kept


#: Functions of a tensor of shape (8, 20, 16), all of which draw random numbers.
SOURCES: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "attention": attention,
    "a kernel": lambda x: kernel(x, 0.5)[0],
    "uniform": lambda x: x * torch.empty_like(x).uniform_(0, 1),
    "a checkpoint": lambda x: checkpoint(lambda y: F.dropout(y.sin(), 0.5).square(), x, use_reentrant=False),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "feature dropout": lambda x: F.dropout1d(x, 0.5),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn": lambda x: x * torch.randn(x.shape),
    "randint": lambda x: x * torch.randint(0, 3, x.shape),
    "randperm": lambda x: x * x[torch.randperm(x.shape[0])],
    "normal": lambda x: x * torch.normal(x.detach(), 1.0),
    "exponential": lambda x: x * torch.empty_like(x).exponential_().log(),
    "multinomial": lambda x: x * torch.multinomial(x.detach().sigmoid().flatten(0, 1), 16).view(x.shape),
    "bernoulli of a tensor": lambda x: x * torch.bernoulli(torch.sigmoid(x.detach())),
    "bernoulli of a number": lambda x: x * torch.empty_like(x).bernoulli_(0.3),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=-1),
    "stochastic depth": lambda x: x * (torch.rand(x.shape[0], 1, 1) > 0.3),
    "an operator": lambda x: x * noise(x.detach()),
    "a function": Noisy.apply,
    "a nested region": nested,
    "a branching": branching,
}
QUICK = ("dropout", "attention", "a kernel")


class Branch(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(16, 16), nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(F.gelu(self.up(x))))


class Model(nn.Module):
    """Branches that compute ``function``, as do the embedding and the head."""

    def __init__(self, function: Callable[[Tensor], Tensor], branch: type[nn.Module] = Branch) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.embedding, self.head = nn.Embedding(13, 16), nn.Linear(16, 4)
        self.branches = nn.ModuleList(branch(function) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.function(self.embedding(tokens) * 1.5)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(self.function(x.sin()))


NAMES = ["branches.0", "branches.1"]


def loss_of(model: Callable[..., Tensor]) -> Tensor:
    torch.manual_seed(1)
    return model(TOKENS).square().mean()


def budget_of_all(budget: float | None) -> contextlib.AbstractContextManager[Any]:
    """PyTorch's own setting, which is for the whole model."""
    return functorch_config.patch(activation_memory_budget=1.0 if budget is None else budget)


@pytest.mark.parametrize("source", [name if name in QUICK else thorough(name) for name in SOURCES])
@pytest.mark.parametrize("budget", [0.0, *(thorough(budget) for budget in (0.3, 0.5, 0.9))])
def test_random_numbers_are_those_of_the_forward_under_a_memory_budget(source: str, budget: float) -> None:
    """Eager draws the same: the compiled forward runs the same operators in the same order."""
    if source == "a function" and torch.__version__ < "2.12":
        pytest.skip("a model that holds the function breaks the graph there")
    for options, everywhere in (({"activation_memory_budget": budget}, None), ({}, budget)):
        torch._dynamo.reset()
        model = Model(SOURCES[source])
        with budget_of_all(everywhere):
            backend, run = compile_model(model, **options)
            assert_exact(
                model, run, backend, loss_of, NAMES, patterns=[(), (0,), (1,)], what=f"{options} {everywhere} "
            )
            with backend.disabled():
                compiled(model, loss_of, run)
                drawn = torch.rand(())
        loss_of(model).backward()
        assert torch.rand(()) == drawn, "the backward draws nothing"


@pytest.mark.inductor
@pytest.mark.parametrize("source", ["dropout", thorough("attention"), thorough("uniform"), thorough("a checkpoint")])
def test_generated_code_uses_the_masks_of_the_forward_under_a_memory_budget(source: str) -> None:
    model = Model(SOURCES[source])

    def result(budget: float | None, everywhere: float | None) -> Any:
        torch._dynamo.reset()
        with budget_of_all(everywhere):
            backend, run = compile_model(model, inner="inductor", activation_memory_budget=budget)
            with backend.pinned([0]):
                return compiled(model, loss_of, run)

    expected = result(None, None)
    for budget, everywhere in ((0.0, None), (None, 0.3)):
        assert_equal(result(budget, everywhere), expected, what=f"{budget}, {everywhere}")


def saved_and_backward(function: Callable[[Tensor], Tensor], budget: float | None) -> tuple[int, list[fx.Graph]]:
    """Bytes that a step saves, without parameters, and the graphs of its backward."""
    torch._dynamo.reset()
    backwards: list[fx.Graph] = []

    def backward(gm: fx.GraphModule, _inputs: Any) -> Any:
        backwards.append(gm.graph)
        return gm.forward

    model = Model(function)
    _, run = compile_model(model, rate=0.0, activation_memory_budget=budget, inner=(lambda gm, _: gm.forward, backward))
    loss_of(run).backward()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(run)
    del loss
    return sum(size for at, size in kept.items() if at not in parameters), backwards


def test_a_budget_saves_what_dropout_returns_and_recomputes_all_else() -> None:
    elements = TOKENS.numel() * 16
    plain, _ = saved_and_backward(torch.sin, 0.0)
    dropping, _ = saved_and_backward(SOURCES["dropout"], 0.0)
    everything, _ = saved_and_backward(SOURCES["dropout"], None)
    returned = elements * (1 + 4)  # a mask, and the values behind it
    outside = 2 * elements  # the masks of embedding and head, for which the backend has no budget
    assert dropping <= plain + len(NAMES) * returned + outside, (dropping, plain)
    assert dropping + len(NAMES) * 4 * elements <= everything, (dropping, everything)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_attention_is_recomputed_for_a_budget_where_it_drops_nothing(dropout_p: float) -> None:
    _, backwards = saved_and_backward(lambda x: attention(x, dropout_p), 0.0)
    forward_operators = {
        str(node.target)
        for graph in backwards
        for node in graph.nodes
        if str(node.target).endswith("flash_attention_for_cpu.default")
    }
    assert bool(forward_operators) == (dropout_p == 0)


class Stateful(Branch):
    """A branch with a buffer; subclasses read it for the backward and then write into it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(function)
        self.buffer = nn.Buffer(torch.ones(16))


class Scaled(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        scaled = self.up(x) * self.buffer.sin()
        self.buffer.mul_(0.9)
        return self.down(scaled)


class Centred(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        centred = (hidden - self.buffer.clone()).sin()
        self.buffer.lerp_(hidden.detach().mean((0, 1)), 0.5)
        return self.down(centred)


class Delayed(Stateful):
    """Scales by a view of what the last forward computed."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(function)
        self.last = nn.Buffer(torch.ones(20, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        scaled = hidden * (self.last.transpose(0, 1) * 1.0)
        self.last.copy_(hidden.detach().transpose(0, 1))
        return self.down(scaled)


def check_old_values(branch: type[Stateful], budget: float | None, inner: str) -> None:
    """Of each pattern, two steps in a row: a buffer holds what the step before left in it."""
    model, oracle = (Model(torch.sin, branch) for _ in range(2))
    backend, run = compile_model(model, activation_memory_budget=budget, inner=inner)
    for pattern in ((), (0,), (1,)):
        for step in range(2):
            model.zero_grad()
            oracle.zero_grad()
            handles = [
                oracle.get_submodule(NAMES[i]).register_forward_hook(lambda _m, _a, out: out.detach()) for i in pattern
            ]
            loss_of(oracle).backward()
            for handle in handles:
                handle.remove()
            with backend.pinned(list(pattern)):
                loss_of(run).backward()
            for (name, p), q in zip(model.named_parameters(), oracle.parameters(), strict=True):
                what = f"step {step} of {pattern}, {name}: "
                torch.testing.assert_close(p.grad, q.grad, msg=lambda text, what=what: what + text)
            for a, b in zip(model.buffers(), oracle.buffers(), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("branch", [Scaled, Centred, Delayed])
@pytest.mark.parametrize("budget", [None, 0.0, thorough(0.5)])
def test_a_backward_reads_buffers_as_they_were_before_the_forward_wrote_into_them(
    branch: type[Stateful], budget: float | None
) -> None:
    """With or without a budget: PyTorch saves the overwritten buffer in both cases."""
    check_old_values(branch, budget, "aot_eager")


@pytest.mark.inductor
@pytest.mark.thorough
@pytest.mark.parametrize("branch", [Scaled, Centred, Delayed])
def test_generated_code_reads_buffers_as_they_were(branch: type[Stateful]) -> None:
    check_old_values(branch, None, "inductor")


def test_a_graph_whose_only_dear_operator_is_dropout_is_partitioned_too() -> None:
    """For it the partitioner of torch < 2.15 saves the pair that dropout returns as one value, which nothing can hold."""
    embedding = nn.Embedding(13, 16)
    _, run = compile_model(nn.Sequential(embedding, nn.Dropout(0.5)))
    torch.manual_seed(1)
    with budget_of_all(0.3):
        run(TOKENS).square().sum().backward()
    torch.manual_seed(1)
    expected = torch.autograd.grad(F.dropout(embedding(TOKENS)).square().sum(), embedding.weight)
    torch.testing.assert_close(embedding.weight.grad, *expected)


class Budgeted(Model):
    """Sets a budget of its own."""

    def __init__(self, budget: float) -> None:
        super().__init__(SOURCES["dropout"])
        self.budget = budget

    def forward(self, tokens: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # the block is refused there
            return super().forward(tokens)
        with torch.autograd.graph.region_activation_memory_budget(self.budget):
            return super().forward(tokens)


@pytest.mark.skipif(not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="torch 2.13 has it")
@pytest.mark.parametrize("budget", [0.0, thorough(0.5)])
def test_a_budget_that_a_forward_sets_itself_changes_no_gradient(budget: float) -> None:
    model = Budgeted(budget)
    backend, run = compile_model(model)
    assert_exact(model, run, backend, loss_of, NAMES, patterns=[(), (0,), (1,)])
