"""Observe some of the forwards, estimate sensitivities from them, and re-allocate rates when that is due."""

from __future__ import annotations

import threading

from dropbp_fx import _torch
from dropbp_fx.policy.branches import in_model
from dropbp_fx.policy.sampler import PatternSampler
from dropbp_fx.policy.saved_state import SavedState
from dropbp_fx.sensitivity.observation import Observation
from dropbp_fx.sensitivity.running import RunningSensitivity
from dropbp_fx.sensitivity.sensitivity import Metric, Sensitivity

#: Share of the forwards that are observed for a running estimate: one in so many.
_OBSERVE_EVERY = 20


class Observer:
    """The running estimate of one backend.

    Args:
        sampler: whose forwards are observed, and whose rates are re-allocated.
        reallocate_every: once in so many forwards; ``None`` for never, and then nothing is observed.
    """

    def __init__(self, sampler: PatternSampler, reallocate_every: int | None) -> None:
        self._sampler = sampler
        self._every = reallocate_every
        self._running = RunningSensitivity()
        self._reallocated = 0  # the round at which rates were last re-allocated
        self._pending: list[tuple[int, Observation]] = []  # with the number of the round
        self._lock = threading.RLock()

    def observation(self) -> Observation | None:
        """Whoever watches the forward that was just sampled, ``None`` if nobody does; one forward of each model is watched.

        A forward under saved-tensor hooks (a checkpoint's, for one) is not observed: isolated regions would keep alive what
        those hooks are there to free.
        """
        if self._every is None or self._sampler.overridden:
            return None
        number = self._sampler.round_number
        if not 1 <= number % _OBSERVE_EVERY <= len(self._sampler.branches.models):
            return None
        if _torch.saved_tensor_hooks_are_set():
            return None
        if not self._pending or self._pending[-1][0] != number:
            self._pending.append((number, Observation()))
        return self._pending[-1][1]

    def estimate(self, metric: Metric = "gradient") -> Sensitivity | None:
        """Sensitivities estimated from all that was observed up to now, ``None`` while that is too little."""
        with self._lock:
            self.read_pending()
            self._pending.clear()
            branches = self._sampler.branches
            estimates: dict[str, float] = {}
            for model in branches.models:
                names = [branch.name for branch in branches.of(model) if branch.droppable]
                found = self._running.estimate(names, metric, in_model("", model))
                if found is None:
                    return None
                estimates |= found
            if not estimates:
                return None
            values = tuple(estimates.get(branch.name, 0.0) for branch in branches)
            return Sensitivity(tuple(branch.name for branch in branches), values, metric, 1)

    def read_pending(self) -> None:
        """Add to the running estimate what was observed; forwards whose backward has yet to run stay pending."""
        with self._lock:
            unfinished: list[tuple[int, Observation]] = []
            for number, observation in self._pending:
                found, stem = observation.read()
                if found:
                    branches = self._sampler.branches
                    model = branches.model_of(next(iter(found)))
                    by_name = {branches[index].name: observed for index, observed in found.items()}
                    self._running.observe(by_name, stem, in_model("", model))
                else:
                    unfinished.append((number, observation))
            self._pending = unfinished

    def reallocate_if_due(self) -> None:
        """Re-allocate rates by the running estimate, once in as many forwards as was asked for."""
        rounds = self._sampler.rounds
        if self._every is None or not rounds or rounds % self._every or self._reallocated == rounds:
            return
        estimate = self.estimate()
        if estimate is not None:
            self._sampler.rated.set_sensitivities(self._sampler.ranks.mean(estimate, "a re-allocation of rates"))
        self._reallocated = rounds

    def saved(self) -> SavedState:
        """The sampler's state, with that of the running estimate. Waits for the device."""
        with self._lock:
            self.read_pending()
            return self._sampler.saved(self._running.averages(), self._reallocated)

    def go_on_from(self, saved: SavedState) -> None:
        """Go by a state that the sampler has loaded. What was observed and not yet added is of a run that does not go on."""
        with self._lock:
            self._running.load(saved.running)
            self._reallocated = saved.reallocated
            self._pending.clear()
