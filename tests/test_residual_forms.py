"""Every form in which a branch is added to its stream: found, and exact; and what looks like one and is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from tests.oracle import DetachPoint, assert_exact
from tests.test_branches import names, search

D, TOKENS, STREAMS = 8, 4, 3
INPUT = torch.linspace(-2, 2, 2 * TOKENS * D).reshape(2, TOKENS, D).sin()
KEPT = torch.tensor([0, 2, 3])


class Work(nn.Module):
    """Two linear layers, from ``inputs`` to ``outputs`` features."""

    def __init__(self, outputs: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, D), nn.Linear(D, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Layer(nn.Module):
    """Two pieces of work and whatever a form may weigh them with."""

    def __init__(self, form: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.work, self.other = Work(), Work()
        self.gate = nn.Linear(D, D)
        self.vector = nn.Parameter(torch.linspace(0.3, 0.7, D))
        self.number = nn.Parameter(torch.tensor(0.4))
        self.matrix = nn.Parameter(torch.linspace(-1, 1, D * D).reshape(D, D).cos() / 3)
        self.weight = nn.Identity()  # a place to detach a weight at

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


class Network(nn.Module):
    def __init__(self, form: Callable[[Any, Tensor], Tensor], depth: int = 2) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.layers = nn.ModuleList(Layer(form) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def square(model: Any) -> Tensor:
    return model(INPUT).square().sum()


def inplace(change: Callable[[Any, Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def form(m: Any, x: Tensor) -> Tensor:
        stream = x * 1.0
        change(m, x, stream)
        return stream

    return form


def written_at(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, KEPT] += m.work(x[:, KEPT])
    return x


def written_slice(m: Any, x: Tensor) -> Tensor:
    stream = x.clone()
    stream[:, 1:] += m.work(x)[:, 1:]
    return stream


def isub(m: Any, x: Tensor) -> Tensor:
    stream = x * 1.0
    stream -= m.work(x)
    return stream


def highway(m: Any, x: Tensor) -> Tensor:
    gate = m.gate(x).sigmoid()
    return gate * m.work(x) + (1 - gate) * x


def foreach(m: Any, x: Tensor) -> Tensor:
    left, right = torch._foreach_add([x, m.vector * x], [m.work(x), m.vector * m.vector])
    return left + right.detach()


def foreach_inplace(m: Any, x: Tensor) -> Tensor:
    left, right = x * 1.0, x * 2.0
    torch._foreach_add_([left, right], [m.work(x), m.vector * x])
    return left + right.detach()


def row(of: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: of(m, x.flatten(0, 1)).view_as(x)


ONE = ["work"]
PRODUCT = ["work", "weight"]
BOTH: list[Any] = ["work", "other"]
#: For each form the modules of a layer that are detached together to drop one branch; several branches in a tuple.
FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str] | tuple[list[str], ...]]] = {
    "sum of a list": (lambda m, x: sum([x, m.work(x), m.other(x)]), (["work"], ["other"])),  # type: ignore[return-value]
    "stack and sum": (lambda m, x: torch.stack([x, m.work(x)]).sum(0), ONE),
    "stack and sum, last": (lambda m, x: torch.sum(torch.stack((x, m.work(x)), dim=-1), dim=-1), ONE),
    "stack and mean": (lambda m, x: torch.stack([m.work(x), x], 1).mean(dim=1), ONE),
    "number first": (lambda m, x: x + 1.0 + m.work(x), ONE),
    "number between": (lambda m, x: x + m.work(x) + 1.0 + m.other(x), (["work"], ["other"])),
    "bias between": (lambda m, x: x + m.work(x) + m.vector + m.other(x), (["work"], ["other"])),
    "number on the branch": (lambda m, x: x + (m.work(x) + 1.0), ONE),
    "bias on the branch": (lambda m, x: x + (m.work(x) + m.weight(m.vector)), PRODUCT),
    "branch in the middle of biases": (lambda m, x: (m.number + x) + (m.work(x) - m.weight(m.vector)), PRODUCT),
    "alpha": (lambda m, x: torch.add(x, m.work(x), alpha=0.5), ONE),
    "alpha on the stream": (lambda m, x: torch.add(m.work(x), x, alpha=0.5), ONE),
    "method with alpha": (lambda m, x: x.add(m.work(x), alpha=-0.5), ONE),
    "minus": (lambda m, x: x - m.work(x), ONE),
    "minus the stream": (lambda m, x: m.work(x) - x, ONE),
    "sub with alpha": (lambda m, x: torch.sub(x, m.work(x), alpha=0.5), ONE),
    "rsub": (lambda m, x: torch.rsub(m.work(x), x, alpha=2), ONE),
    "minus a sum": (lambda m, x: x - (m.work(x) + m.other(x)), (["work"], ["other"])),
    "in place with alpha": (inplace(lambda m, x, y: y.add_(m.work(x), alpha=0.5)), ONE),
    "sub in place": (inplace(lambda m, x, y: y.sub_(m.work(x), alpha=0.5)), ONE),
    "isub": (isub, ONE),
    "addcmul": (lambda m, x: torch.addcmul(x, m.weight(m.vector), m.work(x), value=0.5), PRODUCT),
    "addcmul with a gate": (lambda m, x: torch.addcmul(x, m.other(x).sigmoid(), m.work(x)), BOTH),
    "addcmul in place": (inplace(lambda m, x, y: y.addcmul_(m.weight(m.vector), m.work(x))), PRODUCT),
    "addmm": (row(lambda m, x: torch.addmm(x, m.work(x), m.weight(m.matrix))), PRODUCT),
    "addmm of the stream's norm": (
        row(lambda m, x: torch.addmm(x, m.other(x), m.weight(m.matrix.T), alpha=0.5)),
        ["other", "weight"],
    ),
    "baddbmm": (lambda m, x: x.baddbmm(m.weight(m.work(x) @ x.mT), m.other(x), beta=0.5), ["other", "weight"]),
    "lerp": (lambda m, x: torch.lerp(x, m.work(x), 0.3), ONE),
    "lerp by a parameter": (lambda m, x: x.lerp(m.work(x), m.number), ONE),
    "lerp by a gate": (lambda m, x: x.lerp(m.work(x), m.gate(x).sigmoid()), ONE),
    "lerp from the branch": (lambda m, x: torch.lerp(m.work(x), x, m.vector), ONE),
    "lerp in place": (inplace(lambda m, x, y: y.lerp_(m.work(x), 0.3)), ONE),
    "mix by a number": (lambda m, x: m.number * x + (1 - m.number) * m.work(x), ONE),
    "mix by a vector": (lambda m, x: x * m.vector.sigmoid() + m.work(x) * (1.0 - m.vector.sigmoid()), ONE),
    "highway": (highway, ONE),
    "index_add": (lambda m, x: x.index_add(1, KEPT, m.work(x[:, KEPT])), ONE),
    "index_add twice": (
        lambda m, x: x.index_add(1, KEPT, m.work(x[:, KEPT])).index_add(1, KEPT, m.other(x[:, KEPT]), alpha=0.5),
        (["work"], ["other"]),
    ),
    "index_add in place": (inplace(lambda m, x, y: y.index_add_(1, KEPT, m.work(x[:, KEPT]))), ONE),
    "scatter_add": (
        lambda m, x: x.scatter_add(1, KEPT.view(1, -1, 1).expand(2, -1, D), m.work(x[:, KEPT])),
        ONE,
    ),
    "index_put": (lambda m, x: x.index_put((torch.tensor([0]), KEPT), m.work(x[0, KEPT]), accumulate=True), ONE),
    "added at indices": (written_at, ONE),
    "added to a slice": (written_slice, ONE),
    "list add": (foreach, ONE),
    "list add in place": (foreach_inplace, ONE),
    "broadcast": (lambda m, x: x + m.work(x.mean(1, keepdim=True)), ONE),
    "broadcast beside another": (
        lambda m, x: x + (m.other(x) + m.work(x.amax(1, keepdim=True))),
        (["other"], ["work"]),
    ),
    "where": (lambda m, x: torch.where(x > 0, x + m.work(x), x), ONE),
    "mask": (lambda m, x: x + (x > 0) * m.work(x), ONE),
    "bfloat16 branch": (lambda m, x: x + m.work(x).bfloat16(), ONE),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_residual_add_is_found_and_exact(name: str) -> None:
    form, detached = FORMS[name]
    model = Network(form)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    groups = detached if isinstance(detached, tuple) else (detached,)
    points: list[DetachPoint] = [
        [f"layers.{i}.{part}" for part in group] for i in range(len(model.layers)) for group in groups
    ]
    everything = range(len(points))
    patterns = [[], [0], [len(points) - 1], list(everything)[1:]]
    loose = {"rtol": 2e-2, "atol": 2e-2} if name == "bfloat16 branch" else {}
    assert_exact(model, run, backend, square, points, patterns=patterns, **loose)  # type: ignore[arg-type]
