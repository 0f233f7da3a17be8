"""What is dropped, and when: :class:`DropPolicy`, its checks, and the policies that have names.

======================  ===============================================================================================
name                    what it does
======================  ===============================================================================================
"dropbp"                random branches at a constant rate: the paper's, without its sensitivities
"freezing"              the lowest layers, and what lies below, are not trained
"progressive_freezing"  all layers at first, then the lowest, and what lies below, end their training one after the other
"lisa"                  the weights of a few random layers are trained, others every 20 forwards
======================  ===============================================================================================
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dropbp_fx.policy.patterns import Pattern, PatternName, SampleFunction, known_name, resolve_pattern
from dropbp_fx.policy.rates import Allocation, check_attainable
from dropbp_fx.policy.schedules import RateSchedule, ScheduleName, checked_schedule
from dropbp_fx.policy.units import Granularity
from dropbp_fx.values import Drop, checked_count, checked_number, shown

PolicyName = Literal["dropbp", "freezing", "progressive_freezing", "lisa"]
#: The graphs have the same choices of their own (:mod:`dropbp_fx.graph.regions`): this room must not know theirs.


@dataclasses.dataclass(frozen=True)
class DropPolicy:
    """What is dropped, and when. Equal fields make equal policies; to change one, ``dataclasses.replace(policy, ...)``.

    Attributes:
        rate: share of the residual branches' backward work (FLOPs) that is dropped, in [0, 1): at each training step, or,
            with a schedule, over the run.
        pattern: which branches are dropped together: "random" (the paper), "independent", "lowest" (the lowest layers, the
            same ones each time), "suffix" (everything below a random depth), "window" (one contiguous run of layers),
            ``LayersPattern(0, 8)`` or "layers[:8]" (those of these places), or a pattern of your own: a
            :class:`~dropbp_fx.Pattern`, or a function like its ``sample``.
        schedule: how the rate changes over the run: "constant", "ramp_up" (from 0 to 2 ``rate``), "ramp_down", "step"
            (nothing in the first half, 2 ``rate`` in the second), "late_ramp" (nothing at first, then up to ``max_rate``),
            or a function from progress (0 to 1) to a rate. The training loop tells the progress:
            :attr:`DropBPBackend.progress`.
        allocation: "uniform" gives every branch the same rate; "sensitivity" gives rates by sensitivity, once it is known:
            after :meth:`DropBPBackend.calibrate`, or by ``reallocate_every``.
        granularity: "branch" drops single branches; "layer" drops all branches of a layer together.
        drop: "branch" drops all gradients of a branch; "weights" those of its parameters only, so that all other
            parameters' gradients stay exact; "below" all gradients of a branch and, where the lowest branches are dropped,
            those of the residual stream up to the first kept branch: an embedding is then not trained with what little of
            its gradient goes around the dropped branches, but not at all in that step.
        rescale: multiply the gradients of a kept branch by 1 / (1 - its rate). With ``pattern="independent"`` gradients are
            then unbiased.
        max_rate: the highest rate that allocation or a named schedule gives, in (0, 1).
        reallocate_every: keep a running estimate of the sensitivities from ordinary steps, and re-allocate the rates once
            in so many forwards.
        hold: sample the pattern once in so many forwards, and drop the same in all of them: at constant rates, and while
            the same branches can be dropped. Every training forward counts, each micro-batch of an accumulated gradient too
            and those of all models of the backend; all graphs of a model's forward are one. Which forwards share a pattern
            goes by their number, so a resumed run goes on in the middle of it.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of range or an unknown name.
    """

    rate: float = 0.5
    pattern: PatternName | Pattern | SampleFunction = "random"
    schedule: ScheduleName | RateSchedule = "constant"
    allocation: Allocation = "uniform"
    granularity: Granularity = "branch"
    drop: Drop = "branch"
    rescale: bool = False
    max_rate: float = 0.95
    reallocate_every: int | None = None
    hold: int = 1

    def __post_init__(self) -> None:
        _check_name(
            "granularity", self.granularity, Granularity, "drop single branches, or all branches of a layer together"
        )
        _check_name(
            "allocation", self.allocation, Allocation, "give every branch the same rate, or rates by sensitivity"
        )
        _check_name(
            "drop",
            self.drop,
            Drop,
            "drop all gradients of a branch, those of its parameters only, or all of them and of all that lies below",
        )
        rate, max_rate = checked_rate(self.rate), checked_max_rate(self.max_rate)
        check_attainable(rate, self.allocation, max_rate)
        every = self.reallocate_every
        if every is not None:
            every = checked_count("reallocate_every", every, least=1, of="forwards", or_none=True)
        if every is not None and self.allocation != "sensitivity":
            raise ValueError(
                f"reallocate_every={every} re-allocates rates by a running estimate of sensitivities, which "
                f"allocation={self.allocation!r} does not use. Pass allocation='sensitivity' with it."
            )
        hold = checked_count("hold", self.hold, least=1, of="forwards")
        if not isinstance(self.rescale, bool):
            raise TypeError(f"rescale must be True or False, not {shown(self.rescale)}.")
        pattern, schedule = resolve_pattern(self.pattern), checked_schedule(self.schedule)
        # One form of each value, so that policies are equal where they do the same.
        canonical = {
            "rate": rate,
            "max_rate": max_rate,
            "reallocate_every": every,
            "hold": hold,
            "pattern": known_name(pattern) or self.pattern,
            "schedule": schedule,
        }
        for field, value in canonical.items():
            object.__setattr__(self, field, value)

    @classmethod
    def named(cls, name: PolicyName) -> DropPolicy:
        """The policy of a name: "dropbp", "freezing", "progressive_freezing" or "lisa"; :meth:`about` says what each is for.

        Raises:
            TypeError: ``name`` is no string.
            ValueError: no policy has the name.
        """
        return _preset(name)[0]

    @classmethod
    def about(cls, name: PolicyName) -> str:
        """What the policy of a name does, and when to take it.

        Raises:
            TypeError, ValueError: as for :meth:`named`.
        """
        return _preset(name)[1]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> DropPolicy:
        """The policy with these fields, as a configuration file may have them; the others are as by default.

        Raises:
            TypeError: ``fields`` is no mapping, or a value is of the wrong type.
            ValueError: there is no such field, or a value is out of range.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"A policy's fields must be a mapping from their names, not {shown(fields)}.")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"A policy has no field {shown(name)}.{hint} Its fields are {', '.join(known)}.")
        return cls(**fields)

    @property
    def resolved_pattern(self) -> Pattern:
        """The pattern as an object."""
        return resolve_pattern(self.pattern)

    @property
    def name(self) -> PolicyName | None:
        """The name of the policy that this one is, at whatever rate; ``None`` for one of your own."""
        for name in get_args(PolicyName):
            if dataclasses.replace(self.named(name), rate=self.rate) == self:
                return name  # type: ignore[no-any-return]
        return None


