"""Measure one contestant in a process of its own."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch

from benchmarks.contestants import CONTESTANTS
from benchmarks.models import SHAPES, Llama


def measure(name: str, shape_name: str, rates: list[float], *, steps: int, warmup: int, device: str) -> dict[str, Any]:
    """Train a few steps at each rate; the first rate's first step includes compiling.

    Returns:
        For each rate the median step in milliseconds (forward, backward, AdamW), the median time the host was busy
        issuing it, and the peak of memory in GiB above what was held before the step; and the first step in seconds.
    """
    result: dict[str, Any] = {"contestant": name, "shape": shape_name, "rates": {}}
    for rate in rates:
        torch._dynamo.reset()
        gc.collect()
        result["rates"][str(rate)] = _measure_rate(name, shape_name, rate, steps, warmup, device)
    return result


def _measure_rate(name: str, shape_name: str, rate: float, steps: int, warmup: int, device: str) -> dict[str, float]:
    shape = SHAPES[shape_name]
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(shape).to(torch.bfloat16 if device == "cuda" else torch.float32)
    loss = CONTESTANTS[name](model, rate)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=device == "cuda")
    batches = [torch.randint(shape.vocabulary, (shape.batch, shape.tokens + 1), device=device) for _ in range(4)]

    def step(index: int) -> None:
        value = loss(batches[index % len(batches)])
        if value.requires_grad:
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    started = time.perf_counter()
    step(0)
    _synchronize(device)
    first = time.perf_counter() - started
    for index in range(warmup):
        step(index)
    seconds, host, peaks = [], [], []
    for index in range(steps):
        _synchronize(device)
        held = _reset_peak(device)
        started = time.perf_counter()
        step(index)
        host.append(time.perf_counter() - started)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
        peaks.append(_peak(device) - held)
    return {
        "first_step_s": round(first, 2),
        "step_ms": round(1e3 * statistics.median(seconds), 3),
        "step_ms_mean": round(1e3 * statistics.mean(seconds), 3),
        "host_ms": round(1e3 * statistics.median(host), 3),
        "activation_gib": round(statistics.median(peaks) / 2**30, 3),
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int:
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
