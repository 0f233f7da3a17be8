"""The backends that the name "dropbp" stands for: one for equal options, in use while a model lives that it works for."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import fx, nn

from dropbp_fx import _torch
from dropbp_fx.backend import DropBPBackend
from dropbp_fx.config import BackendConfig
from dropbp_fx.environment import completed, options_from, variable_of
from dropbp_fx.policy.drop_policy import DropPolicy
from dropbp_fx.state import BackendState

log = logging.getLogger("dropbp_fx")


class NamedBackends:
    """What Dynamo finds by the name "dropbp": ``torch.compile(model, backend="dropbp", options={"rate": 0.5})``.

    ``options`` are the arguments of :func:`dropbp_backend`; ``policy`` may also be a mapping of a policy's fields. Equal
    options share one backend, as the graphs of one model must. What they leave open, environment variables may give
    (:mod:`dropbp_fx.environment`).

    A backend is in use as long as any module lives that its graphs belong to, or that was running when they were compiled:
    these hold it, and it is only weakly held here. ``torch._dynamo.reset()`` takes its code, and leaves rates, branches and
    counts to models that live on. Dynamo keeps the code of a model that is no more until that reset, as another one of the
    class may run by it; that one goes on with the backend. After the reset the next model gets a new one.

    Args:
        name: what Dynamo knows it by, and the module ``home`` calls it: so it is copied and pickled, as a function is.
        home: the module that holds it.
        defaults: all options, with the values that they have by default.
    """

    def __init__(self, name: str, home: str, defaults: Mapping[str, Any]) -> None:
        self.__name__ = name
        self.__module__ = home
        self._defaults = dict(defaults)
        self._known: weakref.WeakValueDictionary[int, _Known] = weakref.WeakValueDictionary()  # their states hold them
        self._numbers = itertools.count()

    def __reduce__(self) -> str:
        return self.__name__

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
        return self.of(options, running)(gm, example_inputs, mode=mode)

    def of(self, options: Mapping[str, Any] | None, running: Collection[nn.Module] = ()) -> DropBPBackend:
        """The backend that the name stands for with these options; made if there is none.

        Args:
            options: as they are given to ``torch.compile``.
            running: the modules that it is wanted for, where that is known.

        Raises:
            TypeError, ValueError: an unknown option or variable, or a bad value.
        """
        config = self._config_of(options)  # checked before anything is looked up: as keys, False and 0 are equal
        found = self._found(config)
        if found is not None and found.modules is not None and found.modules.isdisjoint(running):
            gc.collect()  # an earlier model that is no more must not hand on its state, be it only in a cycle
            found = self._found(config)
        if found is not None:
            return found()
        state = BackendState.of(config)
        state.shortfall.by_name = True
        state.shortfall.expect_a_call()
        known = state.handle = _Known(config, state)
        self._known[next(self._numbers)] = known
        _log_environment(options)
        return known()

    def reset(self) -> None:
        """Forget compiled code; ``torch._dynamo.reset()`` calls this."""
        for known in self._working():
            known().reset()

    def in_use(self) -> tuple[DropBPBackend, ...]:
        """The backends that have modules to work for, or have not had any yet, in the order in which they were made."""
        return tuple(known() for known in self._working() if known.modules is None or len(known.modules))

    def _working(self) -> list[_Known]:
        return [known for known in self._known.values() if known.works]

    def _found(self, config: BackendConfig) -> _Known | None:
        # By what it was made from: a schedule that was set since is in the backend's own configuration.
        return next((known for known in self._working() if known.config == config), None)

    def _config_of(self, options: Mapping[str, Any] | None) -> BackendConfig:
        given = dict(options or {})
        unknown = sorted(set(given) - set(self._defaults), key=str)
        if unknown:
            raise ValueError(
                f"The backend {self.__name__!r} has no option {unknown[0]!r}; its options are {', '.join(self._defaults)}. "
                "Options for Inductor go into the option named 'options'."
            )
        given = completed(given, options_from(os.environ))
        if isinstance(given.get("policy"), Mapping):
            given["policy"] = DropPolicy.from_fields(given["policy"])
        return BackendConfig.checked(**(self._defaults | given))


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


def _log_environment(options: Mapping[str, Any] | None) -> None:
    """Say which variables a new backend goes by, and which ones its options replace."""
    found = options_from(os.environ)
    used = set(completed(options or {}, found)) - set(options or {})
    for option in found:
        variable = variable_of(option)
        effect = "takes effect for" if option in used else "is replaced by the options of"
        log.info("%s=%s %s the backend 'dropbp'", variable, os.environ[variable].strip(), effect)
