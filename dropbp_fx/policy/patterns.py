"""Patterns: which units are dropped together.

A pattern turns units and their rates into the set to drop. Those built in:

=============  =========================  ================================================================================
name           class                      what it drops
=============  =========================  ================================================================================
"random"       :class:`RandomPattern`     random units; their number and FLOPs are nearly the same in every sample
"independent"  :class:`IndependentPattern` each unit by its own coin
"lowest"       :class:`LowestPattern`     the lowest layers, the same ones in every sample
"suffix"       :class:`SuffixPattern`     every layer below a random depth
"window"       :class:`WindowPattern`     one contiguous run of layers, at a random place
"layers[a:b]"  :class:`LayersPattern`     the layers of these places, whatever the rate
=============  =========================  ================================================================================
"""

from __future__ import annotations

import dataclasses
import math
import operator
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

from dropbp_fx.policy.balanced import Unit, effective_rates, sample_dropped
from dropbp_fx.policy.contiguous import LowestPattern, SuffixPattern, WindowPattern
from dropbp_fx.policy.layers import LayersPattern
from dropbp_fx.values import shown, takes

__all__ = [
    "IndependentPattern",
    "LayersPattern",
    "LowestPattern",
    "Pattern",
    "PatternName",
    "PatternWithFrequencies",
    "RandomPattern",
    "SuffixPattern",
    "WindowPattern",
    "checked_sample",
    "frequencies",
    "known_name",
    "pattern_name",
    "resolve_pattern",
]

PatternName = Literal["random", "independent", "window", "lowest", "suffix"]
SampleFunction = Callable[[Sequence[Unit], random.Random], Collection[int]]


@runtime_checkable
class Pattern(Protocol):
    """Chooses the units to drop. To write a new pattern, write :meth:`sample`; nothing has to be registered.

    Every k-th layer, from a random one of the first k on::

        @dataclasses.dataclass(frozen=True)
        class EveryKthLayer:
            k: int

            def sample(self, units: Sequence[Unit], rng: random.Random) -> Collection[int]:
                layers = list(dict.fromkeys(unit.layer for unit in units))
                dropped = set(layers[rng.randrange(self.k) :: self.k])
                return [index for index, unit in enumerate(units) if unit.layer in dropped]

    A function that takes ``(units, rng)`` and returns indices serves as well. Sample from ``rng`` alone and keep no state,
    and a resumed run goes on with the same patterns. Whether a pattern honours the units' rates is its own affair; one
    that does not should say what it does in a method ``frequencies`` (:class:`PatternWithFrequencies`). That at least one
    trainable unit stays is seen to by :func:`checked_sample`.
    """

    def sample(self, units: Sequence[Unit], rng: random.Random) -> Collection[int]:
        """The indices into ``units`` of those to drop; units are in the order of execution."""
        ...


@runtime_checkable
class PatternWithFrequencies(Pattern, Protocol):
    """A pattern that knows how often it drops each unit."""

    def frequencies(self, units: Sequence[Unit]) -> Sequence[float]:
        """For each unit the probability that :meth:`sample` drops it."""
        ...


@dataclasses.dataclass(frozen=True)
class RandomPattern:
    """Random units, each dropped at its rate: the pattern of DropBP, with a fixed number and balanced FLOPs.

    :func:`~dropbp_fx.policy.balanced.sample_dropped` says how close every sample is to its budget. One trainable unit is
    always kept, for which rates are scaled down where they leave no room for one.
    """

    def sample(self, units: Sequence[Unit], rng: random.Random) -> frozenset[int]:
        return sample_dropped(units, rng)

    def frequencies(self, units: Sequence[Unit]) -> list[float]:
        return effective_rates(units)


@dataclasses.dataclass(frozen=True)
class IndependentPattern:
    """Each unit is dropped by its own coin, as in stochastic depth: the budget is met on average only.

    Gradients rescaled by 1 / (1 - rate) are unbiased under this pattern, because the gradient of a network is a sum over
    products of its branches and only independent units' chances multiply. Where all trainable units would be dropped,
    one of them, chosen at random, is kept; the frequencies allow for that.
    """

    def sample(self, units: Sequence[Unit], rng: random.Random) -> frozenset[int]:
        return _keeping_one({index for index, unit in enumerate(units) if rng.random() < unit.rate}, units, rng)

    def frequencies(self, units: Sequence[Unit]) -> list[float]:
        trainable = [unit.rate for unit in units if unit.trainable]
        spared = math.prod(trainable) / len(trainable) if trainable else 0.0
        return [unit.rate - spared if unit.trainable else unit.rate for unit in units]


