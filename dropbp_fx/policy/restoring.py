"""Go on from saved branches: which of them fit the model, and what the table of branches then holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from dropbp_fx.policy.branches import Branch, BranchTable


class ExpectedBranches:
    """The branches of a loaded state that no graph has shown yet.

    Args:
        table: where the state's branches are.
    """

    def __init__(self, table: BranchTable) -> None:
        self._table = table
        self._names: set[str] | None = None  # None where no state was loaded, or one without branches
        self._strict = True

    def load(self, saved: Sequence[Branch], present: Sequence[Branch], *, strict: bool) -> None:
        """A state with these branches is loaded into a model with the ``present`` ones."""
        names = {branch.name for branch in present}
        added = {branch.name for branch in saved} - names
        if added or self._names is not None:
            self._names = (set(self.names) & names) | added if saved else None
        self._strict = strict

    def __len__(self) -> int:
        return len(self._names or ())

    @property
    def names(self) -> frozenset[str]:
        """Theirs."""
        return frozenset(self._names or ())

    def found(self, name: str) -> None:
        """A graph has a branch of this name.

        Raises:
            ValueError: the state does not know it.
        """
        if self._names is None:
            return
        if self._strict and self._table.named(name) is None:
            known = ", ".join(branch.name for branch in list(self._table)[:3])
            raise ValueError(
                f"The loaded state does not fit this model: the model has a branch named {name!r}, the state "
                f"has {len(self._table)} branches ({known}, ...) without it. Load the state of the same "
                "model, or pass strict=False to load_state_dict."
            )
        self._names.discard(name)

    def strangers(self) -> list[Branch]:
        """Those of a state that need not fit. They take no part in patterns until a graph shows them."""
        if self._strict:
            return []
        return [branch for name in self.names if (branch := self._table.named(name)) is not None]

    def check_complete(self, model: int) -> None:
        """All graphs of the model have run.

        Raises:
            ValueError: branches of the state are not among theirs.
        """
        of_model = self._table.of(model)
        missing = [branch.name for branch in of_model if branch.name in self.names]
        if missing and self._strict:
            raise ValueError(
                f"The loaded state does not fit this model: {len(missing)} of its {len(of_model)} branches, "
                f"such as {min(missing)!r}, are not in the model. Load the state of the same model, or pass strict=False "
                "to load_state_dict."
            )


def check_same_branches(saved: Sequence[Branch], found: Sequence[Branch]) -> None:
    """Refuse a state of other branches, or of branches in other layers."""
    ours, theirs = [(b.name, b.layer) for b in found], [(b.name, b.layer) for b in saved]
    if ours != theirs:
        odd = sorted({name for name, _ in set(ours) ^ set(theirs)})[:3] or ["their order"]
        raise ValueError(
            f"The state does not fit this model: it has {len(saved)} branches, the model has {len(found)}; they "
            f"differ in {', '.join(odd)}. Load the state of the same model, or pass strict=False."
        )


def continued(present: Sequence[Branch], expected: Collection[str], saved: Sequence[Branch]) -> list[Branch]:
    """Copies of the ``present`` branches, which keep their places, as they were saved; then the others of the state.

    Those that the state does not know count from 0. Those still ``expected`` came with an earlier state:
    no graph has them.
    """
    records = {branch.name: branch for branch in saved}
    branches: list[Branch] = []
    for branch in present:
        record = records.pop(branch.name, None)
        if record is not None:
            branches.append(dataclasses.replace(record, index=branch.index, layer=branch.layer))
        else:
            branches.append(dataclasses.replace(branch, times_seen=0, times_dropped=0))
            if branch.name in expected:
                branches[-1].trainable = branches[-1].droppable = False
    branches += [dataclasses.replace(record, index=len(present) + k) for k, record in enumerate(records.values())]
    return branches
