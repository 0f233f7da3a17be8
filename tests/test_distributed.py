"""Training in two processes on PyTorch's own engines, with gloo on the CPU.

Each test starts two processes once and runs several checks in them. The oracle of a check is one eager process that sees the
batches of both ranks, with ``.detach()`` on the branches that the ranks dropped.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import json
import math
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import examples.distributed
from benchmarks import distributed
from benchmarks.distributed_worker import DistributedRequest, measure
from benchmarks.measure import Record
from benchmarks.models import Llama
from benchmarks.results import load
from benchmarks.suites import shape_of
from dropbp_fx import DropBPBackend, RankDisagreementError
from dropbp_fx.distributed import (
    agree_across,
    all_reduce_present,
    check_ranks,
    clip_grad_norm_,
    gathered_parameters,
    parameter_groups,
    skip_unneeded_gathers,
)
from tests.helpers import make_backend
from tests.oracle import detached

pytestmark = pytest.mark.thorough

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
    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 2)
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
        return self.head(x)


def loss_of(run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return (run(batch) - batch[..., :2].cumsum(1)).square().mean()


def batch_of(rank: int, step: int, tokens: int = 5) -> Tensor:
    return torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def backend_of(**more: Any) -> DropBPBackend:
    arguments = {"rate": 0.5, "seed": 0, "inner": "aot_eager", **more}
    return make_backend(**arguments)


class Drops:
    """The branches that the last step dropped, as paths of modules."""

    def __init__(self, backend: DropBPBackend) -> None:
        self._backend = backend
        self._drawn: list[tuple[Sequence[int], frozenset[int]]] = []
        backend.on_sample(lambda indices, dropped: self._drawn.append((indices, dropped)))

    def last(self) -> list[str]:
        return [name for dropped in self.each() for name in dropped]

    def each(self) -> list[list[str]]:
        """For every draw of the last step, apart."""
        names = [branch.name for branch in self._backend.branches]
        found = [[path_of(names[index]) for index in sorted(dropped)] for _, dropped in self._drawn]
        self._drawn.clear()
        return found


def path_of(branch: str) -> str:
    return branch[branch.index("layers.") :]


def everybody(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def plain(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("module.", "")


def whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Its weight decay and its momentum move a parameter whose gradient is zero, but not one that has none.

    ``eps`` is large because a key's bias has a gradient of rounding errors alone, which Adam would scale up.
    """
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)


def assert_trains_like_one_process(
    run: Callable[[Tensor], Tensor],
    model: nn.Module,
    backend: DropBPBackend,
    *,
    oracle: nn.Module | None = None,
    steps: int = 4,
    tolerance: float = 1e-5,
    data_ranks: int = WORLD,
    some_missing: bool = True,
) -> None:
    """Equal gradients, equal sets of ``None``, and equal parameters after AdamW's steps."""
    rank = dist.get_rank() % data_ranks
    oracle = oracle or Model(model.embed.out_features, len(model.layers))
    ours, theirs = adamw(model), adamw(oracle)
    drops, unequal = Drops(backend), set()
    for step in range(steps):
        loss_of(run, batch_of(rank, step)).backward()
        dropped = drops.last()
        unequal.add(tuple(dropped))
        with detached(oracle, dropped):
            losses = [loss_of(oracle, batch_of(other, step)) for other in range(data_ranks)]
            (sum(losses) / data_ranks).backward()
        compare(model, oracle, what=f"step {step}, {dropped} dropped", tolerance=tolerance, some_missing=some_missing)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert len(unequal) > 1, "every step had the same pattern, so this showed little"


def compare(model: nn.Module, oracle: nn.Module, *, what: str, tolerance: float, some_missing: bool = True) -> None:
    actual = {plain(name): whole(p.grad) for name, p in model.named_parameters()}
    wanted = {name: p.grad for name, p in oracle.named_parameters()}
    assert set(actual) == set(wanted)
    missing = {name for name, g in wanted.items() if g is None}
    assert {name for name, g in actual.items() if g is None} == missing, what
    assert missing or not some_missing, what
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


def a_hook_that_sends_present_gradients_only(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of(rate=0.7)
    options = {"bucket_cap_mb": 0.004, "gradient_as_bucket_view": True}
    ddp = DistributedDataParallel(model, find_unused_parameters=True, **options)
    ddp.register_comm_hook(None, all_reduce_present)
    run = torch.compile(ddp, backend=backend)
    sent: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, **more: Any) -> Any:
        sent.append(tensor.nbytes)
        return reduce(tensor, **more)

    with mock.patch.object(dist, "all_reduce", counted), torch._dynamo.config.patch(optimize_ddp=False):
        assert_trains_like_one_process(run, model, backend)
        sent.clear()
        loss_of(run, batch_of(rank, 99)).backward()
    present = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    everything = sum(p.nbytes for p in model.parameters())
    assert sum(sent) == present < 0.5 * everything


