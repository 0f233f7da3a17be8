"""What the autograd engine and autocast are doing.

| hook | why it is needed |
| --- | --- |
| ``torch._C._current_graph_task_id`` | a forward inside a backward is a recomputation, not a new step |
| ``torch._C._autograd._get_current_graph_task_keep_graph`` | an observed step keeps its regions' graphs if it must |
| ``torch._C._autograd._top_saved_tensors_default_hooks`` | what hooks make of saved tensors is not the tensors |
| ``torch.autograd.forward_ad._current_level`` | forward-mode AD is refused, cheaply, rather than left without a tangent |
| ``torch._C._is_any_autocast_enabled``, ``_DisableAutocast`` | compiled code has its casts in it already |
| ``Tensor._version``, ``Tensor._is_view`` | whether a tensor was written to, and what it keeps alive |
| ``torch._foreach_norm`` | the norms of many gradients, sharded ones among them, in one call and without communication |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch.autograd import forward_ad


def autocast_is_on() -> bool:
    """Whether any device's autocast is on."""
    return bool(torch._C._is_any_autocast_enabled())


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Compiled code has its casts in it already."""
    return cast("contextlib.AbstractContextManager[Any]", torch._C._DisableAutocast())


def norms(tensors: Sequence[torch.Tensor], order: float) -> Sequence[torch.Tensor]:
    """The ``order``-norm of each tensor. Those of DTensors are of their shards, still to be reduced."""
    found: Sequence[torch.Tensor] = torch._foreach_norm(list(tensors), order)
    return found


def in_backward() -> bool:
    """Whether this thread is running an autograd backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def keeps_graph() -> bool:
    """Whether the autograd backward pass this thread is running was asked to keep the graph."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def has_tangents(values: Iterable[Any]) -> bool:
    """Whether forward-mode AD is to follow one of the values."""
    return any(
        isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values
    )


def forward_ad_is_on() -> bool:
    """Whether this is within a level of forward-mode AD, where tensors may have tangents."""
    return forward_ad._current_level >= 0


def saved_tensor_hooks_are_set() -> bool:
    """Whether tensors saved for the backward now go through somebody's hooks."""
    return bool(torch._C._autograd._top_saved_tensors_default_hooks(True))


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to."""
    return tensor._version


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd keeps a tensor's base for it."""
    return tensor._is_view()
