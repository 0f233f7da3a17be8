"""Engines for several processes: ``fully_shard``, DistributedDataParallel, process groups.

| hook | why it is needed |
| --- | --- |
| groups of parameters of ``fully_shard`` | a group that a backward does not read is not gathered for it |
| ``torch._C._storage_Use_Count``, ``Tensor._use_count`` | whether a forward's graph refers to a group's parameters |
| ``DistributedDataParallel._get_active_ddp_module`` | a warning where it waits for gradients that dropping leaves out |
| ``distributed_c10d._get_process_group_store`` | ranks exchange keys without a collective call |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dropbp_fx._torch.autograd import saved_tensor_hooks_are_set


def ddp_waits_for_every_gradient() -> bool:
    """Whether the present forward is that of a DistributedDataParallel that cannot do without any gradient."""
    from torch.nn.parallel import DistributedDataParallel

    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not ddp.require_backward_grad_sync or getattr(ddp, "_use_python_reducer", False):
        return False
    return bool(ddp.static_graph or not ddp.find_unused_parameters)


def process_group_store(group: Any) -> Any:
    """The key-value store that a process group was made with."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_process_group_store(group)


def leave_out_unneeded_gathers(module: torch.nn.Module) -> None:
    """Let the groups of parameters of ``module``, one that ``fully_shard`` took, gather for a backward only what it reads.

    A forward's graph refers to what its backward needs: to a tensor that it saved, to the storage of a view of one, to the
    node that accumulates a parameter's gradient. A group to whose parameters the forward has left no reference more than
    there was before it is not gathered again, and other groups do not prefetch it.
    """
    state = module._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)  # several since torch 2.12
    if groups is None:
        groups = [group for group in [state._fsdp_param_group] if group is not None]
    for group in groups:
        if not hasattr(group, "dropbp_gathers"):
            group.dropbp_gathers = _Gathers(group)


class _Gathers:
    """Stands between a group of sharded parameters and the hooks of its module."""

    _pre_forward: Callable[..., Any]
    _post_forward: Callable[..., Any]
    _pre_backward: Callable[..., Any]
    _finalize_backward: Callable[..., Any]

    def __init__(self, group: Any) -> None:
        self._group = group
        self._needed: list[bool] = []  # for each forward that waits for its backward
        self._before: list[tuple[int, int]] = []
        for name in ("pre_forward", "post_forward", "pre_backward", "finalize_backward"):
            setattr(self, f"_{name}", getattr(group, name))
            setattr(group, name, getattr(self, name))

    def pre_forward(self, *arguments: Any, **named: Any) -> Any:
        found = self._pre_forward(*arguments, **named)
        self._before = self._references()
        return found

    def post_forward(self, *arguments: Any, **named: Any) -> Any:
        group = self._group
        records = len(group._post_forward_indices)
        found = self._post_forward(*arguments, **named)
        if len(group._post_forward_indices) == records or not torch.is_grad_enabled():
            return found  # a checkpoint's recomputation, or no backward will follow
        # Under hooks on saved tensors the graph refers to what the hooks made of them.
        needed = not group.is_sharded or saved_tensor_hooks_are_set() or self._references() != self._before
        self._needed.append(needed)
        if not needed:
            group._post_forward_indices.pop()
            group.comm_ctx.post_forward_order.pop()
        return found

    def pre_backward(self, *arguments: Any, **named: Any) -> Any:
        group = self._group
        state = type(group._training_state).PRE_BACKWARD
        if self._needed and group._training_state != state:  # later outputs of one forward change nothing
            skips = not any(self._needed)  # of several forwards it is not known which one's backward this is
            self._needed.pop()
            if skips:
                group._training_state = state
                return None
        return self._pre_backward(*arguments, **named)

    def finalize_backward(self, *arguments: Any, **named: Any) -> Any:
        self._needed.clear()
        return self._finalize_backward(*arguments, **named)

    def _references(self) -> list[tuple[int, int]]:
        """For each parameter how many references there are to it and to its storage, those of Python counting once."""
        whole = [p._unsharded_param for p in self._group.fsdp_params if hasattr(p, "_unsharded_param")]
        return [(p._use_count(), torch._C._storage_Use_Count(p.untyped_storage()._cdata)) for p in whole]
