"""The one walk up Python's stack: which modules are being called, and which run without having been called."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from dropbp_fx import _torch


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen: list[_torch.Callers] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(_torch.calling_modules())
        return super().forward(x)


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def step_in_a_closure(self, x: torch.Tensor) -> torch.Tensor:
        def closure() -> torch.Tensor:
            return self.layer(x)

        return closure()


X = torch.ones(1, 2)


def test_modules_that_are_called_run_too() -> None:
    task = Task()
    task(X)
    (seen,) = task.layer.seen
    assert seen.called == (task.layer, task)
    assert list(dict.fromkeys(seen.running)) == [task.layer, task]


@pytest.mark.parametrize("method", ["training_step", "step_in_a_closure"])
def test_a_method_runs_without_a_call(method: str) -> None:
    task = Task()
    getattr(task, method)(X)
    (seen,) = task.layer.seen
    assert seen.called == (task.layer,)
    assert list(dict.fromkeys(seen.running)) == [task.layer, task]


def test_nothing_runs_outside_of_a_module() -> None:
    assert _torch.calling_modules() == _torch.Callers((), ())


def test_the_locals_of_a_training_loop_are_not_kept_alive() -> None:
    large = torch.ones(1)
    reference = weakref.ref(large)
    Task()(X)
    del large
    assert reference() is None
