"""The one seam between a backend and its inspection: graphs that a backend has captured, or would capture of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx, nn

from dropbp_fx.backend import DropBPBackend
from dropbp_fx.captured import CapturedGraph
from dropbp_fx.config import BackendConfig
from dropbp_fx.lowering import Lowering
from dropbp_fx.policy.branches import Branch
from dropbp_fx.policy.drop_policy import DropPolicy
from dropbp_fx.runtime.compiler import CompileCounts, Compiler, InnerCompiler
from dropbp_fx.sensitivity.sensitivity import Sensitivity
from dropbp_fx.state import BackendState


@dataclasses.dataclass(frozen=True)
class Captures:
    """What is known of graphs before anything is compiled for them, and what they were captured for.

    Attributes:
        graphs: in the order in which they were captured.
        branches: the backend's table, which the graphs' indices count in.
        policy: what the backend was made to drop, and when.
        inner: its inner compiler.
        sensitivity: of the branches, as measured last.
        shortfall: why less is dropped than was asked for: a text for each cause found so far.
        models: those that the graphs are of, or parts of; not those that were let go of.
    """

    graphs: tuple[CapturedGraph, ...]
    branches: tuple[Branch, ...]
    policy: DropPolicy
    inner: InnerCompiler
    sensitivity: Sensitivity | None
    shortfall: tuple[str, ...]
    models: tuple[nn.Module, ...]


class Rehearsal:
    """A backend that captures graphs and compiles none.

    Args:
        backend: whose configuration it has; of its state it knows nothing, and leaves it alone.
    """

    def __init__(self, backend: DropBPBackend) -> None:
        self._config = backend._config
        self._state = BackendState.of(self._config)
        options, budget = dict(self._config.options), self._config.activation_memory_budget
        compiler = Compiler(self._config.inner, options, CompileCounts(), budget)
        self._lowering = Lowering(self._config, self._state, compiler)
        self._graphs: list[CapturedGraph] = []

    def capture(self, gm: fx.GraphModule) -> None:
        """Take one graph from Dynamo half of the way. It is rewritten."""
        graph = self._lowering.capture(gm, whole=True)
        assert isinstance(graph, CapturedGraph)  # whole=True
        self._graphs.append(graph)

    @property
    def captures(self) -> Captures:
        """What was captured so far."""
        return _captures(self._config, self._state, self._graphs)


def captures_of(backend: DropBPBackend) -> Captures:
    """What a backend has captured of the models that ran."""
    return _captures(backend._config, backend._state, backend._state.graphs)


def _captures(config: BackendConfig, state: BackendState, graphs: Sequence[CapturedGraph]) -> Captures:
    return Captures(
        graphs=tuple(graphs),
        branches=tuple(state.sampler.branches),
        policy=config.policy,
        inner=config.inner,
        sensitivity=state.sampler.rated.sensitivity,
        shortfall=state.shortfall.texts,
        models=tuple(state.modules.outermost),
    )
