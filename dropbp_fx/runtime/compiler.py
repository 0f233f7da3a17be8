"""Inner compilers: what turns one region, or a whole graph, into code."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.prune import prune_cache_key, prune_pass

InnerCompiler = Literal["inductor", "aot_eager"] | tuple[_torch.CompileFunction, _torch.CompileFunction]

_CUDA_GRAPHS = "triton.cudagraphs"


@dataclasses.dataclass
class CompileCounts:
    """What compiling has cost so far.

    Attributes:
        graphs: graphs that Dynamo handed over.
        regions: regions that were different from all before.
        variants: compiled variants of regions, whole graphs not counted.
        seconds: time spent in the inner compiler.
    """

    graphs: int = 0
    regions: int = 0
    variants: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Compiles graphs with the inner compiler the user chose.

    Attributes:
        inner: "inductor", "aot_eager", or a pair (forward compiler, backward compiler), each a function of a flat ATen
            graph and its inputs that returns a callable, as for ``torch._dynamo.backends.common.aot_autograd``.
        options: Inductor configuration, as for ``torch.compile(options=...)``.
        activation_memory_budget: the share of its activations that a region may save, ``None`` for PyTorch's setting.
    """

    inner: InnerCompiler
    options: Mapping[str, Any]
    counts: CompileCounts
    activation_memory_budget: float | None = None

    @property
    def cuda_graphs(self) -> bool:
        """Whether CUDA graphs are asked for: Inductor's of whole graphs, this package's of regions."""
        wanted = self.options.get(_CUDA_GRAPHS)
        if wanted is None and self.inner == "inductor":
            wanted = _torch.inductor_setting(_CUDA_GRAPHS)
        return bool(wanted)

    def whole(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph as ``torch.compile`` would: nothing in it is ever dropped."""
        return self._timed(gm, inputs, None, flat=False).run

    def training(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        dropped: Collection[int],
        *,
        repeatable: bool = False,
        saves_all: bool = False,
        look: _torch.JointPass | None = None,
    ) -> _torch.Compiled:
        """Compile a region with the gates labelled ``dropped`` pruned from its joint graph.

        Args:
            gm: the region.
            inputs: fake inputs.
            dropped: labels of gates.
            repeatable: the backward may run more than once on the same saved tensors.
            saves_all: leave :attr:`activation_memory_budget` aside.
            look: is shown the joint graph before it is pruned.
        """
        self.counts.variants += 1
        with _torch.repeatable_backward(repeatable), self.partitioning(saves_all=saves_all):
            return self._timed(gm, inputs, frozenset(dropped), look=look)

    def partitioning(self, *, saves_all: bool) -> contextlib.AbstractContextManager[Any]:
        """Joint graphs within the block are split as this compiler's are."""
        return _torch.activation_memory_budget(None if saves_all else self.activation_memory_budget)

    def forward_only(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> _torch.Compiled:
        """Compile a region (without gates) that will only ever run without gradients."""
        self.counts.variants += 1
        with torch.no_grad():
            return self._timed(gm, inputs, None)

    @property
    def _options_of_regions(self) -> Mapping[str, Any]:
        """Inductor's own graphs would copy what regions hand to each other, and could not be composed to patterns."""
        return {**self.options, _CUDA_GRAPHS: False} if self.cuda_graphs else self.options

    def _timed(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        dropped: frozenset[int] | None,
        *,
        flat: bool = True,
        look: _torch.JointPass | None = None,
    ) -> _torch.Compiled:
        start = time.perf_counter()
        try:
            joint_pass = None if dropped is None else prune_pass(dropped, look)
            if self.inner == "inductor":
                return _torch.compile_with_inductor(
                    gm,
                    inputs,
                    options=self._options_of_regions if flat else self.options,
                    joint_pass=joint_pass,
                    cache_key="" if dropped is None else prune_cache_key(dropped),
                    flat=flat,
                )
            forward, backward = (
                (_torch.run_graph_eagerly, _torch.run_graph_eagerly) if isinstance(self.inner, str) else self.inner
            )
            return _torch.compile_with_aot_autograd(
                gm, inputs, forward=forward, backward=backward, joint_pass=joint_pass
            )
        finally:
            self.counts.seconds += time.perf_counter() - start
