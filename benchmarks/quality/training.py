"""One fine-tuning run, and what it cost."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.measure import Record, error_text, peak, reset_peak, synchronize
from benchmarks.models import Decoder
from benchmarks.quality.attempts import Attempt, Setting
from benchmarks.quality.methods import methods
from benchmarks.quality.tasks import SHIFTS, Task, Workshop, cosine, make_optimizer, moved, set_learning_rate, update

#: Steps that are not timed, as a share of the run: the first ones warm up.
_UNTIMED = 0.02
#: How often a grid of learning rates is extended where its best value is at an end.
_EXTENSIONS = 2
#: A run whose loss is so many nats above where it began, over a tenth of its steps, does not come back.
_DIVERGED = 0.5
#: Batches that calibrations and the like look at come from another order of the same data.
_ASIDE = 7919


class DivergedError(Exception):
    """Training at this learning rate led away."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One method's runs on a task.

    Attributes:
        method: a name of ``methods()``.
        rate: the method's.
        share: of the task's steps; methods that leave out nothing can spend less time this way.
        lrs: peak learning rates to choose from with the first seed. Where the best is the first or the last of them, a
            half or twice of it is tried too, up to ``_EXTENSIONS`` times.
        seeds: runs with the learning rate that was best.
    """

    method: str
    rate: float
    share: float
    lrs: tuple[float, ...]
    seeds: int


def run(workshop: Workshop, task: Task, plan: Plan) -> Iterator[Record]:
    """All runs of a plan; a run that fails is a record with its text under "error"."""
    runner = _Runner(workshop, task, plan)
    found: dict[float, float] = {}
    candidates = list(plan.lrs)
    for extension in range(_EXTENSIONS + 1):
        for rate in candidates:
            record = runner.run(rate, seed=0)
            found[rate] = record.get("eval_loss", math.inf)
            yield record
        best = min(found, key=found.__getitem__)
        candidates = [best / 2] if best == min(found) else [2 * best] if best == max(found) else []
        if len(plan.lrs) == 1 or not math.isfinite(found[best]) or extension == _EXTENSIONS or not candidates:
            break
    for seed in range(1, plan.seeds):
        yield runner.run(best, seed)


class _Runner:
    """Makes the runs of a plan on one compiled model, as far as the method can be restarted."""

    def __init__(self, workshop: Workshop, task: Task, plan: Plan) -> None:
        self._workshop, self._task, self._plan = workshop, task, plan
        self._steps = max(round(plan.share * workshop.size.steps), 1)
        self._attempt: Attempt | None = None

    def run(self, learning_rate: float, seed: int) -> Record:
        plan, task = self._plan, self._task
        record: Record = {
            "measurement": "quality",
            **task.conditions,
            "method": plan.method,
            "rate": plan.rate,
            "share": plan.share,
            "steps": self._steps,
            "lr": learning_rate,
            "seed": seed,
        }
        try:
            if self._attempt is None or not self._attempt.reusable:
                self._model, self._attempt = prepared(self._workshop, task, plan, self._steps)
                self._weights = copy.deepcopy(self._model.state_dict())
            self._model.load_state_dict(self._weights)
            self._attempt.restart(seed)
            return {
                **record,
                **_train(self._workshop, task, self._attempt, self._model, self._steps, learning_rate, seed),
            }
        except DivergedError as error:  # the weights are set anew for the next run
            return {**record, "error": error_text(error)}
        except Exception as error:
            self._attempt = None
            return {**record, "error": error_text(error)}


def prepared(workshop: Workshop, task: Task, plan: Plan, steps: int) -> tuple[Decoder, Attempt]:
    """A model with its way to be trained, all of it compiled."""
    torch._dynamo.reset()
    model = workshop.model(task)
    setting = Setting(plan.rate, workshop.inner, steps, workshop.precision)
    attempt = methods()[plan.method].make(model, setting)
    ids = workshop.batches(SHIFTS[task.shift], _ASIDE)[0].to(workshop.device)
    attempt.training_loss(ids).backward()
    attempt.compile_all()
    attempt.training_loss(ids).backward()
    model.zero_grad(set_to_none=True)
    return model, attempt


def _train(
    workshop: Workshop, task: Task, attempt: Attempt, model: Decoder, steps: int, learning_rate: float, seed: int
) -> Record:
    device, corpus = workshop.device, SHIFTS[task.shift]
    batches = workshop.batches(corpus, seed, task.windows)
    aside, others = itertools.count(), workshop.batches(corpus, _ASIDE + seed, task.windows)

    def next_batch() -> Tensor:
        return moved(others[next(aside)], device)

    torch.manual_seed(seed)
    optimizer = make_optimizer(attempt.groups(), device)
    untimed, losses, held, started = max(round(_UNTIMED * steps), 2), [], 0, 0.0
    tenth = max(steps // 10, 1)
    for step in range(steps):
        if step and step % tenth == 0:
            _check(losses, tenth)
        if step == untimed:
            held, started = reset_peak(device), time.perf_counter()
        set_learning_rate(optimizer, learning_rate * cosine(step, steps))
        attempt.before_step(step / steps, next_batch)
        loss = attempt.training_loss(moved(batches[step], device))
        loss.backward()
        losses.append(loss.detach())
        update(optimizer, lambda: attempt.before_update(optimizer))
    synchronize(device)
    seconds = (time.perf_counter() - started) / max(steps - untimed, 1) * steps
    return {
        "eval_loss": workshop.held_out_loss(model, corpus),
        "train_losses": [float(torch.stack(losses[at : at + tenth]).mean()) for at in range(0, steps, tenth)],
        "epochs": steps / batches.steps_per_epoch,
        "seconds": round(seconds, 4),
        "step_ms": round(1e3 * seconds / steps, 4),
        "activation_gib": round((peak(device) - held) / 2**30, 4),
        **_cost(workshop, task, attempt),
    }


def _check(losses: Sequence[Tensor], tenth: int) -> None:
    """Do not spend more time on a run that has diverged.

    Raises:
        DivergedError: the mean of the last ``tenth`` losses is far above the first loss, or no number.
    """
    first, last = losses[0].item(), torch.stack(list(losses[-tenth:])).mean().item()
    if not last <= first + _DIVERGED:
        raise DivergedError(f"The loss was {first:.3f} at first and {last:.3f} over the last of {len(losses)} steps.")


def _cost(workshop: Workshop, task: Task, attempt: Attempt) -> Record:
    """The attempt's figures, and the FLOPs of its steps as a share of those of exact ones."""
    ids = workshop.batches(SHIFTS[task.shift], _ASIDE)[0].to(workshop.device)
    return {**attempt.facts(), "flops_share": attempt.flops_share(workshop.flops(task), ids)}


def before_tuning(workshop: Workshop, tasks: Sequence[Task]) -> Iterator[Record]:
    """Held-out losses of the pretrained model, on what it knows and on what is new."""
    for task in tasks:
        model, name = workshop.model(task), SHIFTS[task.shift]
        corpus = workshop.corpus(name)
        yield {
            "measurement": "quality before",
            **task.conditions,
            "eval_loss": workshop.held_out_loss(model, name),
            "pretraining_loss": workshop.held_out_loss(model, "python"),
            "corpus_digest": corpus.digest,
            "corpus_files": corpus.files,
        }
