"""One method of ``benchmarks.distributed`` in as many processes as it is asked for, one a device.

``python -m benchmarks.distributed_worker REQUEST RECORDS`` starts them; the first one writes the records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Record, Request, TrainingRun, conditions, error_text, peak, reset_peak, synchronize
from benchmarks.methods import Training
from benchmarks.models import Decoder, make_model
from benchmarks.suites import shape_of
from dropbp_fx import DropBPBackend, dropbp_backend
from dropbp_fx.distributed import all_reduce_present, check_ranks, parameter_groups, skip_unneeded_gathers

#: Ranks that wait this long for one another are not going to meet: one of them has failed.
_TIMEOUT = datetime.timedelta(seconds=240)


@dataclasses.dataclass(frozen=True)
class DistributedRequest(Request):
    """What the processes are asked to measure.

    Attributes:
        engine: "ddp" or "fsdp2".
        processes: how many, one a device.
        compile: "whole" compiles the model, "blocks" each layer.
        train_steps: steps of a loss curve, or of a comparison of patterns.
    """

    engine: str = "ddp"
    processes: int = 2
    compile: str = "whole"
    train_steps: int = 50


def main() -> None:
    request = DistributedRequest(**json.loads(Path(sys.argv[1]).read_text()))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (request, f"{folder}/store", sys.argv[2]), nprocs=request.processes)


def join_processes(rank: int, request: DistributedRequest, store: str, timeout: datetime.timedelta = _TIMEOUT) -> None:
    """Make this process one rank of the request's, on a device of its own."""
    cuda = request.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=request.processes,
        timeout=timeout,
        device_id=torch.device("cuda", rank) if cuda else None,
    )


def _process(rank: int, request: DistributedRequest, store: str, records: str) -> None:
    join_processes(rank, request, store)
    with Path(records).open("a") as file:
        for record in measure(request):
            if rank == 0:
                print(json.dumps(record), file=file, flush=True)
            elif "error" in record:
                print(f"Rank {rank}: {record['error']}", file=sys.stderr, flush=True)
    dist.destroy_process_group()


def common_record(request: DistributedRequest) -> Record:
    """The conditions that every record of a request names."""
    return {
        **conditions(request, None if request.method == "torch.compile" else "rate"),
        "engine": request.engine,
        "processes": request.processes,
        "compile": request.compile,
    }


def measure(request: DistributedRequest) -> Iterator[Record]:
    """Measure what is asked for, on every rank; a failure becomes a record with its text under "error"."""
    measurements = {
        "distributed steps": _steps,
        "distributed losses": _losses,
        "distributed patterns": _patterns,
    }
    for record in measurements[request.measurement](request):
        yield {**common_record(request), **record}


class DistributedRun(TrainingRun):
    """A model on an engine; every rank has batches of its own."""

    def __init__(self, request: DistributedRequest, *, learning_rate: float = 1e-5, seed: int = 0) -> None:
        self.device = request.device
        self.request = request
        self.seed = seed
        self.shape = shape_of(request.suite, layers=request.layers, batch=request.batch, tokens=request.tokens)
        # Shards are kept in float32 and gathered in bf16; DDP's model is in bf16, as in the runs on one device.
        dtype = torch.bfloat16 if self.device == "cuda" and request.engine == "ddp" else torch.float32
        self.model = make_model(self.shape, device=self.device, dtype=dtype, fused_loss=request.loss == "fused")
        self.parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        self.backend: DropBPBackend | None = None
        self.ddp: DistributedDataParallel | None = None
        self.training = _ENGINES[request.engine](self)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        # Of DTensors, a list that the optimizer has not stepped through before costs the host much; see parameter_groups().
        sharded = request.engine == "fsdp2"
        groups = parameter_groups(self.model, self.model.layers) if sharded else [{"params": self.trainable}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=self.device == "cuda")
        self.batches = [self._batch(number)[dist.get_rank() :: dist.get_world_size()] for number in range(4)]
        self._taken = 0

    def _batch(self, number: int) -> Tensor:
        """The batch of all ranks together."""
        generator = torch.Generator().manual_seed(number)
        size = (self.shape.batch * dist.get_world_size(), self.shape.tokens + 1)
        return torch.randint(self.shape.vocabulary, size, generator=generator).to(self.device)

    def compile(self, model: Decoder) -> None:
        """In place, so that the engine meets the module itself."""
        if self.request.method == "torch.compile":
            compiler: Any = self.request.inner
        else:
            compiler = self.backend = dropbp_backend(rate=0.0, inner=self.request.inner, seed=self.seed)
            self.backend.register(model)
        for module in model.layers if self.request.compile == "blocks" else [model]:
            module.compile(backend=compiler, dynamic=False)

    def finished(self, loss: Callable[[Tensor], Tensor]) -> Training:
        backend = self.backend
        if backend is None:
            return Training(loss)
        before = backend.stats

        def choose(rate: float) -> None:
            nonlocal before
            backend.rate, before = rate, backend.stats

        def facts() -> Record:
            stats = backend.stats
            dropped = stats.realised_rate * stats.forwards - before.realised_rate * before.forwards
            return {
                "realised_rate": round(dropped / max(stats.forwards - before.forwards, 1), 4),
                "branches": len(backend.branches),
                "graphs": stats.graphs,
                "compiled_variants": stats.compiled_variants,
            }

        return Training(loss, choose, backend.warmup, facts)


