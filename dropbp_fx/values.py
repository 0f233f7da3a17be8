"""What a user's values are: numbers of any kind, functions of the right arguments; and how a sentence shows them."""

from __future__ import annotations

import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable
from typing import Any, Literal

#: What dropping a branch leaves out: all its gradients, those of its parameters only, or also all that runs before it.
Drop = Literal["branch", "weights", "below"]
_LONGEST_SHOWN = 120
#: Counts are kept below what every format of a checkpoint holds exactly.
LARGEST_COUNT = 2**63 - 1
#: Seeds of more bits Python would at some point not print.
SEED_BITS = 1000


def checked_number(
    what: str,
    value: Any,
    *,
    low: float,
    high: float,
    includes: Literal["low", "both", "neither"],
    meaning: str,
    or_none: bool = False,
) -> float:
    """A number of the user's as a float between ``low`` and ``high``.

    Args:
        what: what the user calls it.
        value: the number.
        low: one end.
        high: the other.
        includes: which ends are valid.
        meaning: what the number is, for the sentence that refuses it.
        or_none: ``None`` would have done as well.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    interval = f"{'(' if includes == 'neither' else '['}{low:g}, {high:g}{']' if includes == 'both' else ')'}"
    number = as_float(value)
    if number is None:
        raise TypeError(f"{what} must be a number in {interval}{' or None' if or_none else ''}, not {shown(value)}.")
    above = number > low if includes == "neither" else number >= low
    below = number <= high if includes == "both" else number < high
    if not (above and below):
        raise ValueError(f"{what} must be in {interval}, not {shown(value)}: {meaning}.")
    return number


def checked_count(
    what: str, value: Any, *, least: int, of: str | None = None, meaning: str = "", or_none: bool = False
) -> int:
    """A count of the user's as an ``int`` of at least ``least`` that every checkpoint can hold.

    Args:
        what: what the user calls it.
        value: the count.
        least: the lowest that is valid.
        of: what is counted, for the sentence that refuses what is no count.
        meaning: how the sentence goes on that refuses a lower one, with the sign that parts them.
        or_none: ``None`` would have done as well.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.
    """
    number = as_int(value)
    if number is None:
        wanted = f"a whole number{f' of {of}' if of else ''}{' or None' if or_none else ''}"
        raise TypeError(f"{what} must be {wanted}, not {shown(value)}.")
    if number < least:
        raise ValueError(f"{what} must be at least {least}, not {shown(value)}{meaning}.")
    if number > LARGEST_COUNT:
        raise ValueError(f"{what} must be less than 2**63, not {shown(value)}.")
    return number


def as_float(value: Any) -> float | None:
    """A real number as a float, infinite where floats end; ``None`` for what is none.

    Numbers are Python's, fractions, and numpy's scalars and arrays without dimensions. ``True`` and ``False``, other
    arrays and tensors are none.
    """
    if isinstance(value, bool):
        return None
    if not isinstance(value, numbers.Real):
        value = _numpy_scalar(value)
        if not isinstance(value, numbers.Real):
            return None
    try:
        return float(value) + 0.0  # no negative zero
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def as_int(value: Any) -> int | None:
    """A whole number, Python's or numpy's, as an ``int``; ``None`` for what is none."""
    if isinstance(value, bool):
        return None
    if not isinstance(value, numbers.Integral):
        value = _numpy_scalar(value)
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def takes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether ``function`` can be called with ``arguments``; ``True`` where it does not tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def shown(value: Any) -> str:
    """``repr(value)`` as it fits into a sentence: on one line, not long, and without addresses."""
    try:
        text = repr(value)
    except Exception:  # a repr of the user's own; and Python refuses to print very long integers
        return f"an object of type {type(value).__name__}"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(text.split()))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def in_words(value: Any) -> str:
    """A value in words that are equal in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _numpy_scalar(value: Any) -> Any:
    """The scalar in a numpy array without dimensions; anything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.ndim == 0:
        return value[()]
    return value
