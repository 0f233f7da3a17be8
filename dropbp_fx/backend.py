"""What ``torch.compile`` calls. The rooms of the package are wired together here; the logic is in them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.captured import EnteredBranches
from dropbp_fx.config import BackendConfig, checked_inductor_options
from dropbp_fx.graph.grad_mode import start_without_gradients, switches_gradients_on
from dropbp_fx.lowering import Lowering
from dropbp_fx.policy.branches import Branch, checked_choice
from dropbp_fx.policy.drop_policy import DropPolicy, checked_rate
from dropbp_fx.policy.rates import RateView
from dropbp_fx.policy.rounds import checked_repeats
from dropbp_fx.policy.schedules import RateSchedule, ScheduleName, checked_progress, checked_schedule
from dropbp_fx.runtime.compiler import Compiler
from dropbp_fx.sensitivity.calibration import calibrate, check_call
from dropbp_fx.sensitivity.sensitivity import Metric, Sensitivity, check_calibration
from dropbp_fx.state import BackendState
from dropbp_fx.summary import BackendStats, as_html, as_text
from dropbp_fx.values import shown

_CALIBRATION = "backend.calibrate()"


class DropBPBackend:
    """A ``torch.compile`` backend that drops residual branches in the backward pass. Made by :func:`dropbp_backend`.

    One backend may serve several models and graphs. Patterns are sampled for each model on its own; the branches of the
    second model have ``@2`` behind their names, and so on in the order in which models first run or are registered. Layers
    that are compiled one by one are told apart after :meth:`register`. Deep copies share the original's policy and code (a
    library that copies the backend must not part it from the handle its user holds); a pickled backend becomes an
    independent one with the same configuration and state, and compiles anew.
    """

    def __init__(self, config: BackendConfig, state: BackendState | None = None) -> None:
        self._config = config
        self._state = state or BackendState.of(config)
        if state is None:
            self._state.shortfall.expect_a_call()
        self._note_schedule()
        self.__name__ = "dropbp"

    # ---- torch.compile ---------------------------------------------------------------------------------------------

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph from Dynamo. ``options`` and ``mode`` are ``torch.compile``'s, for Inductor."""
        inductor = dict(self._config.options)
        if mode is not None and mode != "default":
            inductor.update(_torch.inductor_mode_options(mode))
        inductor.update(checked_inductor_options(options, self._config.inner))
        self._state.shortfall.called(cut=_torch.is_cut_by_ddp_optimizer(gm))
        compiler = Compiler(self._config.inner, inductor, self._state.counts, self._config.activation_memory_budget)
        lowering = Lowering(self._config, self._state, compiler)
        inside = switches_gradients_on(gm)
        if inside:
            start_without_gradients(gm)
        with torch.enable_grad() if inside else contextlib.nullcontext():
            graph = lowering.capture(gm)
            if isinstance(graph, EnteredBranches):
                compiled = lowering.whole(gm, example_inputs, graph)
            else:
                with _torch.unseen_by_ddp_optimizer(gm):
                    compiled = lowering.runner(graph)
        compiler.counts.graphs += 1  # only now: Dynamo may restart its analysis from inside the inner compiler
        return torch.enable_grad()(compiled) if inside else compiled

    def reset(self) -> None:
        """Forget compiled code; ``torch._dynamo.reset()`` calls this. Branches, rates and patterns stay as they are."""
        self._state.variants.clear()
        self._state.runners.clear()
        self._state.graphs.clear()
        self._state.graph_memory.clear()

    # ---- the user's handle -----------------------------------------------------------------------------------------

    @property
    def policy(self) -> DropPolicy:
        """What is dropped and when, with a schedule set or loaded since; the rate that holds now is :attr:`rate`."""
        return self._config.policy

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The residual branches found so far, in execution order; empty before the first forward."""
        return tuple(self._state.sampler.branches)

    @property
    def rate(self) -> float:
        """The drop rate of every branch, in [0, 1). Setting it takes effect at the next forward, without recompiling.

        Raises:
            TypeError, ValueError: when set to something that is no rate.
        """
        return self._state.sampler.rated.rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._state.sampler.rated.rate = checked_rate(rate)

    @property
    def rates(self) -> RateView:
        """The drop rate of every branch, by name; empty before the first forward.

        ``backend.rates["model.layers.3.mlp"] = 0.2`` sets one by hand, ``backend.rates = {...}`` several; they take effect
        at the next forward, without recompiling, and hold until ``del backend.rates[name]`` or until :attr:`rate` is set.

        Raises:
            KeyError: the model has no such branch, or has not run yet.
            TypeError, ValueError: something that is no rate.
        """
        rated = self._state.sampler.rated
        return RateView(rated.table, lambda: rated.rates.by_hand, rated.set_by_hand, checked_rate)

    @rates.setter
    def rates(self, rates: Mapping[str, float]) -> None:
        self.rates.replace(rates)

    @property
    def progress(self) -> float:
        """How much of the run is done, from 0 to 1: what a schedule goes by.

        Set it in the training loop, once an optimizer step: ``backend.progress = step / total_steps``.

        Raises:
            TypeError, ValueError: when set to something that is no number in [0, 1].
        """
        return self._state.sampler.rated.progress

    @progress.setter
    def progress(self, progress: float) -> None:
        self._state.sampler.rated.progress = checked_progress(progress)

    @property
    def schedule(self) -> ScheduleName | RateSchedule:
        """How the rate depends on progress, as in :class:`~dropbp_fx.DropPolicy`. It may be set, from the next forward on.

        Raises:
            TypeError, ValueError: when set to something that is no schedule.
        """
        return self._state.sampler.rated.rates.schedule

    @schedule.setter
    def schedule(self, schedule: ScheduleName | RateSchedule) -> None:
        self._state.sampler.rated.reschedule(checked_schedule(schedule))
        self._note_schedule()

    def register(self, model: torch.nn.Module) -> None:
        """Say which model the layers belong to that are compiled one by one.

        Then the branches of all its layers are told apart and named after their place in the model, and patterns are sampled
        over the whole of it. Call it before the first forward; a model that is compiled whole needs none of this::

            backend.register(model)
            for layer in model.layers:
                layer.compile(backend=backend)

        Raises:
            TypeError: ``model`` is no module.
            RuntimeError: branches have been found already, under names that they would then no longer have.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"register() takes the model that the compiled layers belong to, not {shown(model)}.")
        if self._state.runners:
            raise RuntimeError(
                f"This backend has found {len(self.branches)} branches already, and named them. Call register(model) before "
                "the first forward of a compiled layer."
            )
        self._state.modules.register(model)
        self._state.models.register(model)
        self._state.live_with([model])

    def pinned(self, dropped: Iterable[int | str | Branch]) -> contextlib.AbstractContextManager[None]:
        """Forwards within the block, in this thread, drop exactly these branches, given by index or name.

        Where the backend serves several models, an index or a name of the first model's means the branches of that name in
        all of them; an object of :attr:`branches` means that one.

        Raises:
            IndexError, KeyError, TypeError: the model has no such branch.
            ValueError: everything trainable would be dropped.
        """
        if isinstance(dropped, str) or not isinstance(dropped, Iterable):
            raise TypeError(f"pinned() takes a list of branches; for one branch pass [{shown(dropped)}].")
        return self._state.sampler.pinned(checked_choice(dropped))

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Forwards within the block, in this thread, compute exact full gradients."""
        return self._state.sampler.pinned(())

    def repeated(self, forwards: int = 1) -> contextlib.AbstractContextManager[None]:
        """Forwards within the block, in this thread, drop what the last forward before it dropped, rescaled alike.

        An optimizer that takes two forwards and backwards a step (SAM) thus sees one function in both::

            loss_of(model).backward()
            optimizer.first_step(zero_grad=True)
            with backend.repeated():
                loss_of(model).backward()
            optimizer.second_step(zero_grad=True)

        Args:
            forwards: how many forwards of each model to repeat, in their order and then from the first again: as many as
                the model runs in a step, micro-batches of an accumulated gradient included. Forwards that repeat others
                are not counted back, pinned ones are.

        Raises:
            TypeError, ValueError: ``forwards`` is no count of at least 1.
            RuntimeError: this thread has not run as many training forwards, or not since a state was loaded.
        """
        return self._state.sampler.repeated(checked_repeats(forwards))

    def on_sample(self, callback: Callable[[Sequence[int], frozenset[int]], object]) -> Callable[[], None]:
        """Call ``callback(indices, dropped)`` whenever a graph has been told what its next forward drops.

        Args:
            callback: takes the graph's droppable branches, as indices into :attr:`branches`, and those of them that are
                dropped. A model of several graphs makes several calls a forward. What it raises, the forward raises.

        Returns:
            A function without arguments that ends this; calling it again does nothing.

        Raises:
            TypeError: ``callback`` is not callable.
        """
        if not callable(callback):
            raise TypeError(f"callback must be a function of (indices, dropped), not {shown(callback)}.")
        listeners = self._state.listeners

        def listen(indices: Sequence[int], dropped: frozenset[int]) -> None:
            callback(indices, dropped)

        def end() -> None:
            if listen in listeners:
                listeners.remove(listen)

        listeners.append(listen)
        return end

    def calibrate(
        self,
        step: Callable[[], torch.Tensor],
        *,
        metric: Metric = "gradnorm",
        batches: int = 1,
        progress_bar: bool = True,
    ) -> Sensitivity:
        """Measure how much dropping each branch changes the parameter gradients.

        Nothing is trained: parameters, their ``.grad``, buffers that the compiled model writes, and every random stream
        are as before afterwards, also after an exception or an interrupt; batches that were finished by then are kept
        in :attr:`sensitivity`. The cost is about (branches / 2 + 2) backward passes and one forward a batch, and the
        memory that of one training step.

        Args:
            step: runs a forward of the compiled model, in training mode, and returns the loss. The backward is run here,
                and not through gradient hooks of parameters: give it the model itself, not DistributedDataParallel's
                wrapper. Other modules may be eager, and the model may run several times.
            metric: see :class:`Sensitivity`.
            batches: how many steps to average over; one is what the paper takes, and it is noisy.
            progress_bar: show one, where tqdm is installed and there is a terminal.

        Raises:
            TypeError: ``step`` is not callable, or does not return a real scalar tensor.
            ValueError: an unknown metric, no batch, a loss that requires no gradient, or gradients that are not finite.
            RuntimeError: the step runs a backward itself (then eager modules that run after the compiled model may hold
                gradients of it), uses reentrant activation checkpointing, or ``fully_shard`` has freed parameters.
            RankDisagreementError: in a distributed run, a rank failed or did not come, or has other branches.
        """
        check_call(step, progress_bar)
        check_calibration(metric, batches)
        samples: list[Sensitivity] = []
        table, ranks = self._state.sampler.branches, self._state.sampler.ranks

        def keep(found: Mapping[int, float]) -> None:
            values = tuple(found.get(branch.index, 0.0) for branch in table)
            samples.append(Sensitivity(tuple(branch.name for branch in table), values, metric, 1))
            self._state.sampler.rated.set_sensitivities(ranks.mean(Sensitivity.mean(samples), _CALIBRATION))

        try:
            calibrate(step, self._state.under, metric, int(batches), keep, progress_bar)
        except BaseException as error:
            ranks.give_up(_CALIBRATION, error)
            raise
        measured = self.sensitivity
        assert measured is not None
        return measured

    @property
    def sensitivity(self) -> Sensitivity | None:
        """The branches' sensitivities that were measured or estimated last, ``None`` before that."""
        return self._state.sampler.rated.sensitivity

    @property
    def running_sensitivity(self) -> Sensitivity | None:
        """The running estimate of ``reallocate_every``, ``None`` while too few steps were observed. Waits for the device."""
        return self._state.observer.estimate()

    def warmup(self) -> None:
        """Compile every variant now that steps of a run will need, rather than when each is first sampled."""
        for runner in self._state.runners:
            runner.warmup()

    @property
    def stats(self) -> BackendStats:
        """Figures so far."""
        return BackendStats.of(self._state)

    def state_dict(self) -> dict[str, Any]:
        """The policy's state in plain Python types: a run resumed from it samples the patterns the old one would have.

        JSON and ``torch.load(weights_only=True)`` hold it exactly. With ``reallocate_every`` it waits for the device.
        """
        return self._state.observer.saved().as_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Go on where ``state_dict()`` was taken, by this backend or another one of the same configuration.

        What came after that is forgotten: sensitivities, rates set by hand and observations too. Rate, progress and schedule
        are the state's. A function as the schedule cannot be saved: give the backend the same one before. Branches that
        were found after the state was saved start anew where the state holds no branch, and do not fit it otherwise.

        Args:
            state: what ``state_dict()`` returned, perhaps read from a file.
            strict: refuse a state whose branches are not those of the model. Otherwise what is known of equally named
                branches is taken over, and the others count from 0.

        Raises:
            TypeError, ValueError: ``state`` is no state, or does not fit this backend or its model; then nothing has
                changed. If the model has not run yet, its branches are compared as its graphs are compiled.
        """
        saved = self._state.sampler.load(state, strict=strict)
        self._state.observer.go_on_from(saved)
        self._note_schedule()

    def _note_schedule(self) -> None:
        """A pickled backend, and one that is compared, are made of the configuration; state may have another schedule."""
        schedule = self._state.sampler.rated.rates.schedule
        if schedule is not self.policy.schedule:
            policy = dataclasses.replace(self.policy, schedule=schedule)
            self._config = dataclasses.replace(self._config, policy=policy)

    # ---- identity --------------------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        """Equal if either would do for the other: same state, or same configuration and neither has seen a graph.

        Dynamo reuses compiled code for a backend that equals the one it was compiled with. Were two used backends of
        one configuration equal, the second model would silently follow the first one's rates and pins.
        """
        if not isinstance(other, DropBPBackend):
            return NotImplemented
        if self._state is other._state:
            return True
        return (
            self._config == other._config and self.rate == other.rate and not self._is_used() and not other._is_used()
        )

    def __hash__(self) -> int:
        return hash((self.policy.rate, self.policy.granularity, self._config.seed, self._config.strict))

    def _is_used(self) -> bool:
        return bool(self._state.counts.graphs or len(self._state.sampler.branches))

    def __deepcopy__(self, memo: dict[int, Any]) -> DropBPBackend:
        return copy.copy(self)

    def __copy__(self) -> DropBPBackend:
        return type(self)(self._config, self._state)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._config, self.state_dict())

    def __repr__(self) -> str:
        return as_text(self._config, self._state)

    def _repr_html_(self) -> str:
        return as_html(self._config, self._state)


def _restore(config: BackendConfig, state: Mapping[str, Any]) -> DropBPBackend:
    backend = DropBPBackend(config)
    backend.load_state_dict(state)
    return backend
