"""DropBP as a ``torch.compile`` backend: fine-tune with residual branches dropped in the backward pass only."""

from dropbp_fx.backend import BackendStats, DropBPBackend, NoResidualBranchWarning, dropbp_backend
from dropbp_fx.policy.allocation import allocate
from dropbp_fx.policy.branches import Branch
from dropbp_fx.policy.patterns import IndependentPattern, Pattern, RandomPattern, SuffixPattern, WindowPattern
from dropbp_fx.policy.ramps import Ramp, Steps
from dropbp_fx.policy.sampling import Unit
from dropbp_fx.policy.sensitivity import Sensitivity

__all__ = [
    "BackendStats",
    "Branch",
    "DropBPBackend",
    "IndependentPattern",
    "NoResidualBranchWarning",
    "Pattern",
    "Ramp",
    "RandomPattern",
    "Sensitivity",
    "Steps",
    "SuffixPattern",
    "Unit",
    "WindowPattern",
    "__version__",
    "allocate",
    "dropbp_backend",
]
__version__ = "0.1.0"
