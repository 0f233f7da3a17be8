"""Which adds are residual branches: the graph is read, not the names. Expectations are written down by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dropbp_fx import dropbp_backend
from dropbp_fx.graph.branch import BranchSearch
from dropbp_fx.graph.branches import find_branches
from dropbp_fx.graph.naming import name_branches
from dropbp_fx.graph.normalise import normalise_inplace_adds
from dropbp_fx.graph.values import mutated_by
from tests.helpers import scale
from tests.oracle import assert_exact
from tests.selection import sweep, thorough

D = 8


def search(model: nn.Module, *inputs: Tensor) -> BranchSearch:
    found: list[BranchSearch] = []

    def backend(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        normalise_inplace_adds(gm)
        found.append(find_branches(gm))
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def names(model: nn.Module, *inputs: Tensor) -> list[str]:
    return [name.name for name in name_branches(search(model, *inputs).branches)]


class LoRA(nn.Module):
    """A linear layer with a low-rank update, added in one of the ways libraries add it."""

    def __init__(self, inputs: int = D, outputs: int = D, dora: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.base.requires_grad_(False)
        self.a = nn.Linear(inputs, 2, bias=False)
        self.b = nn.Linear(2, outputs, bias=False)
        self.dora = dora
        self.magnitude = nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        update = self.b(self.a(F.dropout(x, 0.0))) * 2.0
        if not self.dora:
            return base + update
        norm = (self.base.weight + self.b.weight @ self.a.weight).norm(dim=1).detach()
        scale = self.magnitude / norm
        return base + ((scale - 1) * base + scale * update)


class Block(nn.Module):
    """Attention-like and MLP-like branches; ``how`` adds the branch to the stream."""

    def __init__(self, linear: Callable[..., nn.Module], how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.q, self.o = linear(), linear()
        self.up, self.down = linear(), linear()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = self.how(x, self.o(F.scaled_dot_product_attention(self.q(h), h, h)))
        return self.how(x, self.down(F.gelu(self.up(x))))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


BLOCK_NAMES = [f"blocks.{i}.{part}" for i in range(2) for part in ("q+o", "up+down")]
PLAIN = lambda x, h: x + h  # noqa: E731
WAYS: dict[str, tuple[Callable[..., nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "plain": (lambda: nn.Linear(D, D), PLAIN),
    "lora": (LoRA, PLAIN),
    "dora": (lambda: LoRA(dora=True), PLAIN),
    "branch first": (LoRA, lambda x, h: h + x),
    "dropout on the branch": (LoRA, lambda x, h: F.dropout(h, 0.0) + x),
    "deepnorm": (LoRA, lambda x, h: 1.5 * x + h),
    "scaled branch": (LoRA, lambda x, h: x + 0.5 * h),
    "torch.add": (LoRA, torch.add),
    "method": (LoRA, lambda x, h: x.add(h)),
    "float32 stream": (LoRA, lambda x, h: x.to(torch.float64) + h),
}


@pytest.mark.parametrize("way", sweep(WAYS, ["lora", "dora", "deepnorm", "dropout on the branch", "float32 stream"]))
def test_a_branch_is_found_however_it_is_added_and_lora_is_none(way: str) -> None:
    linear, how = WAYS[way]
    x = torch.randn(2, 3, D)
    if way == "float32 stream":
        how = lambda x, h: (x.to(torch.float64) + h).to(torch.float32)  # noqa: E731
    assert names(Stack(Block(linear, how), Block(linear, how)), x) == BLOCK_NAMES


@pytest.mark.thorough
def test_lora_is_exact_and_a_dropped_branch_takes_its_lora_with_it() -> None:
    model = Stack(Block(LoRA, PLAIN), Block(LoRA, PLAIN))
    x = torch.randn(2, 3, D)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    points = [f"blocks.{i}.{part}" for i in range(2) for part in ("o", "down")]

    def loss(m: Any) -> Tensor:
        return m(x).square().sum()

    assert_exact(model, run, backend, loss, points)


class Parallel(nn.Module):
    def __init__(self, order: str, shared_norm: bool) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(D), nn.LayerNorm(D)
        self.q, self.o = LoRA(), LoRA()
        self.up, self.down = LoRA(), LoRA()
        self.order, self.shared_norm = order, shared_norm

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm_a(x)
        b = a if self.shared_norm else self.norm_b(x)
        a = self.o(F.scaled_dot_product_attention(self.q(a), a, a))
        b = self.down(F.gelu(self.up(b)))
        return {"x+a+b": lambda: x + a + b, "a+b+x": lambda: a + b + x, "x+(a+b)": lambda: x + (a + b)}[self.order]()


@pytest.mark.parametrize(
    ("order", "shared_norm", "count"),
    [("x+a+b", False, 2), thorough("a+b+x", True, 1), thorough("x+(a+b)", False, 1), ("x+(a+b)", True, 1)],
)
def test_parallel_attention_and_mlp_are_two_branches(order: str, shared_norm: bool, count: int) -> None:
    model = Stack(*(Parallel(order, shared_norm) for _ in range(count)))
    x = torch.randn(2, 3, D)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)

    def loss(m: Any) -> Tensor:
        return m(x).square().sum()

    points = [f"blocks.{i}.{part}" for i in range(count) for part in ("o", "down")]
    patterns = [[], [0], [1]] if count == 1 else [[], [0], [3], [1, 2], [0, 1, 3]]
    assert_exact(model, run, backend, loss, points, patterns=patterns)
    assert [branch.name for branch in backend.branches] == BLOCK_NAMES[: 2 * count]


class Adapter(nn.Module):
    """Houlsby's adapter: a bottleneck with a residual of its own, inside of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.down, self.up = nn.Linear(D, 2), nn.Linear(2, D)

    def forward(self, h: Tensor) -> Tensor:
        h = self.linear(h)
        return h + self.up(F.relu(self.down(h)))


