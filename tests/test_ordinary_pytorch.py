"""Ordinary PyTorch in and around a compiled model: eager, plain ``torch.compile`` and this backend side by side.

Each case is a forward of a small residual model. Whatever is dropped, the outputs, every gradient, the set of ``None``
gradients and what the forward leaves behind in its input and its buffers are those of the eager model whose branches are
detached; with nothing dropped they are those of ``torch.compile(backend="aot_eager")`` too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropbp_fx import NoResidualBranchWarning, dropbp_backend
from tests.oracle import detached

WIDTH = 8
PATTERNS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (2,), (0, 2), (1, 2), (0, 1))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Model(nn.Module):
    """Three residual branches; ``program`` is the forward."""

    shift: Tensor
    count: Tensor

    def __init__(self, program: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        self.program = program
        self.branches = nn.ModuleList(Branch() for _ in range(3))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        return self.program(self, x)


def stream(model: Model, x: Tensor, first: int = 0, last: int = 3) -> Tensor:
    for branch in model.branches[first:last]:
        x = x + branch(x)
    return x


@dataclasses.dataclass
class Outcome:
    """What a step leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    left: dict[str, Tensor]
    facts: list[Any]


def step(model: Model, run: Callable[[Tensor], Any], requires_grad: bool, *, leaf: bool = False) -> Outcome:
    torch.manual_seed(1)
    base = torch.randn(4, WIDTH, requires_grad=requires_grad)
    given = base if leaf else base * 1
    model.zero_grad()
    made = run(given)
    outputs = list(made) if isinstance(made, tuple) else [made]
    total = sum((k + 1) * value.square().sum() for k, value in enumerate(outputs) if value.requires_grad)
    if given.requires_grad and not leaf:
        total = total + given.pow(3).sum()  # the input may carry a gradient of its own by now
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["input"] = base.grad
    left = {"input": given.detach().clone(), **{name: b.clone() for name, b in model.named_buffers()}}
    facts = [given.requires_grad, [value is given for value in outputs], [value.requires_grad for value in outputs]]
    return Outcome([value.detach() for value in outputs], gradients, left, facts)


