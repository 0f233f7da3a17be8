"""What else people switch on beside a backend: each leaves any pattern exact. docs/neighbours.md has the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from dropbp_fx import DropBPBackend, dropbp_backend
from tests.matrix import family, language_loss
from tests.oracle import Result, assert_equal, assert_exact, eager
from tests.test_models import ResidualMLP, square_loss

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


def test_liger_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norms, rotary embedding, gated MLP and fused linear cross-entropy, as ``use_liger_kernel`` has them."""
    if torch.get_default_device().type == "cpu":
        pytest.skip("Liger's kernels are Triton's; run with --device cuda.")
    pytest.importorskip("liger_kernel", reason="Liger's kernels are in the package liger-kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # are replaced for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    torch.manual_seed(1)
    model = family("Llama").build().train()
    apply_liger_kernel_to_llama(model=model)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, language_loss, LLAMA_BRANCHES, patterns=[[], [0], [1, 2], [0, 1, 2]])
    assert [branch.name for branch in backend.branches] == LLAMA_BRANCHES
