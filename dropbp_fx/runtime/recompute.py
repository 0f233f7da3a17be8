"""Give a recomputed forward the pattern of the forward it repeats.

Non-reentrant ``torch.utils.checkpoint`` around a compiled block runs the block again during the backward. Were a new
pattern sampled then, gradients would be wrong. PyTorch keeps one object for a checkpoint's forward and its recomputations,
so the patterns are noted with it, in the order in which the checkpointed function ran compiled graphs. A forward inside a
backward that is no part of such a recomputation (reentrant checkpoints, whose first run is without gradients) samples like
any other.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from dropbp_fx import _torch


@dataclasses.dataclass(frozen=True)
class SampledPattern:
    """What one forward of one graph does.

    Attributes:
        dropped: numbers of the graph's branches that it drops.
        below: whether nothing is trained that runs before the graph's first kept branch, if its first branch is dropped.
        scales: what the gradients of each of the graph's branches are multiplied by if kept; empty if by nothing.
    """

    dropped: frozenset[int]
    below: bool = False
    scales: tuple[float, ...] = ()


class PatternMemory:
    """The patterns of one compiled graph's forwards inside of checkpoints, for as long as the checkpoints exist."""

    def __init__(self) -> None:
        self._patterns: weakref.WeakKeyDictionary[Any, list[SampledPattern]] = weakref.WeakKeyDictionary()  # by frame
        self._repeated: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # by run: calls so far
        self._lock = threading.Lock()

    def recall(self, around: Sequence[_torch.CheckpointCall]) -> SampledPattern | None:
        """The pattern of the forward that the present one repeats, ``None`` if it repeats none.

        Args:
            around: the running checkpoints, innermost first.

        Raises:
            RuntimeError: the checkpointed function takes another way than it did.
        """
        again = next((call for call in around if call.recomputes), None)
        if again is None:
            return None
        with self._lock:
            number = self._repeated.get(again.run, 0)
            self._repeated[again.run] = number + 1
            patterns = self._patterns.get(again.frame, ())
            if number < len(patterns):
                return patterns[number]
        raise RuntimeError(
            f"A checkpointed function runs a compiled block for the {number + 1}. time when it is recomputed, and ran it "
            f"{len(patterns)} times in its forward, so the pattern of that forward cannot be told. Let the function do the "
            "same in both, and Dynamo not compile anew in between; or compile the model with the checkpoints inside."
        )

    def note(self, around: Sequence[_torch.CheckpointCall], pattern: SampledPattern) -> None:
        """Remember what a forward does for the checkpoints it is the first or another run of."""
        for call in around:
            if call.recomputes:
                return
            with self._lock:
                self._patterns.setdefault(call.frame, []).append(pattern)
