"""What is compiled and when, what is saved for backward, dynamic shapes, the on-disk cache."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from tests.helpers import compile_model, recording_compilers
from tests.oracle import assert_equal, assert_exact, compiled, eager
from tests.selection import thorough
from tests.test_models import SMALL, ResidualMLP, square_loss


def llama(layers: int) -> hf.LlamaForCausalLM:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, "num_hidden_layers": layers}))


def loss_on(ids: Tensor) -> Any:
    return lambda model: model(input_ids=ids, labels=ids).loss


IDS = torch.arange(16).reshape(2, 8)


@pytest.mark.parametrize("kind", ["mlp", thorough("llama")])
def test_two_hundred_random_patterns_compile_nothing_new(kind: str) -> None:
    model = llama(4) if kind == "llama" else ResidualMLP(depth=8)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    loss = loss_on(IDS) if kind == "llama" else square_loss
    loss(run).backward()
    backend.warmup()
    before = backend.stats
    rng = random.Random(0)
    seen = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(200):
            pattern = frozenset(i for i in range(8) if rng.random() < rng.random()) - {rng.randrange(8)}
            seen.add(pattern)
            with backend.pinned(pattern):
                loss(run).backward()
    assert len(seen) > 100
    assert backend.stats.graphs == before.graphs == 1
    assert backend.stats.compiled_variants == before.compiled_variants


def test_after_warmup_the_inner_compilers_are_never_called_again() -> None:
    calls, compilers = recording_compilers()
    backend, run = compile_model(ResidualMLP(), inner=compilers)
    loss = square_loss(run)
    backend.warmup()
    compiled_in_advance = list(calls)
    assert "backward" in compiled_in_advance
    loss.backward()
    for _ in range(12):
        square_loss(run).backward()
    assert calls == compiled_in_advance


@pytest.mark.thorough
def test_the_number_of_compilations_does_not_grow_with_depth() -> None:
    counts = []
    for layers in (2, 8):
        torch._dynamo.reset()
        backend = dropbp_backend(inner="aot_eager")
        run = torch.compile(llama(layers), backend=backend)
        loss_on(IDS)(run).backward()
        backend.warmup()
        counts.append((backend.stats.unique_regions, backend.stats.compiled_variants))
    assert counts[0] == counts[1]
    regions, variants = counts[0]
    assert regions == 4, "prologue, attention, MLP, epilogue"
    assert variants == 6, "two for each branch, one for the prologue and one for the epilogue"


def saved_bytes(run: Any, loss: Any, model: nn.Module) -> int:
    """Bytes that a forward keeps for its backward, parameters and inputs not counted, each memory once."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())} | {
        IDS.untyped_storage().data_ptr()
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(run)
    value.backward()
    return sum(kept.values())


def test_a_dropped_branch_saves_nothing_for_backward() -> None:
    model = llama(4)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    loss = loss_on(IDS)

    def saved(pattern: list[int]) -> int:
        with backend.pinned(pattern):
            loss(run).backward()  # compiles
            return saved_bytes(run, loss, model)

    full = saved([])
    for kind in (0, 1):  # all attention branches alike, all MLP branches alike
        savings = {full - saved([2 * layer + kind]) for layer in range(1, 4)}
        assert len(savings) == 1
        assert min(savings) > 0
    one = saved([i for i in range(8) if i != 3])
    assert saved([i for i in range(8) if i not in (3, 5)]) - one == full - saved([5]), "the rest saves nothing at all"


def test_saved_tensor_hooks_of_the_user_never_see_the_tracing() -> None:
    model = ResidualMLP()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with torch.autograd.graph.save_on_cpu(), backend.pinned([1]):
        actual = compiled(model, square_loss, run)
    assert_equal(actual, eager(model, square_loss, ["blocks.1"]))


@pytest.mark.parametrize("kind", ["mlp", thorough("llama")])
def test_dynamic_shapes_are_exact_and_add_no_recompiles(kind: str) -> None:
    model = llama(2) if kind == "llama" else ResidualMLP(depth=4)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend, dynamic=True)
    llamas = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn", "mlp")]
    points = llamas if kind == "llama" else [f"blocks.{i}" for i in range(4)]

    def loss_of_length(length: int) -> Any:
        if kind == "llama":
            return loss_on(torch.arange(2 * length).reshape(2, length))
        x = torch.linspace(-1, 1, length * 8).reshape(length, 8)
        return lambda m: m(x).square().mean()

    loss_of_length(7)(run).backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (12, 5):
            assert_exact(model, run, backend, loss_of_length(length), points, patterns=[(), (0,), (1, 2), (0, 1, 2)])
    assert backend.stats.graphs == 1
    assert len(backend.branches) == 4


def test_changing_lengths_recompile_no_more_than_torch_compile_does() -> None:
    counts = []
    for use_dropbp in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = ResidualMLP()
        backend: Any = dropbp_backend(0.3, inner="aot_eager") if use_dropbp else "aot_eager"
        run = torch.compile(model, backend=backend)
        for length in (4, 5, 6, 9, 4):
            run(torch.ones(length, 8)).sum().backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1]


def test_dynamic_shapes_with_parallel_branches_and_mixed_gradients() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            x = x + self.a(h).tanh() + self.b(h).tanh()
            return x + self.c(torch.cat([x, x * 2], -1)).tanh()

    model = Parallel()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend, dynamic=True)
    for length in (6, 9):
        x = torch.linspace(-1, 1, length * 16).reshape(length, 16)

        def loss(m: Any, x: Tensor = x) -> Tensor:
            return m(x).square().sum()

        for pattern in ([], [0], [1], [2], [0, 1], [0, 2]):
            with backend.pinned(pattern):
                actual = compiled(model, loss, run)
            assert_equal(actual, eager(model, loss, ["abc"[i] for i in pattern]))


CACHE_SCRIPT = """
import json, sys, torch
from torch._dynamo.utils import counters
from dropbp_fx import dropbp_backend
from tests.oracle import assert_exact
from tests.test_models import ResidualMLP, square_loss
torch.manual_seed(0)
model = ResidualMLP()
backend = dropbp_backend()
run = torch.compile(model, backend=backend)
patterns = [(), (0,), (1,), (0, 1), (1, 2)]
if sys.argv[1] == "reversed":
    patterns.reverse()
assert_exact(model, run, backend, square_loss, ["blocks.0", "blocks.1", "blocks.2"], patterns=patterns)
print(json.dumps({name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}))
"""


@pytest.mark.thorough
@pytest.mark.inductor
def test_a_second_process_starts_from_the_disk_cache_and_mixes_no_variants_up(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    counts = []
    for order in ("forward", "reversed"):
        done = subprocess.run(
            [sys.executable, "-c", CACHE_SCRIPT, order],
            env=environment,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        counts.append(json.loads(done.stdout.splitlines()[-1]))
    assert counts[0]["fxgraph_cache_miss"] > 0
    assert counts[1]["fxgraph_cache_miss"] == 0, counts
    assert counts[1]["fxgraph_cache_hit"] > 0


def test_an_inference_only_process_compiles_one_graph() -> None:
    model = ResidualMLP().eval()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        square_loss(run)
    assert backend.stats.graphs == 1
    assert backend.stats.compiled_variants == 0
