"""Decide for each forward which branches it drops."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from dropbp_fx.policy.branches import Branch, BranchTable, in_model
from dropbp_fx.policy.patterns import Pattern, RandomPattern, checked_draw, frequencies
from dropbp_fx.policy.presence import Presence, PresentBranches
from dropbp_fx.policy.ramps import RateSchedule, ScheduleName
from dropbp_fx.policy.ranks import Proposal, RankAgreement, in_words
from dropbp_fx.policy.rates import Rates, check_attainable
from dropbp_fx.policy.rounds import Forward, PerThread, Pinned, Repeated, Round
from dropbp_fx.policy.running import Observed, RunningSensitivity
from dropbp_fx.policy.sampling import Unit
from dropbp_fx.policy.saved_state import Granularity, SavedState
from dropbp_fx.policy.sensitivity import Metric, Sensitivity
from dropbp_fx.policy.values import shown

#: Share of the forwards that are observed for a running estimate: one in so many.
_OBSERVE_EVERY = 20
#: A run whose schedule has not moved by this many forwards was probably never told of its progress.
_PROGRESS_EXPECTED_BY = 100


class Schedule:
    """The drop policy of one backend: rates, random draws and their state.

    Patterns are a function of (seed, number of the round, rates, branches): they leave every other random stream alone,
    and a resumed run goes on with the same ones. ``seed=None`` takes ``torch.initial_seed()`` at the first draw.

    Args:
        rates: how the branches get their rates; a number stands for equal ones.
        granularity: "branch" drops single branches; "layer" all branches of a layer together.
        seed: seeds the patterns.
        pattern: which branches are dropped together.
        reallocate_every: re-allocate rates by a running estimate of sensitivities, once in so many forwards.
        configuration: whatever else the ranks of a distributed run must have alike, in words.
    """

    def __init__(
        self,
        rates: Rates | float,
        granularity: Granularity,
        seed: int | None,
        *,
        pattern: Pattern | None = None,
        reallocate_every: int | None = None,
        configuration: Mapping[str, str] | None = None,
    ) -> None:
        self.branches = BranchTable()
        self._present = PresentBranches(self.branches)
        self.ranks = RankAgreement()
        self.granularity: Granularity = granularity
        self.forwards = 0
        self.rates = rates if isinstance(rates, Rates) else Rates(rates)
        self.pattern: Pattern = pattern or RandomPattern()
        self._reallocate_every = reallocate_every
        self._running = RunningSensitivity()
        self._progress_told = False
        self._scales: dict[int, float] | None = None  # by branch; forgotten, like the next, whenever a rate changes
        self._units_of: dict[tuple[int, ...], list[tuple[Unit, list[int]]]] = {}
        self._seed = seed
        self._rounds = 0
        self._reallocated = 0  # the round at which rates were last re-allocated
        self._expected: set[str] | None = None  # names in a loaded state that no graph has shown yet
        self._strict_state = True
        self._configuration = dict(configuration or {})
        self._agreed = False  # all ranks have agreed on the branches and on the state that was loaded last
        self._flops: dict[tuple[int, bool], int] = {}  # by branch and whether it is trainable, once that is settled
        self._thread = PerThread()
        self.sensitivity: Sensitivity | None = None
        self._epoch = 0  # loading a state ends every thread's round
        self._lock = threading.RLock()

    # ---- what the user sets ----------------------------------------------------------------------------------------

    @property
    def rate(self) -> float:
        return self.rates.rate

    @rate.setter
    def rate(self, rate: float) -> None:
        """Give all branches one rate; rates that were set by hand are taken back."""
        with self._lock:
            check_attainable(rate, self.rates.allocation, self.rates.max_rate)
            self._go_by(dataclasses.replace(self.rates, rate=rate, by_hand={}))

    def set_by_hand(self, by_hand: Mapping[str, float]) -> None:
        """Let these branches have rates of their own, and no others."""
        with self._lock:
            self._go_by(dataclasses.replace(self.rates, by_hand=by_hand))

    def reschedule(self, schedule: ScheduleName | RateSchedule) -> None:
        """Let the rate depend on progress in another way from now on."""
        with self._lock:
            self._go_by(dataclasses.replace(self.rates, schedule=schedule))

    @property
    def progress(self) -> float:
        return self.rates.progress

    @progress.setter
    def progress(self, progress: float) -> None:
        with self._lock:
            self._go_by(dataclasses.replace(self.rates, progress=progress))
            self._progress_told = True

    def assign(self) -> None:
        """Give every branch the rate that is its due now."""
        self._go_by(self.rates)

    def _go_by(self, rates: Rates) -> None:
        """Give every branch the rate that is its due by ``rates``, from now on.

        Raises:
            TypeError, ValueError: there is none; then nothing has changed.
        """
        with self._lock:
            settled = rates.of(tuple(self.branches))
            self.rates = rates
            self._set_rates(settled)

    def _set_rates(self, settled: Iterable[float]) -> None:
        for branch, rate in zip(self.branches, settled, strict=False):
            branch.rate = rate
        self._scales = None
        self._units_of.clear()

    def learn(self, sensitivity: Sensitivity) -> None:
        """Take note of measured sensitivities."""
        with self._lock:
            by_name = dict(zip(sensitivity.names, sensitivity.values, strict=True))
            known, measured = _without_unreached(tuple(self.branches), by_name, sensitivity)
            self._go_by(dataclasses.replace(self.rates, sensitivities=known))
            self.sensitivity = measured

    def agree_across(self, group: Any, *, every: int, timeout_s: float) -> None:
        """Patterns are to be alike on the ranks of ``group``, and only there."""
        with self._lock:
            self.ranks.across(group, every=every, timeout_s=timeout_s)
            self._agreed = False

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
        override = Pinned(items, set())
        if len(self.branches):
            self._check_keeps_one(self.branches.resolve(items), self.branches.models)
        else:
            override.unmet = {item.name if isinstance(item, Branch) else item for item in items}
        self._thread.overrides.append(override)
        try:
            yield
        finally:
            self._thread.overrides.pop()
        if override.unmet and len(self.branches):
            self.branches.resolve(override.unmet)

    @contextlib.contextmanager
    def repeat(self, forwards: int) -> Iterator[None]:
        """Within the block (and this thread) drop what the last ``forwards`` forwards of each model dropped, in their order.

        Raises:
            RuntimeError: no model has run as many in this thread.
        """
        with self._lock:
            earlier = self._thread.last(forwards, self._epoch)
        if not earlier:
            many = "a training forward" if forwards == 1 else f"{forwards} training forwards"
            raise RuntimeError(
                f"repeated({'' if forwards == 1 else forwards}) repeats the pattern of {many} of this thread, but no model "
                "has run as many in it since this backend was made or a state was loaded. Run the forward to be repeated "
                "first, outside of the block."
            )
        self._thread.overrides.append(Repeated(earlier))
        try:
            yield
        finally:
            self._thread.overrides.pop()

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
            branch = self.branches.meet(name, layer, rate=self.rates.current)
            if self._expected is not None:
                self._expected.discard(name)
            if self._present.gain(branch, trainable=trainable, droppable=droppable):
                self._facts_changed()
            else:
                self.assign()
            for override in self._thread.overrides:
                if isinstance(override, Pinned):
                    override.unmet -= {branch.name, branch.index}
            return branch

    def present(self, presence: Presence, *, in_part: bool = False) -> None:
        """Take note of what a graph that is about to run says of its branches (:meth:`PresentBranches.enter`)."""
        with self._lock:
            if self._present.enter(presence, in_part=in_part):
                self._facts_changed()

    def forget(self, model: int) -> None:
        """A model is no more: none of its branches can be dropped until a graph says so."""
        with self._lock:
            self._present.forget(model)
            self._facts_changed()

    def _facts_changed(self) -> None:
        """Units, rates and scales are those of what can be dropped now, and ranks agree on it anew."""
        self._agreed = False
        self._weigh_by_what_is_trained()
        branches = tuple(self.branches)
        known, self.sensitivity = _without_unreached(branches, self.rates.sensitivities, self.sensitivity)
        self._go_by(dataclasses.replace(self.rates, sensitivities=known))

    def weigh(self, index: int, backward_flops: int, *, trainable: bool) -> None:
        """Take note of what dropping a branch saves where it is trainable, or where it is not, unless that is known.

        The first graph's figure stays, and a loaded state's: another one for each sequence length would make draws
        depend on the order in which graphs were compiled, which a resumed run or another rank does not share.
        """
        with self._lock:
            if backward_flops:
                self._flops.setdefault((index, trainable), backward_flops)
            self._weigh_by_what_is_trained()

    def flops_of(self, index: int, *, trainable: bool) -> int:
        """What dropping a branch saves where it is trainable, or where it is not; 0 if that is not known yet."""
        return self._flops.get((index, trainable), 0)

    def _weigh_by_what_is_trained(self) -> None:
        """A branch's FLOPs are those of its being trained or not, as it is now; until those are known, what they were."""
        for branch in self.branches:
            branch.backward_flops = self._flops.get((branch.index, branch.trainable), branch.backward_flops)

    def draw(
        self,
        indices: Sequence[int],
        presence: Presence | None = None,
        check: Callable[[frozenset[int]], object] | None = None,
    ) -> frozenset[int]:
        """The branches among ``indices`` (those of one graph that it can drop) that this forward drops.

        Args:
            indices: the graph's droppable branches.
            presence: what the graph says of all its branches; ``None`` for what the table says.
            check: is shown what was drawn, and may raise.

        Whatever is raised, by a pattern of the user's or by ``check`` of what was drawn, the forward then does not count.

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
            forward.pattern = self._pinned(override, model)
        else:
            forward.pattern = self._take(forward, model, around)
            if self.rates.rescale:
                scales = {index: self._scale(index) for index in around}
        forward.scales.update(scales)
        return forward.pattern

    def drops_all_before(self, index: int) -> bool:
        """Whether the forward just drawn drops every droppable branch of the model that runs before the one at ``index``."""
        with self._lock:
            model = self.branches.model_of(index)
            dropped = self._thread.forwards[model].pattern
            return all(b.index in dropped for b in self.branches.of(model) if b.droppable and b.index < index)

    def scales(self, indices: Sequence[int]) -> tuple[float, ...]:
        """What the forward just drawn multiplies each branch's gradients by if it is kept; empty if by nothing."""
        latest = self._thread.latest
        if latest is None or not latest.scales:
            return ()
        return tuple(latest.scales.get(index, 1.0) for index in indices)

    @property
    def round_number(self) -> int:
        """The number of this thread's present round, from 1."""
        latest = self._thread.latest
        return latest.round.number if latest is not None and latest.round is not None else 0

    def observes(self) -> bool:
        """Whether the forward that was just drawn is to be observed: of several models, one forward of each."""
        return (
            self._reallocate_every is not None
            and not self._thread.overrides
            and 1 <= self.round_number % _OBSERVE_EVERY <= len(self.branches.models)
        )

    def observed(self, branches: Mapping[int, Observed], stem: float | None) -> None:
        """Take note of what a step showed of its kept branches, by index."""
        with self._lock:
            model = self.branches.model_of(next(iter(branches))) if branches else 1
            named = {self.branches[index].name: found for index, found in branches.items()}
            self._running.observe(named, stem, in_model("", model))

    def running_estimate(self, metric: Metric = "gradient") -> Sensitivity | None:
        """Sensitivities estimated from the steps observed so far, ``None`` while there are too few."""
        with self._lock:
            estimates: dict[str, float] = {}
            for model in self.branches.models:
                names = [branch.name for branch in self.branches.of(model) if branch.droppable]
                found = self._running.estimate(names, metric, in_model("", model))
                if found is None:
                    return None
                estimates |= found
            if not estimates:
                return None
            values = tuple(estimates.get(branch.name, 0.0) for branch in self.branches)
            return Sensitivity(tuple(branch.name for branch in self.branches), values, metric, 1)

    def reallocation_due(self) -> bool:
        """Whether rates are to be re-allocated before the next forward."""
        with self._lock:
            every = self._reallocate_every
            return (
                every is not None
                and self._rounds > 0
                and self._rounds % every == 0
                and self._reallocated != self._rounds
            )

    def reallocated(self) -> None:
        """Re-allocation was due, and is done or cannot be done yet."""
        self._reallocated = self._rounds

    def _pinned(self, override: Pinned, model: int) -> frozenset[int]:
        """What ``override`` drops.

        Raises:
            ValueError: everything trainable would be dropped.
        """
        met = [item for item in override.chosen if _plain(item) not in override.unmet]
        dropped = self.branches.resolve(met)
        self._check_keeps_one(dropped, (model,))
        return dropped

    def _check_keeps_one(self, dropped: Collection[int], models: Sequence[int]) -> None:
        """Some model keeps something trainable, if any model has something.

        Raises:
            ValueError: none does.
        """
        trainable = [b for model in models for b in self.branches.of(model) if b.trainable and b.droppable]
        if not trainable or any(branch.index not in dropped for branch in trainable):
            return
        # What the table says is as of the last forward: something may have been unfrozen since, or all of this frozen.
        now = {b.index for model in models for b in self.branches.of(model) if self._present.requires_gradient(b.index)}
        if now and not now <= set(dropped):
            return
        raise ValueError(
            f"The pattern drops all {len(trainable)} branches that have trainable parameters, so nothing would be "
            "trained. Keep at least one of them."
        )

    def _take(self, forward: Forward, model: int, around: Collection[int]) -> set[int]:
        current = forward.round
        if current is None or current.epoch != self._epoch:
            self._check_state_is_complete(model)
            self._rounds += 1
            self._expect_progress()
            current = forward.round = Round(self._rounds, self._epoch, self._present.version)
            if self._agreed and self.ranks.needed:
                self.ranks.compare(self._rounds, self._facts)
        if current.version != self._present.version:  # a piece of the model is not what it was when the round was drawn
            current.keep_only(forward.seen.difference(around))
            current.version = self._present.version
        if not current.drawn.issuperset(around):
            if self._present.ask([b for b in self.branches.of(model) if b.index not in forward.seen]):
                self._facts_changed()
                current.version = self._present.version
            if not self._agreed and self.ranks.needed:
                self._agree()
            self._extend(current, model)
        return current.dropped

    def _agree(self) -> None:
        """Before a draw from branches or a state that are new: all ranks must have them alike, or all raise.

        Raises:
            RankDisagreementError: they do not.
        """
        mine = [branch for branch in self.branches if branch.droppable]
        flops = {branch.name: branch.backward_flops for branch in mine}
        decided = self.ranks.settle(Proposal(self._facts(), self._seed, torch.initial_seed(), flops))
        self._seed = decided["seed"]
        for branch in mine:
            branch.backward_flops = decided["flops"][branch.name]
            self._flops[branch.index, branch.trainable] = branch.backward_flops
        self.assign()
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
            "number of training forwards": self._rounds,
            "rate": self.rates.rate,
            "schedule": in_words(self.rates.schedule),
            "progress": self.rates.progress,
            "rates set by hand": [list(item) for item in sorted(self.rates.by_hand.items())],
            "sensitivities": [list(item) for item in self.rates.sensitivities.items()],
            "branches": [[b.name, b.layer, b.trainable] for b in self.branches if b.droppable],
        }

    def _expect_progress(self) -> None:
        """Warn once, where a schedule is never told of the run's progress."""
        if self.rates.schedule != "constant" and not self._progress_told and self._rounds == _PROGRESS_EXPECTED_BY:
            warnings.warn(
                f"The schedule {self.rates.schedule!r} has stayed at progress 0 for {_PROGRESS_EXPECTED_BY} forwards. Set "
                "backend.progress = step / total_steps in the training loop.",
                stacklevel=2,
            )

    def _scale(self, index: int) -> float:
        """1 / (1 - how often the branch is dropped): kept gradients times this are right on average."""
        if self._scales is None:
            often = self._frequencies()
            self._scales = {index: 1.0 / (1.0 - share) if share < 1 else 1.0 for index, share in often.items()}
        return self._scales.get(index, 1.0)

    def _extend(self, current: Round, model: int) -> None:
        """Draw for every known branch of the model that this round has no answer for yet."""
        known = self.branches.of(model)
        fresh = [b for b in known if b.index not in current.drawn]
        kept_one = any(
            b.trainable and b.droppable and b.index in current.drawn and b.index not in current.dropped for b in known
        )
        groups = self._units([b for b in fresh if b.droppable])
        rng = random.Random(f"dropbp_fx:{self._resolved_seed()}:{current.number}:{len(current.drawn)}")
        chosen = checked_draw(self.pattern, [unit for unit, _ in groups], rng, keep_one=not kept_one)
        for index in chosen:
            current.dropped.update(groups[index][1])
        current.drawn.update(b.index for b in fresh)

    def _units(self, branches: Sequence[Branch]) -> list[tuple[Unit, list[int]]]:
        """What is dropped as a whole, with the indices of its branches."""
        key = tuple([branch.index for branch in branches])
        found = self._units_of.get(key)
        if found is None:
            found = self._units_of[key] = units_of(branches, self.granularity)
        return found

    # ---- what is asked about it ------------------------------------------------------------------------------------

    def attainable_rate(self) -> float:
        """The share of droppable branches that the pattern drops in the long run."""
        often = self._frequencies()
        return sum(often.values()) / len(often) if often else 0.0

    def _frequencies(self) -> dict[int, float]:
        """How often the pattern drops each branch that is droppable now, by index."""
        found: dict[int, float] = {}
        for model in self.branches.models:
            groups = self._units([b for b in self.branches.of(model) if b.droppable])
            often = frequencies(self.pattern, [unit for unit, _ in groups])
            found |= {index: share for share, (_, indices) in zip(often, groups, strict=True) for index in indices}
        return found

    def realised_rate(self) -> float:
        """The share of (branch, training forward) pairs that was dropped, of those that could be."""
        seen = sum(branch.times_seen for branch in self.branches)
        return sum(branch.times_dropped for branch in self.branches) / seen if seen else 0.0

    def realised_flops_rate(self) -> float:
        """The same, branches counting by the backward FLOPs that dropping them saves."""
        seen = sum(branch.times_seen * branch.backward_flops for branch in self.branches)
        return sum(branch.times_dropped * branch.backward_flops for branch in self.branches) / seen if seen else 0.0

    # ---- state -----------------------------------------------------------------------------------------------------

    def _resolved_seed(self) -> int:
        if self._seed is None:
            self._seed = torch.initial_seed()
        return self._seed

    @contextlib.contextmanager
    def _undone_if_refused(self) -> Iterator[None]:
        """A draw that raises leaves everything as if it had not begun, but for what ranks have agreed on."""
        rounds, seed, agreed = self._rounds, self._seed, self._agreed
        forwards, latest = dict(self._thread.forwards), self._thread.latest
        try:
            yield
        except BaseException:
            self._rounds, self._thread.forwards, self._thread.latest = rounds, forwards, latest
            if self._agreed == agreed:
                self._seed = seed
            raise

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on, in plain Python types."""
        with self._lock:
            return SavedState(
                rate=self.rates.rate,
                progress=self.rates.progress,
                schedule=self.rates.schedule,
                rates_by_hand=self.rates.by_hand,
                sensitivity=self.sensitivity,
                running=self._running.averages(),
                reallocated=self._reallocated,
                granularity=self.granularity,
                seed=self._seed,
                rounds=self._rounds,
                forwards=self.forwards,
                branches=tuple(self.branches),
            ).as_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Go on where ``state`` was saved; what came later is forgotten.

        Branches that the state does not know, as they were met after it was saved, stay and count from 0.

        Raises:
            TypeError, ValueError: the state is none, of another granularity, saved with a function as the schedule that
                this backend does not have, or of a model with other branches. Then nothing has changed. Where this
                backend has not met its model yet, the branches are compared as its graphs come in.
        """
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be True or False, not {shown(strict)}.")
        with self._lock:
            saved = SavedState.parsed(state, self.rates.schedule)
            if saved.granularity != self.granularity:
                raise ValueError(
                    f"The state was saved with granularity={saved.granularity!r}, this backend has "
                    f"granularity={self.granularity!r}. Make the backend with the granularity of the state."
                )
            check_attainable(saved.rate, self.rates.allocation, self.rates.max_rate)
            unmet = self._expected or set()
            met = [branch for branch in self.branches if branch.name not in unmet]
            if strict and met and saved.branches:
                _check_same_branches(saved.branches, tuple(self.branches))
            present = tuple(self.branches) if met else ()  # else the table is an earlier state's, and no graph's
            branches = _going_on(present, unmet, saved.branches)
            measured = saved.sensitivity
            by_name = {} if measured is None else dict(zip(measured.names, measured.values, strict=True))
            known, measured = _without_unreached(branches, by_name, measured)
            rates = dataclasses.replace(
                self.rates,
                rate=saved.rate,
                progress=saved.progress,
                schedule=saved.schedule,
                by_hand=saved.rates_by_hand,
                sensitivities=known,
            )
            settled = rates.of(branches)

            # Nothing below is refused.
            self.rates = rates
            self.sensitivity = measured
            self._running.load(saved.running)
            self._reallocated = saved.reallocated
            self._seed = saved.seed
            self._rounds = saved.rounds
            self.forwards = saved.forwards
            self._epoch += 1
            self._agreed = False
            names = {branch.name for branch in present}
            added = {branch.name for branch in saved.branches} - names
            if added or self._expected is not None:
                self._expected = (unmet & names) | added if saved.branches else None
            self._strict_state = strict
            self.branches.become(branches)
            for branch in branches:
                if branch.backward_flops:
                    self._flops[branch.index, branch.trainable] = branch.backward_flops
            self._present.version += 1
            self._set_rates(settled)

    def _check_state_is_complete(self, model: int) -> None:
        """By the second forward after loading, every branch of the state should have turned up.

        Those of a state of another model take no part in draws until they do.
        """
        if not self._expected:
            return
        if not self._strict_state:
            strangers = [self.branches.named(name) for name in self._expected]
            if self._present.lose([branch for branch in strangers if branch is not None]):
                self._facts_changed()
            return
        past = self._thread.past.get(model)
        if not (past and past[-1].epoch == self._epoch):
            return
        missing = [branch.name for branch in self.branches.of(model) if branch.name in self._expected]
        if missing:
            raise ValueError(
                f"The loaded state does not fit this model: {len(missing)} of its {len(self.branches.of(model))} branches, "
                f"such as {min(missing)!r}, are not in the model. Load the state of the same model, or pass strict=False "
                "to load_state_dict."
            )