def micro_batches_without_communication(rank: int, folder: Path) -> None:
    """A branch that was dropped in the last micro-batch only has the gradients of the others."""
    model, oracle, backend = Model(layers=1), Model(layers=1), backend_of()
    model.compile(backend=backend)
    ddp, drops = DistributedDataParallel(model, find_unused_parameters=True), Drops(backend)
    for step in range(3):
        for micro in range(3):
            with ddp.no_sync() if micro < 2 else contextlib.nullcontext():
                loss_of(ddp, batch_of(rank, 10 * step + micro)).backward()
            with detached(oracle, drops.last()):
                losses = [loss_of(oracle, batch_of(other, 10 * step + micro)) for other in range(WORLD)]
                (sum(losses) / WORLD).backward()
        compare(model, oracle, what=f"step {step}", tolerance=1e-5, some_missing=False)
        model.zero_grad(set_to_none=True)
        oracle.zero_grad(set_to_none=True)


def graphs_that_ddp_optimizer_cut(rank: int, folder: Path) -> None:
    """It cuts at the borders of buckets, through branches too; those are never dropped, and gradients are exact."""
    model, backend = Model(256, layers=3), backend_of()
    ddp = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = torch.compile(ddp, backend=backend)
        assert_trains_like_one_process(run, model, backend, steps=3, tolerance=1e-4, some_missing=False)
    assert backend.stats.graphs > 1
    assert 1 < len(backend.branches) < 6
    assert any("torch._dynamo.config.optimize_ddp = False" in str(warning.message) for warning in caught)
    loss_of(
        run, batch_of(rank, 9, tokens=7)
    ).backward()  # a graph with symbolic sizes, which compiles its variants at once


def ddp_that_was_not_told_of_missing_gradients(rank: int, folder: Path) -> None:
    """Or it would average none of the first step's gradients that were not in a full bucket, and say so a step later."""
    model, backend = Model(layers=1), backend_of()
    model.compile(backend=backend)
    for options in ({}, {"find_unused_parameters": True, "static_graph": True}):
        ddp = DistributedDataParallel(model, **options)
        with pytest.raises(RuntimeError, match="Make it with find_unused_parameters=True, and without static_graph"):
            loss_of(ddp, batch_of(rank, 0))
        with ddp.no_sync():
            loss_of(ddp, batch_of(rank, 0))
        with backend.disabled():
            loss_of(ddp, batch_of(rank, 0)).backward()


def measurements_of_the_benchmark(rank: int, folder: Path) -> None:
    def measured(kind: str, method: str, engine: str, value: float) -> Record:
        sizes = {"layers": 1, "inner": "aot_eager", "steps": 1, "warmup": 1, "train_steps": 4}
        request = DistributedRequest(f"distributed {kind}", method, "tiny", [value], engine=engine, **sizes)
        torch._dynamo.reset()
        (record,) = measure(request)
        assert "error" not in record, record
        return record

    everything = sum(p.numel() for p in Llama(shape_of("tiny", layers=1)).parameters())
    assert 0 < measured("steps", "dropbp_fx", "fsdp2", 0.5)["gradient_bytes"] < 4 * everything
    patterns = measured("patterns", "dropbp_fx, present gradients", "ddp", 0.5)
    assert (patterns["agree"], patterns["resumed_alike"], patterns["steps"]) == (True, True, 4)


DDP = [
    ddp_of_a_compiled_model,
    a_hook_that_sends_present_gradients_only,
    micro_batches_without_communication,
    graphs_that_ddp_optimizer_cut,
    ddp_that_was_not_told_of_missing_gradients,
    measurements_of_the_benchmark,
]


@pytest.mark.long
def test_ddp(tmp_path: Path) -> None:
    in_two_processes(DDP, tmp_path)


# ---- fully_shard -----------------------------------------------------------------------------------------------------


def sharded(model: nn.Module, **more: Any) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **more)
    fully_shard(model, mesh=mesh, **more)


