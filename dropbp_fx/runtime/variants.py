"""The compiled variants of one region, each compiled when it is first needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.checkpoints import checkpoint_bodies
from dropbp_fx.graph.copying import copy_graph_module
from dropbp_fx.graph.cost import joint_cost
from dropbp_fx.graph.gate import IDENTITIES
from dropbp_fx.graph.gradflow import GradientFlow
from dropbp_fx.graph.hooks import hook_gradient
from dropbp_fx.graph.prune import prune_pass
from dropbp_fx.graph.regions import Region
from dropbp_fx.runtime import artifacts
from dropbp_fx.runtime.compiler import Compiler

#: What a variant drops, in order: labels of branches; inputs that want no gradient; outputs that get none.
VariantKey = tuple[frozenset[int], frozenset[int], frozenset[int]]


class RegionVariants:
    """Compiles and keeps the variants of all regions that share one structure.

    Attributes:
        flow: which inputs get gradients from which outputs, for any pattern.
        name: a path that tells the region apart from others in what is written about it.
    """

    def __init__(
        self, region: Region, fake_mode: Any, compiler: Compiler, name: str = "region", branches: Sequence[str] = ()
    ) -> None:
        self.name = name
        self._branch_names = tuple(branches)
        self._gm = region.gm
        self._examples = region.examples
        self._streams = region.streams
        # a model's head and loss are of no layer: recomputing them costs much and saves next to nothing
        self._saves_all = not region.branches
        self._fake_mode = fake_mode
        self._compiler = compiler
        self._compiled: dict[tuple[VariantKey, bool] | None, _torch.Compiled] = {}
        self._saved_flops: dict[int, int] = {}
        compiler.counts.regions += 1
        with self._tracing(), _torch.fake_execution(fake_mode):
            self.flow = GradientFlow.trace(copy_graph_module(self._gm), self._inputs(frozenset()))

    def training(self, key: VariantKey, *, repeatable: bool = False) -> _torch.Compiled:
        """The variant whose forward records what its pruned backward needs.

        Args:
            key: what it drops.
            repeatable: its backward may run more than once (``retain_graph=True``).
        """
        return self._get((key, repeatable), lambda: self._compile_training(key, repeatable))

    def forward_only(self) -> _torch.Compiled:
        """The variant for when no gradient enters the region at all: it saves nothing."""
        return self._get(None, self._compile_forward_only)

    def _get(
        self, key: tuple[VariantKey, bool] | None, compile_variant: Callable[[], _torch.Compiled]
    ) -> _torch.Compiled:
        compiled = self._compiled.get(key)
        if compiled is None:
            with _torch.compile_lock():
                compiled = self._compiled.get(key)
                if compiled is None:
                    if artifacts.wanted():
                        self._show(None if key is None else key[0])
                    with self._tracing():
                        compiled = compile_variant()
                    self._compiled[key] = compiled
        return compiled

    def _compile_training(self, key: VariantKey, repeatable: bool) -> _torch.Compiled:
        dropped, without_gradient, dead = key
        gm = copy_graph_module(self._gm)
        if dead:
            _detach_outputs(gm, dead)
        with torch.enable_grad():  # may be needed first inside of a backward
            return self._compiler.training(
                gm,
                self._inputs(without_gradient),
                dropped,
                repeatable=repeatable,
                saves_all=self._saves_all,
                look=None if dropped else self._count,
            )

    def _compile_forward_only(self) -> _torch.Compiled:
        gm = copy_graph_module(self._gm)
        _remove_gates(gm)
        return self._compiler.forward_only(gm, self._inputs(None))

    @functools.cached_property
    def joint(self) -> fx.GraphModule | None:
        """The region's joint graph with its gates, ``None`` where nothing in it requires a gradient."""
        with _torch.compile_lock(), self._tracing(), torch.enable_grad():
            return _torch.trace_joint_graph(copy_graph_module(self._gm), self._inputs(frozenset()))

    def saved_flops(self, label: int) -> int:
        """Operations of the backward that dropping the branch labelled ``label`` alone saves.

        They are counted while the variant that keeps everything is compiled, and are 0 before: then no gradient ever
        entered the region.
        """
        return self._saved_flops.get(label, 0)

    def _count(self, joint: fx.Graph) -> None:
        """Regions that differ in which inputs want gradients share this object: the costliest counts."""
        whole = joint_cost(joint).backward_flops
        for label in range(len(self._branch_names)):
            saved = whole - joint_cost(joint, {label}).backward_flops
            self._saved_flops[label] = max(saved, self._saved_flops.get(label, 0))

    def trace(
        self, key: VariantKey | None, decompositions: Mapping[Any, Callable[..., Any]] | None = None
    ) -> _torch.TracedGraphs | fx.GraphModule:
        """The graphs that a variant is compiled from, nothing being compiled: those of a training variant, or the one
        graph of the forward-only variant (``key=None``) and of one in which nothing requires a gradient.
        """
        gm = copy_graph_module(self._gm)
        with _torch.compile_lock(), self._tracing(), torch.enable_grad():
            if key is not None:
                dropped, without_gradient, dead = key
                if dead:
                    _detach_outputs(gm, dead)
                inputs = self._inputs(without_gradient)
                with self._compiler.partitioning(saves_all=self._saves_all):
                    traced = _torch.trace_graphs(gm, inputs, prune_pass(dropped), decompositions)
                if traced is not None:
                    return traced
            _remove_gates(gm)
            return _torch.trace_forward_graph(gm, self._inputs(None), decompositions)

    def _show(self, key: VariantKey | None) -> None:
        """Hand on the graphs that a variant is compiled from."""
        joint = self.joint
        if joint is not None:
            artifacts.emit(f"{self.name}/joint.py", joint.print_readable(print_output=False))
        decompositions = _torch.inductor_decompositions() if self._compiler.inner == "inductor" else None
        folder, traced = f"{self.name}/{self._describe(key)}", self.trace(key, decompositions)
        if isinstance(traced, fx.GraphModule):
            artifacts.emit(f"{folder}/forward.py", traced.print_readable(print_output=False))
            return
        for stage in ("joint", "forward", "backward"):
            graph = getattr(traced, stage)
            artifacts.emit(f"{folder}/{stage}.py", graph.print_readable(print_output=False))

    def _describe(self, key: VariantKey | None) -> str:
        if key is None:
            return "forward_only"
        dropped, without_gradient, dead = key
        names = [
            self._branch_names[label] if label < len(self._branch_names) else str(label) for label in sorted(dropped)
        ]
        parts = ["drops_" + "+".join(names) if names else "keeps_all"]
        inert = [str(k) for k in sorted(without_gradient) if self._wants_gradient(k)]
        parts += ["inputs_without_gradient_" + "_".join(inert)] if inert else []
        parts += ["dead_outputs_" + "_".join(map(str, sorted(dead)))] if dead else []
        return "__".join(parts)

    def _wants_gradient(self, index: int) -> bool:
        example = self._examples[index]
        return isinstance(example, torch.Tensor) and (example.requires_grad or index in self._streams)

    def _tracing(self) -> Any:
        return _torch.fresh_tracing_context(self._fake_mode)

    def _inputs(self, without_gradient: frozenset[int] | None) -> list[Any]:
        """Fake leaves like the region's inputs; ``None`` means that no input requires a gradient."""
        leaves: list[Any] = []
        for index, example in enumerate(self._examples):
            if not isinstance(example, torch.Tensor):
                leaves.append(example)
                continue
            wants = example.requires_grad or (index in self._streams and example.is_floating_point())
            if not wants:  # as it is: a Python number that Dynamo wrapped remembers its symbol on this very object
                leaves.append(example)
                continue
            with torch.no_grad():
                leaf = example.detach()
            leaves.append(leaf.requires_grad_(without_gradient is not None and index not in without_gradient))
        return leaves


def _remove_gates(gm: fx.GraphModule) -> None:
    for _, body in checkpoint_bodies(gm):
        _remove_gates(body)
    for node in list(gm.graph.nodes):
        if node.target in IDENTITIES or node.target is hook_gradient:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        elif node.op == "call_function" and node.target is _torch.SET_GRAD_ENABLED:
            gm.graph.erase_node(node)
    gm.recompile()


def _detach_outputs(gm: fx.GraphModule, dead: frozenset[int]) -> None:
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    values: Sequence[Any] = output.args[0]
    with gm.graph.inserting_before(output):
        output.args = (
            tuple(
                gm.graph.call_method("detach", (value,)) if index in dead else value
                for index, value in enumerate(values)
            ),
        )
    gm.recompile()
