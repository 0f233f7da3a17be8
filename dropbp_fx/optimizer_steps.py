"""Be told of every optimizer step of this process, for as long as somebody lives who wants to know."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_Owner = TypeVar("_Owner")


def after_steps(owner: _Owner, do: Callable[[_Owner, Optimizer], None]) -> RemovableHandle:
    """Call ``do(owner, optimizer)`` after each step of any optimizer, but not while Dynamo traces one.

    The hook does not keep ``owner`` alive, and outlives it as one that does nothing. Removed when ``owner`` is collected, it
    could go at any moment, also while PyTorch or Dynamo iterates over the hooks, which is an error there.

    Returns:
        What removes the hook. Not to be used from within a hook.
    """
    reference = weakref.ref(owner)

    def stepped(optimizer: Optimizer, *_: object) -> None:
        if torch.compiler.is_compiling():
            return
        found = reference()
        if found is not None:
            do(found, optimizer)

    return register_optimizer_step_post_hook(stepped)
