"""What else people switch on beside a backend: each leaves any pattern exact. docs/compatibility.md has the table."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from dropbp_fx import DropBPBackend, dropbp_backend
from tests.helpers import scale
from tests.matrix import family, language_loss
from tests.oracle import Result, assert_equal, assert_exact, eager
from tests.test_models import ResidualMLP, square_loss

pytestmark = pytest.mark.thorough

POINTS = ["blocks.0", "blocks.1", "blocks.2"]
LLAMA_BRANCHES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
PATTERNS: list[list[int]] = [[], [1], [0, 2], [0, 1]]


def make(inner: str = "aot_eager", **options: Any) -> tuple[nn.Module, DropBPBackend, Any]:
    model, backend = ResidualMLP(), dropbp_backend(inner=inner)
    return model, backend, torch.compile(model, backend=backend, **options)


@pytest.mark.parametrize(
    "options",
    [{"fullgraph": True}, {"dynamic": True}, {"mode": "default"}, {"mode": "max-autotune-no-cudagraphs"}],
    ids=str,
)
def test_options_of_torch_compile(options: dict[str, Any]) -> None:
    model, backend, run = make(**options)
    assert_exact(model, run, backend, square_loss, POINTS, patterns=PATTERNS)


@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "reduce-overhead"])
def test_modes_of_inductor(mode: str) -> None:
    model, backend, run = make("inductor", mode=mode)
    assert_exact(model, run, backend, square_loss, POINTS, patterns=[[], [0, 2]])


def test_compiled_autograd() -> None:
    """The backward is captured as a graph of its own, a new one for each pattern of gradients that exist."""
    model, backend, run = make()
    for pattern in PATTERNS:
        model.zero_grad()
        with backend.pinned(pattern):
            loss = square_loss(run)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            loss.backward()
        actual = Result(loss.detach(), {name: p.grad for name, p in model.named_parameters()})
        assert_equal(actual, eager(model, square_loss, [POINTS[i] for i in pattern]))


def test_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        model, backend, run = make()
        assert_exact(model, run, backend, square_loss, POINTS, patterns=PATTERNS)
    finally:
        torch.use_deterministic_algorithms(False)


class Attention(nn.Module):
    def __init__(self, flex: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.flex = flex

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.flex:
            mixed = flex_attention(q, k, v, score_mod=lambda score, _b, _h, row, column: score - (row - column).abs())
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, flex: bool) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention(flex) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = x + self.attention[i](x)
            x = x + self.mlp[i](x)
        return x


@pytest.mark.parametrize("kind", ["flash", "math", "flex"])
def test_kinds_of_attention(kind: str) -> None:
    if kind == "flex" and torch.get_default_device().type == "cpu":
        pytest.skip("PyTorch has no backward of flex attention on the CPU; run with --device cuda.")
    model, backend = Transformer(kind == "flex"), dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)

    rows = torch.linspace(-1, 1, 2 * 16 * 16).reshape(2, 16, 16).sin()
    kernel = SDPBackend.FLASH_ATTENTION if kind == "flash" else SDPBackend.MATH

    def loss(m: Any) -> Tensor:
        with sdpa_kernel(kernel):
            value: Tensor = m(rows).square().sum()
        return value

    points = ["attention.0", "mlp.0", "attention.1", "mlp.1"]
    assert_exact(model, run, backend, loss, points, patterns=[[], [0], [1, 2], [0, 1, 2]])


@torch.library.custom_op("dropbp_fx_tests::scale_gradients", mutates_args=("grad", "weight_grad"))
def scale_gradients(grad: Tensor, weight_grad: Tensor, x: Tensor, weight: Tensor) -> None:
    weight_grad.copy_((grad * x).sum_to_size(weight.shape))
    grad.mul_(weight)


class Scale(torch.autograd.Function):
    """As kernel libraries do it: operators of their own, and the gradient is written over the one that came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        return scale(rows, weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        mine, weight_grad = grad.contiguous().view(-1, grad.shape[-1]), torch.empty_like(weight)
        scale_gradients(mine, weight_grad, rows, weight)
        return mine.view(grad.shape), weight_grad


class Kernels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = (nn.Parameter(torch.linspace(0.5, 1.5, size)) for size in (16, 24))
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(Scale.apply(self.up(Scale.apply(x, self.norm)).tanh(), self.gate))


class KernelNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Kernels() for _ in range(3))
        self.norm = nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return Scale.apply(x, self.norm)


def test_kernels_in_autograd_functions() -> None:
    """They run in both directions as opaque operators, and a dropped branch runs none backward."""
    model, backend = KernelNetwork(), dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend, fullgraph=True)
    rows = torch.linspace(-1, 1, 2 * 5 * 16).reshape(2, 5, 16)
    assert_exact(model, run, backend, lambda m: m(rows).sin().sum(), POINTS, patterns=PATTERNS)
    assert [branch.name for branch in backend.branches] == POINTS
    with backend.pinned([0, 2]), torch.profiler.profile(acc_events=True) as profile:
        run(rows).sin().sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["dropbp_fx_tests::scale"] == 7
    assert calls["dropbp_fx_tests::scale_gradients"] == 3


#: Some of Liger's kernels, and the branches that are left of Llama's with them.
LIGER: dict[str, tuple[set[str], list[str]]] = {
    "rms_norm": ({"rms_norm"}, LLAMA_BRANCHES),
    "swiglu": ({"swiglu"}, LLAMA_BRANCHES),
    "loss": ({"fused_linear_cross_entropy"}, LLAMA_BRANCHES),
    "all but rope": ({"rms_norm", "swiglu", "fused_linear_cross_entropy"}, LLAMA_BRANCHES),
    "rope": ({"rope"}, LLAMA_BRANCHES[1::2]),
    "all": ({"rope", "rms_norm", "swiglu", "fused_linear_cross_entropy"}, LLAMA_BRANCHES[1::2]),
}


@pytest.mark.parametrize("kernels", LIGER)
@pytest.mark.filterwarnings("ignore::dropbp_fx.NoResidualBranchWarning")  # of the pieces of attention around its rope
def test_liger_kernels(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's rotary embedding breaks the graph inside of attention, so the MLPs are what is left to drop.

    The decoder is compiled, not what stands around it: where PyTorch 2.11 compiles Liger's last norm and the slice that its
    loss takes of it as one graph, no gradient passes, with any backend.
    """
    if torch.get_default_device().type == "cpu":
        pytest.skip("Liger's kernels are Triton's; run with --device cuda.")
    pytest.importorskip("liger_kernel", reason="Liger's kernels are in the package liger-kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # are replaced for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    taken, points = LIGER[kernels]
    torch.manual_seed(1)
    model: Any = family("Llama").build().train()
    apply_liger_kernel_to_llama(model=model, **{name: name in taken for name in LIGER["all"][0]})
    backend = dropbp_backend(inner="aot_eager")
    backend.register(model)
    run = copy.copy(model)  # with the same parameters
    run._modules = {**model._modules, "model": torch.compile(model.model, backend=backend)}
    run.forward = types.MethodType(model.forward.__func__, run)
    last = len(points) - 1
    try:
        assert_exact(model, run, backend, language_loss, points, patterns=[[], [0], [last], [*range(last)]])
        assert [branch.name for branch in backend.branches] == points
    except BaseException as error:
        for reason, count in torch._dynamo.utils.counters["graph_break"].items():
            error.add_note(f"{count} graph breaks: {reason}")
        raise
