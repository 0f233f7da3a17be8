"""Run a region cut off from the rest of autograd, so that its backward is somebody else's to drive.

In a normal step autograd chains the regions' compiled functions. Calibration and observation need to stand between them:
the region then runs on leaves of its own, and one autograd node carries its outputs. When a gradient
arrives at that node, a :class:`Driver` decides what to do with it, and returns the gradients of the region's inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.graph.gradflow import GradientFlow
from dropbp_fx.runtime.plan import Step
from dropbp_fx.runtime.second_order import refusing_second_derivatives, way_to
from dropbp_fx.runtime.variants import RegionVariants

Gradients = list[Tensor | None]


class Driver(Protocol):
    """Whoever stands between the regions.

    Attributes:
        probe: a leaf that requires a gradient; every isolated region is connected to it, so that asking for its gradient
            makes autograd visit every one. It never gets one.
    """

    probe: Tensor

    def backward(self, record: RegionRecord, tangents: Sequence[Tensor | None]) -> Gradients:
        """The gradients of ``record``'s :attr:`~RegionRecord.wanted` inputs, given those of its ``graded`` outputs."""
        ...


@dataclasses.dataclass
class RegionRecord:
    """One run of one region.

    Attributes:
        branches: indices (in the backend's table) of its branches; the position is the gate's label.
        step: what was run.
        variants: the region's variants.
        inputs: the region's inputs; those that require a gradient are leaves of the region's own.
        wanted: positions in ``inputs`` of the values that want a gradient.
        weights: those of them that were leaves before, such as parameters, with the leaf they were.
        sources: for the others, the gradient edge of the value outside.
        graded: positions in the outputs of the values that carry a gradient.
        edges: for each of them its gradient edge inside of the region.
        before_branches: whether it ran before the step's first branch.
    """

    branches: tuple[int, ...]
    step: Step
    variants: RegionVariants
    inputs: list[Any]
    wanted: tuple[int, ...]
    weights: dict[int, Tensor]
    sources: dict[int, Any]
    graded: tuple[int, ...]
    edges: tuple[Any, ...]
    before_branches: bool = False

    @property
    def flow(self) -> GradientFlow:
        """Which inputs get gradients from which outputs."""
        return self.variants.flow

    def reached_through(self, label: int, dropped: frozenset[int]) -> frozenset[int]:
        """The inputs that get a gradient with the gates labelled ``dropped`` dropped, and none if ``label`` is too."""
        more = dropped | {label}
        before = frozenset().union(*(self.flow.sources(output, dropped) for output in self.graded))
        return before - frozenset().union(*(self.flow.sources(output, more) for output in self.graded))

    def gradients(self, tangents: Sequence[Tensor | None], *, retain: bool) -> Gradients:
        """Run the region's own backward; the gradients of its wanted inputs."""
        pairs = [(edge, tangent) for edge, tangent in zip(self.edges, tangents, strict=True) if tangent is not None]
        return _grad(pairs, [self.inputs[k] for k in self.wanted], retain)

    def gradients_without(
        self, label: int, tangents: Sequence[Tensor | None], rerun: Callable[[Callable[[], Any]], Any]
    ) -> Gradients:
        """The same with the gates labelled ``label`` dropped.

        Args:
            label: position in :attr:`branches`.
            tangents: gradients of the graded outputs.
            rerun: calls its argument under the random streams that the region ran under.
        """
        dropped = frozenset({label})
        passed: dict[int, Tensor] = {}
        for output, tangent in zip(self.graded, tangents, strict=True):
            if tangent is None or not self.flow.sources(output, dropped).intersection(self.wanted):
                continue
            source = self.flow.passes_through(output, dropped)
            if source is None:
                return self._pruned_gradients(dropped, tangents, rerun)
            passed[source] = tangent if source not in passed else passed[source] + tangent
        return [passed.get(k) for k in self.wanted]

    def _pruned_gradients(
        self, dropped: frozenset[int], tangents: Sequence[Tensor | None], rerun: Callable[[Callable[[], Any]], Any]
    ) -> Gradients:
        assert self.step.key is not None
        _, without, _ = self.step.key
        live = {output for output in self.graded if self.flow.sources(output, dropped).intersection(self.wanted)}
        run = self.variants.training((dropped, without, self.flow.differentiable - live)).run
        outputs = rerun(lambda: run(*self.inputs))
        pairs = [
            (outputs[output], tangent)
            for output, tangent in zip(self.graded, tangents, strict=True)
            if tangent is not None and outputs[output].requires_grad
        ]
        return _grad(pairs, [self.inputs[k] for k in self.wanted], False)


def run_isolated(
    step: Step, variants: RegionVariants, branches: tuple[int, ...], values: Sequence[Any], driver: Driver
) -> tuple[RegionRecord, list[Any]]:
    """Run a training step's region isolated, its backward being ``driver``'s to drive.

    Returns:
        The record, and the region's outputs.
    """
    outside = [values[slot] for slot in step.inputs]
    inputs = [v.detach().requires_grad_() if isinstance(v, Tensor) and v.requires_grad else v for v in outside]
    wanted = tuple(k for k, v in enumerate(outside) if isinstance(v, Tensor) and v.requires_grad)
    outputs = list(step.run(*inputs))
    if step.undefined is not None:
        step.undefined.watch(inputs, outputs)
    graded = tuple(j for j, v in enumerate(outputs) if isinstance(v, Tensor) and v.requires_grad)
    record = RegionRecord(
        branches=branches,
        step=step,
        variants=variants,
        inputs=inputs,
        wanted=wanted,
        weights={k: outside[k] for k in wanted if outside[k].grad_fn is None},
        sources={
            k: torch.autograd.graph.get_gradient_edge(outside[k]) for k in wanted if outside[k].grad_fn is not None
        },
        graded=graded,
        edges=tuple(torch.autograd.graph.get_gradient_edge(outputs[j]) for j in graded),
    )
    if graded:
        carried = _Isolated.apply(
            record,
            driver,
            [outputs[j] for j in graded],
            [way_to([outside[k] for k in wanted])],
            driver.probe,
            *(outside[k] for k in wanted),
        )
        for j, value in zip(graded, carried, strict=True):
            outputs[j] = value
    return record, outputs


def squared_norm(gradient: Tensor) -> Tensor:
    """The squared norm of a gradient, as a scalar in float32 at least; the device is not waited for."""
    precise = gradient.dtype if gradient.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=precise)
    return norm.square()


def record_of(node: Any) -> RegionRecord | None:
    """The record behind the autograd node of an isolated region, ``None`` for any other node."""
    return getattr(node, "dropbp_record", None)


def _grad(pairs: Sequence[tuple[Any, Tensor]], inputs: Sequence[Tensor], retain: bool) -> Gradients:
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, tangents = zip(*pairs, strict=True)
    with _torch.repeatable_backward(retain):
        return list(torch.autograd.grad(outputs, inputs, tangents, retain_graph=retain, allow_unused=True))


class _Isolated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        record: RegionRecord,
        driver: Driver,
        outputs: list[Tensor],
        way: list[Tensor | None],
        *inputs: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.way = way[0]
        ctx.dropbp_record = record
        ctx.driver = driver
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        found = ctx.driver.backward(ctx.dropbp_record, tangents)
        if torch.is_grad_enabled():
            found = refusing_second_derivatives(found, ctx, ctx.way, tangents)
        return (None, None, None, None, None, *found)