def a_compiled_model_that_is_sharded_whole(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of()
    model.compile(backend=backend)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    assert_trains_like_one_process(model, model, backend)
    assert backend.stats.graphs == 1


def a_compiled_model_that_is_sharded_by_layers(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of()
    backend.register(model)
    model.compile(backend=backend)
    sharded(model)
    assert_trains_like_one_process(model, model, backend)


def a_model_that_is_sharded_and_then_compiled(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of()
    backend.register(model)
    sharded(model, reshard_after_forward=False)
    assert_trains_like_one_process(torch.compile(model, backend=backend), model, backend)


def layers_that_are_compiled_and_then_sharded(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of()
    backend.register(model)
    for layer in model.layers:
        layer.compile(backend=backend)
    sharded(model)
    assert_trains_like_one_process(model, model, backend)


def sharded_layers_that_are_compiled(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of()
    backend.register(model)
    sharded(model)
    for layer in model.layers:
        layer.compile(backend=backend)
    assert_trains_like_one_process(model, model, backend)


def mixed_precision(rank: int, folder: Path) -> None:
    """Against one eager process under bf16: no further from it than bf16's rounding."""
    model, backend = Model(), backend_of()
    backend.register(model)
    model.compile(backend=backend)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    drops, oracle = Drops(backend), Model()
    for step in range(3):
        loss_of(model, batch_of(rank, step)).backward()
        with detached(oracle, drops.last()):
            (sum(loss_of(oracle, batch_of(other, step)) for other in range(WORLD)) / WORLD).backward()
        wanted = {name: p.grad for name, p in oracle.named_parameters()}
        found = {name: whole(p.grad) for name, p in model.named_parameters()}
        assert {n for n, g in found.items() if g is None} == {n for n, g in wanted.items() if g is None} != set()
        for name, gradient in wanted.items():
            if gradient is not None:
                assert (found[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-4, name
        model.zero_grad()
        oracle.zero_grad()


def only_present_gradients_are_sent(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of(rate=0.5)
    backend.register(model)
    model.compile(backend=backend)
    sharded(model)
    loss_of(model, batch_of(rank, 0)).backward()
    model.zero_grad()
    sent: list[int] = []
    # What FSDP2 calls for it, in this release and in others.
    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)]
    with contextlib.ExitStack() as stack:
        for name in names:
            collective = getattr(dist, name)

            def counted(*arguments: Any, collective: Any = collective, **named: Any) -> Any:
                tensors = [a for a in (*arguments, *named.values()) if isinstance(a, Tensor)]
                sent.append(max(tensor.numel() for tensor in tensors))
                return collective(*arguments, **named)

            stack.enter_context(mock.patch.object(dist, name, counted))
        loss_of(model, batch_of(rank, 1)).backward()
    present = sum(whole(p.grad).numel() for p in model.parameters() if p.grad is not None)
    everything = sum(p.numel() for p in model.parameters())
    assert present <= sum(sent) < 1.1 * present < 0.9 * everything  # shards are padded to equal sizes


def gathers_of(act: Callable[[], Any]) -> int:
    """How often parameters are gathered meanwhile."""
    count = 0
    with contextlib.ExitStack() as stack:
        for name in ("all_gather_into_tensor", "all_gather_single"):  # by release
            if hasattr(dist, name):
                collective = getattr(dist, name)

                def counted(*arguments: Any, collective: Any = collective, **named: Any) -> Any:
                    nonlocal count
                    count += 1
                    return collective(*arguments, **named)

                stack.enter_context(mock.patch.object(dist, name, counted))
        act()
    return count


def a_backward_gathers_what_it_reads(rank: int, folder: Path) -> None:
    """Layers compiled one by one, the model compiled whole, and frozen layers with trained ones below them."""
    for kind in ("blocks", "whole", "frozen"):
        torch._dynamo.reset()
        model, backend = Model(layers=4), backend_of(granularity="layer")
        oracle = Model(layers=4)
        if kind == "frozen":
            for each in (model, oracle):
                each.layers[2].requires_grad_(False)
        backend.register(model)
        if kind != "whole":
            for layer in model.layers:
                layer.compile(backend=backend)
        else:
            model.compile(backend=backend)
        sharded(model)
        skip_unneeded_gathers(model)
        skip_unneeded_gathers(model)
        loss_of(model, batch_of(rank, 0)).backward()
        model.zero_grad()
        for pattern in ([], [0, 1], [2, 3, 6, 7], [0, 1, 4, 5, 6, 7], [1, 2]):
            with backend.pinned(pattern):
                loss = loss_of(model, batch_of(rank, 1))
            count = gathers_of(loss.backward)
            whole_layers = sum({2 * layer, 2 * layer + 1} <= set(pattern) for layer in range(4))
            assert count == 4 - whole_layers, (kind, pattern, count)
            dropped = [path_of(backend.branches[index].name) for index in pattern]
            with detached(oracle, dropped):
                (sum(loss_of(oracle, batch_of(other, 1)) for other in range(WORLD)) / WORLD).backward()
            compare(model, oracle, what=f"{kind}, {pattern} dropped", tolerance=1e-5, some_missing=False)
            model.zero_grad()
            oracle.zero_grad()


def gathers_of_several_forwards_and_checkpoints(rank: int, folder: Path) -> None:
    """Two forwards before their backwards, in either order, a forward without one, and recomputed layers."""
    model, backend = Model(layers=3), backend_of()
    oracle = Model(layers=3)
    for each in (model, oracle):
        each.layers[1].requires_grad_(False)  # nothing but saved tensors refers to its parameters
    backend.register(model)
    for layer in model.layers:
        layer.compile(backend=backend)
    sharded(model)
    skip_unneeded_gathers(model)

    def forward(pattern: Sequence[int], step: int) -> Tensor:
        with backend.pinned(pattern):
            return loss_of(model, batch_of(rank, step))

    def expected(pattern: Sequence[int], step: int) -> None:
        with detached(oracle, [path_of(backend.branches[index].name) for index in pattern]):
            (sum(loss_of(oracle, batch_of(other, step)) for other in range(WORLD)) / WORLD).backward()

    loss_of(model, batch_of(rank, 0)).backward()
    model.zero_grad()
    for first, second in (([2, 3], []), ([], [2, 3]), ([0, 1, 2, 3], [2, 3])):
        for order in (1, -1):
            losses = [forward(first, 1), forward(second, 2)]
            forward(second, 3)  # nothing comes of it
            for loss in losses[::order]:
                loss.backward()
            expected(first, 1)
            expected(second, 2)
            compare(model, oracle, what=f"{first}, {second}, {order}", tolerance=1e-5, some_missing=False)
            model.zero_grad()
            oracle.zero_grad()

    with torch.no_grad():
        loss_of(model, batch_of(rank, 4))
    model.recomputes = True
    assert gathers_of(forward([2, 3], 5).backward) == 3  # a recomputation reads all parameters
    expected([2, 3], 5)
    compare(model, oracle, what="recomputed", tolerance=1e-5, some_missing=False)


def calibration_and_re_allocation_of_shards(rank: int, folder: Path) -> None:
    """The measure is that of a model that is not sharded; observed forwards train like any other."""
    model, backend = Model(), backend_of(allocation="sensitivity", reallocate_every=5)
    backend.register(model)
    model.compile(backend=backend)
    sharded(model)
    with pytest.raises(RuntimeError, match="Calibrate inside of dropbp_fx.distributed.gathered_parameters"):
        backend.calibrate(lambda: loss_of(model, batch_of(rank, 0)))
    with gathered_parameters(model):
        found = backend.calibrate(lambda: loss_of(model, batch_of(rank, 0)))
    torch._dynamo.reset()  # it remembers that this code has breaks in it
    single, alone = Model(), backend_of()
    single.compile(backend=alone)
    wanted = alone.calibrate(lambda: loss_of(single, batch_of(rank, 0)))
    assert found.values == pytest.approx(wanted.values, rel=1e-4)
    assert_trains_like_one_process(model, model, backend, steps=7, some_missing=False)
    assert len(set(everybody(str(dict(backend.rates))))) == 1


def groups_that_make_no_new_pattern_dear(rank: int, folder: Path) -> None:
    """DTensor works out how a call runs on shards once for every list of shapes; a new pattern brings no new list."""
    propagator, name = DTensor._op_dispatcher.sharding_propagator, "_propagate_tensor_meta_non_cached"
    first = [[], ["0.attn"], ["0.mlp"], ["0.attn", "0.mlp"]]
    later = [
        ["1.attn", "2.mlp", "3.mlp"],
        ["0.mlp", "1.attn", "1.mlp", "3.attn"],
        ["1.mlp", "2.attn", "3.mlp", "3.attn"],
    ]

    def calls_worked_out(groups_of: Callable[[nn.Module], Any], clip: Callable[[Any], Any]) -> int:
        """For the later patterns, by the optimizer and the clipping."""
        model = Model(layers=4)
        sharded(model)
        optimizer, calls = torch.optim.AdamW(groups_of(model), fused=True), 0
        for step, dropped in enumerate([*first, *later]):
            loss_of(model, batch_of(rank, step)).backward()
            for branch in dropped:
                for parameter in model.get_submodule(f"layers.{branch}").parameters():
                    parameter.grad = None
            with mock.patch.object(propagator, name, wraps=getattr(propagator, name)) as worked_out:
                clip(optimizer.param_groups)
                optimizer.step()
            calls += worked_out.call_count if step >= len(first) else 0
            optimizer.zero_grad(set_to_none=True)
        return calls

    def by_layer(model: nn.Module) -> list[dict[str, Any]]:
        return parameter_groups(model, model.layers)

    def all_at_once(groups: list[dict[str, Any]]) -> None:
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 0.1)

    assert calls_worked_out(by_layer, lambda groups: clip_grad_norm_(groups, 0.1)) == 0
    assert calls_worked_out(by_layer, all_at_once) >= len(later)
    assert calls_worked_out(lambda model: model.parameters(), lambda groups: None) >= len(later)


def clipped_shards(rank: int, folder: Path) -> None:
    """As PyTorch clips them, with one reduction for all groups; parameters of other meshes may be among them."""
    model = Model()
    sharded(model)
    loss_of(model, batch_of(rank, 0)).backward()
    model.layers[0].mlp.zero_grad(set_to_none=True)
    groups = parameter_groups(model, model.layers)
    for order in (2.0, 1.0, math.inf):
        wanted = nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None], order
        ).full_tensor()
        with CommDebugMode() as sent:
            norm = clip_grad_norm_(groups, 0.5 * float(wanted), order)
        torch.testing.assert_close(norm, wanted)
        assert sent.get_total_counts() == 1, sent.get_comm_counts()
        clipped = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], order)
        torch.testing.assert_close(clipped.full_tensor(), 0.5 * norm)
    alone = nn.Parameter(torch.ones(3))
    alone.grad = torch.full((3,), 2.0)
    sharded_norm = float(clip_grad_norm_(groups, math.inf))
    assert float(clip_grad_norm_([*groups, {"params": alone}], 1e9)) == pytest.approx(math.hypot(sharded_norm, 12**0.5))


def groups_in_a_checkpoint(rank: int, folder: Path) -> None:
    """Groups come back as they were, and parameters that have had no gradient yet, of which the checkpoint knows nothing."""

    def start(rates: Sequence[float]) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = Model()
        sharded(model)
        optimizer = torch.optim.AdamW(parameter_groups(model, model.layers), fused=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, *dropped: nn.Module) -> None:
        loss_of(model, batch_of(rank, 0)).backward()
        for part in dropped:
            part.zero_grad(set_to_none=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model, optimizer = start([0.01, 0.02, 0.03])
    step(model, optimizer, model.layers[0].attn, model.layers[1])
    saved = examples.distributed.state_of(
        model, optimizer, json.dumps({"step": 1, "dropbp": backend_of().state_dict()})
    )
    dcp.save(saved, checkpoint_id=folder / "groups")
    again, resumed = start([0.5, 0.5, 0.5])
    assert examples.distributed.load(folder / "groups", again, resumed, backend_of()) == 1
    assert [group["lr"] for group in resumed.param_groups] == [0.01, 0.02, 0.03]
    for _ in range(2):
        step(model, optimizer)
        step(again, resumed)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(whole(one.detach()), whole(other.detach()), rtol=0, atol=0)


FSDP2 = [
    a_compiled_model_that_is_sharded_whole,
    a_compiled_model_that_is_sharded_by_layers,
    a_model_that_is_sharded_and_then_compiled,
    layers_that_are_compiled_and_then_sharded,
    sharded_layers_that_are_compiled,
    mixed_precision,
    only_present_gradients_are_sent,
    a_backward_gathers_what_it_reads,
    gathers_of_several_forwards_and_checkpoints,
    calibration_and_re_allocation_of_shards,
    groups_that_make_no_new_pattern_dear,
    clipped_shards,
    groups_in_a_checkpoint,
]


# ---- parts of a model ------------------------------------------------------------------------------------------------


def tensor_parallel_layers(rank: int, folder: Path) -> None:
    """Both ranks see the same batch; gradients of a dropped branch's shards are missing on both."""
    model, backend = Model(), backend_of()
    plan = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (WORLD,)), plan)
    run = torch.compile(model, backend=backend)
    assert_trains_like_one_process(run, model, backend, data_ranks=1, steps=3, tolerance=1e-4)
    assert backend.stats.graphs == 1
    assert len(backend.branches) == 4


