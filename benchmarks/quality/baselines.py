"""Other ways to spend less on a step: small implementations of what others published, and of what is obvious."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.methods import compiled_parts
from benchmarks.models import Decoder, Linear
from benchmarks.quality.attempts import Attempt, NextBatch, Setting, count_flops
from dropbp_fx.distributed import parameter_groups
from dropbp_fx.graph.gate import scale_gradient


class Freezing(Attempt):
    """The lowest layers, as many as the rate says, and the embedding below them are not trained at all.

    With LoRA there are no updates in them: an update that is not trained adds nothing, and leaving it out saves the time it
    takes in the forward.

    Args:
        same_size: raise the rank in the other layers until as many parameters are trained as without freezing.
    """

    def __init__(self, model: Decoder, setting: Setting, *, same_size: bool = False) -> None:
        count = len(model.layers)
        frozen = round(setting.rate * count)
        torch.manual_seed(0)  # of new updates
        for number, layer in enumerate(model.layers):
            for linear in _with_updates(layer):
                if number < frozen:
                    linear.begin_update(0)
                elif same_size:
                    linear.begin_update(round(linear.rank * count / (count - frozen)))
        model.layers[:frozen].requires_grad_(False)
        if frozen:
            for name, parameter in model.named_parameters(recurse=False):
                if name in ("embedding", "positions"):
                    parameter.requires_grad_(False)
        super().__init__(model, setting)


def _with_updates(layer: nn.Module) -> list[Linear]:
    return [module for module in layer.modules() if isinstance(module, Linear) and module.rank]


class NestedBatch(Attempt):
    """Every layer is trained on windows of its own number, a part of those that the layer above it is trained on.

    The lower half of the layers takes the share 1 - 2 rate of each batch's windows and the upper half all of them or, with
    ``gradual``, the share rises evenly from there to the last layer, so that the mean is 1 - rate either way. All other
    windows only run forward through a layer. Gradients of all layers are unbiased: what comes from above is scaled up
    where windows are left out. They scatter more the fewer windows they are of, so a layer's learning rate is multiplied
    by the square root of its share.
    """

    def __init__(self, model: Decoder, setting: Setting, *, gradual: bool = False) -> None:
        count, lowest = len(model.layers), 1 - 2 * setting.rate
        if gradual:
            self.shares = [lowest + (1 - lowest) * number / (count - 1) for number in range(count)]
        else:
            self.shares = [lowest if number < count // 2 else 1.0 for number in range(count)]
        self.model, self.setting = model, setting
        self.run = torch.compile(self._forward, backend=setting.inner, dynamic=False)

    def _forward(self, ids: Tensor) -> Tensor:
        sizes = [max(round(share * len(ids)), 1) for share in self.shares]
        trained = sizes[0]
        x = self.model.embed(ids)
        x, others = x[:trained], x[trained:].detach()
        for layer, size in zip(self.model.layers, sizes, strict=True):
            if size > trained:
                scale = torch.full((), size / trained, device=x.device)
                x = torch.cat([scale_gradient(x, scale), others[: size - trained]])
                others = others[size - trained :]
                trained = size
            x = layer(x, *self.model.context())
            if trained < len(ids):
                with torch.no_grad():
                    others = layer(others, *self.model.context())
        return self.model.loss(x, ids)

    def groups(self) -> list[dict[str, Any]]:
        groups = parameter_groups(self.model, self.model.layers)
        return [{**group, "scale": share**0.5} for group, share in zip(groups, [*self.shares, 1.0], strict=False)]

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= group["scale"]

    def flops_share(self, whole: int, ids: Tensor) -> float:
        return count_flops(self.model, lambda: self._forward(ids)) / whole


class Skipping(Attempt):
    """Layers are skipped in forward and backward, more often the later they come; those that run are scaled up for it.

    The mean share of skipped layers is the rate. With ``progressive`` it builds up as in progressive layer dropping
    (Zhang and He, NeurIPS 2020: theta(t) = (1 - theta) exp(-gamma t) + theta, gamma T = 100); without, this is stochastic
    depth with linear decay (Huang et al., ECCV 2016).
    """

    def __init__(self, model: Decoder, setting: Setting, *, progressive: bool) -> None:
        self.model, self.setting, self._progressive = model, setting, progressive
        self._attention, self._feed_forward, self._head = compiled_parts(model, setting.inner)
        self._progress, self._rng = 0.0, random.Random(0)

    def restart(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def before_step(self, progress: float, next_batch: NextBatch) -> None:
        self._progress = progress

    def loss(self, ids: Tensor) -> Tensor:
        last = max(1 - 2 * self.setting.rate, 0.0)  # of the last layer, so that the mean is 1 - rate
        if self._progressive:
            last += (1 - last) * math.exp(-100 * self._progress)
        x = self.model.embed(ids)
        count = len(self.model.layers)
        chances = [1 - (index + 0.5) / count * (1 - last) for index in range(count)]
        # The first layer is the most likely one; without any layer there would be nothing to train.
        kept = [index for index, keep in enumerate(chances) if self._rng.random() < keep] or [0]
        for index in kept:
            layer, keep = self.model.layers[index], chances[index]
            x = x + self._attention(layer, x, *self.model.context()) / keep
            x = x + self._feed_forward(layer, x) / keep
        return self._head(self.model, x, ids)

    def flops_share(self, whole: int, ids: Tensor) -> float:
        return 1 - self.setting.rate  # but for the head


class KeepRows(torch.autograd.Function):
    """The identity, whose gradient keeps some tokens only: a share of the rows, those with the largest norms.

    With ``sampled``, rows are drawn with chances in proportion to their norms and scaled by one over these instead, so that
    the gradient stays unbiased (importance sampling, as in VCAS).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, sampled: bool) -> Tensor:
        ctx.share, ctx.sampled = share, sampled
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        norms = grad.flatten(0, -2).float().norm(dim=-1)
        count = max(round(ctx.share * len(norms)), 1)
        if ctx.sampled:
            chances = (norms * count / norms.sum().clamp_min(1e-30)).clamp(max=1)
            for _ in range(4):  # what would exceed one is given to the others
                certain = chances >= 1
                others = chances.masked_fill(certain, 0)
                scale = (count - certain.sum()).clamp_min(0) / others.sum().clamp_min(1e-30)
                chances = torch.where(certain, 1.0, others * scale).clamp(max=1)
            weights = (torch.rand_like(chances) < chances) / chances.clamp_min(1e-6)
        else:
            weights = torch.zeros_like(norms)
            weights[norms.topk(count).indices] = 1
        return grad * weights.view(*grad.shape[:-1], 1).to(grad.dtype), None, None


