"""A stand-in for CUDA graphs where there are none: what was captured runs again whenever it is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Replayed:
    """Captures work like :class:`dropbp_fx._torch.GraphCapture`: nothing it writes changes until it is replayed.

    Attributes:
        captured: how many pieces of work.
        replayed: how often any of them ran.
        fails: raises the error when something is captured.
    """

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self.fails: RuntimeError | None = None

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.fails is not None:
            raise self.fails
        self.captured += 1
        held = list({id(tensor): tensor for tensor in _tensors_of(work, set())}.values())
        before = [(tensor, tensor.detach().clone()) for tensor in held]
        state = torch.get_rng_state()
        made = work()
        torch.set_rng_state(state)
        written = [tensor for tensor, content in before if not torch.equal(tensor, content)]
        for tensor, content in before:
            if any(tensor is other for other in written):
                tensor.detach().copy_(content)

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(tree_leaves(made), tree_leaves(work()), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        return replay, made


def _tensors_of(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that a function can reach through what it closes over."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_of(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_of(item, seen)
    elif callable(value) and getattr(value, "__closure__", None):
        for cell in value.__closure__:
            yield from _tensors_of(cell.cell_contents, seen)
