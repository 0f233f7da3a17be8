"""Inspection: see what would be dropped, what that saves and why, before a GPU hour is spent."""

from dropbp_fx.inspect.explaining import explain
from dropbp_fx.inspect.explanation import ExplainedBranch, Explanation, Prediction

__all__ = ["ExplainedBranch", "Explanation", "Prediction", "explain"]
