"""Training with dropbp_fx, and what may go with it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Record
from benchmarks.models import Decoder
from benchmarks.quality.attempts import Attempt, NextBatch, Setting
from benchmarks.quality.tasks import cosine
from dropbp_fx import DropPolicy, dropbp_backend
from dropbp_fx.distributed import parameter_groups


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
        chosen = dict(options())
        base, budget = DropPolicy.named(chosen.pop("policy", "dropbp")), chosen.pop("activation_memory_budget", None)
        policy = dataclasses.replace(base, rate=setting.rate, **chosen)
        self.backend = dropbp_backend(policy=policy, inner=setting.inner, activation_memory_budget=budget, seed=0)
        self.run = torch.compile(model, backend=self.backend, dynamic=False)
        self._calibrate_at, self._scale_power, self._coast, self._control = calibrate_at, scale_power, coast, control
        self.reusable = policy.allocation == "uniform" and control is None
        self._calibrated = False
        self._controlled: list[float] = []
        self._taken: Counter[Tensor] = Counter()  # steps by gradients, which a fused optimizer counts on the device
        self._missed: Counter[Tensor] = Counter()  # in succession

    def restart(self, seed: int) -> None:
        self._taken.clear()
        self._missed.clear()
        state = self.backend.state_dict()
        for branch in state["branches"]:
            branch["times_seen"] = branch["times_dropped"] = 0
        self.backend.load_state_dict({**state, "seed": seed, "rounds": 0, "forwards": 0, "progress": 0.0})

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, [self.model.layers])

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
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                self._taken[parameter] += 1
                self._missed[parameter] = 0
            elif parameter in self._taken:
                self._missed[parameter] += 1
                alike.setdefault((self._taken[parameter], self._missed[parameter]), []).append(parameter)
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


class FreezeOut(Engine):
    """Layers end their training one after the other, the lowest first (Brock et al., FreezeOut, 2017, linear).

    The learning rate of each layer falls to zero along a cosine of its own, layers by equal distances in time, and the layer
    is dropped from then on. The last one trains to the end of the run; the first one until its share 1 - 2 rate.

    Args:
        scaled: learning rates begin so much higher as they end earlier, as in the paper.
    """

    def __init__(self, model: Decoder, setting: Setting, *, scaled: bool = False) -> None:
        first = max(1 - 2 * setting.rate, 0.0)
        count = len(model.layers)
        self._ends = [first + (1 - first) * (index + 0.5) / count for index in range(count)]
        self._scaled, self._step = scaled, 0

        def frozen(progress: float) -> float:
            return min(sum(end <= progress for end in self._ends) / count, 0.99)

        super().__init__(model, setting, options=lambda: {"pattern": "lowest", "schedule": frozen})

    def groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.model.layers)

    def before_step(self, progress: float, next_batch: NextBatch) -> None:
        self._step = round(progress * self.setting.steps)
        super().before_step(progress, next_batch)

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        step, steps = self._step, self.setting.steps
        for group, end in zip(optimizer.param_groups, self._ends, strict=False):  # the last group is no layer
            own = cosine(min(step, end * steps), end * steps)
            group["lr"] *= own / cosine(step, steps) / (end if self._scaled else 1.0)


def _distance(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    """Squared norm of a difference; a missing gradient is zero."""
    total = 0.0
    for left, right in zip(a, b, strict=True):
        difference = right if left is None else left if right is None else left - right
        if difference is not None:
            total += float(difference.double().square().sum())
    return total
