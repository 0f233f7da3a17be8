"""What is known of a graph before anything is compiled for it: what a runner is made from, and an explanation too."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from dropbp_fx.graph.describe import BranchFacts
from dropbp_fx.graph.naming import BranchName
from dropbp_fx.graph.regions import RegionProgram
from dropbp_fx.policy.branches import Branch
from dropbp_fx.policy.presence import Leaves, Presence, leaves_of
from dropbp_fx.runtime.per_module import IdentifyingParameters
from dropbp_fx.runtime.plan import Planner
from dropbp_fx.runtime.variants import RegionVariants


class Home:
    """The module that a graph is compiled for; once it is no more, the first one that runs by the code."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def is_taken_by(self, module: nn.Module) -> bool:
        """Whether ``module`` is the one, or is it from now on."""
        if self._module() is None:
            self._module = weakref.ref(module)
        return self._module() is module


@dataclasses.dataclass(frozen=True)
class EnteredBranches:
    """The branches of one graph, for the module it is compiled for.

    Attributes:
        branches: as in the backend's table, in the graph's order.
        names: seen from that module.
        droppable: positions of those that this graph may drop.
        identifying: tell other modules apart that the graph serves.
        prefix: where that module is in its model.
        model: the number of that model.
        presence: what the graph says of its branches there.
        parameters: for each branch which arguments are its parameters; ``None`` where they are not all known.
        training: whether its forwards are training ones, even if nothing in them is trained.
        idle: parameters of branches that would be dropped, were the model not in evaluation mode.
        undecided: those of a graph without branches in a model with graph breaks: other pieces may have some.
        home: that module, where it is known.
        given: its inputs that belong to no module, by what Dynamo calls them: sizes and dtypes, no data.
    """

    branches: tuple[Branch, ...]
    names: tuple[BranchName, ...]
    droppable: tuple[int, ...]
    identifying: IdentifyingParameters
    prefix: str
    model: int
    presence: Presence
    parameters: tuple[tuple[int, ...] | None, ...]
    training: bool
    idle: Leaves = ()
    undecided: Leaves = ()
    home: Home | None = None
    given: tuple[tuple[str, Tensor], ...] = ()

    def presence_of(self, own: Sequence[Branch], arguments: Sequence[object]) -> Presence:
        """What the graph says of its branches in another module, where they are ``own``.

        Args:
            own: as in the backend's table.
            arguments: the graph's, when it runs for that module.
        """
        index_of = {branch.index: mine.index for branch, mine in zip(self.branches, own, strict=True)}
        return Presence(
            branches=tuple(branch.index for branch in own),
            droppable=frozenset(index_of[index] for index in self.presence.droppable),
            trainable=frozenset(index_of[index] for index in self.presence.trainable),
            trains=self.presence.trains,
            leaves={
                mine.index: leaves_of([arguments[position] for position in positions])
                for mine, positions in zip(own, self.parameters, strict=True)
                if positions is not None
            },
        )

    def with_trainable(self, positions: Collection[int]) -> EnteredBranches:
        """The same with branches that count as trainable through others' parameters: their own ones tell nothing."""
        if not positions:
            return self
        known = [None if k in positions else own for k, own in enumerate(self.parameters)]
        indices = {self.branches[position].index for position in positions}
        presence = dataclasses.replace(
            self.presence,
            trainable=self.presence.trainable | indices,
            leaves={index: leaves for index, leaves in self.presence.leaves.items() if index not in indices},
        )
        return dataclasses.replace(self, presence=presence, parameters=tuple(known))


@dataclasses.dataclass(frozen=True)
class CapturedGraph:
    """One graph from Dynamo, searched, gated and split.

    Attributes:
        program: its regions. Their branches are numbered within the graph.
        variants: of each region; equal regions share one object.
        indices: for each of the program's branches its index in the backend's table.
        facts: by index in the table, for every branch of the graph, those that can never be dropped included.
        rejected: adds that were not taken for a branch, by the name of their node, and why.
        entered: all its branches, and what is needed to tell the modules apart that it serves.
        below: whether patterns may leave untrained what runs before the lowest kept branch.
    """

    program: RegionProgram
    variants: tuple[RegionVariants, ...]
    indices: tuple[int, ...]
    facts: Mapping[int, BranchFacts]
    rejected: tuple[tuple[str, str], ...]
    entered: EnteredBranches
    below: bool

    @functools.cached_property
    def planner(self) -> Planner:
        """Decides what the regions do in any pattern."""
        return Planner(self.program, self.variants)
