"""DropBP as a ``torch.compile`` backend: fine-tune with residual branches dropped in the backward pass only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dropbp_fx._distributed.agreement import RankDisagreementError
from dropbp_fx.backend import DropBPBackend
from dropbp_fx.entry import backends, current, dropbp_backend, named_backend
from dropbp_fx.policy.allocation import allocate
from dropbp_fx.policy.balanced import Unit
from dropbp_fx.policy.branches import Branch
from dropbp_fx.policy.drop_policy import DropPolicy
from dropbp_fx.policy.patterns import (
    IndependentPattern,
    LayersPattern,
    LowestPattern,
    Pattern,
    RandomPattern,
    SuffixPattern,
    WindowPattern,
)
from dropbp_fx.policy.schedules import LateRamp, Ramp, Steps
from dropbp_fx.runtime.device_graphs import CudaGraphsWarning
from dropbp_fx.sensitivity.sensitivity import Sensitivity
from dropbp_fx.shortfall import LessDroppedWarning, NoResidualBranchWarning
from dropbp_fx.summary import BackendStats
from dropbp_fx.version import __version__

if TYPE_CHECKING:
    from dropbp_fx.inspect import Explanation, dump_graphs, explain

__all__ = [
    "BackendStats",
    "Branch",
    "CudaGraphsWarning",
    "DropBPBackend",
    "DropPolicy",
    "Explanation",
    "IndependentPattern",
    "LateRamp",
    "LayersPattern",
    "LessDroppedWarning",
    "LowestPattern",
    "NoResidualBranchWarning",
    "Pattern",
    "Ramp",
    "RandomPattern",
    "RankDisagreementError",
    "Sensitivity",
    "Steps",
    "SuffixPattern",
    "Unit",
    "WindowPattern",
    "__version__",
    "allocate",
    "backends",
    "current",
    "dropbp_backend",
    "dump_graphs",
    "explain",
    "named_backend",
]

_INSPECTION = frozenset({"Explanation", "dump_graphs", "explain"})


def __getattr__(name: str) -> Any:
    """Training imports nothing of the inspection until it is asked for."""
    if name in _INSPECTION:
        return getattr(importlib.import_module("dropbp_fx.inspect"), name)
    raise AttributeError(f"module 'dropbp_fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is public is shown before it is first asked for."""
    return sorted({*globals(), *__all__})
