"""The backends that the name "dropbp" stands for: one for equal options, in use while a model lives that it works for."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from dropbp_fx import _torch
from dropbp_fx.backend import DropBPBackend
from dropbp_fx.config import BackendConfig
from dropbp_fx.environment import completed, options_from, variable_of
from dropbp_fx.policy.drop_policy import DropPolicy
from dropbp_fx.state import BackendState

log = logging.getLogger("dropbp_fx")
_OPTIONS = tuple(inspect.signature(BackendConfig.checked).parameters)


class NamedBackends:
    """What Dynamo finds by the name "dropbp": ``torch.compile(model, backend="dropbp", options={"rate": 0.5})``.

    ``options`` are the arguments of :func:`dropbp_backend`; ``policy`` may also be a mapping of a policy's fields. Equal
    options share one backend, as the graphs of one model must. What they leave open, environment variables may give
    (:mod:`dropbp_fx.environment`).

    A backend is in use as long as any module lives that its graphs belong to, or that was running when they were compiled:
    these hold it, and it is only weakly held here. ``torch._dynamo.reset()`` takes its code, and leaves rates, branches and
    counts to models that live on. Dynamo keeps the code of a model that is no more until that reset, as another one of the
    class may run by it; that one goes on with the backend. After the reset the next model gets a new one.
    """

    def __init__(self) -> None:
        self.__name__ = "dropbp"
        self._known: list[_Known] = []

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph from Dynamo.

        Raises:
            TypeError, ValueError: an unknown option or variable, or a bad value, before anything is compiled.
        """
        running = set(_torch.calling_modules().running)  # first: frames whose locals are looked at keep them
        if not self._serves(_config_of(options), running):
            gc.collect()  # an earlier model that is no more must not hand on its state, be it only in a cycle
        return self.of(options)(gm, example_inputs, mode=mode)

    def of(self, options: Mapping[str, Any] | None) -> DropBPBackend:
        """The backend that the name stands for with these options; made if there is none.

        Raises:
            TypeError, ValueError: an unknown option or variable, or a bad value.
        """
        config = _config_of(options)  # checked before anything is looked up: as keys, False and 0 are equal
        found = self._found(config)
        if found is not None:
            return found()
        state = BackendState.of(config)
        state.shortfall.by_name = True
        state.shortfall.expect_a_call()
        known = state.handle = _Known(config, state)
        self._known = [*(known for known in self._known if known.works), known]
        _log_environment(options)
        return known()

    def reset(self) -> None:
        """Forget compiled code; ``torch._dynamo.reset()`` calls this."""
        for known in self._known:
            if known.state() is not None:
                known().reset()

    def in_use(self) -> tuple[DropBPBackend, ...]:
        """The backends that have modules to work for, or have not had any yet, in the order in which they were made."""
        return tuple(known() for known in self._known if known.works and (known.modules is None or len(known.modules)))

    def _found(self, config: BackendConfig) -> _Known | None:
        # By what it was made from: a schedule that was set since is in the backend's own configuration.
        return next((known for known in self._known if known.config == config and known.works), None)

    def _serves(self, config: BackendConfig, running: set[nn.Module]) -> bool:
        """Whether the backend of a configuration, if there is one, works for one of the modules that run."""
        found = self._found(config)
        return found is None or found.modules is None or bool(running.intersection(found.modules))


class _Known:
    """What is known of one backend; holds neither it nor its state. Called, it gives the backend.

    Modules hold the object. Code that has outlived them holds the state alone, and the next model to run by it gets another
    object of that state.
    """

    def __init__(self, config: BackendConfig, state: BackendState) -> None:
        self.config = config
        self.state = weakref.ref(state)
        self._backend: Callable[[], DropBPBackend | None] = lambda: None

    def __call__(self) -> DropBPBackend:
        backend = self._backend()
        if backend is None:
            state = self.state()
            assert state is not None
            backend = DropBPBackend(self.config, state)
            backend.schedule = state.sampler.rated.rates.schedule  # it may have been set through an earlier object
            self._backend = weakref.ref(backend)
        return backend

    @property
    def works(self) -> bool:
        """Whether somebody holds the backend, or there is code that another model may run by."""
        state = self.state()
        return state is not None and (self._backend() is not None or bool(state.runners))

    @property
    def modules(self) -> weakref.WeakSet[nn.Module] | None:
        """The modules that hold it, ``None`` as long as it has worked for none."""
        state = self.state()
        return None if state is None else state.alive_with


