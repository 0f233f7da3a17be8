"""Models of several residual streams: dropping a branch is detaching its output, and nothing else."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from tests.helpers import compile_model
from tests.oracle import Result, assert_equal
from tests.selection import thorough
from tests.streams import REFUSED, D, check_program


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**9))
def test_programs_of_several_streams_agree_with_detach(seed: int) -> None:
    check_program(seed)


def test_an_output_that_is_a_view_of_an_input_does_not_turn_missing_gradients_into_zeros() -> None:
    check_program(11276)


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.parametrize("part", range(4))
def test_many_programs_of_several_streams_agree_with_detach(part: int) -> None:
    @hypothesis.seed(part)
    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(10**9, 2 * 10**9))
    def check(seed: int) -> None:
        check_program(seed)

    check()


class Coupled(nn.Module):
    """Two streams, each of which reads the other."""

    def __init__(self, layers: int, ending: str) -> None:
        super().__init__()
        self.ending = ending
        self.stem = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.f = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(layers))
        self.g = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(layers))
        self.head = nn.ModuleList(nn.Linear(D, 2) for _ in range(2))

    def forward(self, inputs: Tensor, cut: str = "") -> Any:
        x, m = self.stem[0](inputs), self.stem[1](inputs)
        for number, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
            h = torch.tanh(f(torch.cat([x, m], -1)))
            x = x + (h.detach() if cut == f"f.{number}" else h)
            h = torch.tanh(g(torch.cat([m, x], -1)))
            m = m + (h.detach() if cut == f"g.{number}" else h)
        if self.ending == "one head":
            return self.head[0](x).square().mean()
        if self.ending == "loss":
            return self.head[0](x).square().mean() + self.head[1](m).square().mean()
        return (self.head[0](x), self.head[1](m)) if self.ending == "heads" else (x, m)


def loss_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else torch.stack([value.square().mean() for value in result]).sum()


@pytest.mark.parametrize(
    ("ending", "layers"),
    [
        *[("one head", 3), ("loss", 1), ("raw", 3)],
        *[thorough(*case) for case in (("one head", 1), ("loss", 3), ("heads", 1), ("heads", 3), ("raw", 1))],
    ],
)
def test_every_branch_of_coupled_streams_is_found_and_dropped_alone(ending: str, layers: int) -> None:
    model = Coupled(layers, ending)
    backend, run = compile_model(model)
    x = torch.randn(3, D)
    with backend.disabled():
        loss_of(run(x)).backward()
    adds = [f"{name}.{number}" for number in range(layers) for name in "fg"]
    # The last sum of the second stream is read by nobody where the first has the only head.
    assert [branch.name for branch in backend.branches] == adds[: -1 if ending == "one head" else None]
    for branch in backend.branches:
        if ending == "one head" and layers == 1:
            break  # the only branch is never dropped
        model.zero_grad(set_to_none=True)
        expected = loss_of(model(x, branch.name))
        expected.backward()
        wanted = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        with backend.pinned([branch.name]):
            loss = loss_of(run(x))
        loss.backward()
        actual = {name: p.grad for name, p in model.named_parameters()}
        assert_equal(Result(loss.detach(), actual), Result(expected.detach(), wanted), what=branch.name)


class Attention(nn.Module):
    """Returns its keys and its weights beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.k(x)
        weights = (self.q(x) @ keys.transpose(1, 2)).softmax(-1)
        return self.o(weights @ keys), keys, weights


class Storing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        keys, weights = [], []
        for attention in self.attention:
            h, k, w = attention(x)
            x = x + h
            keys.append(k)
            weights.append(w)
        return x, keys, weights


@pytest.mark.parametrize("item", [1, 2])
@pytest.mark.parametrize("ask", ["backward", "grad of a parameter"])
def test_a_loss_that_reads_what_a_dropped_branch_stores_is_refused(item: int, ask: str) -> None:
    model, x = Storing(), torch.randn(2, 3, D)
    backend, run = compile_model(model)

    def loss() -> Tensor:
        found = run(x)
        return found[0].square().sum() + found[item][1].square().sum()

    with backend.pinned([0, 2]):  # what the kept branch stores has its gradient
        loss().backward()
    assert model.attention[1].k.weight.grad is not None  # type: ignore[union-attr]
    with backend.pinned([1]):
        run(x)[0].square().sum().backward()  # nobody reads what is stored
        found = loss()
        with pytest.raises(RuntimeError, match=REFUSED):
            if ask == "backward":
                found.backward()
            else:
                torch.autograd.grad(found, model.attention[1].k.weight)  # type: ignore[union-attr]


def test_a_loss_compiled_with_the_model_may_read_what_a_dropped_branch_stores() -> None:
    model, x = Storing(), torch.randn(2, 3, D)
    backend = dropbp_backend(inner="aot_eager", seed=0)

    def loss(cut: bool = False) -> Tensor:
        handle = (
            model.attention[1].register_forward_hook(lambda _, __, out: (out[0].detach(), *out[1:])) if cut else None
        )
        stream, keys, _ = model(x)
        if handle is not None:
            handle.remove()
        return stream.square().sum() + keys[1].square().sum()

    run = torch.compile(lambda: loss(), backend=backend)
    with backend.disabled():
        run().backward()
    expected = torch.autograd.grad(loss(cut=True), list(model.parameters()), allow_unused=True)
    model.zero_grad(set_to_none=True)
    with backend.pinned([1]):
        run().backward()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted)


class Checkpointed(nn.Module):
    """Each layer, its auxiliary loss included, inside an activation checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.cut = False

    def layer(self, attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        h, _, weights = attention(x)
        return x + (h.detach() if self.cut and attention is self.attention[1] else h), weights

    def forward(self, x: Tensor) -> Tensor:
        auxiliary = []
        for attention in self.attention:
            x, weights = torch.utils.checkpoint.checkpoint(self.layer, attention, x, use_reentrant=False)
            auxiliary.append(weights.square().sum())
        return x.square().sum() + torch.stack(auxiliary).sum()


def test_what_a_checkpoint_hands_to_the_loss_keeps_its_gradient() -> None:
    model, x = Checkpointed(), torch.randn(2, 3, D)
    backend, run = compile_model(model)
    with backend.disabled():
        run(x).backward()
    model.cut = True
    expected = torch.autograd.grad(model(x), list(model.parameters()), allow_unused=True)
    model.cut = False
    model.zero_grad(set_to_none=True)
    with backend.pinned([1]):
        run(x).backward()
    for (name, p), wanted in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, msg=lambda text, name=name: f"{name}: {text}")


class SharedTerm(nn.Module):
    """Layers that add one learnt term to their scores: it becomes an ancestor of later scores, and no stream."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 3, 3))
        self.q = nn.ModuleList(nn.Linear(D, D) for _ in range(layers))
        self.o = nn.ModuleList(nn.Linear(D, D) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        bias = F.relu(self.bias + x.mean())
        for q, o in zip(self.q, self.o, strict=True):
            scores = q(x) @ x.transpose(1, 2)
            x = x + o((scores + bias).softmax(-1) @ x)
        return x.square().mean()


@pytest.mark.parametrize("layers", [2, thorough(4)])
def test_a_term_that_all_layers_share_is_no_stream(layers: int) -> None:
    model = SharedTerm(layers)
    backend, run = compile_model(model)
    run(torch.randn(2, 3, D)).backward()
    assert [branch.name for branch in backend.branches] == [f"q.{i}+o.{i}" for i in range(layers)]