class Stage(nn.Module):
    """Two of the four layers of a model."""

    def __init__(self, model: Model, rank: int) -> None:
        super().__init__()
        self.embed = None if rank else model.embed
        self.layers = nn.ModuleDict({str(k): model.layers[k] for k in (2 * rank, 2 * rank + 1)})
        self.head = model.head if rank else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(x)


def stages_of_a_pipeline(rank: int, folder: Path) -> None:
    """Every stage draws for itself, once for each micro-batch."""
    part, oracle, backend = Stage(Model(layers=4), rank), Model(layers=4), backend_of(seed=rank)
    agree_across(backend, dist.new_group([rank], use_local_synchronization=True))
    part.compile(backend=backend)
    example = torch.zeros(2, 5, 16 if rank else 4, requires_grad=bool(rank))
    result = torch.zeros(2, 5, 2 if rank else 16, requires_grad=not rank)
    stage = PipelineStage(part, rank, WORLD, torch.device("cpu"), input_args=(example,), output_args=(result,))
    schedule = Schedule1F1B(stage, 2, loss_fn=lambda output, target: (output - target).square().mean())
    drops = Drops(backend)
    for step in range(3):
        micro = [batch_of(0, 10 * step + number) for number in range(2)]
        if rank:
            schedule.step(target=torch.cat(micro)[..., :2].cumsum(1))
        else:
            schedule.step(torch.cat(micro))
        assert backend.stats.forwards == 2 * (step + 1)
        for batch, dropped in zip(micro, map(sum, zip(*everybody(drops.each()), strict=True), [[], []]), strict=True):
            with detached(oracle, dropped):
                (loss_of(oracle, batch) / 2).backward()
        for name, parameter in part.named_parameters():
            wanted = oracle.get_parameter(name).grad
            assert (parameter.grad is None) == (wanted is None), name
            if wanted is not None:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5)
        part.zero_grad()
        oracle.zero_grad()