dropbp = NamedBackends()


def named_backend(**options: Any) -> DropBPBackend:
    """The backend that ``torch.compile(backend="dropbp", options=options)`` compiles with, made if there is none yet.

    For what has to be said before the first forward, where a program takes a backend's name only::

        backend = dropbp_fx.named_backend()
        backend.register(model)  # layers that are compiled one by one, and called by no module

    Keep the object until the model has run: models that it has compiled or that were registered hold it, nothing else does.

    Args:
        options: as they are given to ``torch.compile``: none where it gets the name alone, and the environment the rest.

    Raises:
        TypeError, ValueError: an unknown option or environment variable, or a bad value.
    """
    gc.collect()  # the backend of a model that is no more, be it only in a cycle, is not the next one's
    return dropbp.of(options)


def current() -> DropBPBackend:
    """The one backend that is in use by its name, ``torch.compile(backend="dropbp")``, to steer the run with.

    ::

        backend = dropbp_fx.current()
        backend.progress = step / total
        checkpoint["dropbp"] = backend.state_dict()

    It is there once a first graph is compiled, or :func:`named_backend` was called, and as long as the model lives, also
    after ``torch._dynamo.reset()``.

    Raises:
        RuntimeError: there is none, or more than one.
    """
    if len(dropbp.in_use()) > 1:
        gc.collect()  # those of models that are no more
    found = dropbp.in_use()
    if not found:
        raise RuntimeError(
            "No backend is in use by its name: one is made when torch.compile(backend='dropbp') compiles the first graph, "
            "and lives as long as the model. Call dropbp_fx.current() after the first forward; before it, "
            "dropbp_fx.named_backend(), with the options that torch.compile gets, makes the backend. One from "
            "dropbp_backend() is not found here: keep the object."
        )
    if len(found) > 1:
        rates = ", ".join(f"{backend.rate:g}" for backend in found)
        raise RuntimeError(
            f"{len(found)} backends are in use by their name, of the rates {rates}: torch.compile got different options, or "
            "the environment has changed. Take the one that you mean from dropbp_fx.backends(), or from "
            "dropbp_fx.named_backend(...) with its options; or give all graphs the same options."
        )
    return found[0]


def backends() -> tuple[DropBPBackend, ...]:
    """All backends that are in use by their name, in the order in which they were made.

    That of a model which is no more may be among them until Python's garbage collection has run.
    """
    return dropbp.in_use()


def _config_of(options: Mapping[str, Any] | None) -> BackendConfig:
    named = dict(options or {})
    unknown = sorted(set(named) - set(_OPTIONS), key=str)
    if unknown:
        raise ValueError(
            f"The backend 'dropbp' has no option {unknown[0]!r}; its options are {', '.join(_OPTIONS)}. Options "
            "for Inductor go into the option named 'options'."
        )
    named = completed(named, options_from(os.environ))
    if isinstance(named.get("policy"), Mapping):
        named["policy"] = DropPolicy.from_fields(named["policy"])
    return BackendConfig.checked(**named)


def _log_environment(options: Mapping[str, Any] | None) -> None:
    """Say which variables a new backend goes by, and which ones its options replace."""
    found = options_from(os.environ)
    used = set(completed(options or {}, found)) - set(options or {})
    for option in found:
        variable = variable_of(option)
        effect = "takes effect for" if option in used else "is replaced by the options of"
        log.info("%s=%s %s the backend 'dropbp'", variable, os.environ[variable].strip(), effect)
