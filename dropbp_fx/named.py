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
        self._known: list[tuple[BackendConfig, weakref.ref[BackendState]]] = []

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
        state = self._found(config)
        if state is None:
            state = BackendState.of(config)
            state.handle = DropBPBackend(config, state)
            state.shortfall.by_name = True
            state.shortfall.expect_a_call()
            self._known.append((config, weakref.ref(state, self._forget)))
            _log_environment(options)
        return _backend_of(state)

    def reset(self) -> None:
        """Forget compiled code; ``torch._dynamo.reset()`` calls this."""
        for state in self._states():
            _backend_of(state).reset()

    def in_use(self) -> tuple[DropBPBackend, ...]:
        """The backends that have modules to work for, or have not had any yet, in the order in which they were made."""
        states = self._states()
        return tuple(_backend_of(state) for state in states if state.alive_with is None or len(state.alive_with))

    def _states(self) -> list[BackendState]:
        states = [state for _, reference in self._known if (state := reference()) is not None]
        return [state for state in states if _works(state)]

    def _found(self, config: BackendConfig) -> BackendState | None:
        # By what it was made from: a schedule that was set since is in the backend's own configuration.
        same = (reference() for known, reference in self._known if known == config)
        return next((state for state in same if state is not None and _works(state)), None)

    def _serves(self, config: BackendConfig, running: set[nn.Module]) -> bool:
        """Whether the backend of a configuration, if there is one, works for one of the modules that run."""
        state = self._found(config)
        return state is None or state.alive_with is None or bool(running.intersection(state.alive_with))

    def _forget(self, reference: weakref.ref[BackendState]) -> None:
        self._known = [(config, known) for config, known in self._known if known is not reference]


def _works(state: BackendState) -> bool:
    """Whether there is a module or code that the backend works for, or was none yet: else the next model gets a new one."""
    return state.alive_with is None or bool(len(state.alive_with) or state.runners)


def _backend_of(state: BackendState) -> DropBPBackend:
    assert isinstance(state.handle, DropBPBackend)
    return state.handle


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
