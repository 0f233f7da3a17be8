"""Copy tensors for compiled code, which counts on strides."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_copy(value: Tensor) -> Tensor:
    """A copy laid out like ``value``, gaps included; differentiable."""
    copy = value.clone()
    if copy.stride() == value.stride():
        return copy
    with torch.no_grad():
        laid_out = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return laid_out.copy_(value)
