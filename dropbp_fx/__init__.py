"""DropBP as a ``torch.compile`` backend: fine-tune with residual branches dropped in the backward pass only."""

from dropbp_fx.backend import BackendStats, DropBPBackend, NoResidualBranchWarning, dropbp_backend
from dropbp_fx.policy.branches import Branch

__all__ = ["BackendStats", "Branch", "DropBPBackend", "NoResidualBranchWarning", "__version__", "dropbp_backend"]
__version__ = "0.1.0"
