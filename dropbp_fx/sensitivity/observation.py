"""Watch the gradients of one ordinary step between its regions, for a running estimate of sensitivities.

The step computes what it would compute anyway: regions run the same compiled variants, isolated, and every
gradient is passed on and a few norms noted. Norms stay on the device; nothing waits for them until they are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.runtime.plan import Step
from dropbp_fx.runtime.variants import RegionVariants
from dropbp_fx.sensitivity.isolated import Gradients, RegionRecord, run_isolated
from dropbp_fx.sensitivity.running import Observed


@dataclasses.dataclass(frozen=True)
class _RegionNorms:
    """Squared norms that one region's backward showed, on the device.

    Attributes:
        branches: the region's branches by index, with whether each was dropped.
        own: of the gradients of each branch's own parameters.
        rest: of the gradients of the region's other parameters.
        arriving: of the gradients of its outputs.
        leaving: of the gradients of its inputs that are no parameters.
        change: of the difference between the one stream's gradient leaving and arriving.
    """

    branches: dict[int, bool]
    own: dict[int, list[Tensor]]
    rest: list[Tensor]
    arriving: list[Tensor]
    leaving: list[Tensor]
    change: Tensor | None


class Observation:
    """Drives the isolated regions of one step."""

    def __init__(self) -> None:
        self.probe = torch.zeros((), device="cpu", requires_grad=True)
        self._found_a_branch = False
        self._of_regions: list[_RegionNorms] = []
        self._stem: list[_RegionNorms] = []

    def run(self, step: Step, variants: RegionVariants, branches: tuple[int, ...], values: Sequence[Any]) -> list[Any]:
        """Run a training step's region isolated."""
        record, outputs = run_isolated(step, variants, branches, values, self)
        self._found_a_branch = self._found_a_branch or bool(branches)
        record.before_branches = not self._found_a_branch
        return outputs

    def backward(self, record: RegionRecord, tangents: Sequence[Tensor | None]) -> Gradients:
        """Pass the gradients on; note norms."""
        gradients = record.gradients(tangents, retain=_torch.keeps_graph())
        if record.branches or record.before_branches:
            norms = _norms(record, tangents, dict(zip(record.wanted, gradients, strict=True)))
            (self._stem if record.before_branches else self._of_regions).append(norms)
        return gradients

    def read(self) -> tuple[dict[int, Observed], float | None]:
        """What the step showed of its branches (by index) and of the stem. Waits for the device."""
        found: dict[int, Observed] = {}
        for norms in self._of_regions:
            found.update(_observed(norms))
        stem = [_total(s.rest) / arriving for s in self._stem if (arriving := _total(s.arriving))]
        return found, math.fsum(stem) if stem else None


def _norms(
    record: RegionRecord, tangents: Sequence[Tensor | None], gradients: dict[int, Tensor | None]
) -> _RegionNorms:
    dropped = record.step.key[0] if record.step.key is not None else frozenset()
    own: dict[int, list[Tensor]] = {}
    rest = dict.fromkeys(record.weights)
    for label, branch in enumerate(record.branches):
        if label not in dropped:
            mine = [k for k in record.reached_through(label, dropped) if k in record.weights]
            own[branch] = _squares([gradients[k] for k in mine])
            for k in mine:
                rest.pop(k, None)
    change = None
    if len(record.branches) == 1 and not dropped:
        for output, arriving in zip(record.graded, tangents, strict=True):
            source = record.flow.passes_through(output, frozenset({0}))
            leaving = None if source is None else gradients.get(source)
            if arriving is not None and leaving is not None:
                change = _squares([leaving - arriving])[0]
    return _RegionNorms(
        branches={branch: label in dropped for label, branch in enumerate(record.branches)},
        own=own,
        rest=_squares([gradients[k] for k in rest]),
        arriving=_squares(tangents),
        leaving=_squares([gradients[k] for k in record.sources]),
        change=change,
    )


def _squares(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The squared norm of gradients taken together, in few kernels; nothing if there are none."""
    present = [gradient.detach() for gradient in gradients if gradient is not None]
    return [torch.nn.utils.get_total_norm(present).double().square()] if present else []


def _observed(norms: _RegionNorms) -> dict[int, Observed]:
    """Ratios of the norms; a region of several branches shares its ratios out evenly among them."""
    arriving, leaving = _total(norms.arriving), _total(norms.leaving)
    if not arriving:
        return {}
    count = len(norms.branches)
    ratio = (leaving / arriving) ** (0.5 / count) if leaving else None
    kept = not any(norms.branches.values())
    lost = all(norms.branches.values())
    change = None
    if ratio is not None and kept:
        known = norms.change is not None
        square = float(norms.change) if norms.change is not None else max(leaving - arriving, 0.0)
        change = (square / leaving / count) ** 0.5 if known or square else None
    return {
        branch: Observed(
            own=_total(norms.own[branch]) / arriving if branch in norms.own else None,
            kept=ratio if kept else None,
            lost=ratio if lost else (1.0 if norms.change is not None else None),
            change=change,
        )
        for branch in norms.branches
    }


def _total(squares: Sequence[Tensor]) -> float:
    return float(torch.stack(list(squares)).sum()) if squares else 0.0
