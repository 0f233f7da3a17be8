"""What a compiled graph says of its branches: which of them can be dropped now, and which are trainable."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from dropbp_fx.policy.branches import Branch, BranchTable

Leaves = tuple["weakref.ref[Tensor]", ...]


@dataclasses.dataclass(eq=False)
class Presence:
    """The facts of one graph, for one of the modules that it serves. Freezing a layer makes another graph, with others.

    Attributes:
        branches: indices of all its branches in the table, those that it can never drop included.
        droppable: those a gradient reaches.
        trainable: those that are trainable (:class:`~dropbp_fx.policy.branches.Branch`).
        trains: whether its forward computes anything that requires a gradient.
        leaves: by branch, the parameters that it reads. What requires a gradient can be asked of them before a forward.
        checked: the table's version when this was last entered into it, and whether in part.
    """

    branches: tuple[int, ...]
    droppable: frozenset[int]
    trainable: frozenset[int]
    trains: bool = True
    leaves: Mapping[int, Leaves] = dataclasses.field(default_factory=dict)
    checked: tuple[int, bool] = (-1, False)


class PresentBranches:
    """Keeps a table of branches to what the graphs of the latest forwards say.

    Attributes:
        version: grows whenever a branch becomes trainable or droppable, or is so no longer.
    """

    def __init__(self, table: BranchTable) -> None:
        self.version = 0
        self._table = table
        self._leaves: dict[int, Leaves] = {}

    def enter(self, presence: Presence, *, in_part: bool = False) -> bool:
        """Let the table say what a graph does.

        Args:
            presence: what it says.
            in_part: no gradient comes to what lies below the graph, but only because this forward drops it: a branch that
                therefore has none to drop, or leads to nothing trainable, is what it was.

        Returns:
            Whether that changes anything.
        """
        if presence.checked == (self.version, in_part):
            return False
        before = self.version
        for index in presence.branches:
            branch = self._table[index]
            trainable, droppable = index in presence.trainable, index in presence.droppable
            if in_part:
                trainable |= branch.trainable and index not in presence.leaves
                droppable |= branch.droppable
            self._set(branch, trainable, droppable)
            self._leaves.pop(index, None)
        self._leaves.update(presence.leaves)
        presence.checked = self.version, in_part
        return self.version != before

    def gain(self, branch: Branch, *, trainable: bool, droppable: bool) -> bool:
        """A newly compiled graph shows a branch: until its forward it is no less than other graphs have said.

        Returns:
            Whether that changes anything.
        """
        return self._set(branch, branch.trainable or trainable, branch.droppable or droppable)

    def ask(self, branches: Collection[Branch]) -> bool:
        """Let the table say of branches whose graphs have not run yet whether their parameters require gradients now.

        Returns:
            Whether that changes anything.
        """
        before = self.version
        for branch in branches:
            now = self.requires_gradient(branch.index)
            if now is not None:
                self._set(branch, now, branch.droppable)
        return self.version != before

    def requires_gradient(self, index: int) -> bool | None:
        """Whether a parameter of the branch requires a gradient, ``None`` where its parameters cannot be told."""
        leaves = self._leaves.get(index)
        if not leaves:
            return None
        alive = [parameter for reference in leaves if (parameter := reference()) is not None]
        return any(parameter.requires_grad for parameter in alive) if len(alive) == len(leaves) else None

    def forget(self, model: int) -> None:
        """The model is no more: none of its branches can be dropped until a graph says so."""
        for branch in self._table.of(model):
            self._set(branch, False, False)
            self._leaves.pop(branch.index, None)

    def lose(self, branches: Iterable[Branch]) -> bool:
        """Branches that no graph has shown take no part.

        Returns:
            Whether that changes anything.
        """
        before = self.version
        for branch in branches:
            self._set(branch, False, False)
        return self.version != before

    def _set(self, branch: Branch, trainable: bool, droppable: bool) -> bool:
        if (branch.trainable, branch.droppable) == (trainable, droppable):
            return False
        branch.trainable, branch.droppable = trainable, droppable
        self.version += 1
        return True


def leaves_of(parameters: Iterable[object]) -> Leaves:
    """Weak references to parameters."""
    return tuple(weakref.ref(parameter) for parameter in parameters if isinstance(parameter, Tensor))
