"""Every family of tests/matrix.py: the branches written down by hand are found, and gradients are exact for any pattern.

Families nobody listed must work too: the second half are networks of unusual form.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from tests.matrix import FAMILIES, Family, language_loss
from tests.oracle import DetachPoint, assert_equal, assert_exact, compiled, eager, some_patterns

pytestmark = pytest.mark.thorough

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_family_is_exact_and_its_branches_are_those_of_its_source(family: Family) -> None:
    model = family.build().train()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    points = list(family.branches.values())
    assert_exact(model, run, backend, family.loss, points, patterns=some_patterns(len(points), randoms=1))
    assert [branch.name for branch in backend.branches] == list(family.branches)


def test_the_documentation_lists_exactly_these_families() -> None:
    document = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
    section = document.split("## Families")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "| " in line]
    shown = {about: families.split(", ") for about, families in cells if families not in ("architectures", "---")}
    expected: dict[str, list[str]] = {}
    for family in FAMILIES:
        expected.setdefault(family.layer, []).append(f"`{family.build.model.__name__}`")
        if family.note:
            expected.setdefault(family.note, []).append(family.name)
    assert shown == expected
    assert f"The {len(FAMILIES)} families" in section


def test_experts_run_by_a_python_loop_break_the_graph_and_nothing_can_be_dropped() -> None:
    model = BY_NAME["Mixtral"].build(num_hidden_layers=1, num_local_experts=2).train()
    model.set_experts_implementation("eager")
    backend = dropbp_backend(0.5, inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_equal(compiled(model, language_loss, run), eager(model, language_loss, []))
    assert [branch.name for branch in backend.branches] == ["self_attn"], "the experts' add is in a graph without them"
    assert backend.stats.attainable_rate == 0


WIDTH = 8


class TwoStreams(nn.Module):
    """A reversible network's coupling: each stream is added a function of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.g = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x, x * 0.5
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class Scaled(nn.Module):
    """Multiplies by a learnt vector."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.by


class ScaledSkip(nn.Module):
    """Hyper-connections in small: the stream is scaled by a function of a learnt number, the branch by a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.take = nn.ModuleList(Scaled() for _ in range(3))
        self.keep = nn.Parameter(torch.tensor([0.9, 1.1, 0.8]))

    def forward(self, x: Tensor) -> Tensor:
        for index, (work, take) in enumerate(zip(self.work, self.take, strict=True)):
            x = (self.keep[index].sigmoid() * 2) * x + take(work(x).tanh())
        return x


class StochasticDepth(nn.Module):
    """Layer scale, and each sample's branch left out of the forward by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for work, scale in zip(self.work, self.scale, strict=True):
            h = scale(work(x).relu())
            alive = torch.rand(x.shape[0], 1, 1) < 0.7
            x = x + h * alive / 0.7
        return x


class Highway(nn.Module):
    """``t * h + (1 - t) * x``: the gate is the stream's as well as the branch's, so the branch is ``h`` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.t = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        t = self.t(x).sigmoid()
        return t * self.h(x).tanh() + (1 - t) * x


class DenselyConnected(nn.Module):
    """DenseNet: outputs are joined, never added."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.ModuleList(nn.Linear(WIDTH * (i + 1), WIDTH) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for work in self.work:
            x = torch.cat([x, work(x).relu()], -1)
        return x


class WrittenKeys(nn.Module):
    """Keys copied into an empty buffer piece by piece, as DeepSeek's attention does, and the buffer is returned too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.how = how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.k(x)
        keys = k.new_empty(k.shape)
        if self.how == "copy_":
            keys[..., :3].copy_(k[..., :3])
            keys[..., 3:].copy_(k[..., 3:] * 2)
        else:
            keys[..., :3] = k[..., :3]
            keys[..., 3:] = k[..., 3:] * 2
        return x + (x @ keys.transpose(-1, -2)).softmax(-1) @ self.v(x), keys


class Written(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WrittenKeys(how) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, one = self.blocks[0](x)
        second, two = self.blocks[1](first)
        return second, one.detach() + two.detach()


INPUT = torch.linspace(-2, 2, 2 * 5 * WIDTH).reshape(2, 5, WIDTH).sin()


def square(model: Any) -> Tensor:
    torch.manual_seed(5)  # for those that draw random numbers: the same ones in eager and compiled
    output = model(INPUT)
    return (output if isinstance(output, Tensor) else output[0]).square().sum()


UNUSUAL: dict[str, tuple[Callable[[], nn.Module], dict[str, DetachPoint]]] = {
    "two streams": (TwoStreams, {f"{name}.{i}.1": f"{name}.{i}" for i in range(2) for name in "fg"}),
    "scaled skip": (ScaledSkip, {f"work.{i}": f"take.{i}" for i in range(3)}),
    "stochastic depth": (StochasticDepth, {f"work.{i}": f"scale.{i}" for i in range(3)}),
    "highway": (lambda: nn.Sequential(*(Highway() for _ in range(3))), {f"{i}.h": f"{i}.h" for i in range(3)}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_network_of_unusual_form_is_exact(name: str) -> None:
    build, branches = UNUSUAL[name]
    model = build()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, square, list(branches.values()))
    assert [branch.name for branch in backend.branches] == list(branches)


def test_a_network_whose_outputs_are_joined_has_no_branch() -> None:
    model = nn.Sequential(DenselyConnected(), nn.Flatten())
    backend = dropbp_backend(inner="aot_eager", strict=True)
    with pytest.raises(Exception, match="No residual branch was found"):
        square(torch.compile(model, backend=backend))
    assert backend.branches == ()


class DropoutInPlace(nn.Module):
    """A dropout that writes into its operand, asked to by position, as nn.Dropout asks."""

    def __init__(self) -> None:
        super().__init__()
        self.work = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for work in self.work:
            h = work(x)
            F.dropout(h, 0.4, True, True)
            x = x + h.tanh()
        return x


@pytest.mark.parametrize("how", ["copy_", "setitem"])
def test_a_branch_that_writes_its_values_into_a_buffer_is_exact(how: str) -> None:
    model = Written(how)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with backend.pinned([]):
        assert_equal(compiled(model, square, run), eager(model, square, []))
    with backend.pinned([0]):
        actual = compiled(model, square, run)
    assert {name for name, g in actual.gradients.items() if g is None} == {
        f"blocks.0.{part}.{kind}" for part in "kv" for kind in ("weight", "bias")
    }
    torch.testing.assert_close(run(INPUT), model(INPUT))  # the buffers are returned as well


def test_a_branch_with_a_dropout_in_place_is_exact() -> None:
    model = DropoutInPlace()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    assert_exact(model, run, backend, square, [f"work.{i}" for i in range(2)])


def test_whatever_the_graph_breaks_the_names_are_those_of_the_whole_model_once_it_was_seen() -> None:
    family = BY_NAME["HuBERT"]
    model = family.build().train()
    family.loss(model)  # installs the hooks whose installation breaks the graph
    backend = dropbp_backend(inner="aot_eager")
    family.loss(torch.compile(model, backend=backend))
    assert [branch.name for branch in backend.branches] == [f"hubert.{name}" for name in family.branches]
