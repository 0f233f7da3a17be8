"""Environment variables that configure the backend by name, for programs in which only a name can be given.

=================================  ==================================================================================
variable                           value
=================================  ==================================================================================
``DROPBP_RATE``                    a number in [0, 1)
``DROPBP_POLICY``                  a policy's name, or its fields as a JSON object: ``{"pattern": "suffix"}``
``DROPBP_SEED``                    a whole number
``DROPBP_STRICT``                  1 or true, 0 or false
``DROPBP_INNER``                   inductor or aot_eager
``DROPBP_ACTIVATION_MEMORY_BUDGET``  a number in [0, 1]
=================================  ==================================================================================

One that is empty counts as not set. They are read when a graph is compiled.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

from dropbp_fx.config import checked_budget, checked_inner, checked_seed
from dropbp_fx.policy.drop_policy import DropPolicy, checked_rate
from dropbp_fx.values import shown

_PREFIX = "DROPBP_"
_FLAGS = {"1": True, "true": True, "0": False, "false": False}


def options_from(environ: Mapping[str, str]) -> dict[str, Any]:
    """The options that the environment gives the backend by name.

    Raises:
        ValueError: there is no variable of that name, or its value is not valid.
    """
    found: dict[str, Any] = {}
    for variable in sorted(name for name in environ if name.startswith(_PREFIX)):
        option = variable.removeprefix(_PREFIX).lower()
        read = _READERS.get(option) if variable == variable_of(option) else None
        if read is None:
            raise ValueError(_unknown_text(variable))
        text = environ[variable].strip()
        if not text:
            continue
        try:
            found[option] = read(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The environment variable {variable} is {shown(text)}. {error}") from error
    return found


def variable_of(option: str) -> str:
    """The variable that gives an option."""
    return _PREFIX + option.upper()


def completed(options: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given, with the environment's for those that were not.

    A policy that was given brings its own rate with it, and the environment's rate does not replace that.
    """
    given = set(options) | ({"rate"} if "policy" in options else set())
    return {**options, **{name: value for name, value in environment.items() if name not in given}}


def _rate(text: str) -> float:
    return checked_rate(_number("rate", text))


def _budget(text: str) -> float | None:
    return checked_budget(_number("activation_memory_budget", text))


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} must be a number, such as 0.5.") from None


def _seed(text: str) -> int | None:
    try:
        seed = int(text)
    except ValueError:
        raise ValueError("seed must be a whole number, such as 1234, of at most 1000 bits.") from None
    return checked_seed(seed)


def _strict(text: str) -> bool:
    if text.lower() not in _FLAGS:
        raise ValueError("strict must be 1 or true, or 0 or false.")
    return _FLAGS[text.lower()]


def _policy(text: str) -> DropPolicy:
    if text[0] not in "{[":
        return DropPolicy.named(text)  # type: ignore[arg-type]
    try:
        fields = json.loads(text, object_pairs_hook=_fields)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f'policy must be a policy\'s name, or a JSON object of its fields, such as {{"pattern": "suffix", "rate": '
            f"0.4}}; this is no JSON: {error}."
        ) from None
    return DropPolicy.from_fields(fields)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"The JSON object has {twice!r} more than once; give each field one value.")
    return fields


_READERS: dict[str, Callable[[str], Any]] = {
    "rate": _rate,
    "policy": _policy,
    "seed": _seed,
    "strict": _strict,
    "inner": checked_inner,
    "activation_memory_budget": _budget,
}


def _unknown_text(variable: str) -> str:
    known = [variable_of(option) for option in _READERS]
    close = difflib.get_close_matches(variable.removeprefix(_PREFIX).lower(), _READERS, n=1)
    hint = f" Did you mean {variable_of(close[0])}?" if close else ""
    return (
        f"The environment variable {variable} is none that the backend 'dropbp' knows.{hint} It knows {', '.join(known)}. "
        "Rename it, or unset it."
    )