def _ddp(run: DistributedRun) -> Training:
    run.compile(run.model)
    drops = run.backend is not None
    # Dynamo's own splitting at buckets is for plain torch.compile, whose backward would otherwise be a single node.
    torch._dynamo.config.optimize_ddp = not drops
    run.ddp = DistributedDataParallel(
        run.model,
        device_ids=[torch.cuda.current_device()] if run.device == "cuda" else None,
        find_unused_parameters=drops,
        gradient_as_bucket_view=True,
    )
    if run.request.method == "dropbp_fx, present gradients":
        run.ddp.register_comm_hook(None, all_reduce_present)
    return run.finished(run.ddp)


def _fsdp2(run: DistributedRun) -> Training:
    run.compile(run.model)
    mesh = init_device_mesh(run.device, (dist.get_world_size(),))
    half = torch.bfloat16 if run.device == "cuda" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for layer in run.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(run.model, mesh=mesh, mp_policy=policy)
    if run.request.method == "dropbp_fx, needed gathers":
        skip_unneeded_gathers(run.model)
    return run.finished(run.model)


_ENGINES: dict[str, Callable[[DistributedRun], Training]] = {"ddp": _ddp, "fsdp2": _fsdp2}


# ---- measurements --------------------------------------------------------------------------------------------------


def _steps(request: DistributedRequest) -> Iterator[Record]:
    """For each rate: time and memory of steps, and what one step sends.

    ``step_ms``: median over steps issued back to back, device events, of the slowest rank; ``peak_gib``: of the rank with
    the highest. ``gradient_bytes``, ``gathered_bytes``: what one rank hands to reductions and gets from gathers, the mean
    over steps of different patterns.
    """
    run = DistributedRun(request)
    for index, value in enumerate(request.values):
        try:
            yield {"value": value, **_steps_at(run, value, first=index == 0)}
        except Exception as error:
            yield {"value": value, "error": error_text(error)}
            return  # the other ranks are elsewhere by now


def _steps_at(run: DistributedRun, value: float | None, *, first: bool) -> Record:
    if value is not None:
        run.training.choose(value)
    first_loss, seconds = run.timed_step()
    if first:
        run.training.compile_all()
        run.make_optimizer_state()
    second_loss, _ = run.timed_step()
    for _ in range(run.request.warmup):
        run.step()
    synchronize(run.device)
    dist.barrier()
    times = run.back_to_back(run.step, run.request.steps)
    synchronized, host, activations = zip(*(run.synchronized_step() for _ in range(run.request.steps)), strict=True)
    reset_peak(run.device)
    traffic = Traffic(run)
    for _ in range(4):
        with traffic:
            run.step()
    synchronize(run.device)
    return {
        "losses": [first_loss, second_loss],
        "first_step_s": round(seconds, 3) if first else None,
        "step_ms": round(_largest(run, statistics.median(times)), 3),
        "synchronized_ms": round(_largest(run, statistics.median(synchronized)), 3),
        "host_ms": round(_largest(run, statistics.median(host)), 3),
        "activation_gib": round(_largest(run, statistics.median(activations)), 4),
        "peak_gib": round(_largest(run, peak(run.device) / 2**30), 4),
        "gradient_bytes": traffic.gradients // 4,
        "gathered_bytes": traffic.gathered // 4,
        **run.training.facts(),
    }