def assert_alike(actual: Outcome, expected: Outcome, what: str) -> None:
    assert actual.facts == expected.facts, what
    missing = {name for name, value in actual.gradients.items() if value is None}
    assert missing == {name for name, value in expected.gradients.items() if value is None}, what
    for mine, other in (
        (dict(enumerate(actual.outputs)), dict(enumerate(expected.outputs))),
        (actual.gradients, expected.gradients),
        (actual.left, expected.left),
    ):
        for name, value in other.items():  # type: ignore[attr-defined]
            if value is not None:
                torch.testing.assert_close(
                    mine[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{what}: {n}: {text}"
                )


def compare(
    program: Callable[[Model, Tensor], Any],
    requires_grad: bool,
    *,
    plain: bool = True,
    leaf: bool = False,
    patterns: Sequence[Collection[int]] = PATTERNS,
    steps: Callable[..., Outcome] = step,
    **options: Any,
) -> None:
    """Run ``program`` for several patterns against the oracle, and with nothing dropped against plain ``torch.compile``."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(program)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def again(run: Callable[[Tensor], Any]) -> Outcome:
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                value.copy_(start[name])
        return steps(model, run, requires_grad, leaf=leaf)

    backend = dropbp_backend(0.5, seed=0, inner="aot_eager", **options)
    run = torch.compile(model, backend=backend)
    for pattern in patterns:
        with backend.pinned(pattern):
            actual = again(run)
        with detached(model, [f"branches.{k}" for k in pattern]):
            expected = again(model)
        assert len(backend.branches) == 3, backend.branches
        assert_alike(actual, expected, f"pattern {list(pattern)}")
    if plain:
        with backend.pinned(()):
            actual = again(run)
        assert_alike(actual, again(torch.compile(model, backend="aot_eager")), "plain torch.compile")
    for _ in range(3):
        again(run)  # drawn at random


# ---- in-place changes of inputs and buffers --------------------------------------------------------------------------


def add_scalar(m: Model, x: Tensor) -> Tensor:
    x.add_(1.0)
    return stream(m, x)


def normalise(m: Model, x: Tensor) -> Tensor:
    x.sub_(x.mean(-1, keepdim=True)).div_(2.0)
    return stream(m, x)


def set_column(m: Model, x: Tensor) -> Tensor:
    x[:, 0] = 0.0
    return stream(m, x)


def write_through_view(m: Model, x: Tensor) -> Tensor:
    x.view(-1)[1:5].mul_(3.0)
    return stream(m, x)


def keep_a_view(m: Model, x: Tensor) -> Tensor:
    first = x[0]
    x.add_(1.0)
    first.mul_(2.0)
    return stream(m, x) + first


def augmented_residual(m: Model, x: Tensor) -> Tensor:
    for branch in m.branches:
        x += branch(x.clone())
    return x * 2


def learned_write(m: Model, x: Tensor) -> Tensor:
    x.mul_(m.scale)
    return stream(m, x)


def write_between(m: Model, x: Tensor) -> Tensor:
    y = stream(m, x * 1, 0, 1)
    x.add_(1.0)
    y = stream(m, y + x, 1, 2)
    x.mul_(0.5)
    return stream(m, y + x, 2, 3)


def write_late(m: Model, x: Tensor) -> Tensor:
    y = stream(m, x * 1)
    x.zero_()
    return y


def write_a_branch_into_it(m: Model, x: Tensor) -> Tensor:
    y = stream(m, x * 1, 0, 2)
    x.copy_(y)
    return stream(m, y, 2, 3)


def return_it(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    x.add_(1.0)
    return stream(m, x), x


def return_the_result(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.add_(1.0)
    return stream(m, x), x


def return_a_view(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    x.add_(1.0)
    return stream(m, x), x[1:, 2]


def write_without_gradient(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(0.5)
    return stream(m, x)


def write_data(m: Model, x: Tensor) -> Tensor:
    x.detach().mul_(0.5)
    return stream(m, x)


def write_a_parameter(m: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.branches[1].up.weight.mul_(0.5)  # type: ignore[union-attr, operator]
    return stream(m, x)


def scale_a_buffer(m: Model, x: Tensor) -> Tensor:
    m.shift.mul_(0.9)
    m.count.add_(1)
    return stream(m, x + m.shift * m.count)


def copy_into_a_buffer(m: Model, x: Tensor) -> Tensor:
    m.shift.copy_(x.detach().mean(0))
    return stream(m, x - m.shift)


def average_late(m: Model, x: Tensor) -> Tensor:
    y = stream(m, x)
    m.shift.lerp_(y.detach().mean(0), 0.1)
    return y


def buffer_as_stream(m: Model, x: Tensor) -> Tensor:
    m.shift.mul_(0.9)
    return stream(m, m.shift) + x


def foreach_write(m: Model, x: Tensor) -> Tensor:
    torch._foreach_mul_([x, m.shift], 0.5)
    return stream(m, x + m.shift)


def write_after_the_add(m: Model, x: Tensor) -> Tensor:
    for branch in m.branches:
        x = x + branch(x)
        x.mul_(0.9)
        x[:, 0].add_(1.0)
    return x


WRITES = [
    *(add_scalar, normalise, set_column, write_through_view, keep_a_view, augmented_residual, learned_write),
    *(write_between, write_late, write_a_branch_into_it, return_it, return_the_result, return_a_view),
    *(write_without_gradient, write_data, write_a_parameter, scale_a_buffer, copy_into_a_buffer, average_late),
    *(buffer_as_stream, foreach_write, write_after_the_add),
]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["data", "gradient"])
@pytest.mark.parametrize("program", WRITES, ids=lambda program: program.__name__)
def test_a_forward_may_change_its_input_and_buffers_in_place(
    program: Callable[[Model, Tensor], Any], requires_grad: bool
) -> None:
    compare(program, requires_grad, plain=program is not learned_write)  # there plain saves what it then overwrites
