"""What dropping each branch saves, by whether the branch is trainable."""

from __future__ import annotations

from collections.abc import Iterable

from dropbp_fx.policy.branches import Branch, BranchTable


class BranchFlops:
    """Backward FLOPs that dropping saves. The first figure of a branch stays, and a loaded state's: another one for each
    sequence length would make patterns depend on the order in which graphs were compiled, which a resumed run or another
    rank does not share.
    """

    def __init__(self, branches: BranchTable) -> None:
        self._branches = branches
        self._known: dict[tuple[int, bool], int] = {}

    def record(self, index: int, flops: int, *, trainable: bool) -> None:
        """Take note of a figure, unless the branch has one."""
        if flops:
            self._known.setdefault((index, trainable), flops)
        self.update_branches()

    def of(self, index: int, *, trainable: bool) -> int:
        """The figure of a branch where it is trainable, or where it is not; 0 if that is not known yet."""
        return self._known.get((index, trainable), 0)

    def take_over(self, branches: Iterable[Branch]) -> None:
        """Go by the figures of these branches, as they come from a loaded state or from another rank."""
        for branch in branches:
            self._known[branch.index, branch.trainable] = branch.backward_flops

    def update_branches(self) -> None:
        """A branch's FLOPs are those of its being trained or not, as it is now; until those are known, what they were."""
        for branch in self._branches:
            branch.backward_flops = self._known.get((branch.index, branch.trainable), branch.backward_flops)