def _losses(request: DistributedRequest) -> Iterator[Record]:
    """The mean loss over ranks of every step."""
    value = request.values[0]
    try:
        run = DistributedRun(request, learning_rate=1e-4)
        if value is not None:
            run.training.choose(value)
        losses = []
        for _ in range(request.train_steps):
            loss = run.step()
            dist.all_reduce(loss.div_(dist.get_world_size()))
            losses.append(loss)
        yield {"value": value, "losses": [float(loss) for loss in losses], **run.training.facts()}
    except Exception as error:
        yield {"value": value, "error": error_text(error)}


def _patterns(request: DistributedRequest) -> Iterator[Record]:
    """Do ranks with different data drop the same branches in every step, and a resumed run what the old one would have?"""
    value = request.values[0]
    try:
        steps = request.train_steps
        run = DistributedRun(request)
        first = _drawn(run, value, steps // 2)
        assert run.backend is not None
        state = json.dumps(run.backend.state_dict())
        second = _drawn(run, value, steps - steps // 2)
        del run
        torch._dynamo.reset()
        resumed = DistributedRun(request)
        assert resumed.backend is not None
        resumed.backend.load_state_dict(json.loads(state))
        again = _drawn(resumed, None, len(second))
        check_ranks(resumed.backend)
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, _digest([first, second, again]))
        yield {
            "value": value,
            "steps": len(first) + len(second),
            "agree": len(set(everybody)) == 1,
            "resumed_alike": second == again,
            "different_patterns": len({_digest(pattern) for pattern in first + second}),
        }
    except Exception as error:
        yield {"value": value, "error": error_text(error)}


def _drawn(run: DistributedRun, rate: float | None, steps: int) -> list[list[int]]:
    """How often each branch was dropped in each of some steps."""
    if rate is not None:
        run.training.choose(rate)
    backend = run.backend
    assert backend is not None
    counts = []
    for _ in range(steps):
        before = {branch.name: branch.times_dropped for branch in backend.branches}
        run.step()
        counts.append([branch.times_dropped - before.get(branch.name, 0) for branch in backend.branches])
    return counts


def _largest(run: DistributedRun, value: float) -> float:
    everywhere = torch.tensor(value, device=run.device, dtype=torch.float64)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
    return float(everywhere)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


#: Names of torch.distributed that FSDP2 and hooks call; releases differ.
_COLLECTIVES = (
    "all_reduce",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_gather_into_tensor",
    "all_gather_single",
)


class Traffic:
    """Counts the bytes of gradients that a rank hands to reductions, and of parameters that it gathers, within blocks."""

    def __init__(self, run: DistributedRun) -> None:
        self.gradients = self.gathered = 0
        self._run = run
        self._stack = contextlib.ExitStack()
        self._inside = False

    def __enter__(self) -> None:
        ddp = self._run.ddp
        if ddp is not None and self._run.request.method != "dropbp_fx, present gradients":
            # Its reducer is not written in Python. It sends every bucket whole, so as much as there are parameters.
            self.gradients += sum(p.nbytes for p in ddp.parameters() if p.requires_grad)
        for name in _COLLECTIVES:
            if hasattr(dist, name):
                self._stack.enter_context(mock.patch.object(dist, name, self._counted(name, getattr(dist, name))))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _counted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if self._inside:  # one of them may be made of another
                return collective(*arguments, **named)
            tensors = [*arguments, *named.values()]
            largest = max(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
            if name.startswith("all_gather"):
                self.gathered += largest
            else:
                self.gradients += largest
            self._inside = True
            try:
                return collective(*arguments, **named)
            finally:
                self._inside = False

        return counted


if __name__ == "__main__":
    main()
