"""Non-reentrant activation checkpoints around compiled code.

| hook | why it is needed |
| --- | --- |
| ``torch.utils.checkpoint`` hooks and their frames | a recomputed forward is told which one it repeats |
| ``torch._C._autograd`` stack of saved tensor hooks | find the hooks of the checkpoints that are running |
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch

from dropbp_fx._torch.autograd import saved_tensor_hooks_are_set


@dataclasses.dataclass(frozen=True)
class CheckpointCall:
    """One non-reentrant ``torch.utils.checkpoint`` that is running, or running again inside a backward.

    Attributes:
        frame: what PyTorch knows the checkpoint by, the same object for the forward and all its recomputations.
        run: tells its runs apart.
        recomputes: whether this is a recomputation.
    """

    frame: Any
    run: Any
    recomputes: bool


def running_checkpoints() -> tuple[CheckpointCall, ...]:
    """The non-reentrant checkpoints around this point of this thread, innermost first.

    Raises:
        RuntimeError: PyTorch's checkpoints do not look as they did in the releases this was written for.
    """
    autograd: Any = torch._C._autograd
    stack: list[tuple[Any, Any]] = []
    try:
        while saved_tensor_hooks_are_set():
            stack.append(autograd._top_saved_tensors_default_hooks(True))
            autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(stack):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
    return tuple(call for pack, _ in stack if (call := _checkpoint_call(pack)) is not None)


def _checkpoint_call(pack: Any) -> CheckpointCall | None:
    """The checkpoint whose hook packs saved tensors, ``None`` if it is somebody else's hook."""
    name = getattr(pack, "__qualname__", "")
    recomputes = "_recomputation_hook." in name
    if not recomputes and "_checkpoint_hook." not in name:
        return None
    own = inspect.unwrap(pack)
    cells = dict(zip(own.__code__.co_freevars, own.__closure__ or (), strict=True))
    cell = cells.get("target_frame_ref" if recomputes else "frame")
    frame = None if cell is None else cell.cell_contents() if recomputes else cell.cell_contents
    if frame is None:
        raise RuntimeError(
            f"torch {torch.__version__} does not say which torch.utils.checkpoint a compiled block is run in, so the "
            "pattern of its forward cannot be repeated when it is recomputed. Compile the model with the checkpoints inside."
        )
    return CheckpointCall(frame, own, recomputes)
