"""Gradients agree with the eager ``.detach()`` oracle for any pattern, in the settings that models are trained in.

tests/test_matrix.py goes through the model families; here it is a Llama or a smaller network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from tests.matrix import IDS, LLAMA_LIKE, language_loss
from tests.oracle import DetachPoint, assert_exact
from tests.selection import thorough

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is called, and for each of its branches the name and where eager detaches it."""

    build: Callable[[], nn.Module]
    loss: Callable[[Any], Tensor]
    branches: dict[str, DetachPoint]


class ResidualMLP(nn.Module):
    """Nothing but linear layers and adds, and never a look at ``self.training``."""

    def __init__(self, depth: int = 3, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


X = torch.linspace(-1, 1, 40).reshape(5, 8).cos()


def square_loss(model: Any) -> Tensor:
    return model(X).square().mean()


class TransformerEncoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


SEQUENCE = torch.linspace(-2, 2, 2 * 6 * 16).reshape(2, 6, 16).sin()


def sequence_loss(model: Any) -> Tensor:
    return (model(SEQUENCE) * SEQUENCE.cos()).square().mean()


ENCODER_BRANCHES: dict[str, DetachPoint] = {
    "encoder.layers.0.self_attn": "encoder.layers.0.self_attn",
    "encoder.layers.0.linear1+linear2": "encoder.layers.0.linear2",
    "encoder.layers.1.self_attn": "encoder.layers.1.self_attn",
    "encoder.layers.1.linear1+linear2": "encoder.layers.1.linear2",
}


def same(*names: str) -> dict[str, DetachPoint]:
    return {name: name for name in names}


CASES: dict[str, Case] = {
    "encoder, pre-norm": Case(lambda: TransformerEncoder(True), sequence_loss, ENCODER_BRANCHES),
    "encoder, post-norm": Case(lambda: TransformerEncoder(False), sequence_loss, ENCODER_BRANCHES),
    "residual mlp": Case(ResidualMLP, square_loss, same(*(f"blocks.{i}" for i in range(3)))),
}


LLAMA = Case(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)), language_loss, LLAMA_LIKE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_with_detach_for_every_kind_of_pattern(name: str) -> None:
    case = CASES[name]
    model = case.build().train()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, case.loss, list(case.branches.values()))
    assert [branch.name for branch in backend.branches] == list(case.branches)


@pytest.mark.inductor
@pytest.mark.parametrize("case", [thorough(LLAMA), CASES["residual mlp"]], ids=["llama", "residual mlp"])
def test_gradients_agree_with_detach_under_inductor(case: Case) -> None:
    model = case.build().train()
    backend = dropbp_backend()
    run = torch.compile(model, backend=backend)
    points = list(case.branches.values())
    count = len(points)
    patterns: Sequence[Sequence[int]] = [(), (0,), range(1, count), [i for i in range(count) if i % 3 == 1]]
    assert_exact(model, run, backend, case.loss, points, patterns=patterns, rtol=1e-3, atol=1e-4)


def test_loss_outside_of_the_compiled_part() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)

    def loss(m: Any) -> Tensor:
        return F.cross_entropy(m(input_ids=IDS, use_cache=False).logits.flatten(0, 1), IDS.flatten())

    assert_exact(model, run, backend, loss, list(LLAMA_LIKE.values()))


def test_a_function_that_calls_the_model_and_computes_the_loss() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    backend = dropbp_backend(inner="aot_eager")
    step = torch.compile(lambda: language_loss(model), backend=backend)

    def loss(m: Any) -> Tensor:
        return step() if m is step else language_loss(m)

    assert_exact(model, step, backend, loss, list(LLAMA_LIKE.values()))


def test_frozen_parameters_and_a_frozen_embedding() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("q_proj", "down_proj")))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, language_loss, list(LLAMA_LIKE.values()))


@pytest.mark.thorough
def test_layers_below_the_first_trainable_one_are_never_drawn() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 3}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name or "lm_head" in name)
    backend = dropbp_backend(0.5, inner="aot_eager", seed=0)
    run = torch.compile(model, backend=backend)
    for _ in range(4):
        language_loss(run).backward()
    assert [branch.droppable for branch in backend.branches] == [False] * 4 + [True] * 2
    assert [branch.times_dropped for branch in backend.branches[:4]] == [0] * 4
    assert backend.stats.realised_rate == 0.5


@pytest.mark.parametrize("where", ["x += h", "h += x", "x.add_(h)"])
def test_inplace_residual_adds(where: str) -> None:
    class InPlace(ResidualMLP):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                h = block(x)
                if where == "x += h":
                    x = x * 1
                    x += h
                elif where == "x.add_(h)":
                    x = x.clone()
                    x.add_(h)
                else:
                    h += x
                    x = h
            return self.head(x)

    model = InPlace()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, square_loss, [f"blocks.{i}" for i in range(3)])


def test_a_graph_break_in_the_middle_of_the_model() -> None:
    class Broken(ResidualMLP):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.blocks[0](x)
            x = x + self.blocks[1](x)
            torch._dynamo.graph_break()
            x = x + self.blocks[2](x)
            return self.head(x)

    model = Broken()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, square_loss, [f"blocks.{i}" for i in range(3)])
    assert backend.stats.graphs == 2


def test_a_graph_break_at_every_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x).tanh()
            return x + self.b(x).tanh()

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                torch._dynamo.graph_break()
                x = block(x)
            return x

    model = Broken()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    inputs = torch.linspace(-1, 1, 64).reshape(4, 16)

    def loss(m: Any) -> Tensor:
        return m(inputs).square().sum()

    # One Dynamo graph serves all three blocks; the model that calls them tells them apart.
    points = [f"blocks.{i}.{child}" for i in range(3) for child in ("a", "b")]
    loss(run).backward()
    assert [branch.name for branch in backend.branches] == points
    assert_exact(model, run, backend, loss, points)


def test_dropout_draws_the_same_masks_as_eager() -> None:
    class Dropping(ResidualMLP):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + F.dropout(block(F.dropout(x, 0.2)), 0.1)
            return self.head(x)

    model = Dropping()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)

    def loss(m: Any) -> Tensor:
        torch.manual_seed(3)
        return square_loss(m)

    assert_exact(model, run, backend, loss, [f"blocks.{i}" for i in range(3)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, thorough(torch.float16)])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)).to(dtype)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(
        model,
        run,
        backend,
        language_loss,
        list(LLAMA_LIKE.values()),
        patterns=[(), (0,), (0, 1, 2), (1, 2)],
        rtol=2e-2,
        atol=2e-2,
    )


def test_autocast_around_the_call() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)

    def loss(m: Any) -> Tensor:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            return language_loss(m)

    assert_exact(
        model,
        run,
        backend,
        loss,
        list(LLAMA_LIKE.values()),
        patterns=[(), (0,), (0, 1, 2), (1, 2)],
        rtol=2e-2,
        atol=2e-2,
    )
