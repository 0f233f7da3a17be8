"""What an explanation finds: the branches of a model, what each costs, and what dropping saves at any rate."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Collection, Sequence

from dropbp_fx.captured import CapturedGraph
from dropbp_fx.inspect.costs import CostModel, PatternCost
from dropbp_fx.inspect.figures import ExplainedBranch, Prediction
from dropbp_fx.inspect.given import Given
from dropbp_fx.inspect.patterns import sample_patterns
from dropbp_fx.policy.branches import Branch
from dropbp_fx.policy.drop_policy import checked_rate
from dropbp_fx.policy.patterns import Pattern, pattern_name
from dropbp_fx.policy.units import Granularity

#: Patterns that a prediction averages over.
PATTERNS = 32


class Findings:
    """What is known of a model's branches and of what dropping them saves. Users hold it as an :class:`Explanation`, which
    says what the attributes are and adds the ways to show them; what shows them asks for no more than this.
    """

    def __init__(
        self,
        *,
        model: str,
        given: Given,
        branches: Sequence[ExplainedBranch],
        graphs: Sequence[CapturedGraph],
        costs: CostModel,
        granularity: Granularity,
        inner: str,
        pattern: Pattern,
        parameters: int | None,
        trainable_parameters: int | None,
        shortfall: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.given = given
        self.branches = tuple(branches)
        self.rejected = tuple(item for graph in graphs for item in graph.rejected)
        self.shortfall = tuple(shortfall)
        self.granularity = granularity
        self.rate = given.rate
        self.inner = inner
        self.pattern = pattern_name(pattern)
        self._pattern = pattern
        self.parameters = parameters
        self.trainable_parameters = trainable_parameters
        self.graphs = len(graphs)
        self.regions = sum(len(graph.program.regions) for graph in graphs)
        self.unique_regions = len({variants for graph in graphs for variants in graph.variants})
        self._graphs = tuple(graphs)
        self._costs = costs
        self._predictions: dict[float, Prediction] = {}

    @functools.cached_property
    def variants(self) -> int:
        """How many variants :meth:`DropBPBackend.warmup` compiles."""
        return len(frozenset().union(*(self._costs.variants_to_compile(graph) for graph in self._graphs)))

    @property
    def droppable(self) -> tuple[ExplainedBranch, ...]:
        """The branches that can be dropped."""
        return tuple(branch for branch in self.branches if branch.droppable)

    def branch(self, chosen: int | str) -> ExplainedBranch:
        """The branch of that index or name.

        Raises:
            KeyError: there is none.
        """
        for branch in self.branches:
            if chosen in (branch.index, branch.name):
                return branch
        raise KeyError(
            f"There is no branch {chosen!r}: the model has {len(self.branches)} residual branches. "
            "[branch.name for branch in explanation.branches] lists them."
        )

    def cost_of(self, dropped: Collection[int | str]) -> PatternCost:
        """FLOPs and saved bytes of a step that drops exactly these branches, given by index or name.

        Raises:
            KeyError: there is no such branch.
        """
        indices = {self.branch(item).index for item in dropped}
        total = PatternCost(0, 0, 0)
        all_before = True
        for graph in self._graphs:
            numbers = frozenset(number for number, index in enumerate(graph.indices) if index in indices)
            total += self._costs.pattern(graph, numbers, below=graph.below and all_before)
            all_before = all_before and len(numbers) == len(graph.indices)
        return total

    def predict(self, rate: float) -> Prediction:
        """What a step costs when every branch is dropped at ``rate``: the mean over samples of the backend's pattern.

        The samples are the same for every call. The variants of the regions are traced when the first prediction is
        made (seconds), later ones are quick.

        Raises:
            TypeError, ValueError: ``rate`` is no number in [0, 1).
        """
        rate = checked_rate(rate)
        if rate not in self._predictions:
            full = self.cost_of(())
            patterns = self._patterns(rate)
            costs = [self.cost_of(pattern) for pattern in patterns]
            backward = statistics.fmean(cost.backward_flops for cost in costs)
            saved = statistics.fmean(cost.saved_bytes for cost in costs)
            flops = full.forward_flops + full.backward_flops
            self._predictions[rate] = Prediction(
                rate=rate,
                dropped=statistics.fmean(len(pattern) for pattern in patterns) / max(len(self.droppable), 1),
                forward_flops=full.forward_flops,
                backward_flops=round(backward),
                saved_bytes=round(saved),
                relative_cost=(full.forward_flops + backward) / flops if flops else 1.0,
                relative_memory=saved / full.saved_bytes if full.saved_bytes else 1.0,
            )
        return self._predictions[rate]

    def layers(self) -> tuple[str, ...]:
        """The layers that hold a droppable branch, in execution order."""
        return tuple(dict.fromkeys(branch.layer for branch in self.droppable))

    def _patterns(self, rate: float) -> tuple[frozenset[int], ...]:
        if not rate:
            return (frozenset(),)
        branches = [
            Branch(branch.index, branch.name, branch.layer, rate, branch.trainable, True, branch.backward_flops)
            for branch in self.droppable
        ]
        return sample_patterns(branches, self._pattern, self.granularity, PATTERNS)
