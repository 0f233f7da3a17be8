"""Tell apart the models that one backend serves, by the modules that hold their branches."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn


class Models:
    """Numbers models, from 1, in the order in which they were first seen.

    A model is known by its modules: the outermost one of a compiled graph, and those around it that were running. They are
    held weakly. A new model takes the number of one that is no more, and the names of its branches with it.
    """

    def __init__(self) -> None:
        self._members: list[weakref.WeakSet[nn.Module]] = []
        self._registered: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def register(self, model: nn.Module) -> None:
        """Take ``model`` for one of its own, whatever it runs inside of."""
        self._registered.add(model)
        self.number_of([model], ())

    def number_of(self, roots: Sequence[nn.Module], running: Iterable[nn.Module]) -> tuple[int, bool]:
        """The number of the model that a graph with these outermost modules belongs to, and whether it has just become it.

        Args:
            roots: the modules, and known ones that hold them.
            running: the modules whose methods run now.
        """
        registered = [root for root in roots if root in self._registered]
        members = registered[:1] or [*roots, *_around(roots, running)]
        if not members:  # a function that reaches no module
            return 1, False
        for attempt in ("as it is", "without garbage"):
            for number, known in enumerate(self._members, 1):
                if any(module in known for module in members):
                    known.update(members)
                    return number, False
            free = next((number for number, known in enumerate(self._members) if not len(known)), None)
            if free is not None:
                self._members[free].update(members)
                return free + 1, True
            if attempt == "as it is" and self._members:
                gc.collect()  # a model that was let go of may live on in a cycle, and with it its branches' names
        self._members.append(weakref.WeakSet(members))
        return len(self._members), False


def owner_among(running: Iterable[nn.Module], parameters: Sequence[Tensor], names: Sequence[str]) -> nn.Module | None:
    """The first one of the ``running`` modules that calls ``parameters`` by these ``names``."""
    if not names:
        return None
    return next((module for module in running if _has(module, parameters, names)), None)


def _has(module: nn.Module, parameters: Sequence[Tensor], names: Sequence[str]) -> bool:
    return all(_found(module, name) is parameter for parameter, name in zip(parameters, names, strict=True))


def _found(module: nn.Module, path: str) -> object:
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _around(roots: Iterable[nn.Module], running: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the ``running`` modules that hold one of ``roots``."""
    wanted = set(map(id, roots))
    return [module for module in dict.fromkeys(running) if wanted & set(map(id, module.modules()))]
