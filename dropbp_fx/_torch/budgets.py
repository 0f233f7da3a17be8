"""How much of its activations a joint graph may save: PyTorch's activation memory budgets.

| hook | why it is needed |
| --- | --- |
| ``torch._functorch.config.activation_memory_budget`` | the backend's parameter of that name, and the user's own setting |
| ``torch.fx.traceback.MEMORY_BUDGET_ANNOTATION_KEY`` (2.13 and later) | budgets that a forward sets for its own operators |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx

_ANNOTATIONS = "custom"


def activation_memory_budget(budget: float | None) -> contextlib.AbstractContextManager[Any]:
    """What is partitioned within saves no more than this share of what it would; the rest is recomputed."""
    if budget is None:
        return contextlib.nullcontext()
    from torch._functorch import config

    return cast("contextlib.AbstractContextManager[Any]", config.patch(activation_memory_budget=budget))


def lowest_budget(joint: fx.GraphModule) -> float:
    """The lowest of the budgets that may be in force for ``joint``: the setting, and those of its operators."""
    from torch._functorch import config

    return min(config.activation_memory_budget, *(1.0, *(budget for _, budget in _annotated(joint))))


@contextlib.contextmanager
def changed_budgets(joint: fx.GraphModule, change: Callable[[float], float]) -> Iterator[None]:
    """Within the block, ``change`` of each of those budgets is in force; operators of ``joint`` are annotated for good."""
    from torch._functorch import config

    for node, budget in list(_annotated(joint)):
        node.meta[_ANNOTATIONS] = {**node.meta[_ANNOTATIONS], _annotation_key(): change(budget)}
    with activation_memory_budget(change(config.activation_memory_budget)):
        yield


def _annotation_key() -> str | None:
    return getattr(torch.fx.traceback, "MEMORY_BUDGET_ANNOTATION_KEY", None)


def _annotated(joint: fx.GraphModule) -> Iterator[tuple[fx.Node, float]]:
    """Operators with budgets of their own, also in graphs inside of the graph."""
    key = _annotation_key()
    for module in joint.modules() if key is not None else ():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            annotations = node.meta.get(_ANNOTATIONS)
            if isinstance(annotations, dict) and annotations.get(key) is not None:
                yield node, annotations[key]
