"""Run a training graph in which nothing can be dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dropbp_fx import _torch
from dropbp_fx.runtime.dispatch import PatternSource
from dropbp_fx.runtime.per_module import PerModule


class WholeRunner:
    """The callable that Dynamo runs in place of such a graph: whoever samples patterns hears of its forwards.

    Args:
        compiled: the graph, compiled as ``torch.compile`` would.
        sources: told of each forward, for the module that the graph then runs for.
    """

    def __init__(self, compiled: Callable[..., Any], sources: PerModule[PatternSource]) -> None:
        self._compiled = compiled
        self._sources = sources

    def __call__(self, *arguments: Any) -> Any:
        source = self._sources.of(arguments)
        if source.calibration() is None and not any(call.recomputes for call in _torch.running_checkpoints()):
            source.sample()
        return self._compiled(*arguments)
