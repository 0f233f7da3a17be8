"""Measure one method in the process it has to itself. Every function yields records as soon as it has them."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor

from benchmarks.methods import METHODS, Training, check
from benchmarks.suites import build, shape_of

Record = dict[str, Any]

#: A run that is still compiling after its warm-up gets this many more steps to settle.
_SETTLING_STEPS = 24


@dataclasses.dataclass(frozen=True)
class Request:
    """What a process is asked to measure.

    Attributes:
        measurement: "steps" (time and memory of training steps), "first step" (what compiling costs), or "length" (does a
            step fit).
        values: the knob's values, one after the other in this process; ``[None]`` for a method without a knob.
        patterns: how many random patterns a "first step" process goes on to draw.
        cap_gib: memory the process may use on the device, ``None`` for all of it.
    """

    measurement: str
    method: str
    suite: str
    values: Sequence[float | None] = (None,)
    loss: str = "plain"
    steps: int = 20
    warmup: int = 5
    device: str = "cpu"
    inner: str = "inductor"
    layers: int | None = None
    batch: int | None = None
    tokens: int | None = None
    patterns: int = 0
    cap_gib: float | None = None


def measure(request: Request) -> Iterator[Record]:
    """Measure what is asked for; a failure becomes a record with its text under "error"."""
    method = METHODS[request.method]
    measurements = {"steps": _steps, "first step": _first_step, "length": _length}
    common = conditions(request, method.knob)
    for record in measurements[request.measurement](request):
        yield {**common, **record}


def conditions(request: Request, knob: str | None) -> Record:
    """What every record says of the request it answers."""
    shape = shape_of(request.suite, layers=request.layers, batch=request.batch, tokens=request.tokens)
    return {
        "measurement": request.measurement,
        "suite": request.suite,
        "method": request.method,
        "loss_function": request.loss,
        "layers": shape.layers,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "knob": knob,
    }


class TrainingRun:
    """A model, a method's way to train it, an optimizer and batches."""

    def __init__(self, request: Request) -> None:
        self.device = request.device
        if request.cap_gib is not None and self.device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(request.cap_gib * 2**30 / total, 1.0))
        self.shape = shape_of(request.suite, layers=request.layers, batch=request.batch, tokens=request.tokens)
        check([request.method], request.suite, self.shape)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        model = build(self.shape, device=self.device, dtype=dtype, fused_loss=request.loss == "fused")
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.weights = [*model.parameters(), *model.buffers()]
        self.parameters = {tensor.untyped_storage().data_ptr() for tensor in self.weights}
        self.training: Training = METHODS[request.method].make(model, request.inner)
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, fused=self.device == "cuda")
        size = (self.shape.batch, self.shape.tokens + 1)
        self.batches = [torch.randint(self.shape.vocabulary, size, device=self.device) for _ in range(4)]
        self.saved_bytes = 0
        self._taken = 0

    def step(self) -> Tensor:
        """One training step, or one forward where that is all the method does."""
        loss = self.training.loss(self.batches[self._taken % len(self.batches)])
        self._taken += 1
        if loss.requires_grad:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def timed_step(self) -> tuple[float, float]:
        """The step's loss, and its seconds, work on the device included."""
        seconds, loss = timed(self.step, self.device)
        return float(loss), seconds

    def zero_gradients(self) -> None:
        """Give every parameter a gradient, as after a step that dropped nothing."""
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)

    def make_optimizer_state(self) -> None:
        """The state of parameters that were dropped so far must not appear as memory of a later step."""
        self.zero_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self, warmup: int) -> None:
        """Warm up, and go on while steps still compile something."""
        for _ in range(warmup):
            self.step()
        for _ in range(_SETTLING_STEPS):
            before = _graphs_compiled()
            self.step()
            if _graphs_compiled() == before:
                break
        synchronize(self.device)

    def back_to_back(self, function: Callable[[], object], times: int) -> list[float]:
        """Milliseconds of each call, none waited for: the host runs ahead of the device as in any training loop."""
        if self.device != "cuda":
            marks = [time.perf_counter()]
            for _ in range(times):
                function()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        synchronize(self.device)
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        synchronize(self.device)
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]

    def synchronized_step(self) -> tuple[float, float, float]:
        """Milliseconds of one step, milliseconds until the host had issued it, GiB above what was held before."""
        synchronize(self.device)
        held = reset_peak(self.device)
        started = time.perf_counter()
        self.step()
        host = time.perf_counter() - started
        synchronize(self.device)
        whole = time.perf_counter() - started
        return 1e3 * whole, 1e3 * host, (peak(self.device) - held) / 2**30

    def reserved(self) -> int:
        """Bytes the allocator holds after a step that began with none to spare, those that CUDA graphs keep included."""
        synchronize(self.device)
        torch.cuda.empty_cache()
        self.step()
        synchronize(self.device)
        return torch.cuda.memory_reserved()

    def own_bytes(self) -> int:
        """Bytes of weights, buffers and the optimizer's state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.weights, *(value for value in states if isinstance(value, Tensor))]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def saved_gib(self) -> float:
        """What autograd keeps for one backward, parameters and buffers not counted.

        Autograd passes every tensor it saves through the hook, those of compiled code included. Several may be views of
        one piece of memory, so each storage counts once; ``kept`` holds on to them, since no address may be used twice.
        """
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.training.loss(self.batches[0])
        total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in self.parameters)
        del loss
        return total / 2**30


def synchronize(device: str) -> None:
    """Wait for the device's work."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> int:
    """Start to watch the peak of memory; bytes held now, 0 on the CPU."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: str) -> int:
    """Most bytes held since :func:`reset_peak`, 0 on the CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that ``run`` takes, work on the device included, and what it returns."""
    synchronize(device)
    started = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - started, result


def _steps(request: Request) -> Iterator[Record]:
    """For each value of the knob: the first step where it compiles, then medians over steps; at last the optimizer alone.

    The figures: ``step_ms`` from steps issued back to back, ``synchronized_ms`` and ``host_ms`` from steps that are
    waited for, ``activation_gib`` the peak above what was held before the step (on the CPU, what autograd saved).
    CUDA graphs hold their memory between steps, too: with them it is what is reserved beyond weights and optimizer state.
    """
    run = TrainingRun(request)
    recompiles = METHODS[request.method].recompiles
    for index, value in enumerate(request.values):
        try:
            yield {"value": value, **_steps_at(run, request, value, compiles=index == 0 or recompiles)}
        except Exception as error:
            yield {"value": value, "error": error_text(error)}
        for parameter in run.trainable:
            parameter.grad = None
        gc.collect()
        if run.device == "cuda":
            torch.cuda.empty_cache()
    if METHODS[request.method].knob is None and request.method != "forward alone":
        try:
            run.zero_gradients()
            for _ in range(3):
                run.optimizer.step()
            times = run.back_to_back(run.optimizer.step, request.steps)
            yield {"measurement": "optimizer", "value": None, "optimizer_ms": round(statistics.median(times), 3)}
        except Exception as error:
            yield {"measurement": "optimizer", "value": None, "error": error_text(error)}


def _steps_at(run: TrainingRun, request: Request, value: float | None, *, compiles: bool) -> Record:
    if value is not None:
        run.training.choose(value)
    breaks = _graph_breaks()
    graphs = _graphs_compiled()
    first_loss, first = run.timed_step()
    if compiles:
        run.training.compile_all()
        run.make_optimizer_state()
    second_loss, _ = run.timed_step()
    run.settle(request.warmup)
    back_to_back = run.back_to_back(run.step, request.steps)
    synchronized, host, peaks = zip(*(run.synchronized_step() for _ in range(request.steps)), strict=True)
    activation = statistics.median(peaks) if run.device == "cuda" else run.saved_gib()
    reserved = statistics.median(run.reserved() for _ in range(5)) if run.device == "cuda" else None
    if reserved is not None and METHODS[request.method].cuda_graphs:
        activation = (reserved - run.own_bytes()) / 2**30
    return {
        "losses": [first_loss, second_loss],
        "first_step_s": round(first, 3) if compiles else None,
        "step_ms": round(statistics.median(back_to_back), 3),
        "step_ms_mean": round(statistics.mean(back_to_back), 3),
        "synchronized_ms": round(statistics.median(synchronized), 3),
        "host_ms": round(statistics.median(host), 3),
        "activation_gib": round(activation, 4) if run.device == "cuda" else activation,
        "reserved_gib": None if reserved is None else round(reserved / 2**30, 4),
        "graphs_compiled": _graphs_compiled() - graphs,
        "graph_breaks": _graph_breaks() - breaks,
        **run.training.facts(),
    }


def _first_step(request: Request) -> Iterator[Record]:
    """The first step, then everything else that later steps may need, then random patterns that may compile nothing."""
    try:
        run = TrainingRun(request)
        (value,) = request.values
        if value is not None:
            run.training.choose(value)
        loss, first = run.timed_step()
        started = time.perf_counter()
        run.training.compile_all()
        record: Record = {
            "value": value,
            "losses": [loss],
            "first_step_s": round(first, 3),
            "all_variants_s": round(first + time.perf_counter() - started, 3),
            **run.training.facts(),
        }
        if request.patterns:
            run.make_optimizer_state()
            graphs, variants = _graphs_compiled(), run.training.facts().get("compiled_variants", 0)
            for _ in range(request.patterns):
                run.step()
            synchronize(run.device)
            record["patterns"] = request.patterns
            record["recompiles"] = _graphs_compiled() - graphs
            record["new_variants"] = run.training.facts().get("compiled_variants", 0) - variants
        yield record
    except Exception as error:
        yield {"value": request.values[0], "error": error_text(error)}


def _length(request: Request) -> Iterator[Record]:
    """Do steps of this length fit? The second one counts as well: the first has no optimizer state until its end."""
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    record: Record = {"value": request.values[0], "cap_gib": request.cap_gib, "allocator": allocator}
    try:
        run = TrainingRun(request)
        if request.values[0] is not None:
            run.training.choose(request.values[0])
        run.timed_step()
        run.training.compile_all()
        run.make_optimizer_state()
        held = reset_peak(run.device)
        milliseconds = [1e3 * run.timed_step()[1] for _ in range(request.steps)]
        record |= {
            "fits": True,
            "step_ms": round(statistics.median(milliseconds), 1),
            "held_gib": round(held / 2**30, 3),
            "peak_gib": round(peak(run.device) / 2**30, 3),
        }
    except Exception as error:  # a compiler wraps what it met, so the type alone does not tell
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
        record |= {"fits": False, "reason": error_text(error)} if full else {"error": error_text(error)}
    yield record


def _graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def error_text(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"