def stages_that_were_not_told_apart(rank: int, folder: Path) -> None:
    part = Stage(Model(layers=4), rank)
    backend = backend_of()
    part.compile(backend=backend)
    text = raised(lambda: part(torch.zeros(2, 5, 16 if rank else 4)))
    assert 'number 0 of the branches: ["layers.0.attn", "layers.0", true] on rank 0' in text
    assert "agree_across(backend, group)" in text


PARTS = [tensor_parallel_layers, stages_of_a_pipeline, stages_that_were_not_told_apart]


@pytest.mark.long
def test_fsdp2_and_parts_of_a_model(tmp_path: Path) -> None:
    in_two_processes([*FSDP2, *PARTS], tmp_path)


# ---- groups of parameters, and clipping by them --------------------------------------------------------------------


def test_parameter_groups_are_one_a_layer_and_one_of_the_rest() -> None:
    model = Model()
    model.layers[1].mlp.requires_grad_(False)
    model.layers[1].attn.out.weight = model.layers[0].attn.out.weight  # belongs to the first that has it
    groups = [group["params"] for group in parameter_groups(model, model.layers)]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [{names[p].split(".")[1] if "layers" in names[p] else "rest" for p in group} for group in groups] == [
        {"0"}, {"1"}, {"rest"},
    ]  # fmt: skip
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, trainable)) == sorted(id(p) for group in groups for p in group)
    assert groups[0] == list(model.layers[0].parameters())
    for part in (model.layers[0], model.embed, model.head):
        part.requires_grad_(False)
    assert len(parameter_groups(model, model.layers)) == 1  # none of them is empty, as an optimizer's first may not be
    with pytest.raises(ValueError, match="Layer 0, a Layer, is no part of the model, so an optimizer would train"):
        parameter_groups(model, Model().layers)


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("bound", [0.0, 0.3, 1e6])
def test_clipping_by_groups_is_clipping_all(order: float, bound: float) -> None:
    ours, theirs = Model(), Model()
    for model in (ours, theirs):
        loss_of(model, batch_of(0, 0)).backward()
        model.layers[1].attn.zero_grad(set_to_none=True)
        model.layers[0].zero_grad(set_to_none=True)  # a whole group
    wanted = nn.utils.clip_grad_norm_(theirs.parameters(), bound, order)
    found = clip_grad_norm_(torch.optim.SGD(parameter_groups(ours, ours.layers)).param_groups, bound, order)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_clipping_where_there_is_nothing_to_clip_and_what_it_refuses() -> None:
    model = Model()
    groups = parameter_groups(model, model.layers)
    assert clip_grad_norm_(groups, 1.0) == clip_grad_norm_([], 1.0) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(
        TypeError, match=r"takes groups of parameters, and was given a Parameter as one\. Give optimizer"
    ):
        clip_grad_norm_(model.parameters(), 1.0)
    for bound in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"max_norm is {bound}, but a norm is at least 0"):
            clip_grad_norm_(groups, bound)
    for order in (0.0, math.nan):
        with pytest.raises(ValueError, match=f"norm_type is {order}, but the order must be above 0"):
            clip_grad_norm_(groups, 1.0, order)


