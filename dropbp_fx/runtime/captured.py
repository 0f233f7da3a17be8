"""What is known of a graph before anything is compiled for it: what a runner is made from, and an explanation too."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from dropbp_fx.graph.describe import BranchFacts
from dropbp_fx.graph.naming import BranchName
from dropbp_fx.graph.regions import RegionProgram
from dropbp_fx.policy.branches import Branch
from dropbp_fx.runtime.instances import Anchors
from dropbp_fx.runtime.plan import Planner
from dropbp_fx.runtime.variants import RegionVariants


@dataclasses.dataclass(frozen=True)
class MetBranches:
    """The branches of one graph, for the module it is compiled for.

    Attributes:
        branches: as in the backend's table, in the graph's order.
        names: seen from that module.
        droppable: positions of those that this graph may drop.
        anchors: tell other modules apart that the graph serves.
        prefix: where that module is in its model.
    """

    branches: tuple[Branch, ...]
    names: tuple[BranchName, ...]
    droppable: tuple[int, ...]
    anchors: Anchors
    prefix: str


@dataclasses.dataclass(frozen=True)
class CapturedGraph:
    """One graph from Dynamo, searched, gated and split.

    Attributes:
        program: its regions. Their branches are numbered within the graph.
        variants: of each region; equal regions share one object.
        indices: for each of the program's branches its index in the backend's table.
        facts: by index in the table, for every branch of the graph, those that can never be dropped included.
        rejected: adds that were not taken for a branch, by the name of their node, and why.
        met: all its branches, and what is needed to tell the modules apart that it serves.
        below: whether patterns may leave untrained what runs before the lowest kept branch.
    """

    program: RegionProgram
    variants: tuple[RegionVariants, ...]
    indices: tuple[int, ...]
    facts: Mapping[int, BranchFacts]
    rejected: tuple[tuple[str, str], ...]
    met: MetBranches
    below: bool

    @functools.cached_property
    def planner(self) -> Planner:
        """Decides what the regions do in any pattern."""
        return Planner(self.program, self.variants)
