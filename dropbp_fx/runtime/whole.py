"""Run a training graph in which nothing can be dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dropbp_fx import _torch
from dropbp_fx.runtime.dispatch import Policy
from dropbp_fx.runtime.instances import Instances


class WholeRunner:
    """The callable that Dynamo runs in place of such a graph: the policy hears of its forwards.

    Args:
        compiled: the graph, compiled as ``torch.compile`` would.
        policies: told of each forward, for the module that the graph then runs for.
    """

    def __init__(self, compiled: Callable[..., Any], policies: Instances[Policy]) -> None:
        self._compiled = compiled
        self._policies = policies

    def __call__(self, *arguments: Any) -> Any:
        policy = self._policies.of(arguments)
        if policy.calibration() is None and not any(call.recomputes for call in _torch.running_checkpoints()):
            policy.draw()
        return self._compiled(*arguments)
