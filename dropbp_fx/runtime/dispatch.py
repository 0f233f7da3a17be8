"""Run a graph region by region, each in the variant that the forward's pattern asks for."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.graph.regions import Region, RegionProgram
from dropbp_fx.runtime.chain import Chain, chained
from dropbp_fx.runtime.copies import exact_copy
from dropbp_fx.runtime.device_graphs import DeviceGraphs, GraphMemory
from dropbp_fx.runtime.graphed import GraphedForward
from dropbp_fx.runtime.per_module import PerModule
from dropbp_fx.runtime.plan import Planner, Step
from dropbp_fx.runtime.recompute import PatternMemory, SampledPattern
from dropbp_fx.runtime.stored import StoredValues
from dropbp_fx.runtime.variants import RegionVariants
from dropbp_fx.runtime.writeback import write_back

#: Plans are a few microseconds to look up and a few hundred to make; random patterns of deep models seldom recur.
_PLANS_KEPT = 256
#: Regions with more branches than this are not compiled for every subset in advance.
_EXHAUSTIVE_BRANCHES = 3


class Watcher(Protocol):
    """Runs the regions of an observed forward one by one, and stands between them in the backward."""

    def run(self, step: Step, variants: RegionVariants, branches: tuple[int, ...], values: Sequence[Any]) -> list[Any]:
        """Run a training step's region, whose branches have these indices in the backend's table; its outputs."""
        ...


class Calibrating(Watcher, Protocol):
    """The same for a calibration, whose forwards leave no trace."""

    def keep(self, original: Tensor) -> None:
        """Remember what a tensor holds."""
        ...

    def protect(self, step: Step, variants: RegionVariants, values: Sequence[Any]) -> None:
        """Remember what a region is about to overwrite."""
        ...


class PatternSource(Protocol):
    """What one graph's forwards ask whoever decides over them. Branches go by their number in ``Region.branches``."""

    def sample(self) -> SampledPattern:
        """What the forward about to run does; called once a forward."""
        ...

    def observation(self) -> Watcher | None:
        """Whoever watches the forward that was just sampled."""
        ...

    def index(self, branch: int) -> int:
        """The branch's index in the backend's table."""
        ...

    def calibration(self) -> Calibrating | None:
        """The calibration that the forward about to run is part of."""
        ...


class _GradientEdge(torch.autograd.Function):
    """``output`` carries ``source``'s gradient: what a region whose branches are all dropped does in the backward."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, output: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _Plan(NamedTuple):
    """A pattern's steps, what runs them when nobody watches, and what the pattern returns without its gradient."""

    steps: tuple[Step, ...]
    parts: tuple[Chain | Step, ...]
    stored: StoredValues | None


