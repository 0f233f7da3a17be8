"""What a backend and its copies share, and what its policy says to a compiled graph."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator

import torch
from torch import nn

from dropbp_fx import _torch
from dropbp_fx.captured import CapturedGraph
from dropbp_fx.config import BackendConfig
from dropbp_fx.graph.naming import ModuleTree
from dropbp_fx.graph.owners import Models
from dropbp_fx.policy.presence import Presence
from dropbp_fx.policy.rates import Rates
from dropbp_fx.policy.sampler import PatternSampler
from dropbp_fx.runtime.compiler import CompileCounts
from dropbp_fx.runtime.device_graphs import GraphMemory
from dropbp_fx.runtime.dispatch import RegionRunner
from dropbp_fx.runtime.optimizers import CompiledStepWatch
from dropbp_fx.runtime.recompute import SampledPattern
from dropbp_fx.runtime.variants import RegionVariants
from dropbp_fx.sensitivity.calibration import Calibration
from dropbp_fx.sensitivity.observation import Observation
from dropbp_fx.sensitivity.observer import Observer
from dropbp_fx.shortfall import Listener, Shortfall


@dataclasses.dataclass
class BackendState:
    """What a backend and its deep copies share: its policy and the code it has compiled.

    Attributes:
        handle: gives the backend, where that was given by its name and perhaps nobody holds it.
        alive_with: the modules that hold it; ``None`` as long as it has worked for none.
    """

    sampler: PatternSampler
    observer: Observer
    listeners: list[Listener]
    shortfall: Shortfall
    counts: CompileCounts = dataclasses.field(default_factory=CompileCounts)
    variants: dict[Hashable, RegionVariants] = dataclasses.field(default_factory=dict)
    runners: list[RegionRunner] = dataclasses.field(default_factory=list)
    graphs: list[CapturedGraph] = dataclasses.field(default_factory=list)
    modules: ModuleTree = dataclasses.field(default_factory=ModuleTree)
    models: Models = dataclasses.field(default_factory=Models)
    calibration: Calibration | None = None
    calibrating_thread: int = 0
    holders: weakref.WeakValueDictionary[str, nn.Module] = dataclasses.field(
        default_factory=weakref.WeakValueDictionary
    )
    step_watch: CompiledStepWatch | None = None
    graph_memory: dict[torch.device, GraphMemory] = dataclasses.field(default_factory=dict)
    handle: Callable[[], object] | None = None
    alive_with: weakref.WeakSet[nn.Module] | None = None

    @classmethod
    def of(cls, config: BackendConfig) -> BackendState:
        policy = config.policy
        sampler = PatternSampler(
            Rates(
                policy.rate,
                allocation=policy.allocation,
                schedule=policy.schedule,
                max_rate=policy.max_rate,
                rescale=policy.rescale,
            ),
            policy.granularity,
            config.seed,
            pattern=policy.resolved_pattern,
            hold=policy.hold,
            configuration=config.described(),
        )
        listeners: list[Listener] = []
        shortfall = Shortfall(sampler, listeners, strict=config.strict)
        return cls(sampler, Observer(sampler, policy.reallocate_every), listeners, shortfall)

    def live_with(self, modules: Iterable[nn.Module]) -> None:
        """Let a backend that was given by its name live for as long as any of these modules.

        Nothing in the state may hold a module of them: neither would ever be let go of.
        """
        if self.handle is None:
            return
        for module in modules:
            if self.alive_with is None:
                self.alive_with = weakref.WeakSet()
            if module not in self.alive_with:
                self.alive_with.add(module)
                weakref.finalize(module, _let_go, self.handle()).atexit = False

    @contextlib.contextmanager
    def under(self, calibration: Calibration) -> Iterator[None]:
        """Within the block this thread's forwards, and recomputations in any backward, are part of ``calibration``."""
        before = self.calibration, self.calibrating_thread
        self.calibration, self.calibrating_thread = calibration, threading.get_ident()
        try:
            yield
        finally:
            self.calibration, self.calibrating_thread = before


def _let_go(_backend: object) -> None:
    """A module that held it is no more."""


@dataclasses.dataclass(frozen=True)
class GraphPatterns:
    """What the policy says to one graph, whose droppable branches have the ``indices`` in the backend's table, and what the
    graph says to the policy: its ``presence``.

    With ``below``, nothing that runs before the model's first kept branch is trained, if its first branch is dropped.
    """

    state: BackendState
    indices: tuple[int, ...]
    below: bool
    presence: Presence

    def sample(self) -> SampledPattern:
        self.state.observer.reallocate_if_due()
        sampler = self.state.sampler
        dropped = sampler.sample(self.indices, self.presence, self._check_ddp)
        for listen in reversed(self.state.listeners):  # one of them may take itself away
            listen(self.indices, dropped)
        local = frozenset(number for number, index in enumerate(self.indices) if index in dropped)
        below = self.below and 0 in local and sampler.drops_all_before(self.indices[0])
        return SampledPattern(local, below, sampler.scales(self.indices))

    def _check_ddp(self, dropped: frozenset[int]) -> None:
        branches = self.state.sampler.branches
        if any(branches[index].trainable for index in dropped) and _torch.ddp_waits_for_every_gradient():
            raise RuntimeError(
                "DistributedDataParallel waits for the gradient of every parameter, but those of a dropped branch have "
                "none. Make it with find_unused_parameters=True, and without static_graph=True."
            )

    def observation(self) -> Observation | None:
        return self.state.observer.observation()

    def index(self, branch: int) -> int:
        return self.indices[branch]

    def calibration(self) -> Calibration | None:
        mine = threading.get_ident() == self.state.calibrating_thread or _torch.in_backward()
        if self.state.calibration is None or not mine:
            return None
        self.state.sampler.present(self.presence)  # what is measured is what can be dropped now
        return self.state.calibration