@pytest.mark.parametrize("way", ["plain", "dropout on the branch"])
def test_an_adapter_inside_a_branch_belongs_to_it(way: str) -> None:
    def linear() -> nn.Module:
        return Adapter() if next(numbers) % 2 else nn.Linear(D, D)

    numbers = iter(range(100))
    how = WAYS[way][1]
    assert names(Stack(Block(linear, how), Block(linear, how)), torch.randn(2, 3, D)) == BLOCK_NAMES


class Biased(nn.Module):
    """A position bias (or mask) of the scores' own shape, made once and used by every layer, as in T5 and XGLM."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(3, 3)
        self.q = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.o = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(torch.arange(3, device=x.device)).expand(2, 3, 3)
        for q, o in zip(self.q, self.o, strict=True):
            scores = q(x) @ x.transpose(1, 2)
            scores = scores + bias
            bias = bias * 1.0
            x = x + o(scores.softmax(-1) @ x)
        return x


def test_a_bias_on_the_scores_is_no_residual_branch() -> None:
    found = search(Biased(), torch.randn(2, 3, D))
    assert len(found.branches) == 3
    assert all(branch.addition.meta["example_value"].shape == (2, 3, D) for branch in found.branches)


class Around(nn.Module):
    """A skip around the whole network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_skip_around_whole_layers_is_none_and_those_inside_are() -> None:
    inner = Stack(Block(LoRA, PLAIN), Block(LoRA, PLAIN))
    assert names(Around(inner), torch.randn(2, 3, D)) == [f"inner.{name}" for name in BLOCK_NAMES]


class NoBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.position = nn.Parameter(torch.zeros(3, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position.expand_as(x)  # a position embedding
        x = self.a(x) + self.b(x)  # two projections, neither computed from the other
        x = x + torch.sigmoid(x) * x  # a gate, no work
        left, right = x.chunk(2, -1)
        x = x * 0.5 + torch.cat([-right, left], -1) * 0.5  # rotary
        return x + self.b(x).detach() + self.a(x).mean()  # nothing to differentiate; another shape


def test_adds_that_are_no_residual_branch() -> None:
    found = search(NoBranch(), torch.randn(2, 3, D))
    assert found.branches == ()
    assert {rejected.reason for rejected in found.rejected} == {
        "neither summand is computed from the other by a matrix product"
    }


class Recurrent(nn.Module):
    """A linear attention whose state is updated by a matrix product (gated delta rule): a residual inside a mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.o = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x)
        state = x.new_zeros(2, D, D)
        read = []
        for step in range(3):
            key = k[:, step]
            state = state + key.unsqueeze(-1) @ (key.unsqueeze(1) - key.unsqueeze(1) @ state)
            read.append((key.unsqueeze(1) @ state).squeeze(1))
        return x + self.o(torch.stack(read, 1))


def test_a_state_recurrence_inside_a_mixer_is_not_taken_for_the_stream() -> None:
    assert names(Stack(Recurrent(), Recurrent()), torch.randn(2, 3, D)) == ["blocks.0.k+o", "blocks.1.k+o"]


class Doubled(torch.autograd.Function):
    """An autograd function without a matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


class Multiplied(torch.autograd.Function):
    """An autograd function with one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.flatten(0, -2).mT @ grad.flatten(0, -2)


class Kernel(torch.autograd.Function):
    """An autograd function that runs a kernel PyTorch cannot look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return scale(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum_to_size(weight.shape)


class KernelNorm(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return Kernel.apply(x, self.weight)


class PreNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize(("shape", "name"), [((D,), "blocks.0.mlp"), ((3, D), "blocks.0.norm+mlp")])
def test_a_kernel_of_one_matrix_is_a_norm_and_lends_a_branch_no_name(shape: tuple[int, ...], name: str) -> None:
    assert names(Stack(PreNorm(KernelNorm(*shape))), torch.randn(2, 3, D)) == [name]


class WithFunction(nn.Module):
    def __init__(self, works: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.weight = nn.Parameter(torch.eye(D))
        self.works = works

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + (Multiplied.apply(h, self.weight) if self.works else Doubled.apply(h))


@pytest.mark.parametrize("works", [True, False])
def test_an_autograd_function_does_work_if_its_forward_does(works: bool) -> None:
    assert len(search(WithFunction(works), torch.randn(2, 3, D)).branches) == works


class Cached(nn.Module):
    """Returns what it computed on the way, and computes something that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.o = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.k(x)
        _ = keys.exp().sum()
        return x + self.o(keys.softmax(-1)), keys * 2


def test_only_what_leaves_the_graph_leaves_the_branch() -> None:
    (branch,) = search(Cached(), torch.randn(2, 3, D)).branches
    assert [(value.name, user.name) for value, user in branch.escapes] == [("keys", "mul")]


@torch.library.custom_op("dropbp_fx_tests::put", mutates_args=("into",))
def put(value: Tensor, into: Tensor) -> None:
    into.copy_(value)


@pytest.mark.parametrize("target", [torch.ops.dropbp_fx_tests.put, torch.ops.dropbp_fx_tests.put.default])
@pytest.mark.parametrize("by_name", [False, True])
def test_what_an_operator_writes_into_is_in_its_schema(target: Any, by_name: bool) -> None:
    graph = fx.Graph()
    value, into = graph.placeholder("value"), graph.placeholder("into")
    call = graph.call_function(target, (value,) if by_name else (value, into), {"into": into} if by_name else {})
    assert mutated_by(call) == [into]


@pytest.mark.parametrize(("inplace", "written"), [(True, True), (False, False)])
def test_a_function_asked_to_write_into_its_operand_does(inplace: bool, written: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert mutated_by(graph.call_function(F.dropout, (x, 0.5, True, inplace))) == [x] * written
    assert mutated_by(graph.call_function(F.relu, (x,), {"inplace": inplace})) == [x] * written


def test_a_decorator_around_forward_leaves_branches_their_names() -> None:
    """Dynamo then captures the decorator's frame, where the module is the first of ``args``."""

    def decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            return forward(*args, **kwargs)

        return wrapper

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        @decorated
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x).relu()
            return x

    backend = dropbp_backend(inner="aot_eager")
    torch.compile(Net(), backend=backend)(torch.ones(2, 8)).sum().backward()
    assert [branch.name for branch in backend.branches] == ["blocks.0", "blocks.1"]