def _check_same_branches(saved: Sequence[Branch], met: Sequence[Branch]) -> None:
    """Refuse a state of other branches, or of branches in other layers."""
    ours, theirs = [(b.name, b.layer) for b in met], [(b.name, b.layer) for b in saved]
    if ours != theirs:
        odd = sorted({name for name, _ in set(ours) ^ set(theirs)})[:3] or ["their order"]
        raise ValueError(
            f"The state does not fit this model: it has {len(saved)} branches, the model has {len(met)}; they "
            f"differ in {', '.join(odd)}. Load the state of the same model, or pass strict=False."
        )


def _going_on(present: Sequence[Branch], unmet: Collection[str], saved: Sequence[Branch]) -> list[Branch]:
    """Copies of the ``present`` branches, which keep their places, as they were saved; then the others of the state.

    Those that the state does not know count from 0. If they are ``unmet``, an earlier state brought them: no graph has them.
    """
    records = {branch.name: branch for branch in saved}
    branches: list[Branch] = []
    for branch in present:
        record = records.pop(branch.name, None)
        if record is not None:
            branches.append(dataclasses.replace(record, index=branch.index, layer=branch.layer))
        else:
            branches.append(dataclasses.replace(branch, times_seen=0, times_dropped=0))
            if branch.name in unmet:
                branches[-1].trainable = branches[-1].droppable = False
    branches += [dataclasses.replace(record, index=len(present) + k) for k, record in enumerate(records.values())]
    return branches


