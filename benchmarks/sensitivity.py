"""``python -m benchmarks.sensitivity``: what sensitivities cost, and how well the running estimate ranks branches.

* cost: :meth:`DropBPBackend.calibrate` against the reference procedure, one whole step for every branch and one more, in
  time and peak memory, with the largest relative difference of their values;
* ranking: language models are trained on text found on the machine (Python's standard library, as bytes); at several points
  the running estimate's ranking of the branches is held against the exact measure's (Spearman's rank correlation);
* overhead: the time of steps with the running estimate over that of steps without.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.measure import peak, reset_peak, timed
from benchmarks.models import Shape
from benchmarks.suites import SUITES, build
from dropbp_fx import DropBPBackend, DropPolicy, _torch, dropbp_backend

_GPU_COST = Shape(24, 2048, 8192, 16, 32000, 2, 2048)
_CPU_COST = Shape(24, 128, 256, 4, 1000, 2, 64)
_GPU_TEXT = Shape(12, 512, 2048, 8, 256, 32, 256)
_CPU_TEXT = Shape(4, 64, 128, 4, 256, 8, 64)


def _estimating(every: int) -> DropPolicy:
    return DropPolicy(0.5, allocation="sensitivity", reallocate_every=every)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sensitivity", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--points", nargs="+", type=int, default=[50, 200, 600], help="training steps to rank at")
    parser.add_argument("--shape", choices=SUITES, help="measure the cost on this shape")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    device, inner = arguments.device, arguments.inner
    on_gpu = device == "cuda"
    cost_shape = SUITES[arguments.shape] if arguments.shape else (_GPU_COST if on_gpu else _CPU_COST)
    cost = _cost(cost_shape, device, inner)
    print(tabulate(cost.items(), tablefmt="github"), flush=True)
    ranking: list[dict[str, Any]] = []
    text_shape = _GPU_TEXT if on_gpu else _CPU_TEXT
    for name, family in (("Llama", "llama"), ("GPT-2", "gpt2")):
        shape = dataclasses.replace(text_shape, family=family)
        ranking += _ranking(name, shape, arguments.points, device, inner)
        print(tabulate(ranking, headers="keys", tablefmt="github", floatfmt=".3f"), flush=True)
    overhead = [_overhead(shape, device, inner) for shape in (text_shape, cost_shape)]
    print(tabulate(overhead, headers="keys", tablefmt="github", floatfmt=".4f"), flush=True)
    if arguments.json:
        machine = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
        report = {
            "machine": machine,
            "versions": _torch.versions(),
            "cost": cost,
            "ranking": ranking,
            "overhead": overhead,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _cost(shape: Shape, device: str, inner: str) -> dict[str, float]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(shape, device=device, dtype=dtype, fused_loss=False)
    backend = dropbp_backend(0.5, inner=inner, seed=0)
    run = torch.compile(model, backend=backend)
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.tokens + 1), device=device)

    def step() -> Tensor:
        return run(ids)

    with backend.disabled():
        step().backward()
    backend.warmup()
    model.zero_grad()
    reference_seconds, reference_values = [], []
    for _ in range(3):
        seconds, values = timed(lambda: _reference(model, backend, step), device)
        reference_seconds.append(seconds)
        reference_values = values
    model.zero_grad()
    held = reset_peak(device)
    with backend.disabled():
        step().backward()
    step_peak = peak(device) - held
    model.zero_grad()
    backend.calibrate(step, progress_bar=False)  # compiles
    held = reset_peak(device)
    backend.calibrate(step, progress_bar=False)
    calibrate_peak = peak(device) - held
    seconds = []
    for _ in range(3):
        one, sensitivity = timed(lambda: backend.calibrate(step, progress_bar=False), device)
        seconds.append(one)
    differences = [abs(a - b) / b for a, b in zip(sensitivity.values, reference_values, strict=True)]
    return {
        "branches": len(backend.branches),
        "reference_s": statistics.median(reference_seconds),
        "calibrate_s": statistics.median(seconds),
        "ratio": statistics.median(seconds) / statistics.median(reference_seconds),
        "step_peak_gib": step_peak / 2**30,
        "calibrate_peak_gib": calibrate_peak / 2**30,
        "largest_relative_difference": max(differences),
    }


def _reference(model: nn.Module, backend: DropBPBackend, step: Callable[[], Tensor]) -> list[float]:
    """The memory-saving form of the reference: norms of one whole step for each branch, and one more."""

    def norms(pattern: list[int]) -> Tensor:
        model.zero_grad()
        with backend.pinned(pattern):
            step().backward()
        zero = torch.zeros((), device=next(model.parameters()).device)
        return torch.stack([zero if p.grad is None else p.grad.float().norm() for p in model.parameters()])

    exact = norms([])
    found = [(exact - norms([index])).square().sum() for index in range(len(backend.branches))]
    return [float(value) for value in found]


def _ranking(name: str, shape: Shape, points: list[int], device: str, inner: str) -> list[dict[str, Any]]:
    model = build(shape, device=device, dtype=torch.float32, fused_loss=False)
    backend = dropbp_backend(policy=_estimating(10**9), inner=inner, seed=0)
    run = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=device == "cuda")
    batches = _text(shape, device)
    rows: list[dict[str, Any]] = []
    for number in range(1, max(points) + 1):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = run(next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number not in points:
            continue

        def step() -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                return run(next(batches))

        estimate = backend.running_sensitivity
        row: dict[str, Any] = {"model": name, "step": number, "loss": loss.item()}
        for metric in ("gradnorm", "gradient"):
            exact = backend.calibrate(step, metric=metric, batches=4, progress_bar=False)
            again = backend.calibrate(step, metric=metric, batches=1, progress_bar=False)
            guess = backend._state.schedule.running_estimate(metric)
            if estimate is not None and guess is not None:
                row[f"{metric}: running"] = float(stats.spearmanr(guess.values, exact.values).statistic)
            row[f"{metric}: one exact sample"] = float(stats.spearmanr(again.values, exact.values).statistic)
        rows.append(row)
    return rows


def _overhead(shape: Shape, device: str, inner: str) -> dict[str, Any]:
    """Blocks of steps with and without the running estimate take turns."""
    runs: list[Callable[[], None]] = []
    for every in (None, 10**9):
        model = build(shape, device=device, dtype=torch.float32, fused_loss=False)
        policy = DropPolicy() if every is None else _estimating(every)
        backend = dropbp_backend(policy=policy, inner=inner, seed=0)
        run = torch.compile(model, backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
        ids = torch.randint(shape.vocabulary, (shape.batch, shape.tokens + 1), device=device)

        def step(run: Any = run, optimizer: torch.optim.Optimizer = optimizer, ids: Tensor = ids) -> None:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = run(ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        runs.append(step)
        step()
        backend.warmup()
        for _ in range(20):
            step()
    ratios = []
    for _ in range(15):
        seconds = [timed(lambda step=step: [step() for _ in range(20)], device)[0] for step in runs]  # type: ignore[misc]
        ratios.append(seconds[1] / seconds[0])
    size = f"{shape.layers} x {shape.width}, {shape.batch} x {shape.tokens} tokens"
    return {
        "model": size,
        "step_ms": 1e3 * seconds[0] / 20,
        "with_over_without": statistics.median(ratios),
        "spread": statistics.stdev(ratios),
    }


def _text(shape: Shape, device: str) -> Any:
    """Endless batches of bytes, shape (batch, tokens + 1), of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    draw = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(data) - shape.tokens - 1, (shape.batch,), generator=draw)
        yield torch.stack([data[s : s + shape.tokens + 1] for s in starts.tolist()]).long().to(device)


if __name__ == "__main__":
    main()
