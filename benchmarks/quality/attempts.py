"""What a method is at work: an :class:`Attempt` at training one model, exact ones first."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import CPU_ATTENTION
from benchmarks.measure import Record
from benchmarks.models import Checkpointed, Decoder

#: Gives a batch of the training data, for methods that look at gradients between two steps.
NextBatch = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an attempt is made with: the method's rate, the compiler, and how many steps a run has."""

    rate: float
    inner: str
    steps: int
    precision: Callable[[], contextlib.AbstractContextManager[None]]


class Attempt:
    """A model that is trained in one way; plain torch.compile unless a method says otherwise.

    ``restart`` begins a run; the model's weights are set by then. ``reusable`` attempts can be restarted; others are made
    anew for each run.
    """

    reusable = True

    def __init__(self, model: Decoder, setting: Setting) -> None:
        self.model, self.setting = model, setting
        self.run: Callable[[Tensor], Tensor] = torch.compile(model, backend=setting.inner, dynamic=False)

    def restart(self, seed: int) -> None:
        """Forget the last run."""

    def groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimizer."""
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def loss(self, ids: Tensor) -> Tensor:
        return self.run(ids)

    def training_loss(self, ids: Tensor) -> Tensor:
        """The loss of a batch, in the precision of training."""
        with self.setting.precision():
            return self.loss(ids)

    def before_step(self, progress: float, next_batch: NextBatch) -> None:
        """Called before each step with the share of the run that is done."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Called between the backward and the optimizer's step."""

    def compile_all(self) -> None:
        """Compile what later steps may need; the model has run once."""

    def facts(self) -> Record:
        return {}

    def flops_share(self, whole: int, ids: Tensor) -> float:
        """FLOPs of a step of this run, its mean, as a share of ``whole``, those of an exact step on ``ids``."""
        return step_flops(self.model, ids) / whole


def step_flops(model: Decoder, ids: Tensor) -> int:
    """FLOPs of a forward and backward, without compiling and without an optimizer."""
    return count_flops(model, lambda: model(ids))


def count_flops(model: Decoder, loss: Callable[[], Tensor]) -> int:
    """FLOPs of what gives a loss of the model, and of its backward."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss().backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


class Checkpointing(Attempt):
    """Every layer's activations are recomputed. Gradients are exact, so its losses are those of "none"."""

    def __init__(self, model: Decoder, setting: Setting) -> None:
        wrapped = copy.copy(model)  # the same parameters, other modules
        wrapped._modules = dict(model._modules)
        wrapped.layers = nn.ModuleList(Checkpointed(layer) for layer in model.layers)
        super().__init__(wrapped, setting)


class Accumulation(Attempt):
    """The batch in pieces, one after the other: exact gradients, and the activations of a piece at a time.

    The rate is the share of the batch that waits meanwhile.
    """

    def training_loss(self, ids: Tensor) -> Tensor:
        pieces = ids.chunk(round(1 / (1 - self.setting.rate)))
        losses = []
        for piece in pieces[:-1]:
            loss = super().training_loss(piece) * (len(piece) / len(ids))
            loss.backward()
            losses.append(loss.detach())
        return super().training_loss(pieces[-1]) * (len(pieces[-1]) / len(ids)) + sum(losses)
