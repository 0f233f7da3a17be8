"""How far a pattern's gradient is from the exact one: its bias and its variance, layer by layer, over a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.measure import Record, error_text
from benchmarks.models import Decoder
from benchmarks.quality.attempts import Setting
from benchmarks.quality.dropping import Engine
from benchmarks.quality.methods import methods
from benchmarks.quality.tasks import SHIFTS, Task, Workshop, make_optimizer

_ASIDE = 104729


def measure(
    workshop: Workshop,
    task: Task,
    settings: Sequence[tuple[str, float]],
    *,
    learning_rate: float,
    points: Sequence[float] = (0.0, 0.5, 1.0),
    batches: int = 8,
    samples: int = 8,
) -> Iterator[Record]:
    """Statistics of methods at points of one exact training, one record a point, method and part of the model.

    With g_b the exact gradient of batch b with respect to the part, G its mean over batches, d_bk the gradient that the
    method's k-th sample leaves of batch b (zero where it is dropped) and means over all b and k:

    - ``sampling_variance``: mean ‖g_b - G‖² / ‖G‖², what batches of this size scatter anyway;
    - ``bias``: ‖mean(d_bk - g_b)‖ / ‖G‖;
    - ``added_variance``: how much d_bk scatters over the samples of one batch, the mean over batches, / ‖G‖²;
    - ``cosine``: between the mean of d_bk and G: is the direction right that an optimizer sees in the long run?
    - ``kept_cosine``: the mean cosine between d_bk and g_b where the part is not dropped;
    - ``kept``: how often that is.

    Each batch has ``samples`` samples, so added variance / (batches * samples) of the bias' square is chance.
    """
    model = workshop.model(task)
    optimizer = make_optimizer([{"params": [p for p in model.parameters() if p.requires_grad]}], workshop.device)
    data, corpus = workshop.batches(SHIFTS[task.shift], 0, task.windows), SHIFTS[task.shift]
    others = workshop.batches(corpus, _ASIDE, task.windows)
    looked_at = [others[number].to(workshop.device) for number in range(batches)]
    steps, done = workshop.size.steps, 0
    for point in points:
        torch._dynamo.reset()
        run = torch.compile(model, backend=workshop.inner, dynamic=False)
        workshop.train(run, optimizer, data, range(done, round(point * steps)), steps, learning_rate)
        done = round(point * steps)
        for name, rate in settings:
            common: Record = {
                "measurement": "quality statistics",
                **task.conditions,
                "method": name,
                "rate": rate,
                "point": point,
            }
            try:
                setting = Setting(rate, workshop.inner, steps, workshop.precision)
                for part, found in _statistics(model, methods()[name].make, setting, looked_at, samples, point).items():
                    yield {**common, "part": part, **found}
            except Exception as error:
                yield {**common, "error": error_text(error)}


def _statistics(
    model: Decoder,
    make: Callable[[Decoder, Setting], object],
    setting: Setting,
    batches: Sequence[Tensor],
    samples: int,
    point: float,
) -> dict[str, dict[str, float]]:
    torch._dynamo.reset()
    attempt = make(model, setting)
    if not isinstance(attempt, Engine):
        raise TypeError(
            f"Only methods of the engine leave out gradients by patterns; {type(attempt).__name__} does not."
        )
    remaining = iter(batches * 2)
    attempt.training_loss(batches[0])
    attempt.before_step(point, lambda: next(remaining))
    parts = _parts(model)
    parameters = [p for group in parts.values() for p in group]

    def gradients(ids: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(attempt.training_loss(ids), parameters, allow_unused=True)
        each = iter(found)
        return {
            name: torch.cat([(torch.zeros_like(p) if (g := next(each)) is None else g).flatten() for p in group])
            for name, group in parts.items()
        }

    with attempt.backend.disabled():
        exact = [gradients(ids) for ids in batches]
    mean = {name: torch.stack([g[name] for g in exact]).mean(0) for name in parts}
    errors = {name: torch.zeros_like(mean[name], dtype=torch.float64) for name in parts}
    scattered, cosines, kept = (dict.fromkeys(parts, 0.0) for _ in range(3))
    for ids, whole in zip(batches, exact, strict=True):
        of_batch = {name: torch.zeros_like(errors[name]) for name in parts}
        for _ in range(samples):
            for name, sampled in gradients(ids).items():
                error = (sampled - whole[name]).double()
                of_batch[name] += error
                scattered[name] += float(error.square().sum())
                if sampled.any():
                    kept[name] += 1
                    cosines[name] += float(torch.cosine_similarity(sampled, whole[name], dim=0))
        for name, total in of_batch.items():
            errors[name] += total
            scattered[name] -= float(total.square().sum()) / samples
    count = len(batches) * samples
    answer = {}
    for name in parts:
        size = float(mean[name].double().square().sum()) or math.nan
        bias = float((errors[name] / count).square().sum())
        scatter = sum(float((g[name] - mean[name]).double().square().sum()) for g in exact) / max(len(exact) - 1, 1)
        answer[name] = {
            "norm": math.sqrt(size),
            "sampling_variance": scatter / size,
            "bias": math.sqrt(bias / size),
            "added_variance": max(scattered[name], 0.0) / (len(batches) * max(samples - 1, 1)) / size,
            "cosine": float(
                torch.cosine_similarity(mean[name].double() + errors[name] / count, mean[name].double(), dim=0)
            ),
            "kept_cosine": cosines[name] / kept[name] if kept[name] else math.nan,
            "kept": kept[name] / count,
        }
    return answer


def _parts(model: Decoder) -> dict[str, list[Tensor]]:
    """Trainable parameters by layer; what belongs to none is "rest"."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "rest"
            parts.setdefault(part, []).append(parameter)
    return parts
