"""Blocks that say what forwards are to drop: pinned patterns, and those of earlier forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from dropbp_fx.policy.branches import Branch, BranchTable
from dropbp_fx.policy.presence import PresentBranches
from dropbp_fx.policy.rounds import PerThread, Pinned, Repeated


class Overrides:
    """What the blocks of each thread say of its forwards; the innermost one holds.

    Args:
        branches: the backend's.
        present: what can be dropped of them now.
        thread: where each thread keeps its blocks and its forwards.
    """

    def __init__(self, branches: BranchTable, present: PresentBranches, thread: PerThread) -> None:
        self._branches = branches
        self._present = present
        self._thread = thread

    @contextlib.contextmanager
    def pinned(self, chosen: Iterable[int | str | Branch]) -> Iterator[None]:
        """Within the block (and this thread) drop exactly ``chosen``.

        Raises:
            IndexError, KeyError, TypeError: ``chosen`` names a branch the model does not have. Before the first forward
                the branches are not known yet: then the check is made as graphs come in, and names that no graph had
                by the end of the block are refused there.
            ValueError: everything trainable would be dropped.
        """
        items = tuple(chosen)
        override = Pinned(items, set())
        if len(self._branches):
            self._check_keeps_one(self._branches.resolve(items), self._branches.models)
        else:
            override.unknown = {_plain(item) for item in items}
        with self._within(override):
            yield
        if override.unknown and len(self._branches):
            self._branches.resolve(override.unknown)

    @contextlib.contextmanager
    def repeated(self, forwards: int, epoch: Callable[[], int]) -> Iterator[None]:
        """Within the block (and this thread) drop what the last ``forwards`` forwards of each model dropped, in their order.

        Args:
            forwards: how many.
            epoch: tells which forwards were run since the last state was loaded; earlier ones are not repeated.

        Raises:
            RuntimeError: no model has run as many in this thread.
        """
        earlier = self._thread.last(forwards, epoch())
        if not earlier:
            many = "a training forward" if forwards == 1 else f"{forwards} training forwards"
            raise RuntimeError(
                f"repeated({'' if forwards == 1 else forwards}) repeats the pattern of {many} of this thread, but no model "
                "has run as many in it since this backend was made or a state was loaded. Run the forward to be repeated "
                "first, outside of the block."
            )
        with self._within(Repeated(earlier)):
            yield

    @contextlib.contextmanager
    def _within(self, override: Pinned | Repeated) -> Iterator[None]:
        self._thread.overrides.append(override)
        try:
            yield
        finally:
            self._thread.overrides.pop()

    def found(self, branch: Branch) -> None:
        """A graph has shown a branch."""
        for override in self._thread.overrides:
            if isinstance(override, Pinned):
                override.unknown -= {branch.name, branch.index}

    def dropped_by(self, override: Pinned, model: int) -> frozenset[int]:
        """What ``override`` drops.

        Raises:
            ValueError: everything trainable would be dropped.
        """
        known = [item for item in override.chosen if _plain(item) not in override.unknown]
        dropped = self._branches.resolve(known)
        self._check_keeps_one(dropped, (model,))
        return dropped

    def _check_keeps_one(self, dropped: Collection[int], models: Sequence[int]) -> None:
        """Some model keeps something trainable, if any model has something.

        Raises:
            ValueError: none does.
        """
        trainable = [b for model in models for b in self._branches.of(model) if b.trainable and b.droppable]
        if not trainable or any(branch.index not in dropped for branch in trainable):
            return
        # What the table says is as of the last forward: something may have been unfrozen since, or all of this frozen.
        now = {
            b.index for model in models for b in self._branches.of(model) if self._present.requires_gradient(b.index)
        }
        if now and not now <= set(dropped):
            return
        raise ValueError(
            f"The pattern drops all {len(trainable)} branches that have trainable parameters, so nothing would be "
            "trained. Keep at least one of them."
        )


def _plain(item: int | str | Branch) -> int | str:
    return item.name if isinstance(item, Branch) else item
