"""Decide for each forward which branches it drops."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from dropbp_fx.policy.branches import Branch, BranchTable
from dropbp_fx.policy.sampling import Unit, draw_dropped, effective_rates
from dropbp_fx.policy.sensitivity import Sensitivity

Granularity = Literal["branch", "layer"]
_STATE_VERSION = 1


@dataclasses.dataclass
class _Round:
    """One pattern for the whole model. A model that Dynamo broke into several graphs consumes it piece by piece."""

    number: int = 0
    epoch: int = 0
    drawn: set[int] = dataclasses.field(default_factory=set)
    dropped: set[int] = dataclasses.field(default_factory=set)
    used: set[int] = dataclasses.field(default_factory=set)


class _PerThread(threading.local):
    """Forwards of different threads do not share a round, nor one thread's ``pinned()`` another's forwards."""

    def __init__(self) -> None:
        self.round = _Round()
        self.overrides: list[_Override] = []


@dataclasses.dataclass
class _Override:
    chosen: tuple[int | str | Branch, ...]
    unmet: set[int | str]


class Schedule:
    """The drop policy of one backend: rates, random draws and their state.

    Patterns are a function of (seed, number of the round, rates, branches): they leave every other random stream alone,
    and a resumed run goes on with the same ones. ``seed=None`` takes ``torch.initial_seed()`` at the first draw.
    """

    def __init__(self, rate: float, granularity: Granularity, seed: int | None) -> None:
        self.branches = BranchTable()
        self.granularity: Granularity = granularity
        self.forwards = 0
        self._rate = rate
        self._seed = seed
        self._rounds = 0
        self._expected: set[str] | None = None  # names in a loaded state that no graph has shown yet
        self._strict_state = True
        self._thread = _PerThread()
        self.sensitivity: Sensitivity | None = None
        self._epoch = 0  # loading a state ends every thread's round
        self._lock = threading.RLock()

    # ---- what the user sets ----------------------------------------------------------------------------------------

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate = rate
        with self._lock:
            for branch in self.branches:
                branch.rate = rate

    @contextlib.contextmanager
    def override(self, chosen: Iterable[int | str | Branch]) -> Iterator[None]:
        """Within the block (and this thread) drop exactly ``chosen``.

        Raises:
            IndexError, KeyError, TypeError: ``chosen`` names a branch the model does not have. Before the first forward
                the branches are not known yet: then the check is made as graphs come in, and names that no graph had
                by the end of the block are refused there.
            ValueError: everything trainable would be dropped.
        """
        items = tuple(chosen)
        override = _Override(items, set())
        if len(self.branches):
            self._check_keeps_one(self.branches.resolve(items))
        else:
            override.unmet = {item.name if isinstance(item, Branch) else item for item in items}
        self._thread.overrides.append(override)
        try:
            yield
        finally:
            self._thread.overrides.pop()
        if override.unmet and len(self.branches):
            self.branches.resolve(override.unmet)

    # ---- what the compiled graphs call -----------------------------------------------------------------------------

    def meet(self, name: str, layer: str, *, trainable: bool, droppable: bool) -> Branch:
        """Enter a branch of a newly compiled graph into the table.

        Raises:
            ValueError: a loaded state does not know the branch.
        """
        with self._lock:
            if self._expected is not None and self._strict_state and self.branches.named(name) is None:
                known = ", ".join(branch.name for branch in list(self.branches)[:3])
                raise ValueError(
                    f"The loaded state does not fit this model: the model has a branch named {name!r}, the state "
                    f"has {len(self.branches)} branches ({known}, ...) without it. Load the state of the same "
                    "model, or pass strict=False to load_state_dict."
                )
            branch = self.branches.meet(name, layer, rate=self._rate)
            if self._expected is not None:
                self._expected.discard(name)
            branch.trainable |= trainable
            branch.droppable |= droppable
            for override in self._thread.overrides:
                override.unmet -= {branch.name, branch.index}
            return branch

    def draw(self, indices: Sequence[int]) -> frozenset[int]:
        """The branches among ``indices`` (those of one graph) that this forward drops.

        Raises:
            ValueError: a pinned pattern drops everything trainable, or a loaded state has branches the model lacks.
        """
        with self._lock:
            mine = set(indices)
            pinned = self._pinned()
            dropped = frozenset(self._take(mine) if pinned is None else pinned & mine)
            first = min(mine, default=0)
            self.forwards += first == self._first_index(mine)
            for index in mine:
                branch = self.branches[index]
                branch.times_seen += 1
                branch.times_dropped += index in dropped
            return dropped

    def _first_index(self, mine: Collection[int]) -> int:
        """A forward is counted by the graph that holds the first droppable branch."""
        return next((b.index for b in self.branches if b.droppable), min(mine, default=0))

    def _pinned(self) -> frozenset[int] | None:
        """What the innermost :meth:`override` of this thread drops, ``None`` outside of one.

        Raises:
            ValueError: everything trainable would be dropped.
        """
        if not self._thread.overrides:
            return None
        override = self._thread.overrides[-1]
        met = [item for item in override.chosen if _plain(item) not in override.unmet]
        dropped = self.branches.resolve(met)
        self._check_keeps_one(dropped)
        return dropped

    def _check_keeps_one(self, dropped: Collection[int]) -> None:
        trainable = [branch for branch in self.branches if branch.trainable and branch.droppable]
        if trainable and all(branch.index in dropped for branch in trainable):
            raise ValueError(
                f"The pattern drops all {len(trainable)} branches that have trainable parameters, so nothing would be "
                "trained. Keep at least one of them."
            )

    def _take(self, mine: set[int]) -> set[int]:
        current = self._thread.round
        if not current.number or current.epoch != self._epoch or mine & current.used:
            self._check_state_is_complete()
            self._rounds += 1
            current = self._thread.round = _Round(number=self._rounds, epoch=self._epoch)
        if not mine <= current.drawn:
            self._extend(current)
        current.used |= mine
        return current.dropped & mine

    def _extend(self, current: _Round) -> None:
        """Draw for every known branch that this round has no answer for yet."""
        fresh = [b for b in self.branches if b.index not in current.drawn]
        kept_one = any(
            b.trainable and b.droppable and b.index in current.drawn and b.index not in current.dropped
            for b in self.branches
        )
        groups = self._units([b for b in fresh if b.droppable])
        rng = random.Random(f"dropbp_fx:{self._resolved_seed()}:{current.number}:{len(current.drawn)}")
        chosen = draw_dropped([unit for unit, _ in groups], rng, keep_one=not kept_one)
        for index in chosen:
            current.dropped.update(groups[index][1])
        current.drawn.update(b.index for b in fresh)

    def _units(self, branches: Sequence[Branch]) -> list[tuple[Unit, list[int]]]:
        """What is dropped as a whole, with the indices of its branches."""
        if self.granularity == "branch":
            return [(Unit(b.rate, b.trainable), [b.index]) for b in branches]
        layers: dict[str, list[Branch]] = {}
        for branch in branches:
            layers.setdefault(branch.layer, []).append(branch)
        return [
            (Unit(sum(b.rate for b in group) / len(group), any(b.trainable for b in group)), [b.index for b in group])
            for group in layers.values()
        ]

    # ---- what is asked about it ------------------------------------------------------------------------------------

    def attainable_rate(self) -> float:
        """The share of droppable branches that is dropped in the long run, one trainable unit always being kept."""
        groups = self._units([b for b in self.branches if b.droppable])
        rates = effective_rates([unit for unit, _ in groups])
        size = sum(len(indices) for _, indices in groups)
        return (
            sum(rate * len(indices) for rate, (_, indices) in zip(rates, groups, strict=True)) / size if size else 0.0
        )

    def realised_rate(self) -> float:
        """The share of (branch, training forward) pairs that was dropped, of those that could be."""
        droppable = [branch for branch in self.branches if branch.droppable]
        seen = sum(branch.times_seen for branch in droppable)
        return sum(branch.times_dropped for branch in droppable) / seen if seen else 0.0

    def learn(self, sensitivity: Sensitivity) -> None:
        self.sensitivity = sensitivity

    def scale(self, index: int) -> float:
        return 1.0

    # ---- state -----------------------------------------------------------------------------------------------------

    def _resolved_seed(self) -> int:
        if self._seed is None:
            self._seed = torch.initial_seed()
        return self._seed

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, in plain Python types."""
        with self._lock:
            return {
                "version": _STATE_VERSION,
                "rate": self._rate,
                "granularity": self.granularity,
                "seed": self._seed,
                "rounds": self._rounds,
                "forwards": self.forwards,
                "branches": [dataclasses.asdict(branch) for branch in self.branches],
            }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Go on where ``state`` was saved.

        Raises:
            ValueError: the state is of another version or granularity, or is of a model with other branches. Where
                this backend has not met its model yet, the branches are compared as its graphs come in.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"This is no state of a dropbp_fx backend of version {_STATE_VERSION}: its version is "
                f"{state.get('version')!r}. Pass what state_dict() returned."
            )
        if state["granularity"] != self.granularity:
            raise ValueError(
                f"The state was saved with granularity={state['granularity']!r}, this backend has "
                f"granularity={self.granularity!r}. Make the backend with the granularity of the state."
            )
        names = [record["name"] for record in state["branches"]]
        with self._lock:
            met = [branch.name for branch in self.branches]
            if strict and met and names and met != names:
                odd = sorted(set(met) ^ set(names))[:3] or ["their order"]
                raise ValueError(
                    f"The state does not fit this model: it has {len(names)} branches, the model has {len(met)}; they "
                    f"differ in {', '.join(odd)}. Load the state of the same model, or pass strict=False."
                )
            self._rate = state["rate"]
            self._seed = state["seed"]
            self._rounds = state["rounds"]
            self.forwards = state["forwards"]
            self._epoch += 1
            if not met and names:
                self._expected = set(names)
                self._strict_state = strict
            for record in state["branches"]:
                branch = self.branches.meet(record["name"], record["layer"], rate=record["rate"])
                for field in ("rate", "trainable", "droppable", "times_seen", "times_dropped"):
                    setattr(branch, field, record[field])

    def _check_state_is_complete(self) -> None:
        """By the second forward after loading, every branch of the state should have turned up."""
        if self._expected and self._strict_state and self._thread.round.epoch == self._epoch:
            missing = sorted(self._expected)
            raise ValueError(
                f"The loaded state does not fit this model: {len(missing)} of its {len(self.branches)} branches, such "
                f"as {missing[0]!r}, are not in the model. Load the state of the same model, or pass strict=False to "
                "load_state_dict."
            )


def _plain(item: int | str | Branch) -> int | str:
    return item.name if isinstance(item, Branch) else item
