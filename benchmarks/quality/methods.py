"""The contestants: ways to spend a fine-tuning's time. Each is a name and what makes an :class:`Attempt` of a model.

``rate`` is a method's own measure of what it leaves out; what that saves is measured, not assumed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Record
from benchmarks.models import Checkpointed, Decoder
from benchmarks.quality.patterns import CyclicWindow, Held, Prefix, Sometimes, Windows
from dropbp_fx import dropbp_backend
from dropbp_fx.policy.patterns import RandomPattern, WindowPattern

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
    with FlopCounterMode(display=False) as counter:
        model(ids).backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


class Checkpointing(Attempt):
    """Every layer's activations are recomputed. Gradients are exact, so its losses are those of "none"."""

    def __init__(self, model: Decoder, setting: Setting) -> None:
        wrapped = copy.copy(model)  # the same parameters, other modules
        wrapped._modules = dict(model._modules)
        wrapped.layers = nn.ModuleList(Checkpointed(layer) for layer in model.layers)
        super().__init__(wrapped, setting)


class Engine(Attempt):
    """Training with dropbp_fx.

    Args:
        options: for ``dropbp_backend``, besides the rate.
        calibrate_at: measure sensitivities at this share of the run, and allocate rates by them from then on.
        scale_power: multiply learning rates of the layers by (1 - rate) to the power of minus this, because they are
            updated less often.
        coast: where a gradient was dropped, step along AdamW's moments as they are times this to the power of how often
            in succession it was dropped, instead of not at all. 0 does not.
        control: adjust the rate so that dropping adds this share to the variance that gradients have anyway, after VCAS
            (Wang et al., ICLR 2024), which does so for sampled rows.
    """

    _CONTROL_EVERY = 25
    _CONTROL_BY = 0.05

    def __init__(
        self,
        model: Decoder,
        setting: Setting,
        *,
        options: Callable[[], Mapping[str, Any]] = dict,
        calibrate_at: float | None = None,
        scale_power: float = 0.0,
        coast: float = 0.0,
        control: float | None = None,
    ) -> None:
        self.model, self.setting = model, setting
        chosen = options()
        self.backend = dropbp_backend(rate=setting.rate, inner=setting.inner, seed=0, **chosen)
        self.run = torch.compile(model, backend=self.backend, dynamic=False)
        self._calibrate_at, self._scale_power, self._coast, self._control = calibrate_at, scale_power, coast, control
        self.reusable = "allocation" not in chosen and control is None
        self._calibrated = False
        self._controlled: list[float] = []
        self._missed: dict[Tensor, int] = {}

    def restart(self, seed: int) -> None:
        self._missed.clear()
        state = self.backend.state_dict()
        for branch in state["branches"]:
            branch["times_seen"] = branch["times_dropped"] = 0
        self.backend.load_state_dict({**state, "seed": seed, "rounds": 0, "forwards": 0, "progress": 0.0})

    def groups(self) -> list[dict[str, Any]]:
        layers = [p for p in self.model.layers.parameters() if p.requires_grad]
        inside = {id(p) for p in layers}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in inside]
        return [{"params": layers}, *([{"params": others}] if others else [])]

    def before_step(self, progress: float, next_batch: NextBatch) -> None:
        self.backend.progress = progress
        if self._calibrate_at is not None and not self._calibrated and progress >= self._calibrate_at:
            self.backend.calibrate(lambda: self.training_loss(next_batch()))
            self._calibrated = True
        if self._control is not None and progress * self.setting.steps >= len(self._controlled) * self._CONTROL_EVERY:
            self._adjust(self._control, next_batch(), next_batch())

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        if self._scale_power:
            rate = min(sum(branch.rate for branch in self.backend.branches) / len(self.backend.branches), 0.9)
            optimizer.param_groups[0]["lr"] *= (1 - rate) ** -self._scale_power
        if self._coast:
            self._step_along_moments(optimizer)

    @torch.no_grad()
    def _step_along_moments(self, optimizer: torch.optim.Optimizer) -> None:
        group = optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        alike: dict[tuple[float, int], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                self._missed[parameter] = 0
            elif parameter in optimizer.state:
                self._missed[parameter] = self._missed.get(parameter, 0) + 1
                key = float(optimizer.state[parameter]["step"]), self._missed[parameter]
                alike.setdefault(key, []).append(parameter)
        for (steps, missed), parameters in alike.items():
            states = [optimizer.state[parameter] for parameter in parameters]
            scales = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
            torch._foreach_div_(scales, (1 - beta2**steps) ** 0.5)
            torch._foreach_add_(scales, group["eps"])
            factor = -group["lr"] * self._coast**missed / (1 - beta1**steps)
            torch._foreach_addcdiv_(parameters, [state["exp_avg"] for state in states], scales, value=factor)

    def compile_all(self) -> None:
        self.backend.warmup()

    def facts(self) -> Record:
        stats = self.backend.stats
        return {
            "realised_rate": stats.realised_rate,
            "realised_flops_rate": stats.realised_flops_rate,
            "compiled_variants": stats.compiled_variants,
            "graphs": stats.graphs,
            **({"controlled_rates": self._controlled} if self._control is not None else {}),
        }

    def flops_share(self, whole: int, ids: Tensor) -> float:
        branches = sum(branch.backward_flops for branch in self.backend.branches)
        return 1 - self.backend.stats.realised_flops_rate * branches / whole

    def _adjust(self, share: float, one: Tensor, other: Tensor) -> None:
        with self.backend.disabled():
            exact = [self._gradients(ids) for ids in (one, other)]
        added = _distance(exact[0], self._gradients(one))
        step = self._CONTROL_BY if added < share * 0.5 * _distance(*exact) else -self._CONTROL_BY
        self.backend.rate = min(max(self.backend.rate + step, 0.0), 0.9)
        self._controlled.append(round(self.backend.rate, 3))

    def _gradients(self, ids: Tensor) -> list[Tensor | None]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(self.training_loss(ids), parameters, allow_unused=True))