def _without_unreached(
    branches: Sequence[Branch], known: Mapping[str, float], measured: Sensitivity | None
) -> tuple[dict[str, float], Sensitivity | None]:
    """Known and measured sensitivities without those that say nothing: that of a branch that no gradient reaches is 0, which
    tells nothing of it once a gradient does.
    """
    left = dict(known)
    for branch in branches:
        if not branch.droppable and left.get(branch.name) == 0:
            del left[branch.name]
    if measured is not None:
        left_out = {branch.name for branch in branches if branch.droppable and branch.name not in left}
        if not left_out.isdisjoint(measured.names):
            pairs = zip(measured.names, measured.values, strict=True)
            kept = [(name, value) for name, value in pairs if name not in left_out]
            names, values = zip(*kept, strict=True) if kept else ((), ())
            measured = dataclasses.replace(measured, names=names, values=values)
    return left, measured


def units_of(branches: Iterable[Branch], granularity: Granularity) -> list[tuple[Unit, list[int]]]:
    """What is dropped as a whole, in the order of execution, with the indices of its branches."""
    groups: dict[str, list[Branch]] = {}
    for branch in branches:
        groups.setdefault(branch.name if granularity == "branch" else branch.layer, []).append(branch)
    return [(_unit(group), [branch.index for branch in group]) for group in groups.values()]


def _plain(item: int | str | Branch) -> int | str:
    return item.name if isinstance(item, Branch) else item


def _unit(group: Sequence[Branch]) -> Unit:
    """Branches that are dropped together: their rate is the mean, weighted by what dropping each saves."""
    flops = float(sum(branch.backward_flops for branch in group))
    weights = [branch.backward_flops / flops if flops else 1 / len(group) for branch in group]
    mean = sum(branch.rate * weight for branch, weight in zip(group, weights, strict=True))
    return Unit(
        rate=min(mean, max(branch.rate for branch in group)),  # rounding must not lift it above its parts
        trainable=any(branch.trainable for branch in group),
        flops=flops,
        layer=group[0].layer,
        name=group[0].name if len(group) == 1 else group[0].layer,
    )
