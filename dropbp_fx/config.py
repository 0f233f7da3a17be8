"""The backend's configuration: what is valid, and a sentence for what is not."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, get_args

from dropbp_fx import _torch
from dropbp_fx.graph.regions import Drop
from dropbp_fx.policy.patterns import DrawFunction, Pattern, resolve_pattern
from dropbp_fx.policy.ramps import RateSchedule, checked_schedule, is_number
from dropbp_fx.policy.ranks import in_words
from dropbp_fx.policy.rates import Allocation
from dropbp_fx.policy.schedule import Granularity
from dropbp_fx.runtime.compiler import InnerCompiler

GRANULARITIES: tuple[str, ...] = get_args(Granularity)
_INNER_NAMES = ("inductor", "aot_eager")


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """Everything a backend is made from. Two backends of equal configuration are interchangeable until one is used."""

    rate: float
    granularity: Granularity
    pattern: Pattern
    allocation: Allocation
    max_rate: float
    reallocate_every: int | None
    schedule: str | RateSchedule
    total_forwards: int | None
    drop: Drop
    rescale: bool
    activation_memory_budget: float | None
    inner: InnerCompiler
    options: tuple[tuple[str, Any], ...]
    seed: int | None
    strict: bool

    @classmethod
    def checked(
        cls,
        rate: float,
        *,
        granularity: str,
        pattern: str | Pattern | DrawFunction,
        allocation: str,
        max_rate: float,
        reallocate_every: int | None,
        schedule: str | RateSchedule,
        total_forwards: int | None,
        drop: str,
        rescale: bool,
        activation_memory_budget: float | None,
        inner: InnerCompiler,
        options: Mapping[str, Any] | None,
        seed: int | None,
        strict: bool,
    ) -> BackendConfig:
        """Build a configuration, refusing bad values.

        Raises:
            TypeError: a value of the wrong type.
            ValueError: a value out of range or an unknown name.
        """
        _check_name(
            "granularity", granularity, Granularity, "drop single branches, or all branches of a layer together"
        )
        _check_name("allocation", allocation, Allocation, "give every branch the same rate, or rates by sensitivity")
        _check_name(
            "drop",
            drop,
            Drop,
            "drop all gradients of a branch, those of its parameters only, or all of them and of all that lies below",
        )
        rate = checked_rate(rate)
        max_rate = checked_max_rate(max_rate)
        if allocation == "sensitivity" and rate > max_rate:
            raise ValueError(
                f"With allocation='sensitivity' the rate cannot be above max_rate, but rate={rate} and max_rate={max_rate}: "
                "no allocation meets it. Lower the rate or raise max_rate."
            )
        _check_count("total_forwards", total_forwards)
        _check_count("reallocate_every", reallocate_every)
        if reallocate_every is not None and allocation != "sensitivity":
            raise ValueError(
                f"reallocate_every={reallocate_every} re-allocates rates by a running estimate of sensitivities, which "
                f"allocation={allocation!r} does not use. Pass allocation='sensitivity' with it."
            )
        if not isinstance(rescale, bool):
            raise TypeError(f"rescale must be True or False, not {rescale!r}.")
        if isinstance(inner, str):
            if inner not in _INNER_NAMES:
                raise ValueError(
                    f"inner must be {' or '.join(map(repr, _INNER_NAMES))} or a pair (forward compiler, backward "
                    f"compiler), not {inner!r}."
                )
        elif not (isinstance(inner, tuple) and len(inner) == 2 and all(callable(item) for item in inner)):
            raise TypeError(
                f"inner must be {' or '.join(map(repr, _INNER_NAMES))} or a pair of callables (forward compiler, "
                f"backward compiler), not {inner!r}."
            )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed must be an integer or None, not {seed!r}.")
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be True or False, not {strict!r}.")
        return cls(
            rate=rate,
            granularity=granularity,  # type: ignore[arg-type]
            pattern=resolve_pattern(pattern),
            allocation=allocation,  # type: ignore[arg-type]
            max_rate=max_rate,
            reallocate_every=reallocate_every,
            schedule=checked_schedule(schedule),
            total_forwards=total_forwards,
            drop=drop,  # type: ignore[arg-type]
            rescale=rescale,
            activation_memory_budget=checked_budget(activation_memory_budget),
            inner=inner,
            options=checked_inductor_options(options, inner),
            seed=seed,
            strict=strict,
        )

    def described(self) -> dict[str, str]:
        """What the patterns and gradients of a run depend on, in words that are equal in every process."""
        apart = {"rate", "schedule", "seed", "inner", "options", "strict", "activation_memory_budget"}
        fields = [field.name for field in dataclasses.fields(self) if field.name not in apart]
        return {name: in_words(getattr(self, name)) for name in fields}


def _check_name(argument: str, value: Any, names: Any, meaning: str) -> None:
    valid = get_args(names)
    if value not in valid:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, valid))}, not {value!r}: {meaning}.")


def _check_count(argument: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be a whole number of forwards or None, not {value!r}.")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, not {value}.")


def checked_max_rate(rate: Any) -> float:
    """``max_rate`` as a float in (0, 1).

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if not is_number(rate):
        raise TypeError(f"max_rate must be a number in (0, 1), not {rate!r}.")
    if not 0 < rate < 1:
        raise ValueError(f"max_rate must be in (0, 1), not {rate!r}: it is the highest rate that any branch is given.")
    return float(rate)


def checked_budget(budget: Any) -> float | None:
    """``activation_memory_budget`` as a float in [0, 1], or ``None``.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if budget is None:
        return None
    if not is_number(budget):
        raise TypeError(f"activation_memory_budget must be a number in [0, 1] or None, not {budget!r}.")
    if not 0 <= budget <= 1:
        raise ValueError(
            f"activation_memory_budget must be in [0, 1], not {budget!r}: it is the share of their activations that kept "
            "branches may save for the backward; 1 saves all that torch.compile would, 0 recomputes whatever it can."
        )
    return float(budget)


def checked_rate(rate: Any) -> float:
    """``rate`` as a float in [0, 1).

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if not is_number(rate):
        raise TypeError(f"rate must be a number in [0, 1), not {rate!r}.")
    if not (math.isfinite(rate) and 0 <= rate < 1):
        raise ValueError(
            f"rate must be in [0, 1), not {rate!r}: it is the share of residual branches whose backward is dropped, and "
            "at rate 1 nothing would be trained."
        )
    return float(rate)


def checked_inductor_options(options: Mapping[str, Any] | None, inner: InnerCompiler) -> tuple[tuple[str, Any], ...]:
    """Inductor options in a canonical order.

    Raises:
        TypeError: not a mapping from strings.
        ValueError: an option Inductor does not have, or options for another inner compiler.
    """
    if options is None:
        return ()
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"options must map names of Inductor options to values, not {options!r}.")
    if not options:
        return ()
    if inner != "inductor":
        raise ValueError(f"options go to Inductor, but inner={inner!r}. Drop the options, or use inner='inductor'.")
    known = _torch.inductor_option_names()
    canonical = {name.replace("-", "_"): value for name, value in options.items()}
    for name in canonical:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"Inductor has no option {name!r}.{hint} torch._inductor.list_options() lists them all.")
    if "joint_custom_pre_pass" in canonical:
        raise ValueError(
            "The Inductor option 'joint_custom_pre_pass' is the hook this backend prunes with, so it cannot be set. "
            "Use 'joint_custom_post_pass' or 'post_grad_custom_pre_pass' for a pass of your own."
        )
    return tuple(sorted(canonical.items()))