# ---- agreement -----------------------------------------------------------------------------------------------------


def patterns_agree_whatever_lengths_the_ranks_see(rank: int, folder: Path) -> None:
    """Ranks compile other graphs at other steps; the FLOPs that draws are balanced by are the first rank's."""
    model, backend = Model(), backend_of(seed=None)
    agree_across(backend, every=10)
    model.compile(backend=backend)
    ddp, drops = DistributedDataParallel(model, find_unused_parameters=True), Drops(backend)
    lengths = [[64, 4], [4, 4], [32, 4], [4, 64]]
    seen = []
    for step in range(100):
        tokens = lengths[step][rank] if step < len(lengths) else 4 + (step * (3 + rank)) % 7
        loss_of(ddp, batch_of(rank, step, tokens)).backward()
        seen.append(drops.last())
        model.zero_grad(set_to_none=True)
    ours, theirs = everybody((seen, [branch.backward_flops for branch in backend.branches]))
    assert ours == theirs
    assert len(set(map(tuple, seen))) > 3
    check_ranks(backend)


def a_resumed_run_goes_on_alike(rank: int, folder: Path) -> None:
    """Through ``torch.distributed.checkpoint``, with a first batch of another length than the uninterrupted run had."""

    def start(backend: DropBPBackend) -> tuple[Model, nn.Module, torch.optim.Optimizer, Drops]:
        model = Model()
        model.compile(backend=backend)
        return model, DistributedDataParallel(model, find_unused_parameters=True), adamw(model), Drops(backend)

    def train(ddp: nn.Module, optimizer: torch.optim.Optimizer, drops: Drops, steps: range) -> list[list[str]]:
        seen = []
        for step in steps:
            loss_of(ddp, batch_of(rank, step, 4 + 20 * (step % 3) + rank)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen.append(drops.last())
        return seen

    backend = backend_of(seed=1)
    model, ddp, optimizer, drops = start(backend)
    train(ddp, optimizer, drops, range(7))
    state = {"model": model.state_dict(), "dropbp": json.dumps(backend.state_dict())}
    state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    uninterrupted = train(ddp, optimizer, drops, range(7, 16))

    again = backend_of(seed=1)
    resumed, ddp, optimizer, drops = start(again)
    state = {"model": resumed.state_dict(), "dropbp": ""}
    state["optimizer"] = get_optimizer_state_dict(resumed, optimizer)
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_optimizer_state_dict(resumed, optimizer, state["optimizer"])
    resumed.load_state_dict(state["model"])
    again.load_state_dict(json.loads(state["dropbp"]))
    drops.last()
    assert train(ddp, optimizer, drops, range(7, 16)) == uninterrupted
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), parameter)


