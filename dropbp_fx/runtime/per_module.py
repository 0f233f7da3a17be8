"""Tell apart the modules that one compiled graph serves.

Where layers are compiled one by one, or the graph breaks inside of them, Dynamo compiles the code of one layer and runs it
for all that look alike: their parameters are inputs of the graph. So the graph is the same, and its branches are not.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class IdentifyingParameters:
    """Inputs of a graph that tell which module it runs for.

    Attributes:
        positions: which arguments they are; two of the module's parameters do, since few modules share both.
        names: what the module calls them.
    """

    positions: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    def of(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        return tuple([arguments[position] for position in self.positions])


class PerModule(Generic[T]):
    """What belongs to each module that a graph serves, such as what samples its patterns.

    Args:
        identifying: where the modules' parameters are among the arguments; if there are none, all modules are one.
        first: what belongs to the module that the graph was compiled for.
        enter: finds or makes what belongs to the module of the parameters it is given, with all arguments of the call.
    """

    def __init__(
        self, identifying: IdentifyingParameters, first: T, enter: Callable[[Sequence[Tensor], Sequence[Any]], T]
    ) -> None:
        self._identifying = identifying
        self._first = first
        self._enter = enter
        self._known: dict[tuple[int, ...], tuple[tuple[weakref.ref[Tensor], ...], T]] = {}

    def of(self, arguments: Sequence[Any]) -> T:
        """What belongs to the module that the graph is called for."""
        if not self._identifying.positions:
            return self._first
        parameters = self._identifying.of(arguments)
        key = tuple(map(id, parameters))
        known = self._known.get(key)
        if known is not None and all(reference() is p for reference, p in zip(known[0], parameters, strict=True)):
            return known[1]
        found = self._enter(parameters, arguments)
        self._known[key] = tuple(map(weakref.ref, parameters)), found
        return found
