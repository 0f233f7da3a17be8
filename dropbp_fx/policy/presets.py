"""Policies by name: arguments of ``dropbp_backend`` that go together, with what is known of them.

======================  ===============================================================================================
name                    what it does
======================  ===============================================================================================
"dropbp"                random branches at a constant rate: the paper's, without its sensitivities
"freezing"              the lowest layers, and what lies below, are not trained
"progressive_freezing"  all layers at first, then the lowest, and what lies below, end their training one after the other
======================  ===============================================================================================
"""

from __future__ import annotations

import dataclasses

from dropbp_fx.policy.rates import Allocation
from dropbp_fx.policy.values import shown


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a policy's name stands for.

    Attributes:
        about: what it does and when to take it.
        rate: share of the branches' backward FLOPs that is dropped over the whole run.
        pattern: a name of :func:`~dropbp_fx.policy.patterns.resolve_pattern`.
        schedule: a name of :func:`~dropbp_fx.policy.ramps.rate_schedule`.
        allocation: "uniform" or "sensitivity".
        drop: "branch", "weights" or "below".
    """

    about: str
    rate: float
    pattern: str = "random"
    schedule: str = "constant"
    allocation: Allocation = "uniform"
    drop: str = "branch"


def presets() -> dict[str, Preset]:
    """All policies by name."""
    return {
        "dropbp": Preset(
            about="Random branches at a constant rate (Woo et al., NeurIPS 2024, without sensitivities), which saves memory "
            "and time from the first step on. In the same time a baseline of fewer steps learns more, and 'freezing' learns "
            "more in the same time and memory (docs/choosing.md); take it to reproduce or compare with the paper.",
            rate=0.5,
        ),
        "freezing": Preset(
            about="The lowest layers and the embedding below them are not trained, as with requires_grad_(False), and the "
            "gradients of all others are exact. Half of the layers save a third of a step's time and half of its activation "
            "memory. Where all parameters are trained that learns more than the baseline in the same time; with LoRA of "
            "rank 64 about as much, of rank 8 less, of twice the rank more (docs/choosing.md). It need not be told of the "
            "run's progress.",
            rate=0.5,
            pattern="lowest",
            drop="below",
        ),
        "progressive_freezing": Preset(
            about="All layers are trained at first, exactly; then the lowest end their training one after the other, and "
            "the gradients of those above stay exact (as in FreezeOut, Brock et al., 2017, but with one learning rate for "
            "all). Where all parameters are trained it learns more than the baseline in the same time; take 0.5 to 0.7. "
            "With LoRA of rank 8 it learns as much at 0.25 and less above (docs/choosing.md). Memory is the baseline's at "
            "first and falls from then on; above 0.475 the run begins with layers frozen (0.7: 45 %), which save "
            "memory throughout. It must be told of the run's progress.",
            rate=0.25,
            pattern="lowest",
            schedule="late_ramp",
            drop="below",
        ),
    }


def resolve_preset(policy: str) -> Preset:
    """The policy of a name.

    Raises:
        TypeError: ``policy`` is no string.
        ValueError: no policy has the name.
    """
    known = presets()
    names = ", ".join(map(repr, known))
    if not isinstance(policy, str):
        raise TypeError(
            f"policy must be one of the names {names}, not {shown(policy)}. A pattern of your own is passed as pattern=."
        )
    if policy not in known:
        raise ValueError(
            f"There is no policy named {policy!r}; the names are {names}. Pass one of them, or pattern=, schedule= and the "
            "other arguments by themselves."
        )
    return known[policy]