def raised(act: Callable[[], Any]) -> str:
    """The text of the error, which is the same on every rank."""
    with pytest.raises(RankDisagreementError) as caught:
        act()
    texts = everybody(str(caught.value))
    assert len(set(texts)) == 1, texts
    return texts[0]


def forward_of(backend: DropBPBackend) -> Callable[[], Any]:
    model = Model(layers=1)
    model.compile(backend=backend)
    return lambda: loss_of(model, batch_of(0, 0))


def ranks_that_differ_are_an_error_on_every_rank(rank: int, folder: Path) -> None:
    odd = rank == 1
    text = raised(forward_of(backend_of(seed=odd + 3)))
    assert "seed: 3 on rank 0, 4 on rank 1." in text
    assert "Give dropbp_backend() the same arguments on every rank" in text
    assert "rate: 0.5 on rank 0, 0.25 on rank 1." in raised(forward_of(backend_of(rate=0.25 if odd else 0.5)))
    text = raised(forward_of(backend_of(drop="weights" if odd else "branch", pattern="window" if odd else "random")))
    assert "pattern: RandomPattern() on rank 0, WindowPattern(wrap=True) on rank 1;" in text
    assert "drop: 'branch' on rank 0, 'weights' on rank 1." in text

    behind = backend_of()
    behind.load_state_dict({**behind.state_dict(), "rounds": 7 - odd})
    assert "number of training forwards: 8 on rank 0, 7 on rank 1." in raised(forward_of(behind))

    model, backend = Model(layers=2 - odd), backend_of()
    model.compile(backend=backend)
    text = raised(lambda: model(batch_of(0, 0)))
    assert "the number of branches: 4 on rank 0, 2 on rank 1." in text
    assert "agree_across(backend, group)" in text


def ranks_that_part_later_are_an_error_on_every_rank(rank: int, folder: Path) -> None:
    """A forward more, or a rate of its own, is found at the next comparison, and raised at one step on all ranks."""

    def train(disturb: Callable[[DropBPBackend, Model], Any]) -> str:
        model, backend = Model(layers=1), backend_of()
        agree_across(backend, every=5)
        model.compile(backend=backend)
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer, done = torch.optim.SGD(model.parameters(), 0.01), 0

        def act() -> None:
            nonlocal done
            for step in range(50):
                if step == 7 and rank == 1:
                    disturb(backend, model)
                loss_of(ddp, batch_of(rank, step)).backward()
                optimizer.step()
                done += 1

        text = raised(act)
        assert everybody(done) == [done] * WORLD
        assert 7 < done < 50
        return text

    assert "optimizer steps: 9 on rank 0, 8 on rank 1." in train(lambda backend, model: loss_of(model, batch_of(0, 0)))
    assert "rate: 0.5 on rank 0, 0.1 on rank 1." in train(lambda backend, model: setattr(backend, "rate", 0.1))


def a_check_finds_a_forward_more_at_once(rank: int, folder: Path) -> None:
    backend = backend_of()
    forward = forward_of(backend)
    forward()
    check_ranks(backend)
    with backend.disabled() if rank else contextlib.nullcontext():
        forward()
    assert "number of training forwards: 2 on rank 0, 1 on rank 1." in raised(lambda: check_ranks(backend))


def a_rank_that_does_not_come_is_an_error(rank: int, folder: Path) -> None:
    for missing, patience in ((1, 0.5), (0, 0.75)):
        backend = backend_of()
        agree_across(backend, dist.new_group([0, 1]), timeout_s=0.5)
        forward = forward_of(backend)
        if rank != missing:
            with pytest.raises(RankDisagreementError, match=f"Waited {patience} s for rank {missing} to agree"):
                forward()
        dist.barrier()


