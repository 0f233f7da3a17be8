"""Write back what a graph wants its inputs to hold (:mod:`dropbp_fx.graph.writes`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dropbp_fx.graph.writes import InputWrites


def write_back(writes: InputWrites, written: Sequence[Tensor], outputs: Sequence[Any]) -> tuple[Any, ...]:
    """Write the last of ``outputs`` into the inputs; the outputs that the graph itself has.

    Args:
        writes: which inputs are written to.
        written: those inputs.
        outputs: what the regions made.
    """
    own = len(outputs) - len(written)
    for target, value in zip(written, outputs[own:], strict=True):
        if value.requires_grad and not (target.is_leaf and target.requires_grad):
            target.copy_(value)
        else:  # written where gradients were off, or to a value that has none
            with torch.no_grad():
                target.copy_(value)
    values = list(outputs[:own])
    for alias in writes.returned:
        target = written[alias.write]
        if alias.view is None:
            values[alias.output] = target
        else:
            size, stride, offset = alias.view
            values[alias.output] = target.as_strided(size, stride, target.storage_offset() + offset)
    return tuple(values)
