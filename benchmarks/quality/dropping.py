"""Training with dropbp_fx, and what may go with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Record
from benchmarks.models import Decoder
from benchmarks.quality.attempts import Attempt, NextBatch, Setting
from dropbp_fx import dropbp_backend


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