def calibration_is_the_mean_over_ranks(rank: int, folder: Path) -> None:
    model, backend = Model(), backend_of(allocation="sensitivity")
    model.compile(backend=backend)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    found = backend.calibrate(lambda: loss_of(model, batch_of(rank, 0)), batches=2)
    alone = backend_of()
    single = Model()
    single.compile(backend=alone)
    agree_across(alone, dist.new_group([rank], use_local_synchronization=True))
    own = alone.calibrate(lambda: loss_of(single, batch_of(rank, 0)))
    everyone = everybody(own.values)
    assert everyone[0] != everyone[1]
    assert everybody(found) == [found] * WORLD
    assert found.values == pytest.approx([sum(values) / WORLD for values in zip(*everyone, strict=True)], rel=1e-3)
    assert found.batches == 4
    loss_of(ddp, batch_of(rank, 0)).backward()
    assert len(set(map(str, everybody(dict(backend.rates))))) == 1

    def fails_on_one_rank() -> Tensor:
        if rank:
            raise ZeroDivisionError("no data")
        return loss_of(model, batch_of(rank, 0))

    error = ZeroDivisionError if rank else RankDisagreementError
    expected = (
        "no data" if rank else "Rank 1 failed in backend.calibrate.., so no rank can go on: ZeroDivisionError: no data"
    )
    with pytest.raises(error, match=expected):
        backend.calibrate(fails_on_one_rank)
    check_ranks(backend)


def re_allocation_is_alike(rank: int, folder: Path) -> None:
    model = Model()
    backend = backend_of(allocation="sensitivity", reallocate_every=30, rate=0.3)
    model.compile(backend=backend)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    for step in range(65):
        loss_of(ddp, batch_of(rank, step)).backward()
        model.zero_grad(set_to_none=True)
    rates = dict(backend.rates)
    assert len(set(rates.values())) > 1
    assert everybody(rates) == [rates] * WORLD
    check_ranks(backend)


AGREEMENT = [
    patterns_agree_whatever_lengths_the_ranks_see,
    a_resumed_run_goes_on_alike,
    ranks_that_differ_are_an_error_on_every_rank,
    ranks_that_part_later_are_an_error_on_every_rank,
    a_check_finds_a_forward_more_at_once,
    a_rank_that_does_not_come_is_an_error,
    calibration_is_the_mean_over_ranks,
    re_allocation_is_alike,
]


@pytest.mark.long
def test_agreement(tmp_path: Path) -> None:
    in_two_processes(AGREEMENT, tmp_path)


# ---- examples and the benchmark ------------------------------------------------------------------------------------


def test_gathers_of_a_model_without_shards_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"No part of this Model is sharded by fully_shard.*Call skip_unneeded_gathers"
    ):
        skip_unneeded_gathers(Model())


@pytest.mark.long
def test_the_examples_train_and_go_on(tmp_path: Path) -> None:
    small = ["--inner", "aot_eager", "--layers", "2", "--width", "8", "--log-every", "2"]
    runs = []
    for engine, steps in (("ddp", "2"), ("fsdp2", "2"), ("fsdp2", "4")):
        arguments = [*small, "--engine", engine, "--checkpoint", str(tmp_path / engine), "--steps", steps]
        runs.append(("examples.distributed", [*arguments, *(["--resume"] if steps == "4" else [])]))
    runs.append(("examples.accelerate_launch", ["--inner", "aot_eager", "--steps", "20"]))
    ports = []
    for _ in runs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    mp.spawn(_example_process, (runs, ports, tmp_path), nprocs=WORLD)
    printed = (tmp_path / "printed").read_text()
    assert [line.split(":")[0] for line in printed.splitlines()] == ["step 2", "step 2", "step 4", "step 20"]
    assert "dropped 0.5" in printed.splitlines()[0]
    assert "dropped 0.5" in printed.splitlines()[-1]


def _example_process(rank: int, runs: Sequence[tuple[str, list[str]]], ports: Sequence[int], folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    with (folder / f"printed{rank or ''}").open("w") as file, contextlib.redirect_stdout(file):
        for (module, arguments), port in zip(runs, ports, strict=True):
            torch._dynamo.reset()
            os.environ["MASTER_PORT"] = str(port)
            importlib.import_module(module).main(arguments)


def test_a_benchmark_whose_processes_fail_says_so(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    distributed.main(["tiny", "--engines", "fsdp2", "--measure", "steps", "--time-limit", "0", "--out", str(out)])
    (run,) = load(out)
    assert [record["engine"] for record in run.records] == ["fsdp2"] * 3
    assert all("time limit was reached" in record["error"] for record in run.records)


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
    gc.freeze()  # what the imports made
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
