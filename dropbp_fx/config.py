"""The backend's configuration: what is valid, and a sentence for what is not."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from dropbp_fx import _torch
from dropbp_fx.policy.drop_policy import DropPolicy, PolicyName, resolve_policy
from dropbp_fx.runtime.compiler import InnerCompiler
from dropbp_fx.values import SEED_BITS, as_int, checked_number, in_words, shown

_INNER_NAMES = ("inductor", "aot_eager")


@dataclasses.dataclass(frozen=True)
class BackendConfig:
    """Everything a backend is made from. Two backends of equal configuration are interchangeable until one is used."""

    policy: DropPolicy
    activation_memory_budget: float | None
    inner: InnerCompiler
    options: tuple[tuple[str, Any], ...]
    seed: int | None
    strict: bool

    @classmethod
    def checked(
        cls,
        *,
        rate: float | None,
        policy: PolicyName | DropPolicy,
        inner: InnerCompiler,
        options: Mapping[str, Any] | None,
        activation_memory_budget: float | None,
        seed: int | None,
        strict: bool,
    ) -> BackendConfig:
        """Build a configuration, refusing bad values; a ``rate`` takes the place of the policy's.

        Raises:
            TypeError: a value of the wrong type.
            ValueError: a value out of range or an unknown name.
        """
        policy = resolve_policy(policy)
        if rate is not None:
            policy = dataclasses.replace(policy, rate=rate)
        if not isinstance(strict, bool):
            raise TypeError(f"strict must be True or False, not {shown(strict)}.")
        return cls(
            policy=policy,
            activation_memory_budget=checked_budget(activation_memory_budget),
            inner=checked_inner(inner),
            options=checked_inductor_options(options, inner),
            seed=checked_seed(seed),
            strict=strict,
        )

    def described(self) -> dict[str, str]:
        """What the patterns and gradients of a run depend on, in words that are equal in every process."""
        apart = {"rate", "schedule"}  # they may change in a run, and are compared as they are then
        fields = [field.name for field in dataclasses.fields(self.policy) if field.name not in apart]
        return {name: in_words(getattr(self.policy, name)) for name in fields} | {
            "pattern": in_words(self.policy.resolved_pattern)
        }


def checked_inner(inner: Any) -> InnerCompiler:
    """What compiles the pruned graphs: a name, or a pair of functions.

    Raises:
        TypeError, ValueError: it is neither.
    """
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
    return inner  # type: ignore[no-any-return]


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


def checked_budget(budget: Any) -> float | None:
    """``activation_memory_budget`` as a float in [0, 1], or ``None``.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if budget is None:
        return None
    meaning = (
        "it is the share of their activations that kept branches may save for the backward; 1 saves all that "
        "torch.compile would, 0 recomputes whatever it can"
    )
    return checked_number(
        "activation_memory_budget", budget, low=0, high=1, includes="both", meaning=meaning, or_none=True
    )


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
