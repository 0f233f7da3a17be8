"""Inspection: see what would be dropped, what that saves and why, before a GPU hour is spent."""

from dropbp_fx.inspect.dump import dump_graphs
from dropbp_fx.inspect.explaining import explain
from dropbp_fx.inspect.explanation import Explanation
from dropbp_fx.inspect.figures import ExplainedBranch, Prediction
from dropbp_fx.inspect.given import Given, GivenInput
from dropbp_fx.inspect.history import PatternHistory, record_patterns

__all__ = [
    "ExplainedBranch",
    "Explanation",
    "Given",
    "GivenInput",
    "PatternHistory",
    "Prediction",
    "dump_graphs",
    "explain",
    "record_patterns",
]
