"""Training in two processes on PyTorch's own engines, with gloo on the CPU.

Each test starts two processes once and runs several checks in them. The oracle of a check is one eager process that sees the
batches of both ranks, with ``.detach()`` on the branches that the ranks dropped.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dropbp_fx import DropBPBackend, RankDisagreementError, dropbp_backend
from tests.oracle import detached

WORLD = 2
Check = Callable[[int, Path], None]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def loss_of(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return (run(batch) - batch[..., :2].cumsum(1)).square().mean()


def batch_of(rank: int, step: int, tokens: int = 5) -> Tensor:
    return torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def backend_of(**more: Any) -> DropBPBackend:
    arguments = {"rate": 0.5, "seed": 0, "inner": "aot_eager", **more}
    return dropbp_backend(**arguments)


class Drops:
    """The names of the branches that the last step dropped, from ``backend.branches``."""

    def __init__(self, backend: DropBPBackend) -> None:
        self._backend = backend
        self._before: dict[str, int] = {}

    def last(self) -> list[str]:
        now = {branch.name: branch.times_dropped for branch in self._backend.branches}
        dropped = [name for name in now if now[name] > self._before.get(name, 0)]
        self._before = now
        return dropped


def everybody(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def path_of(branch: str) -> str:
    return branch[branch.index("layers.") :]


def plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("module.", "")


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Its weight decay and its momentum move a parameter whose gradient is zero, but not one that has none."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def assert_trains_like_one_process(
    run: Callable[[Tensor], Tensor],
    model: nn.Module,
    backend: DropBPBackend,
    *,
    oracle: nn.Module | None = None,
    steps: int = 4,
    accumulate: Callable[[nn.Module, Tensor], None] | None = None,
    tolerance: float = 1e-5,
    data_ranks: int = WORLD,
) -> None:
    """Equal gradients, equal sets of ``None``, and equal parameters after AdamW's steps."""
    rank = dist.get_rank() % data_ranks
    oracle = oracle or Model(model.embed.out_features)
    ours, theirs = adamw(model), adamw(oracle)
    drops, unequal = Drops(backend), set()
    for step in range(steps):
        loss_of(run, batch_of(rank, step)).backward()
        dropped = drops.last()
        unequal.add(tuple(dropped))
        with detached(oracle, [path_of(name) for name in dropped]):
            losses = [loss_of(oracle, batch_of(other, step)) for other in range(data_ranks)]
            (sum(losses) / data_ranks).backward()
        compare(model, oracle, what=f"step {step}, {dropped} dropped", tolerance=tolerance)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert len(unequal) > 1, "every step had the same pattern, so this showed little"


def compare(model: nn.Module, oracle: nn.Module, *, what: str, tolerance: float) -> None:
    actual = {plain(name): whole(p.grad) for name, p in model.named_parameters()}
    wanted = {name: p.grad for name, p in oracle.named_parameters()}
    assert set(actual) == set(wanted)
    missing = {name for name, g in wanted.items() if g is None}
    assert {name for name, g in actual.items() if g is None} == missing, what
    assert missing, what
    for name, gradient in wanted.items():
        if gradient is not None:
            torch.testing.assert_close(
                actual[name], gradient, rtol=10 * tolerance, atol=tolerance, msg=lambda t, n=name: f"{what}: {n}: {t}"
            )
    weights = {plain(name): whole(p.detach()) for name, p in model.named_parameters()}
    for name, parameter in oracle.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=100 * tolerance, atol=10 * tolerance)


# ---- DistributedDataParallel ---------------------------------------------------------------------------------------


def ddp_of_a_compiled_model(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of()
    model.compile(backend=backend)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    assert_trains_like_one_process(ddp, model, backend)
    assert backend.stats.graphs == 1


def a_compiled_ddp_with_gradients_as_views_of_buckets(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of()
    ddp = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=True)
    assert_trains_like_one_process(torch.compile(ddp, backend=backend), model, backend)


DDP = [ddp_of_a_compiled_model, a_compiled_ddp_with_gradients_as_views_of_buckets]


def test_ddp(tmp_path: Path) -> None:
    in_two_processes(DDP, tmp_path)


# ---- processes -----------------------------------------------------------------------------------------------------


def in_two_processes(checks: Sequence[Check], folder: Path) -> None:
    """Run the checks in two processes, one after the other; what failed on which rank is the test's failure."""
    mp.spawn(_process, ([check.__name__ for check in checks], folder), nprocs=WORLD)
    failures = [path.read_text() for path in sorted(folder.glob("failure*"))]
    assert not failures, "\n\n".join(failures)
    assert len(list(folder.glob("passed*"))) == WORLD * len(checks)


def _process(rank: int, names: Sequence[str], folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    for name in names:
        torch._dynamo.reset()
        torch.manual_seed(rank)
        started = time.perf_counter()
        try:
            globals()[name](rank, folder)
        except BaseException:
            (folder / f"failure_{name}_{rank}").write_text(f"{name}, rank {rank}: {traceback.format_exc()}")
            os._exit(0)  # the other rank may be waiting in a collective: this ends its connection
        (folder / f"passed_{name}_{rank}").write_text(f"{time.perf_counter() - started:.1f} s")
    dist.barrier()
    dist.destroy_process_group()
