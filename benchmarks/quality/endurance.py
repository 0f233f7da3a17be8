"""One long training: does anything diverge, drift, grow or recompile, and is a resumed run the same run?"""

from __future__ import annotations

import copy
import gc
import resource
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks.measure import Record, synchronize
from benchmarks.quality.dropping import Engine
from benchmarks.quality.tasks import SHIFTS, Task, Workshop, cosine, make_optimizer, moved, set_learning_rate, update
from benchmarks.quality.training import Plan, prepared

_PARTS = 20


def endure(workshop: Workshop, task: Task, name: str, rate: float, *, learning_rate: float) -> Iterator[Record]:
    """Train for as many steps as the workshop has, once in one piece and once more from a checkpoint in the middle.

    Yields a record for each twentieth of the run: the mean ``loss``; ``realised`` and ``asked``, the share of branches that
    was dropped and what the pattern makes of the scheduled rates; ``memory_mib``, what the process (on a GPU: PyTorch's
    allocator) holds; ``variants`` and ``graphs`` compiled so far. The last record says whether parameters, losses and drops
    of the second half came out the same, bit for bit, of a new model, optimizer and backend that loaded the checkpoint.

    Recompilations are errors from the first step on.
    """
    steps = workshop.size.steps
    common: Record = {
        "measurement": "quality endurance",
        **task.conditions,
        "method": name,
        "rate": rate,
        "lr": learning_rate,
        "steps": steps,
    }
    first = _Run(workshop, task, name, rate, learning_rate)
    checkpoint: dict[str, Any] = {}
    whole = []
    for part in range(_PARTS):
        if part == _PARTS // 2:
            checkpoint = first.checkpoint()
        whole.append(first.train(part * steps // _PARTS, (part + 1) * steps // _PARTS))
        yield {**common, "part": part, **whole[-1]}
    del first.attempt
    second = _Run(workshop, task, name, rate, learning_rate)
    second.resume(checkpoint)
    half = [second.train(part * steps // _PARTS, (part + 1) * steps // _PARTS) for part in range(_PARTS // 2, _PARTS)]
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    yield {
        **common,
        "resumed_from": _PARTS // 2,
        "same_losses": all(a["loss"] == b["loss"] for a, b in zip(whole[_PARTS // 2 :], half, strict=True)),
        "same_drops": all(a["realised"] == b["realised"] for a, b in zip(whole[_PARTS // 2 :], half, strict=True)),
        "same_parameters": all(torch.equal(one, other) for one, other in pairs),
    }


class _Run:
    def __init__(self, workshop: Workshop, task: Task, name: str, rate: float, learning_rate: float) -> None:
        self._workshop, self._steps, self._learning_rate = workshop, workshop.size.steps, learning_rate
        self.model, attempt = prepared(workshop, task, Plan(name, rate, 1.0, (learning_rate,), 1), self._steps)
        if not isinstance(attempt, Engine):
            raise TypeError(f"Only methods of the engine are looked at here; {name!r} is none.")
        self.attempt = attempt
        self._batches = workshop.batches(SHIFTS[task.shift], 0, task.windows)
        self._optimizer = make_optimizer(attempt.groups(), workshop.device)
        attempt.restart(seed=0)

    def checkpoint(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "backend": self.attempt.backend.state_dict(),
        }
        return copy.deepcopy(state)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self._optimizer.load_state_dict(checkpoint["optimizer"])
        self.attempt.backend.load_state_dict(checkpoint["backend"])

    def train(self, begin: int, end: int) -> Record:
        """Steps ``begin`` to ``end`` of the run."""
        backend, device = self.attempt.backend, self._workshop.device
        losses, asked, before = [], 0.0, _drops(self.attempt)
        with mock.patch.object(torch._dynamo.config, "error_on_recompile", True):
            for step in range(begin, end):
                set_learning_rate(self._optimizer, self._learning_rate * cosine(step, self._steps))
                self.attempt.before_step(step / self._steps, lambda: self._batches[0])
                loss = self.attempt.training_loss(moved(self._batches[step], device))
                loss.backward()
                losses.append(loss.detach())
                asked += backend.stats.attainable_rate
                update(self._optimizer)
        synchronize(device)
        after = _drops(self.attempt)
        return {
            "loss": float(torch.stack(losses).double().mean()),
            "largest_loss": float(torch.stack(losses).max()),
            "realised": (after[0] - before[0]) / (after[1] - before[1]),
            "asked": asked / (end - begin),
            "memory_mib": round(_memory(device) / 2**20, 2),
            "variants": backend.stats.compiled_variants,
            "graphs": backend.stats.graphs,
        }


def _drops(attempt: Engine) -> tuple[int, int]:
    branches = attempt.backend.branches
    return sum(branch.times_dropped for branch in branches), sum(branch.times_seen for branch in branches)


def _memory(device: str) -> int:
    """What is held now: by PyTorch on a GPU; on a CPU the most that the process has held so far, in bytes."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
