"""Watch the gradients of one ordinary step between its regions, for a running estimate of sensitivities.

The step computes what it would compute anyway: regions run the same compiled variants, behind borders that pass every
gradient on and note a few norms. Norms stay on the device; nothing waits for them until they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.policy.ranks import agreed
from dropbp_fx.policy.running import Observed
from dropbp_fx.policy.schedule import Schedule
from dropbp_fx.policy.sensitivity import Sensitivity
from dropbp_fx.runtime.border import Gradients, RegionRecord, run_isolated, squared_norm
from dropbp_fx.runtime.plan import Step
from dropbp_fx.runtime.variants import RegionVariants


class Observation:
    """Drives the borders of one step."""

    def __init__(self) -> None:
        self.anchor = torch.zeros((), device="cpu", requires_grad=True)
        self._first_branch: int | None = None
        self._own: dict[int, list[Tensor]] = {}
        self._stem: list[Tensor] = []
        self._streams: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def run(self, step: Step, variants: RegionVariants, branches: tuple[int, ...], values: Sequence[Any]) -> list[Any]:
        """Run a training step's region behind a border."""
        record, outputs = run_isolated(step, variants, branches, values, self)
        if branches and self._first_branch is None:
            self._first_branch = id(record)
        record.before_branches = self._first_branch is None
        return outputs

    def backward(self, record: RegionRecord, tangents: Sequence[Tensor | None]) -> Gradients:
        """Pass the gradients on; note norms."""
        gradients = record.gradients(tangents, retain=_torch.keeps_graph())
        dropped = record.step.key[0] if record.step.key is not None else frozenset()
        kept = [label for label in range(len(record.branches)) if label not in dropped]
        by_position = dict(zip(record.wanted, gradients, strict=True))
        for label in kept:
            mine = record.reached_through(label, dropped)
            squares = [squared_norm(g) for k in record.weights if k in mine and (g := by_position[k]) is not None]
            self._own.setdefault(record.branches[label], []).extend(squares)
        if record.before_branches:
            self._stem.extend(squared_norm(g) for k in record.weights if (g := by_position[k]) is not None)
        if len(record.branches) == 1 and kept:
            self._note_stream(record, tangents, by_position)
        return gradients

    def _note_stream(
        self, record: RegionRecord, tangents: Sequence[Tensor | None], gradients: dict[int, Tensor | None]
    ) -> None:
        for output, arriving in zip(record.graded, tangents, strict=True):
            source = record.flow.passes_through(output, frozenset({0}))
            leaving = None if source is None else gradients.get(source)
            if arriving is not None and leaving is not None:
                self._streams[record.branches[0]] = (
                    squared_norm(arriving),
                    squared_norm(leaving),
                    squared_norm(leaving - arriving),
                )

    def read(self) -> tuple[dict[int, Observed], float]:
        """What the step showed of its kept branches (by index), and the stem's squared norm. Waits for the device."""
        found: dict[int, Observed] = {}
        for branch, squares in self._own.items():
            own = _total(squares)
            stream = self._streams.get(branch)
            if stream is None:
                found[branch] = Observed(own)
                continue
            arriving, leaving, difference = (max(float(square), 0.0) ** 0.5 for square in stream)
            scale = leaving or 1.0
            found[branch] = Observed(own, arriving / scale, difference / scale)
        return found, _total(self._stem)


class Observer:
    """Observes some of a schedule's forwards, and re-allocates its rates when that is due."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._pending: list[tuple[int, Observation]] = []  # with the number of the round

    def observation(self) -> Observation | None:
        """Whoever watches the forward that was just drawn, ``None`` if nobody does.

        A forward under saved-tensor hooks (a checkpoint's, for one) is not observed: borders would keep alive what those
        hooks are there to free.
        """
        if not self._schedule.observes() or _torch.saved_tensor_hooks_are_set():
            return None
        number = self._schedule.round_number
        if not self._pending or self._pending[-1][0] != number:
            self._pending.append((number, Observation()))
        return self._pending[-1][1]

    def estimate(self) -> Sensitivity | None:
        """The running estimate, with all that was observed up to now."""
        for _, observation in self._pending:
            branches, stem = observation.read()
            if branches:
                self._schedule.observed(branches, stem)
        self._pending.clear()
        return self._schedule.running_estimate()

    def reallocate_if_due(self) -> None:
        """Re-allocate rates by the running estimate, once in as many forwards as the schedule wants."""
        if not self._schedule.reallocation_due():
            return
        estimate = self.estimate()
        if estimate is not None:
            self._schedule.learn(agreed(estimate))
        self._schedule.reallocated()


def _total(squares: Sequence[Tensor]) -> float:
    return float(torch.stack([square.float() for square in squares]).sum()) if squares else 0.0
