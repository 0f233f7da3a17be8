"""Give a recomputed forward the pattern of the forward it repeats.

Non-reentrant ``torch.utils.checkpoint`` around a compiled block runs the block again during the backward. Were a new
pattern drawn then, gradients would be wrong. A recomputation reads the very tensors that its forward read (the checkpoint
keeps them alive), so the forwards whose autograd graph is still there are remembered by their inputs. A forward inside a
backward that repeats no other (reentrant checkpoints, whose first run is without gradients) draws like any other.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one forward of one graph does.

    Attributes:
        dropped: numbers of the graph's branches that it drops.
        scales: what the gradients of each of the graph's branches are multiplied by if kept; empty if by nothing.
    """

    dropped: frozenset[int]
    scales: tuple[float, ...] = ()


class _Alive:
    """Lives exactly as long as the autograd node it is attached to."""


class PatternMemory:
    """The patterns of a compiled graph's forwards that have not been through their backward yet, by their inputs.

    Args:
        examples: example inputs of the graph; parameters do not tell forwards apart and are left out.
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        self._telling = [
            index
            for index, example in enumerate(examples)
            if isinstance(example, torch.Tensor) and not isinstance(example, torch.nn.Parameter)
        ]
        self._pending: dict[Hashable, weakref.WeakKeyDictionary[_Alive, Drawn]] = {}
        self._lock = threading.Lock()
        self._sweep_at = 64

    def key(self, inputs: Sequence[Any]) -> Hashable:
        """What tells one forward's inputs from another's."""
        return tuple(_identity(inputs[index]) for index in self._telling)

    def remember(self, key: Hashable, outputs: Sequence[Any], pattern: Drawn) -> None:
        """Note the pattern of a forward for as long as its autograd graph exists."""
        node = next((o.grad_fn for o in outputs if isinstance(o, torch.Tensor) and o.grad_fn is not None), None)
        if node is None:
            return
        alive = _Alive()
        metadata: Any = node.metadata
        metadata["dropbp_fx"] = alive
        with self._lock:
            self._pending.setdefault(key, weakref.WeakKeyDictionary())[alive] = pattern
            if len(self._pending) > self._sweep_at:
                self._pending = {key: forwards for key, forwards in self._pending.items() if len(forwards)}
                self._sweep_at = 64 + 2 * len(self._pending)

    def recall(self, key: Hashable) -> Drawn | None:
        """The pattern of the pending forward on these inputs, ``None`` if there is none.

        Raises:
            RuntimeError: there are several with different patterns.
        """
        with self._lock:
            patterns = set(self._pending.get(key, {}).values())
        if len(patterns) > 1:
            raise RuntimeError(
                f"{len(patterns)} forwards with different patterns ran on the same input before their backward, so it "
                "cannot be told which of them is being recomputed. Run the backward after each forward, or give the "
                "forwards one pattern with backend.pinned(...)."
            )
        return next(iter(patterns), None)


def _identity(value: torch.Tensor) -> Hashable:
    # A wrapper subclass has no memory of its own; checkpoints keep the object itself.
    if type(value) is not torch.Tensor:
        return id(value)
    return value.data_ptr(), value._version if not value.is_inference() else 0