@dataclasses.dataclass(frozen=True)
class _FunctionPattern:
    function: SampleFunction

    def sample(self, units: Sequence[Unit], rng: random.Random) -> Collection[int]:
        try:
            return self.function(units, rng)
        except TypeError:
            if takes(self.function, units, rng):
                raise
            raise TypeError(
                f"The pattern {shown(self.function)} cannot be called with (units, rng); it must be a function of the two "
                "that returns the indices of the units to drop."
            ) from None


def _builtin() -> dict[str, Pattern]:
    return {
        "random": RandomPattern(),
        "independent": IndependentPattern(),
        "lowest": LowestPattern(),
        "suffix": SuffixPattern(),
        "window": WindowPattern(),
    }


def resolve_pattern(pattern: str | Pattern | SampleFunction) -> Pattern:
    """The pattern of a name, a pattern itself, or one that calls a function.

    Raises:
        ValueError: no built-in pattern has the name.
        TypeError: ``pattern`` is a class, or neither a string nor a pattern nor a function.
    """
    builtin = _builtin()
    if isinstance(pattern, str):
        found = builtin.get(pattern) or LayersPattern.named(pattern)
        if found is None:
            raise ValueError(
                f"There is no pattern named {pattern!r}; the names are {', '.join(map(repr, builtin))}, and such as "
                "'layers[:8]'. Pass one of them, or an object with a method sample(units, rng)."
            )
        return found
    if isinstance(pattern, type):
        raise TypeError(
            f"pattern is the class {pattern.__name__}, but must be an instance of it: pass {pattern.__name__}(...)."
        )
    if callable(getattr(pattern, "sample", None)):
        return pattern  # type: ignore[return-value]
    if callable(pattern):
        return _FunctionPattern(pattern)
    raise TypeError(
        f"pattern is {shown(pattern)}, but must be one of the names {', '.join(map(repr, builtin))}, an object with a "
        "method sample(units, rng), or a function of (units, rng) that returns the indices of the units to drop."
    )


def known_name(pattern: Pattern) -> str | None:
    """The name that :func:`resolve_pattern` knows a pattern by, if it does."""
    if type(pattern) is LayersPattern:
        return pattern.name
    same = (name for name, known in _builtin().items() if type(known) is type(pattern) and known == pattern)
    return next(same, None)


def pattern_name(pattern: Pattern) -> str:
    """The name that :func:`resolve_pattern` knows a pattern by; of a user's own, the name of its function or class."""
    if isinstance(pattern, _FunctionPattern):
        return getattr(pattern.function, "__name__", repr(pattern.function))
    return known_name(pattern) or type(pattern).__name__


def frequencies(pattern: Pattern, units: Sequence[Unit]) -> list[float]:
    """How often ``pattern`` drops each unit in the long run: exact where it tells, otherwise the units' rates."""
    if isinstance(pattern, PatternWithFrequencies):
        return list(pattern.frequencies(units))
    return [unit.rate for unit in units]


def checked_sample(pattern: Pattern, units: Sequence[Unit], rng: random.Random, *, keep_one: bool) -> frozenset[int]:
    """Sample from ``pattern`` and check what it returned.

    Args:
        pattern: what chooses the units.
        units: what may be dropped, in the order of execution.
        rng: source of randomness.
        keep_one: where all trainable units would be dropped, keep one of them, chosen by ``rng``.

    Returns:
        Indices into ``units``.

    Raises:
        TypeError: the pattern returned something else than a collection of integers.
        IndexError: the pattern returned an index that no unit has.
    """
    sampled = pattern.sample(units, rng)
    if not isinstance(sampled, Iterable):
        raise TypeError(
            f"The pattern {shown(pattern)} returned {shown(sampled)}, but must return a collection of the indices of the "
            "units to drop; an empty one drops nothing."
        )
    dropped = {_checked_index(entry, pattern, len(units)) for entry in sampled}
    return _keeping_one(dropped, units, rng) if keep_one else frozenset(dropped)


def _checked_index(entry: object, pattern: Pattern, count: int) -> int:
    try:
        if isinstance(entry, bool):
            raise TypeError
        index = operator.index(entry)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"The pattern {shown(pattern)} returned {shown(entry)} among the units to drop, but each must be an "
            "integer: the unit's index. To turn a mask into indices, return [i for i, drop in enumerate(mask) if drop]."
        ) from None
    if not 0 <= index < count:
        raise IndexError(
            f"The pattern {shown(pattern)} returned the index {shown(index)}, but there are {count} units, numbered from 0"
            f"{f' to {count - 1}' if count else ''}. Return indices into the units that sample() was given."
        )
    return index


def _keeping_one(dropped: set[int], units: Sequence[Unit], rng: random.Random) -> frozenset[int]:
    """``dropped``, without one of the trainable units if it has all of them."""
    trainable = [index for index, unit in enumerate(units) if unit.trainable]
    if trainable and dropped.issuperset(trainable):
        return frozenset(dropped - {rng.choice(trainable)})
    return frozenset(dropped)
