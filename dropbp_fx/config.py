"""The backend's configuration: what is valid, and a sentence for what is not."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_args

from dropbp_fx import _torch
from dropbp_fx.graph.gating import Drop
from dropbp_fx.policy.patterns import DrawFunction, Pattern, resolve_pattern
from dropbp_fx.policy.ramps import RateSchedule, checked_schedule
from dropbp_fx.policy.ranks import in_words
from dropbp_fx.policy.rates import Allocation, check_attainable
from dropbp_fx.policy.schedule import Granularity
from dropbp_fx.policy.values import LARGEST_COUNT, SEED_BITS, as_float, as_int, shown
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
        check_attainable(rate, allocation, max_rate)
        total_forwards = _checked_count("total_forwards", total_forwards)
        reallocate_every = _checked_count("reallocate_every", reallocate_every)
        if reallocate_every is not None and allocation != "sensitivity":
            raise ValueError(
                f"reallocate_every={reallocate_every} re-allocates rates by a running estimate of sensitivities, which "
                f"allocation={allocation!r} does not use. Pass allocation='sensitivity' with it."
            )
        if not isinstance(rescale, bool):
            raise TypeError(f"rescale must be True or False, not {shown(rescale)}.")
        if isinstance(inner, str):
            if inner not in _INNER_NAMES:
                raise ValueError(
                    f"inner must be {' or '.join(map(repr, _INNER_NAMES))} or a pair (forward compiler, backward "
                    f"compiler), not {shown(inner)}."
                )
        elif not (isinstance(inner, tuple) and len(inner) == 2 and all(callable(item) for item in inner)):
            raise TypeError(
                f"inner must be {' or '.join(map(repr, _INNER_NAMES))} or a pair of callables (forward compiler, "
                f"backward compiler), not {shown(inner)}."
            )
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be True or False, not {shown(strict)}.")
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
            seed=checked_seed(seed),
            strict=strict,
        )

    def described(self) -> dict[str, str]:
        """What the patterns and gradients of a run depend on, in words that are equal in every process."""
        apart = {"rate", "schedule", "seed", "inner", "options", "strict", "activation_memory_budget"}
        fields = [field.name for field in dataclasses.fields(self) if field.name not in apart]
        return {name: in_words(getattr(self, name)) for name in fields}


def _check_name(argument: str, value: Any, names: Any, meaning: str) -> None:
    valid = get_args(names)
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, valid))}, not {shown(value)}: {meaning}.")


def _checked_count(argument: str, value: Any) -> int | None:
    if value is None:
        return None
    count = as_int(value)
    if count is None:
        raise TypeError(f"{argument} must be a whole number of forwards or None, not {shown(value)}.")
    if count < 1:
        raise ValueError(f"{argument} must be at least 1, not {shown(count)}.")
    if count > LARGEST_COUNT:
        raise ValueError(f"{argument} must be less than 2**63, not {shown(count)}.")
    return count


def checked_seed(seed: Any) -> int | None:
    """``seed`` as an ``int``, or ``None``.

    Raises:
        TypeError: it is no whole number.
        ValueError: it has more than 1000 bits.
    """
    if seed is None:
        return None
    number = as_int(seed)
    if number is None:
        raise TypeError(f"seed must be an integer or None, not {shown(seed)}.")
    if number.bit_length() > SEED_BITS:
        raise ValueError(f"seed must have at most {SEED_BITS} bits, not {number.bit_length()}: take a smaller integer.")
    return number


def checked_max_rate(rate: Any) -> float:
    """``max_rate`` as a float in (0, 1).

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    number = as_float(rate)
    if number is None:
        raise TypeError(f"max_rate must be a number in (0, 1), not {shown(rate)}.")
    if not 0 < number < 1:
        raise ValueError(
            f"max_rate must be in (0, 1), not {shown(rate)}: it is the highest rate that any branch is given."
        )
    return number


def checked_budget(budget: Any) -> float | None:
    """``activation_memory_budget`` as a float in [0, 1], or ``None``.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    if budget is None:
        return None
    number = as_float(budget)
    if number is None:
        raise TypeError(f"activation_memory_budget must be a number in [0, 1] or None, not {shown(budget)}.")
    if not 0 <= number <= 1:
        raise ValueError(
            f"activation_memory_budget must be in [0, 1], not {shown(budget)}: it is the share of their activations that "
            "kept branches may save for the backward; 1 saves all that torch.compile would, 0 recomputes whatever it can."
        )
    return number


def checked_rate(rate: Any) -> float:
    """``rate`` as a float in [0, 1).

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.
    """
    number = as_float(rate)
    if number is None:
        raise TypeError(f"rate must be a number in [0, 1), not {shown(rate)}.")
    if not 0 <= number < 1:
        raise ValueError(
            f"rate must be in [0, 1), not {shown(rate)}: it is the share of residual branches whose backward is dropped, "
            "and at rate 1 nothing would be trained."
        )
    return number


def checked_inductor_options(options: Mapping[str, Any] | None, inner: InnerCompiler) -> tuple[tuple[str, Any], ...]:
    """Inductor options in a canonical order.

    Raises:
        TypeError: not a mapping from strings.
        ValueError: an option Inductor does not have, or options for another inner compiler.
    """
    if options is None:
        return ()
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise TypeError(f"options must map names of Inductor options to values, not {shown(options)}.")
    if not options:
        return ()
    if inner != "inductor":
        raise ValueError(
            f"options go to Inductor, but inner={shown(inner)}. Drop the options, or use inner='inductor'."
        )
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
