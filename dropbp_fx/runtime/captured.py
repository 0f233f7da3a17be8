"""What is known of a graph before anything is compiled for it: what a runner is made from, and an explanation too."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from dropbp_fx.graph.describe import BranchFacts
from dropbp_fx.graph.regions import RegionProgram
from dropbp_fx.runtime.plan import Planner
from dropbp_fx.runtime.variants import RegionVariants


@dataclasses.dataclass(frozen=True)
class CapturedGraph:
    """One graph from Dynamo, searched, gated and split.

    Attributes:
        program: its regions. Their branches are numbered within the graph.
        variants: of each region; equal regions share one object.
        indices: for each of the program's branches its index in the backend's table.
        facts: by index in the table, for every branch of the graph, those that can never be dropped included.
        rejected: adds that were not taken for a branch, by the name of their node, and why.
    """

    program: RegionProgram
    variants: tuple[RegionVariants, ...]
    indices: tuple[int, ...]
    facts: Mapping[int, BranchFacts]
    rejected: tuple[tuple[str, str], ...]

    @functools.cached_property
    def planner(self) -> Planner:
        """Decides what the regions do in any pattern."""
        return Planner(self.program, self.variants)