class Tokens(Attempt):
    """Every branch's backward is over a share of the tokens only, 1 - rate of them.

    Which ones is decided by the gradient that arrives at the branch, and for keys and values, to which kept tokens send
    gradients, by theirs. This computes with zeros what code that leaves rows out would not compute at all, so its times
    say nothing and FLOPs stand for them.
    """

    def __init__(self, model: Decoder, setting: Setting, *, sampled: bool = False) -> None:
        share = 1 - setting.rate

        def keeping(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *arguments: KeepRows.apply(function(*arguments), share, sampled)

        for layer in model.layers:
            for name in ("attention", "feed_forward"):
                setattr(layer, name, keeping(getattr(layer, name)))
            for linear in (layer.k, layer.v):
                linear.forward = keeping(linear.forward)  # type: ignore[method-assign]
        super().__init__(model, setting)
        self.run = model  # zeros would not be worth compiling

    def flops_share(self, whole: int, ids: Tensor) -> float:
        tokens = ids.shape[0] * (ids.shape[1] - 1)
        linear = [p for p in self.model.layers.parameters() if p.dim() == 2]
        passes = sum(2 * tokens * p.numel() * (2 if p.requires_grad else 1) for p in linear)
        return 1 - self.setting.rate * passes / whole


class SmallerBatch(Attempt):
    """1 - rate of the windows of each batch; where steps matter more than what they are taken on, a strong baseline."""

    def loss(self, ids: Tensor) -> Tensor:
        return self.run(ids[: max(round((1 - self.setting.rate) * len(ids)), 1)])

    def flops_share(self, whole: int, ids: Tensor) -> float:
        return 1 - self.setting.rate


class Selective(Attempt):
    """A forward of the whole batch without gradients chooses the windows with the largest losses; the step is on these.

    After Jiang et al. (Accelerating deep learning by focusing on the biggest losers, 2019); 1 - rate of the windows stay.
    """

    def __init__(self, model: Decoder, setting: Setting) -> None:
        super().__init__(model, setting)
        self._losses = torch.compile(_losses_by_window, backend=setting.inner, dynamic=False)

    def loss(self, ids: Tensor) -> Tensor:
        keep = max(round((1 - self.setting.rate) * len(ids)), 1)
        with torch.no_grad():
            chosen = self._losses(self.model, ids).topk(keep).indices
        return self.run(ids[chosen])

    def flops_share(self, whole: int, ids: Tensor) -> float:
        return 1 / 3 + 1 - self.setting.rate


def _losses_by_window(model: Decoder, ids: Tensor) -> Tensor:
    x = model.embed(ids)
    for layer in model.layers:
        x = layer(x, *model.context())
    x, weight = model.head(x)
    logits = nn.functional.linear(x, weight).float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