class RegionRunner:
    """The callable that Dynamo runs in place of a training graph.

    Args:
        planner: knows the graph's regions and their variants, and what they do in any pattern.
        sources: asked at each forward, for the module that the graph then runs for.
        below: whether patterns may leave untrained what runs before the lowest kept branch.
        memory: regions run as CUDA graphs that share it.
    """

    def __init__(
        self, planner: Planner, sources: PerModule[PatternSource], *, below: bool, memory: GraphMemory | None = None
    ) -> None:
        self._planner = planner
        self._program = planner.program
        self._writes = planner.program.writes
        self._variants = planner.variants
        self._below = below
        self._sources = sources
        self._graphs = None if memory is None else DeviceGraphs(planner, memory)
        self._scales: dict[int, tuple[float, Tensor]] = {}
        self._memory = PatternMemory()
        self._plans: collections.OrderedDict[tuple[frozenset[int], bool], _Plan] = collections.OrderedDict()
        self._held_back = [_gradient_bytes(planner.program, region) for region in planner.program.regions]
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        if _torch.forward_ad_is_on() and _torch.has_tangents(arguments):
            raise NotImplementedError(
                "Forward-mode AD is not supported for a compiled model: compiled code computes no tangents, so those of its "
                "inputs or parameters would be lost. Call the eager model, or use torch.func.jvp, which runs it eagerly."
            )
        source = self._sources.of(arguments)
        calibration = source.calibration()
        if calibration is not None:
            return self._calibrate(calibration, source, arguments)
        pattern, observation = self._pattern(source)
        plan = self._plan(pattern.dropped, pattern.below)
        written = [arguments[position] for position in self._writes.arguments]
        values = self._values(arguments, pattern.scales)
        del arguments
        leaves = [] if plan.stored is None else plan.stored.leaves(values)
        if observation is None and not _torch.saved_tensor_hooks_are_set():
            self._run_parts(plan, values)
        else:  # hooks on saved tensors bring back what one autograd node saved all at once
            for step in plan.steps:
                if observation is None or step.forward_only:
                    _run_step(step, values)
                else:
                    self._run_watched(step, source, values, observation)
        if plan.stored is not None:
            plan.stored.refuse_gradients(values, leaves)
        return self._outputs(values, written)

    def _run_parts(self, plan: _Plan, values: list[Any]) -> None:
        graphed = None if self._graphs is None else GraphedForward.begin(self._graphs, plan.steps)
        if graphed is None:
            for part in plan.parts:
                if isinstance(part, Chain):
                    part.run(values)
                else:
                    _run_step(part, values)
            return
        with graphed.running():
            for part in plan.parts:
                if isinstance(part, Chain):
                    part.run(values, graphed)
                else:
                    graphed.unshare(part.inputs, values)
                    _run_step(part, values)
        graphed.closed()

    def _calibrate(self, calibration: Calibrating, source: PatternSource, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Run with nothing dropped, every region isolated, and driven by ``calibration``."""
        written = [arguments[position] for position in self._writes.arguments]
        for value in written:
            calibration.keep(value)
        values = self._values(arguments, ())
        del arguments
        for step in self._planner.plan((), repeatable=True):
            calibration.protect(step, self._variants[step.region], values)
            if step.forward_only:
                _run_step(step, values)
            else:
                self._run_watched(step, source, values, calibration)
        return self._outputs(values, written)

    def _run_watched(self, step: Step, source: PatternSource, values: list[Any], watcher: Watcher) -> None:
        branches = tuple(source.index(branch) for branch in self._program.regions[step.region].branches)
        made = watcher.run(step, self._variants[step.region], branches, values)
        for slot, value in zip(step.outputs, made, strict=True):
            values[slot] = value
        for slot in step.dead:
            values[slot] = None

    def _values(self, arguments: Sequence[Any], scales: Sequence[float]) -> list[Any]:
        values: list[Any] = [None] * self._program.slots
        for slot, value in zip(self._program.inputs, arguments, strict=True):
            values[slot] = value
        for position in self._writes.arguments:
            slot = self._program.inputs[position]
            values[slot] = exact_copy(values[slot])
        for slot, value in self._program.constants.items():
            values[slot] = value
        for branch, slot, device in self._program.scales:
            wanted = scales[branch] if scales else 1.0
            known = self._scales.get(slot)
            if known is None or known[0] != wanted:
                known = self._scales[slot] = (wanted, torch.tensor(wanted, dtype=torch.float32, device=device))
            values[slot] = known[1]
        return values

    def _outputs(self, values: Sequence[Any], written: Sequence[Tensor]) -> tuple[Any, ...]:
        outputs = tuple(values[slot] if isinstance(slot, int) else slot[0] for slot in self._program.outputs)
        return write_back(self._writes, written, outputs) if written else outputs

    def _pattern(self, source: PatternSource) -> tuple[SampledPattern, Watcher | None]:
        around = _torch.running_checkpoints()
        pattern, observation = self._memory.recall(around), None
        if pattern is None:
            pattern = source.sample()
            observation = source.observation()
        self._memory.note(around, pattern)
        return pattern, observation

    def warmup(self) -> None:
        """Compile the variants of every region for every subset of its branches, the rest of the model kept, and those that
        are wanted where what runs before the region is not trained.
        """
        for pattern, below in warmup_patterns(self._program, below=self._below):
            self._plan(frozenset(pattern), below)

    def _plan(self, dropped: frozenset[int], below: bool) -> _Plan:
        with self._lock:
            plan = self._plans.get((dropped, below))
            if plan is None:
                steps = self._planner.plan(dropped, below=below)
                stored = self._planner.stored(dropped, below=below)
                plan = _Plan(
                    steps,
                    chained(steps, self._held_back, self._program.returned),
                    StoredValues(stored) if stored else None,
                )
                if len(self._plans) >= _PLANS_KEPT:
                    self._plans.popitem(last=False)
                self._plans[dropped, below] = plan
            return plan


def warmup_patterns(program: RegionProgram, *, below: bool) -> Iterator[tuple[Collection[int], bool]]:
    """The patterns whose variants :meth:`RegionRunner.warmup` compiles, and whether what runs before is left untrained."""
    yield (), False
    before: tuple[int, ...] = ()
    for region in program.regions:
        exhaustive = len(region.branches) <= _EXHAUSTIVE_BRANCHES
        sizes = range(1, len(region.branches) + 1) if exhaustive else (1, len(region.branches))
        for size in sizes:
            for mine in itertools.combinations(region.branches, size):
                yield mine, False
                if below and size < len(region.branches):
                    yield (*before, *mine), True
        if below and before and region.branches:
            yield before, True
        before += region.branches


def _gradient_bytes(program: RegionProgram, region: Region) -> int:
    """What the gradients of the parameters that a region reads take."""
    parameters = set(program.inputs).intersection(region.inputs)
    return sum(
        example.numel() * example.itemsize
        for slot, example in zip(region.inputs, region.examples, strict=True)
        if slot in parameters and isinstance(example, torch.nn.Parameter) and example.requires_grad
    )


def _run_step(step: Step, values: list[Any]) -> None:
    inputs = [values[slot] for slot in step.inputs]
    sources = [values[slot] for _, slot in step.passed]
    for slot in step.dead:
        values[slot] = None
    if not step.forward_only:
        outputs = step.run(*inputs)
    else:
        with torch.no_grad():
            outputs = step.run(*inputs)
    if step.undefined is not None:
        step.undefined.watch(inputs, outputs)
    for slot, value in zip(step.outputs, outputs, strict=True):
        values[slot] = value
    for (position, _), source in zip(step.passed, sources, strict=True):
        values[step.outputs[position]] = _GradientEdge.apply(source, outputs[position])
    for slot in step.dead:
        if slot in step.outputs:
            values[slot] = None
