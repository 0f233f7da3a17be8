"""Sample for each forward which branches it drops."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dropbp_fx._distributed.agreement import Proposal, RankAgreement
from dropbp_fx.policy.branches import Branch, BranchTable
from dropbp_fx.policy.overrides import Overrides
from dropbp_fx.policy.patterns import Pattern, RandomPattern, checked_sample
from dropbp_fx.policy.presence import Presence
from dropbp_fx.policy.rated_branches import RatedBranches
from dropbp_fx.policy.rates import Rates, check_attainable, without_unreached
from dropbp_fx.policy.restoring import ExpectedBranches, check_same_branches, continued
from dropbp_fx.policy.rounds import Forward, PerThread, Repeated, Round
from dropbp_fx.policy.saved_state import SavedState
from dropbp_fx.policy.units import Granularity
from dropbp_fx.sensitivity.running import SavedAverage
from dropbp_fx.values import in_words, shown


class PatternSampler:
    """Samples the patterns of one backend, and holds what they depend on.

    Patterns are a function of (seed, number of the round, rates, branches) and of no earlier pattern: they leave every
    other random stream alone, and a resumed run goes on with the same ones. ``seed=None`` takes ``torch.initial_seed()`` at
    the first one.

    Args:
        rates: how the branches get their rates; a number stands for equal ones.
        granularity: "branch" drops single branches; "layer" all branches of a layer together.
        seed: seeds the patterns.
        pattern: which branches are dropped together.
        hold: in how many rounds one after the other they are the same.
        configuration: whatever else the ranks of a distributed run must have alike, in words.
    """

    def __init__(
        self,
        rates: Rates | float,
        granularity: Granularity,
        seed: int | None,
        *,
        pattern: Pattern | None = None,
        hold: int = 1,
        configuration: Mapping[str, str] | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self.rated = RatedBranches(
            rates if isinstance(rates, Rates) else Rates(rates), granularity, pattern or RandomPattern(), self._lock
        )
        self.ranks = RankAgreement()
        self.forwards = 0
        self.rounds = 0
        self._thread = PerThread()
        self._overrides = Overrides(self.branches, self.rated.present, self._thread)
        self._seed = seed
        self._hold = hold
        self._expected = ExpectedBranches(self.branches)
        self._configuration = dict(configuration or {})
        self._agreed = False  # all ranks have agreed on the branches and on the state that was loaded last
        self._epoch = 0  # loading a state ends every thread's round

    @property
    def branches(self) -> BranchTable:
        """The branches found so far."""
        return self.rated.table

    # ---- what the user sets ----------------------------------------------------------------------------------------

    def agree_across(self, group: Any, *, every: int, timeout_s: float) -> None:
        """Patterns are to be alike on the ranks of ``group``, and only there."""
        with self._lock:
            self.ranks.across(group, every=every, timeout_s=timeout_s)
            self._agreed = False

    def pinned(self, chosen: Iterable[int | str | Branch]) -> contextlib.AbstractContextManager[None]:
        """A block in which forwards of this thread drop exactly ``chosen`` (:meth:`Overrides.pinned`)."""
        return self._overrides.pinned(chosen)

    def repeated(self, forwards: int) -> contextlib.AbstractContextManager[None]:
        """A block in which forwards of this thread drop what the last ones did (:meth:`Overrides.repeated`)."""
        return self._overrides.repeated(forwards, lambda: self._epoch)

    # ---- what the compiled graphs call -----------------------------------------------------------------------------

    def add_branch(self, name: str, layer: str, *, trainable: bool, droppable: bool) -> Branch:
        """Enter a branch of a newly compiled graph into the table.

        Raises:
            ValueError: a loaded state does not know the branch.
        """
        with self._lock:
            self._expected.found(name)
            branch = self.branches.add(name, layer, rate=self.rated.rates.current)
            if self.rated.present.gain(branch, trainable=trainable, droppable=droppable):
                self._facts_changed()
            else:
                self.rated.assign()
            self._overrides.found(branch)
            return branch

    def present(self, presence: Presence, *, in_part: bool = False) -> None:
        """Take note of what a graph that is about to run says of its branches (:meth:`PresentBranches.enter`)."""
        with self._lock:
            if self.rated.present.enter(presence, in_part=in_part):
                self._facts_changed()

    def forget(self, model: int) -> None:
        """A model is no more: none of its branches can be dropped until a graph says so."""
        with self._lock:
            self.rated.present.forget(model)
            self._facts_changed()

    def _facts_changed(self) -> None:
        """Patterns are sampled from what can be dropped now, and ranks agree on it anew."""
        self._agreed = False
        self.rated.facts_changed()

    def sample(
        self,
        indices: Sequence[int],
        presence: Presence | None = None,
        check: Callable[[frozenset[int]], object] | None = None,
    ) -> frozenset[int]:
        """The branches among ``indices`` (those of one graph that it can drop) that this forward drops.

        Args:
            indices: the graph's droppable branches.
            presence: what the graph says of all its branches; ``None`` for what the table says.
            check: is shown the sample, and may raise.

        Whatever is raised, by a pattern of the user's or by ``check``, the forward then does not count.

        Raises:
            ValueError: a pinned pattern drops everything trainable, or a loaded state has branches the model lacks.
            RuntimeError: the forward is to repeat one that there was none of.
            RankDisagreementError: another rank of a distributed run would not drop the same branches.
        """
        around = tuple(indices) if presence is None else presence.branches
        if not around:
            return frozenset()
        with self._lock, self._undone_if_refused():
            model = self.branches.model_of(around[0])
            forward = self._thread.forward(model, around, self._epoch)
            if presence is not None:
                self.present(presence, in_part=bool(forward.dropped))
            if presence is not None and not presence.trains:
                return frozenset()
            mine = set(indices)
            dropped = frozenset(mine.intersection(self._pattern(forward, model, around)))
            if check is not None:
                check(dropped)
            if not forward.counted:
                forward.counted = True
                self.forwards += 1
                if forward.repeats is None:
                    self._thread.remember(model, forward)
            for index in mine:
                branch = self.branches[index]
                branch.times_seen += 1
                branch.times_dropped += index in dropped
            forward.dropped |= dropped
            return dropped

    def _pattern(self, forward: Forward, model: int, around: Collection[int]) -> Collection[int]:
        """What decides which branches of the graph with the branches ``around`` are dropped."""
        override = self._thread.overrides[-1] if self._thread.overrides else None
        scales: dict[int, float] = {}
        if isinstance(override, Repeated):
            earlier = override.repeated_by(forward, model)
            forward.pattern, scales = earlier.dropped, earlier.scales
        elif override is not None:
            forward.pattern = self._overrides.dropped_by(override, model)
        else:
            forward.pattern = self._sampled(forward, model, around)
            if self.rated.rates.rescale:
                scales = {index: self.rated.scale(index) for index in around}
        forward.scales.update(scales)
        return forward.pattern

    def drops_all_before(self, index: int) -> bool:
        """Whether the latest forward drops every droppable branch of the model that runs before the one at ``index``."""
        with self._lock:
            model = self.branches.model_of(index)
            dropped = self._thread.forwards[model].pattern
            return all(b.index in dropped for b in self.branches.of(model) if b.droppable and b.index < index)

    def scales(self, indices: Sequence[int]) -> tuple[float, ...]:
        """What the latest forward multiplies each branch's gradients by if it is kept; empty if by nothing."""
        latest = self._thread.latest
        if latest is None or not latest.scales:
            return ()
        return tuple(latest.scales.get(index, 1.0) for index in indices)

    @property
    def round_number(self) -> int:
        """The number of this thread's present round, from 1."""
        latest = self._thread.latest
        return latest.round.number if latest is not None and latest.round is not None else 0

    @property
    def overridden(self) -> bool:
        """Whether a block says what this thread's forwards drop."""
        return bool(self._thread.overrides)

    def _sampled(self, forward: Forward, model: int, around: Collection[int]) -> set[int]:
        current = forward.round
        if current is None or current.epoch != self._epoch:
            self._check_state_is_complete(model)
            self.rounds += 1
            self.rated.expect_progress(self.rounds)
            current = forward.round = Round(self.rounds, self._epoch, self.rated.present.version)
            if self._agreed and self.ranks.needed:
                self.ranks.compare(self.rounds, self._facts)
        if current.version != self.rated.present.version:  # a piece of the model is not what it was at the last sample
            current.keep_only(forward.seen.difference(around))
            current.version = self.rated.present.version
        if not current.decided.issuperset(around):
            if self.rated.present.ask([b for b in self.branches.of(model) if b.index not in forward.seen]):
                self._facts_changed()
                current.version = self.rated.present.version
            if not self._agreed and self.ranks.needed:
                self._agree()
            self._extend(current, model)
        return current.dropped

    def _agree(self) -> None:
        """Before sampling from branches or a state that are new: all ranks must have them alike, or all raise.

        Raises:
            RankDisagreementError: they do not.
        """
        mine = [branch for branch in self.branches if branch.droppable]
        flops = {branch.name: branch.backward_flops for branch in mine}
        decided = self.ranks.agree(Proposal(self._facts(), self._seed, torch.initial_seed(), flops))
        self._seed = decided["seed"]
        for branch in mine:
            branch.backward_flops = decided["flops"][branch.name]
        self.rated.flops.take_over(mine)
        self.rated.assign()
        self._agreed = True

    def check_ranks(self) -> None:
        """Wait for all ranks, and compare all that decides patterns.

        Raises:
            RankDisagreementError: the ranks differ, or one of them did not come.
        """
        with self._lock:
            if self.ranks.needed:
                self.ranks.check(self._facts() | {"seed": self._seed})

    def _facts(self) -> dict[str, Any]:
        """What must be equal on all ranks, and is once it has been agreed on."""
        return {
            **self._configuration,
            "number of training forwards": self.rounds,
            "rate": self.rated.rates.rate,
            "schedule": in_words(self.rated.rates.schedule),
            "progress": self.rated.rates.progress,
            "rates set by hand": [list(item) for item in sorted(self.rated.rates.by_hand.items())],
            "sensitivities": [list(item) for item in self.rated.rates.sensitivities.items()],
            "branches": [[b.name, b.layer, b.trainable] for b in self.branches if b.droppable],
        }

    def _extend(self, current: Round, model: int) -> None:
        """Sample for every known branch of the model that this round has no answer for yet."""
        known = self.branches.of(model)
        fresh = [b for b in known if b.index not in current.decided]
        kept_one = any(
            b.trainable and b.droppable and b.index in current.decided and b.index not in current.dropped for b in known
        )
        groups = self.rated.units(fresh)
        held = (current.number - 1) // self._hold + 1
        rng = random.Random(f"dropbp_fx:{self._resolved_seed()}:{held}:{len(current.decided)}")
        chosen = checked_sample(self.rated.pattern, [unit for unit, _ in groups], rng, keep_one=not kept_one)
        for index in chosen:
            current.dropped.update(groups[index][1])
        current.decided.update(b.index for b in fresh)

    # ---- state -----------------------------------------------------------------------------------------------------

    def _resolved_seed(self) -> int:
        if self._seed is None:
            self._seed = torch.initial_seed()
        return self._seed

    @contextlib.contextmanager
    def _undone_if_refused(self) -> Iterator[None]:
        """A sample that raises leaves everything as if it had not begun, but for what ranks have agreed on."""
        rounds, seed, agreed = self.rounds, self._seed, self._agreed
        forwards, latest = dict(self._thread.forwards), self._thread.latest
        try:
            yield
        except BaseException:
            self.rounds, self._thread.forwards, self._thread.latest = rounds, forwards, latest
            if self._agreed == agreed:
                self._seed = seed
            raise

    def saved(self, running: Sequence[SavedAverage], reallocated: int) -> SavedState:
        """Everything that later patterns depend on.

        Args:
            running: the averages of the running estimate of sensitivities.
            reallocated: the round at which rates were last re-allocated by it.
        """
        with self._lock:
            return SavedState(
                rate=self.rated.rates.rate,
                progress=self.rated.rates.progress,
                schedule=self.rated.rates.schedule,
                rates_by_hand=self.rated.rates.by_hand,
                sensitivity=self.rated.sensitivity,
                running=running,
                reallocated=reallocated,
                granularity=self.rated.granularity,
                seed=self._seed,
                rounds=self.rounds,
                forwards=self.forwards,
                branches=tuple(self.branches),
            )

    def load(self, state: Mapping[str, Any], *, strict: bool = True) -> SavedState:
        """Go on where ``state`` was saved; what came later is forgotten.

        Branches that the state does not know, as graphs showed them after it was saved, stay and count from 0.

        Returns:
            The state, whose parts that are no sampler's are still to be taken over. That is not refused any more.

        Raises:
            TypeError, ValueError: the state is none, of another granularity, saved with a function as the schedule that
                this backend does not have, or of a model with other branches. Then nothing has changed. Where this
                backend has not seen its model yet, the branches are compared as its graphs come in.
        """
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be True or False, not {shown(strict)}.")
        with self._lock:
            saved = SavedState.parsed(state, self.rated.rates.schedule)
            if saved.granularity != self.rated.granularity:
                raise ValueError(
                    f"The state was saved with granularity={saved.granularity!r}, this backend has "
                    f"granularity={self.rated.granularity!r}. Make the backend with the granularity of the state."
                )
            check_attainable(saved.rate, self.rated.rates.allocation, self.rated.rates.max_rate)
            expected = self._expected.names
            found = [branch for branch in self.branches if branch.name not in expected]
            if strict and found and saved.branches:
                check_same_branches(saved.branches, tuple(self.branches))
            present = tuple(self.branches) if found else ()  # else the table is an earlier state's, and no graph's
            branches = continued(present, expected, saved.branches)
            measured = saved.sensitivity
            by_name = {} if measured is None else dict(zip(measured.names, measured.values, strict=True))
            known, measured = without_unreached(branches, by_name, measured)
            rates = dataclasses.replace(
                self.rated.rates,
                rate=saved.rate,
                progress=saved.progress,
                schedule=saved.schedule,
                by_hand=saved.rates_by_hand,
                sensitivities=known,
            )
            of_branches = rates.of(branches)

            # Nothing below is refused.
            self._seed = saved.seed
            self.rounds = saved.rounds
            self.forwards = saved.forwards
            self._epoch += 1
            self._agreed = False
            self._expected.load(saved.branches, present, strict=strict)
            self.rated.become(branches, rates, of_branches, measured)
            return saved

    def _check_state_is_complete(self, model: int) -> None:
        """By the second forward after loading, every branch of the state should have turned up.

        Raises:
            ValueError: one has not, and the state was to fit.
        """
        if not self._expected:
            return
        if self.rated.present.lose(self._expected.strangers()):
            self._facts_changed()
        past = self._thread.past.get(model)
        if past and past[-1].epoch == self._epoch:
            self._expected.check_complete(model)