def _distance(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    """Squared norm of a difference; a missing gradient is zero."""
    total = 0.0
    for left, right in zip(a, b, strict=True):
        difference = right if left is None else left if right is None else left - right
        if difference is not None:
            total += float(difference.double().square().sum())
    return total


class Freezing(Attempt):
    """The lowest layers, as many as the rate says, and the embedding below them are not trained at all."""

    def __init__(self, model: Decoder, setting: Setting) -> None:
        frozen = round(setting.rate * len(model.layers))
        model.layers[:frozen].requires_grad_(False)
        if frozen:
            for name, parameter in model.named_parameters(recurse=False):
                if name in ("embedding", "positions"):
                    parameter.requires_grad_(False)
        super().__init__(model, setting)


class Skipping(Attempt):
    """Layers are skipped in forward and backward, more often the later they come; those that run are scaled up for it.

    The mean share of skipped layers is the rate. With ``progressive`` it builds up as in progressive layer dropping
    (Zhang and He, NeurIPS 2020: theta(t) = (1 - theta) exp(-gamma t) + theta, gamma T = 100); without, this is stochastic
    depth with linear decay (Huang et al., ECCV 2016).
    """

    def __init__(self, model: Decoder, setting: Setting, *, progressive: bool) -> None:
        self.model, self.setting, self._progressive = model, setting, progressive
        kind = type(model.layers[0])
        self._attention, self._feed_forward, self._head = (
            torch.compile(function, backend=setting.inner, dynamic=False)
            for function in (kind.attention, kind.feed_forward, type(model).loss)
        )
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
            chances = norms
            for _ in range(4):  # what would exceed one is given to the others
                scale = (count - (chances >= 1).sum()) / chances.masked_fill(chances >= 1, 0).sum().clamp_min(1e-30)
                chances = torch.where(chances >= 1, 1.0, chances * scale).clamp(max=1)
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
    """1 - rate of the windows of each batch; where steps matter more than what they are taken on, a strong rival."""

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


@dataclasses.dataclass(frozen=True)
class Method:
    """A contestant.

    Attributes:
        make: from a model and a setting.
        about: what it does, and whose idea it is.
    """

    make: Callable[[Decoder, Setting], Attempt]
    about: str


def _engine(about: str, **arguments: Any) -> Method:
    options = arguments.pop("options", None) or {}
    make_options = options if callable(options) else lambda: options
    return Method(lambda model, setting: Engine(model, setting, options=make_options, **arguments), about)


def methods() -> dict[str, Method]:
    """All contestants by name."""
    window = {"pattern": "window"}
    return {
        "none": Method(Attempt, "torch.compile, nothing dropped"),
        "checkpointing": Method(Checkpointing, "nothing dropped, every layer recomputed"),
        # ---- the paper's
        "random": _engine("random branches, all at one rate: DropBP, uniform"),
        "sensitivity": _engine(
            "random branches at rates by sensitivity, calibrated at 10 %: DropBP as published",
            options={"allocation": "sensitivity"},
            calibrate_at=0.1,
        ),
        # ---- other patterns
        "random layers": _engine("random whole layers", options={"granularity": "layer"}),
        "rescaled": _engine(
            "independent branches, kept ones scaled by 1 / (1 - rate): unbiased",
            options={"pattern": "independent", "rescale": True},
        ),
        "suffix": _engine("everything below a random depth", options={"pattern": "suffix"}),
        "fixed suffix": _engine("everything below a fixed depth", options=lambda: {"pattern": Prefix()}),
        "weights": _engine("gradients of random branches' weights only", options={"drop": "weights"}),
        "window": _engine("a run of layers at a random place", options=window),
        "window, unwrapped": _engine("the same, not around the end", options={"pattern": WindowPattern(wrap=False)}),
        "cyclic window": _engine("a run of layers, places in turn", options=lambda: {"pattern": CyclicWindow()}),
        "two windows": _engine("two runs of layers", options=lambda: {"pattern": Windows(2)}),
        "held window": _engine(
            "a window that stays for 10 steps", options=lambda: {"pattern": Held(WindowPattern(), 10)}
        ),
        "window by sensitivity": _engine(
            "a window that follows rates by sensitivity",
            options={"pattern": "window", "allocation": "sensitivity"},
            calibrate_at=0.1,
        ),
        "sometimes": _engine(
            "a window of .9 in some steps, exact in all others",
            options=lambda: {"pattern": Sometimes(WindowPattern(), 0.9)},
        ),
        "sometimes suffix": _engine(
            "all below a fixed depth (.9) in some steps, exact in all others",
            options=lambda: {"pattern": Sometimes(Prefix(), 0.9)},
        ),
        "online": _engine(
            "random branches, rates by a running estimate of sensitivities",
            options={"allocation": "sensitivity", "reallocate_every": 50},
        ),
        # ---- schedules
        "random, ramp": _engine("random branches, rate from 0 to twice", options={"schedule": "ramp_up"}),
        "window, ramp": _engine("a window, rate from 0 to twice", options={**window, "schedule": "ramp_up"}),
        "window, step": _engine("a window, exact in the first half", options={**window, "schedule": "step"}),
        "suffix, ramp": _engine("suffix, rate from 0 to twice", options={"pattern": "suffix", "schedule": "ramp_up"}),
        # ---- corrections
        "window, scaled": _engine(
            "a window; layers' learning rate times (1 - rate)^-.5", options=window, scale_power=0.5
        ),
        "window, ramp, scaled": _engine(
            "the same with a ramp", options={**window, "schedule": "ramp_up"}, scale_power=0.5
        ),
        "random, coasting": _engine("random branches; dropped parameters step along their moments", coast=1.0),
        "window, coasting": _engine("a window; dropped parameters step along their moments", options=window, coast=1.0),
        "window, fading": _engine("the same, less the longer they are dropped", options=window, coast=0.8),
        "window, ramp, coasting": _engine("the same with a ramp", options={**window, "schedule": "ramp_up"}, coast=1.0),
        "suffix, coasting": _engine(
            "everything below a random depth; what is dropped steps along its moments",
            options={"pattern": "suffix"},
            coast=1.0,
        ),
        "sometimes, coasting": _engine(
            "a window of .9 in some steps, exact in others; what is dropped steps along its moments",
            options=lambda: {"pattern": Sometimes(WindowPattern(), 0.9)},
            coast=1.0,
        ),
        "sometimes suffix, coasting": _engine(
            "all below a depth (.9) in some steps, exact in others; what is dropped steps along its moments",
            options=lambda: {"pattern": Sometimes(Prefix(), 0.9)},
            coast=1.0,
        ),
        "window, controlled": _engine(
            "a window whose rate keeps the added variance at a quarter", options=window, control=0.25
        ),
        # ---- other ways to spend less
        "freezing": Method(Freezing, "the lowest layers are not trained"),
        "LISA": _engine(
            "weights of few layers are trained at a time, others every 20 steps (Pan et al., NeurIPS 2024)",
            options=lambda: {"granularity": "layer", "drop": "weights", "pattern": Held(RandomPattern(), 20)},
        ),
        "stochastic depth": Method(
            lambda model, setting: Skipping(model, setting, progressive=False),
            "layers are skipped (Huang et al., 2016)",
        ),
        "PLD": Method(
            lambda model, setting: Skipping(model, setting, progressive=True),
            "layers are skipped, more and more (Zhang and He, 2020)",
        ),
        "top tokens": Method(Tokens, "every branch's backward is over the tokens with the largest gradients"),
        "sampled tokens": Method(
            lambda model, setting: Tokens(model, setting, sampled=True),
            "the same, drawn in proportion to them and scaled: unbiased",
        ),
        "smaller batch": Method(SmallerBatch, "exact steps on a part of each batch"),
        "selective": Method(Selective, "a step on the windows of largest loss (Jiang et al., 2019)"),
    }
