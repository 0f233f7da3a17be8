"""From Dynamo's graph to what runs in its place: find branches, cut regions, enter both into the backend's tables."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections.abc import Sequence

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.config import BackendConfig
from dropbp_fx.graph.branches import ResidualBranch, does_work, example_value, find_branches, normalise_inplace_adds
from dropbp_fx.graph.copying import copy_graph_module
from dropbp_fx.graph.describe import describe_branch
from dropbp_fx.graph.naming import name_branches, parameter_name
from dropbp_fx.graph.regions import RegionProgram, insert_gates, split_into_regions
from dropbp_fx.graph.structure import structural_key
from dropbp_fx.policy.branches import Branch
from dropbp_fx.runtime import artifacts
from dropbp_fx.runtime.captured import CapturedGraph, MetBranches
from dropbp_fx.runtime.compiler import Compiler
from dropbp_fx.runtime.dispatch import Policy, RegionRunner
from dropbp_fx.runtime.instances import Anchors, Instances
from dropbp_fx.runtime.variants import RegionVariants
from dropbp_fx.state import BackendState, GraphPolicy

log = logging.getLogger("dropbp_fx")


class NoResidualBranchWarning(UserWarning):
    """A training graph has no residual branch, so nothing in it will be dropped."""


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

    def capture(self, gm: fx.GraphModule, *, whole: bool = False) -> CapturedGraph | None:
        """Everything that happens to a graph before something is compiled for it. A graph in which nothing can be
        dropped is ``None`` and left as it was; with ``whole``, for an explanation, it is one region and no warning is due.
        """
        if self.config.rescale:  # it adds graph inputs, and Dynamo goes on reading its own graph's
            gm = copy_graph_module(gm)
        normalise_inplace_adds(gm)
        search = find_branches(gm)
        for rejected in search.rejected:
            log.debug("%s is no residual branch: %s", rejected.addition.name, rejected.reason)
        found = self._meet(gm, search.branches)
        met, droppable = found.branches, found.droppable
        if not whole:
            self._report_absence(gm, search.branches)
        if not droppable and not whole:
            return None
        facts = {
            branch.index: describe_branch(residual, _parameters_of(residual))
            for branch, residual in zip(met, search.branches, strict=True)
        }
        branches = [search.branches[position] for position in droppable]
        gates = insert_gates(gm, branches, drop=self.config.drop, rescale=self.config.rescale)
        program = split_into_regions(gm, branches, gates)
        names = [met[position].name for position in droppable]
        variants = self._variants_of(program, names)
        if artifacts.wanted():
            self._show(gm, program, variants, names)
        graph = CapturedGraph(
            program=program,
            variants=variants,
            indices=tuple(met[position].index for position in droppable),
            facts=facts,
            rejected=tuple((rejected.addition.name, rejected.reason) for rejected in search.rejected),
            met=found,
            below=self.config.drop == "below",
        )
        self._find_ways_to_trainable_inputs(graph)
        return graph

    def _find_ways_to_trainable_inputs(self, graph: CapturedGraph) -> None:
        """A branch without trainable parameters counts as trainable if, it alone being kept, something is trained that is
        not when every branch is dropped: a prefix that attention reads is no branch's own. Were all such branches
        dropped, nothing would be left to train.
        """
        frozen = [k for k, index in enumerate(graph.indices) if not self.state.schedule.branches[index].trainable]
        if not frozen:
            return
        everything = frozenset(range(len(graph.indices)))
        without = graph.planner.reached(everything)
        for k in frozen:
            alone = graph.planner.reached(everything - {k})
            leads = any(inputs & ~known for inputs, known in zip(alone, without, strict=True))
            self.state.schedule.branches[graph.indices[k]].trainable = leads

    def _meet(self, gm: fx.GraphModule, branches: Sequence[ResidualBranch]) -> MetBranches:
        """Enter the graph's branches into the table."""
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        owners = _torch.outermost_modules(placeholders)
        names = name_branches(branches)
        prefixes = {owned.module: "" for owned in owners.values()}
        # A piece without branches may show the whole model, whose other pieces have some; the largest goes first.
        for module in sorted(prefixes, key=lambda module: -len(list(module.modules()))):
            prefixes[module] = self.state.modules.path_of(module)
        met: list[Branch] = []
        droppable: list[int] = []
        homes: list[torch.nn.Module] = []
        for position, (branch, name) in enumerate(zip(branches, names, strict=True)):
            parameters = _parameters_of(branch)
            roots = [owners[node].module for node in parameters if node in owners]
            homes.extend(roots[:1])
            modes = {root.training for root in roots}
            full = name.below(prefixes[roots[0]]) if roots else name
            wanted = any(example_value(output).requires_grad for output, _ in branch.outputs)
            drops = torch.is_grad_enabled() and wanted and modes != {False}
            trainable = any(example_value(node).requires_grad for node in parameters)
            met.append(self.state.schedule.meet(full.name, full.layer, trainable=trainable, droppable=drops))
            if drops:
                droppable.append(position)
            log.info(
                "residual branch %s in layer %s%s", full.name, full.layer, "" if drops else " (never dropped here)"
            )
        home = homes[0] if homes else None
        named = [
            (position, name_of)
            for position, node in enumerate(placeholders)
            if node in owners and home is not None and owners[node].module is home
            if (name_of := parameter_name(home, owners[node].value)) is not None
        ]
        anchors = named[:: max(len(named) - 1, 1)][:2]  # the first and the last
        return MetBranches(
            branches=tuple(met),
            names=names,
            droppable=tuple(droppable),
            anchors=Anchors(tuple(position for position, _ in anchors), tuple(name for _, name in anchors)),
            prefix=prefixes[home] if home is not None else "",
        )

    def _enter(self, graph: CapturedGraph, parameters: Sequence[torch.Tensor]) -> Policy:
        """The policy for the module of these parameters, one that ``graph`` serves: its branches are met like others."""
        met, state = graph.met, self.state
        prefix = state.modules.prefix_of(parameters, met.anchors.names)
        if prefix is None and not state.warned_of_sharing:
            state.warned_of_sharing = True
            names = ", ".join(branch.name for branch in met.branches[:3])
            warnings.warn(
                f"One compiled graph serves several modules, so their branches ({names}) count as the same ones, and each "
                "module's forward as one of its own. If they are layers of one model, call backend.register(model) before "
                "its first forward.",
                stacklevel=2,
            )
        if prefix is None or prefix == met.prefix:
            return GraphPolicy(state, graph.indices, graph.below)
        schedule = state.schedule
        own: list[Branch] = []
        for branch, name in zip(met.branches, met.names, strict=True):
            full = name.below(prefix)
            mine = schedule.meet(full.name, full.layer, trainable=branch.trainable, droppable=branch.droppable)
            schedule.weigh(mine.index, branch.backward_flops)
            own.append(mine)
            log.info("residual branch %s in layer %s (code of %s)", full.name, full.layer, branch.name)
        schedule.assign()
        index_of = {branch.index: mine.index for branch, mine in zip(met.branches, own, strict=True)}
        twin = dataclasses.replace(
            graph,
            indices=tuple(index_of[index] for index in graph.indices),
            facts={index_of[index]: facts for index, facts in graph.facts.items()},
        )
        twin.__dict__["planner"] = graph.planner  # plans depend on the code alone
        if not any(set(twin.indices) & set(known.indices) for known in state.graphs):  # else met through other code
            state.graphs.append(twin)
        return GraphPolicy(state, twin.indices, twin.below)

    def _report_absence(self, gm: fx.GraphModule, branches: Sequence[ResidualBranch]) -> None:
        trains = torch.is_grad_enabled() and any(
            isinstance(example_value(node), torch.Tensor) and example_value(node).requires_grad
            for node in gm.graph.nodes
            if node.op == "placeholder"
        )
        if branches or len(self.state.schedule.branches) or not trains:
            return
        if not any(does_work(node) for node in gm.graph.nodes):
            return  # a piece of a model before a graph break, such as its embedding
        message = (
            "No residual branch was found in this graph: there is no add x + h of two equally shaped activations where "
            "h is computed from x by a matrix product, convolution or attention. Nothing will be dropped in it. "
            "logging.getLogger('dropbp_fx').setLevel('DEBUG') tells why each add was not taken."
        )
        if self.config.strict:
            raise ValueError(message)
        warnings.warn(message, NoResidualBranchWarning, stacklevel=2)

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

    def runner(self, graph: CapturedGraph) -> RegionRunner:
        schedule = self.state.schedule
        graph.planner.plan(())  # most steps need these variants, and their joint graphs tell what branches cost
        for region, variant in zip(graph.program.regions, graph.variants, strict=True):
            for label, branch in enumerate(region.branches):
                schedule.weigh(graph.indices[branch], variant.saved_flops(label))
        schedule.assign()
        policies: Instances[Policy] = Instances(
            graph.met.anchors,
            GraphPolicy(self.state, graph.indices, graph.below),
            functools.partial(self._enter, graph),
        )
        runner = RegionRunner(graph, policies)
        self.state.runners.append(runner)
        self.state.graphs.append(graph)
        if graph.program.has_symbols:
            runner.warmup()  # while Dynamo still collects guards on the symbols
        return runner


def _parameters_of(branch: ResidualBranch) -> list[fx.Node]:
    """Graph inputs that a branch reads and that are tensors of floating point: its parameters and buffers."""
    graph_inputs: dict[fx.Node, None] = {}
    for node in branch.readers:
        for parent in node.all_input_nodes:
            if parent.op == "placeholder":
                # Inside nested checkpoints it cannot be told which operand is meant: any of them may be.
                outer = branch.in_top_graph(parent)
                graph_inputs.update(dict.fromkeys([outer] if outer is not None else branch.anchor.all_input_nodes))
    return [
        node
        for node in graph_inputs
        if node.op == "placeholder"
        and isinstance(example_value(node), torch.Tensor)
        and example_value(node).is_floating_point()
    ]