def resolve_policy(policy: Any) -> DropPolicy:
    """A policy, or that of a name.

    Raises:
        TypeError: ``policy`` is neither.
        ValueError: no policy has the name.
    """
    return policy if isinstance(policy, DropPolicy) else DropPolicy.named(policy)


def _presets() -> dict[str, tuple[DropPolicy, str]]:
    return {
        "dropbp": (
            DropPolicy(rate=0.5),
            "Random branches at a constant rate (Woo et al., NeurIPS 2024, without sensitivities), which saves memory "
            "and time from the first step on. In the same time a baseline of fewer steps learns more, and 'freezing' learns "
            "more in the same time and memory (docs/choosing.md); take it to reproduce or compare with the paper.",
        ),
        "freezing": (
            DropPolicy(rate=0.5, pattern="lowest", drop="below"),
            "The lowest layers and the embedding below them are not trained, as with requires_grad_(False), and the "
            "gradients of all others are exact. Half of the layers save a third of a step's time and half of its activation "
            "memory. Where all parameters are trained that learns more than the baseline in the same time; with LoRA of "
            "rank 64 about as much, of rank 8 less, of twice the rank more (docs/choosing.md). It need not be told of the "
            "run's progress.",
        ),
        "progressive_freezing": (
            DropPolicy(rate=0.25, pattern="lowest", schedule="late_ramp", drop="below"),
            "All layers are trained at first, exactly; then the lowest end their training one after the other, and "
            "the gradients of those above stay exact (as in FreezeOut, Brock et al., 2017, but with one learning rate for "
            "all). Where all parameters are trained it learns more than the baseline in the same time; take 0.5 to 0.7. "
            "With LoRA of rank 8 it learns as much at 0.25 and less above (docs/choosing.md). Memory is the baseline's at "
            "first and falls from then on; above 0.475 the run begins with layers frozen (0.7: 45 %), which save "
            "memory throughout. It must be told of the run's progress.",
        ),
        "lisa": (
            DropPolicy(rate=0.875, granularity="layer", drop="weights", hold=20),
            "The weights of a random eighth of the layers are trained, of others every 20 forwards, and the gradients of "
            "these, of embeddings and of the head are exact (as in LISA, Pan et al., NeurIPS 2024). To train k of n layers, "
            "take the rate 1 - k / n. All gradients of activations are computed, so it saves less time than freezing at "
            "the same rate; at 0.5 it learned less than the baseline in the same time (docs/experiments/quality.md). An "
            "optimizer keeps the moments of layers that are not trained until its user deletes them (docs/howto/policy.md).",
        ),
    }


def _preset(name: Any) -> tuple[DropPolicy, str]:
    known = _presets()
    names = ", ".join(map(repr, known))
    if not isinstance(name, str):
        raise TypeError(
            f"policy must be one of the names {names}, or a DropPolicy, not {shown(name)}. A pattern of your own is passed "
            "as DropPolicy(pattern=...)."
        )
    if name not in known:
        raise ValueError(
            f"There is no policy named {name!r}; the names are {names}. Pass one of them, or a DropPolicy with the pattern, "
            "the schedule and the other fields that you want."
        )
    return known[name]


def _check_name(field: str, value: Any, names: Any, meaning: str) -> None:
    valid = get_args(names)
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, valid))}, not {shown(value)}: {meaning}.")


def checked_max_rate(rate: Any) -> float:
    """``max_rate`` as a float in (0, 1).

    Raises:
        TypeError, ValueError: it is none.
    """
    meaning = "it is the highest rate that any branch is given"
    return checked_number("max_rate", rate, low=0, high=1, includes="neither", meaning=meaning)


def checked_rate(rate: Any) -> float:
    """``rate`` as a float in [0, 1).

    Raises:
        TypeError, ValueError: it is none.
    """
    meaning = "it is the share of residual branches whose backward is dropped, and at rate 1 nothing would be trained"
    return checked_number("rate", rate, low=0, high=1, includes="low", meaning=meaning)
