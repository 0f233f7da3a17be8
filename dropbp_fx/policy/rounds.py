"""The forwards that a thread is in the middle of, their patterns, and blocks that say what forwards are to drop."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Collection, Mapping

from dropbp_fx.policy.branches import Branch

#: How many forwards back ``repeated()`` can go: more micro-batches than anybody accumulates in one step.
_REMEMBERED = 256


@dataclasses.dataclass
class Round:
    """One pattern for the whole model. A model that Dynamo broke into several graphs consumes it piece by piece.

    Attributes:
        number: of all rounds of the backend.
        epoch: loading a state ends every round.
        version: that of the branches' facts when it was last sampled.
        decided: branches it has an answer for.
        dropped: those that are dropped.
    """

    number: int
    epoch: int
    version: int
    decided: set[int] = dataclasses.field(default_factory=set)
    dropped: set[int] = dataclasses.field(default_factory=set)

    def keep_only(self, run: Collection[int]) -> None:
        """Forget the answers for all branches but those that have run."""
        self.decided.intersection_update(run)
        self.dropped.intersection_update(run)


@dataclasses.dataclass
class Forward:
    """A forward of one model, which may run several graphs. A branch that comes again begins another forward.

    Attributes:
        epoch: that of the state it ran in.
        seen: the branches that its graphs have shown so far.
        counted: whether it trains anything, as far as it has come.
        round: what its pattern is a part of, ``None`` while it is told what to drop.
        pattern: what the latest of its graphs went by.
        dropped: what its graphs have dropped so far.
        scales: by branch, what gradients are multiplied by if it is kept; none where nothing is rescaled.
        within: the block it repeats another forward in, if it does.
        repeats: that other forward.
    """

    epoch: int
    seen: set[int] = dataclasses.field(default_factory=set)
    counted: bool = False
    round: Round | None = None
    pattern: Collection[int] = ()
    dropped: set[int] = dataclasses.field(default_factory=set)
    scales: dict[int, float] = dataclasses.field(default_factory=dict)
    within: Repeated | None = None
    repeats: Forward | None = None


@dataclasses.dataclass
class Pinned:
    """Forwards drop what was ``chosen``; ``unknown`` is what of it no graph has shown yet."""

    chosen: tuple[int | str | Branch, ...]
    unknown: set[int | str]


@dataclasses.dataclass
class Repeated:
    """Forwards of each model repeat earlier ones of it, in their order and then from the start."""

    forwards: Mapping[int, tuple[Forward, ...]]
    begun: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def repeated_by(self, forward: Forward, model: int) -> Forward:
        """The forward that ``forward`` repeats.

        Raises:
            RuntimeError: there is none.
        """
        if forward.within is not self or forward.repeats is None:
            earlier = self.forwards.get(model)
            if earlier is None:
                raise RuntimeError(
                    "A forward in a block of repeated() is of a model that has not run as many training forwards in this "
                    "thread as the block repeats. Run its forward outside of the block first."
                )
            forward.within, forward.repeats = self, earlier[self.begun[model] % len(earlier)]
            self.begun[model] += 1
        return forward.repeats


class PerThread(threading.local):
    """Forwards of different threads do not share a round, nor one thread's ``pinned()`` another's forwards."""

    def __init__(self) -> None:
        self.forwards: dict[int, Forward] = {}  # by model
        self.past: dict[int, collections.deque[Forward]] = {}  # those that repeated nothing
        self.latest: Forward | None = None
        self.overrides: list[Pinned | Repeated] = []

    def forward(self, model: int, branches: Collection[int], epoch: int) -> Forward:
        """The forward of ``model`` that a graph with these branches is a part of."""
        found = self.forwards.get(model)
        if found is None or not found.seen.isdisjoint(branches):
            found = self.forwards[model] = Forward(epoch)
        found.seen.update(branches)
        self.latest = found
        return found

    def remember(self, model: int, forward: Forward) -> None:
        """Let ``repeated()`` find a forward."""
        self.past.setdefault(model, collections.deque(maxlen=_REMEMBERED)).append(forward)

    def last(self, count: int, epoch: int) -> dict[int, tuple[Forward, ...]]:
        """The last ``count`` forwards of each model that has run as many since the last state was loaded."""
        found = {
            model: [forward for forward in past if forward.epoch == epoch][-count:] for model, past in self.past.items()
        }
        return {model: tuple(forwards) for model, forwards in found.items() if len(forwards) == count}


def checked_repeats(forwards: object) -> int:
    """How many forwards to repeat.

    Raises:
        TypeError, ValueError: no count that ``repeated()`` can go back.
    """
    if isinstance(forwards, bool) or not isinstance(forwards, int):
        raise TypeError(f"repeated() takes a whole number of forwards, not {forwards!r}.")
    if not 1 <= forwards <= _REMEMBERED:
        raise ValueError(f"repeated() goes back 1 to {_REMEMBERED} forwards, not {forwards}.")
    return forwards
