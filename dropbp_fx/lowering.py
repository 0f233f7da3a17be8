"""From Dynamo's graph to what runs in its place: find branches, cut regions, enter both into the backend's tables."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dropbp_fx import _torch
from dropbp_fx.captured import CapturedGraph, EnteredBranches
from dropbp_fx.config import BackendConfig
from dropbp_fx.entering import enter_branches, enter_module, parameters_of
from dropbp_fx.gaps import report_gaps
from dropbp_fx.graph.branches import find_branches
from dropbp_fx.graph.copying import copy_graph_module
from dropbp_fx.graph.describe import describe_branch
from dropbp_fx.graph.gating import insert_gates
from dropbp_fx.graph.hooks import with_own_hooks
from dropbp_fx.graph.inlining import inline_nested_regions
from dropbp_fx.graph.normalise import normalise_inplace_adds
from dropbp_fx.graph.regions import RegionProgram, split_into_regions
from dropbp_fx.graph.structure import structural_key
from dropbp_fx.graph.writes import UnsupportedWriteError, take_writes_out
from dropbp_fx.runtime import artifacts
from dropbp_fx.runtime.compiler import Compiler
from dropbp_fx.runtime.device_graphs import CudaGraphsWarning, GraphMemory, why_unusable
from dropbp_fx.runtime.dispatch import PatternSource, RegionRunner
from dropbp_fx.runtime.optimizers import CompiledStepWatch
from dropbp_fx.runtime.per_module import PerModule
from dropbp_fx.runtime.variants import RegionVariants
from dropbp_fx.runtime.whole import WholeRunner
from dropbp_fx.shortfall import NoResidualBranchWarning, unsupported_text
from dropbp_fx.state import BackendState, GraphPatterns

log = logging.getLogger("dropbp_fx")


@dataclasses.dataclass(frozen=True)
class Lowering:
    """The way of one graph through the backend.

    Attributes:
        config: the backend's.
        state: its tables, which the graph is entered into.
        compiler: what makes code of the graph's regions.
    """

    config: BackendConfig
    state: BackendState
    compiler: Compiler

    def capture(self, gm: fx.GraphModule, *, whole: bool = False) -> CapturedGraph | EnteredBranches:
        """Everything that happens to a graph before something is compiled for it. A graph in which nothing can be
        dropped is left as it was, and only its branches are entered; with ``whole``, for an explanation, it is one region
        and no warning is due.
        """
        inline_nested_regions(gm)
        if self.config.policy.rescale:  # it adds graph inputs, and Dynamo goes on reading its own graph's
            gm = copy_graph_module(gm)
        try:
            gm, writes = take_writes_out(gm)
        except UnsupportedWriteError as error:
            if whole:
                raise NotImplementedError(f"This graph cannot be explained: {error}.") from error
            text = unsupported_text(str(error))
            self.state.shortfall.report(f"unsupported: {error}", text, NoResidualBranchWarning, error=ValueError)
            return enter_branches(self.state, gm, find_branches(gm).branches, may_drop=False)
        gm = with_own_hooks(gm)
        normalise_inplace_adds(gm)
        search = find_branches(gm)
        for rejected in search.rejected:
            log.debug("%s is no residual branch: %s", rejected.addition.name, rejected.reason)
        entered = enter_branches(self.state, gm, search.branches, quiet=whole)
        entered = dataclasses.replace(entered, undecided=tuple(report_gaps(self.state, gm, search, quiet=whole)))
        if not entered.droppable and not whole:
            return entered
        facts = {
            branch.index: describe_branch(residual, parameters_of(residual))
            for branch, residual in zip(entered.branches, search.branches, strict=True)
        }
        branches = [search.branches[position] for position in entered.droppable]
        gates = insert_gates(gm, branches, drop=self.config.policy.drop, rescale=self.config.policy.rescale)
        program = dataclasses.replace(split_into_regions(gm, branches, gates), writes=writes)
        droppable = [entered.branches[position] for position in entered.droppable]
        names = [branch.name for branch in droppable]
        variants = self._variants_of(program, names)
        if artifacts.wanted():
            self._show(gm, program, variants, names)
        graph = CapturedGraph(
            program=program,
            variants=variants,
            indices=tuple(branch.index for branch in droppable),
            facts=facts,
            rejected=tuple((rejected.addition.name, rejected.reason) for rejected in search.rejected),
            entered=entered,
            below=self.config.policy.drop == "below",
        )
        return self._with_ways_to_trainable_inputs(graph)

    def _with_ways_to_trainable_inputs(self, graph: CapturedGraph) -> CapturedGraph:
        """A branch without trainable parameters counts as trainable if, it alone being kept, something is trained that is
        not when every branch is dropped: a prefix that attention reads is no branch's own. Were all such branches
        dropped, nothing would be left to train.
        """
        before = graph.entered
        frozen = [k for k, index in enumerate(graph.indices) if index not in before.presence.trainable]
        leading: set[int] = set()
        if frozen:
            everything = frozenset(range(len(graph.indices)))
            without = graph.planner.reached(everything)
            for k in frozen:
                alone = graph.planner.reached(everything - {k})
                if any(inputs & ~known for inputs, known in zip(alone, without, strict=True)):
                    leading.add(before.droppable[k])
        entered = before.with_trainable(leading)
        if entered.training:
            self.state.sampler.present(entered.presence, in_part=True)  # until its forward
        if entered is before:
            return graph
        whole = dataclasses.replace(graph, entered=entered)
        whole.__dict__["planner"] = graph.planner
        return whole

    def _enter(self, graph: CapturedGraph, parameters: Sequence[Tensor], arguments: Sequence[Any]) -> PatternSource:
        """The policy for the module of these parameters, one that ``graph`` serves."""
        entered, state = graph.entered, self.state
        own = enter_module(state, entered, parameters)
        if own is None:
            return GraphPatterns(state, graph.indices, graph.below, entered.presence)
        index_of = {branch.index: mine.index for branch, mine in zip(entered.branches, own, strict=True)}
        of_module = dataclasses.replace(
            graph,
            indices=tuple(index_of[index] for index in graph.indices),
            facts={index_of[index]: facts for index, facts in graph.facts.items()},
        )
        of_module.__dict__["planner"] = graph.planner  # plans depend on the code alone
        known = [index for graph in state.graphs for index in graph.indices]  # of them, if entered through other code
        if set(of_module.indices).isdisjoint(known):
            state.graphs.append(of_module)
        return GraphPatterns(state, of_module.indices, of_module.below, entered.presence_of(own, arguments))

    def whole(self, gm: fx.GraphModule, inputs: Sequence[Any], entered: EnteredBranches) -> Callable[..., Any]:
        """Code of a graph in which nothing can be dropped. If it is a training graph, its forwards count."""
        run = self.compiler.whole(gm, inputs)
        if entered.idle:
            run = self.state.shortfall.watched(run, entered.idle, "mode")
        elif entered.undecided:
            run = self.state.shortfall.watched(run, entered.undecided, "absence")
        if not entered.training:
            return run
        below = self.config.policy.drop == "below"

        def enter(parameters: Sequence[Tensor], arguments: Sequence[Any]) -> PatternSource:
            own = enter_module(self.state, entered, parameters)
            presence = entered.presence if own is None else entered.presence_of(own, arguments)
            return GraphPatterns(self.state, (), below, presence)

        first: PatternSource = GraphPatterns(self.state, (), below, entered.presence)
        return WholeRunner(run, PerModule(entered.identifying, first, enter))

    def _show(
        self, gm: fx.GraphModule, program: RegionProgram, variants: Sequence[RegionVariants], names: Sequence[str]
    ) -> None:
        """Hand on the gated graph and its regions."""
        folder = f"graph{len(self.state.graphs)}"
        artifacts.emit(f"{folder}/dynamo.py", gm.print_readable(print_output=False))
        lines = [
            f"region {number}: {', '.join(names[branch] for branch in region.branches) or 'no branch'}; code of {own.name}"
            for number, (region, own) in enumerate(zip(program.regions, variants, strict=True))
        ]
        artifacts.emit(f"{folder}/regions.txt", "\n".join(lines) + "\n")
        for region, own in zip(program.regions, variants, strict=True):
            if own.name.startswith(f"{folder}/"):
                artifacts.emit(f"{own.name}/region.py", region.gm.print_readable(print_output=False))

    def _variants_of(self, program: RegionProgram, names: Sequence[str]) -> tuple[RegionVariants, ...]:
        fake_mode = _torch.fake_mode_of([value for region in program.regions for value in region.examples])
        dynamic = program.has_symbols
        variants: list[RegionVariants] = []
        for number, region in enumerate(program.regions):
            key = (
                structural_key(region.gm, region.examples, region.streams),
                region.streams,
                tuple(sorted(self.compiler.options.items(), key=str)).__repr__(),
                id(fake_mode) if dynamic else None,  # symbols mean something within one trace only
            )
            if key not in self.state.variants:
                mine = [names[branch] for branch in region.branches]
                name = f"graph{len(self.state.graphs)}/region{number:02d}_{'+'.join(mine) or 'no_branch'}"
                self.state.variants[key] = RegionVariants(region, fake_mode, self.compiler, name, mine)
            variants.append(self.state.variants[key])
        return tuple(variants)

    def _graph_memory(self, program: RegionProgram) -> GraphMemory | None:
        """What the program's CUDA graphs share with those of others; ``None`` if it can have none."""
        devices = [value.device for value in program.examples if isinstance(value, Tensor)]
        device = max(devices, key=devices.count, default=torch.device("cpu"))
        memory = self.state.graph_memory.get(device)
        if memory is None:
            capturing = _torch.graph_capture(device)
            if capturing is None:
                return None
            memory = self.state.graph_memory[device] = GraphMemory(device, capturing)
        why = why_unusable(program, device)
        if why is None:
            return memory
        warnings.warn(
            f"A graph runs without the CUDA graphs that were asked for: {why}.", CudaGraphsWarning, stacklevel=2
        )
        return None

    def runner(self, graph: CapturedGraph) -> RegionRunner:
        sampler = self.state.sampler
        graph.planner.plan(())  # most steps need these variants, and their joint graphs tell what branches cost
        for region, variant in zip(graph.program.regions, graph.variants, strict=True):
            for label, branch in enumerate(region.branches):
                index = graph.indices[branch]
                trainable = index in graph.entered.presence.trainable
                sampler.rated.record_flops(index, variant.saved_flops(label), trainable=trainable)
        sampler.rated.assign()
        sources: PerModule[PatternSource] = PerModule(
            graph.entered.identifying,
            GraphPatterns(self.state, graph.indices, graph.below, graph.entered.presence),
            functools.partial(self._enter, graph),
        )
        memory = self._graph_memory(graph.program) if self.compiler.cuda_graphs else None
        runner = RegionRunner(graph.planner, sources, below=graph.below, memory=memory)
        self.state.runners.append(runner)
        if self.state.step_watch is None:
            self.state.step_watch = CompiledStepWatch(sampler.branches.times_dropped)
        self.state.shortfall.watch_first_forwards()
        self.state.graphs.append(graph)
        if graph.program.has_symbols:
            runner.warmup()  # while Dynamo still collects guards on the symbols
        return runner
