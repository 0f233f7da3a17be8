"""Random small residual networks under random patterns agree with the eager ``.detach()`` oracle."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from tests.helpers import make_backend
from tests.oracle import assert_equal, compiled, eager

D = 6


class Branch(nn.Module):
    """Some work: an MLP, an attention or a convolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.conv = nn.Conv1d(D, D, 3, padding=1)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        if self.kind == "mlp":
            return self.second(F.gelu(self.first(x)))
        if self.kind == "conv":
            return self.conv(x.transpose(1, 2)).transpose(1, 2)
        key = self.first(x if memory is None else memory)
        return self.second(F.scaled_dot_product_attention(x, key, key))


class Block(nn.Module):
    """One or two branches, added to the stream in one of many ways."""

    def __init__(self, way: str, kinds: tuple[str, str]) -> None:
        super().__init__()
        self.way = way
        self.norm, self.other_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.branches = nn.ModuleList(Branch(kind) for kind in (kinds if way == "parallel" else kinds[:1]))
        if way == "frozen":
            self.requires_grad_(False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        branch = self.branches[0]
        if self.way == "pre":
            return x + branch(self.norm(x))
        if self.way == "post":
            return self.norm(x + branch(x))
        if self.way == "scaled":
            return 1.25 * x + F.dropout(branch(self.norm(x)), 0.0) * 0.5
        if self.way == "in place":
            h = branch(self.norm(x))
            h += x
            return h
        if self.way == "parallel":
            return x + branch(self.norm(x)) + self.branches[1](self.other_norm(x))
        if self.way == "minus":
            return x - branch(self.norm(x))
        if self.way == "lerp":
            return torch.lerp(x, branch(self.norm(x)), 0.4)
        if self.way == "highway":
            gate = self.other_norm(x).sigmoid()
            return x * gate + branch(self.norm(x)) * (1 - gate)
        if self.way == "indexed":
            rows = torch.arange(0, D - 2, 2, device=x.device)
            return x.index_add(1, rows, branch(self.norm(x[:, rows])))
        if self.way == "broadcast":
            return x + branch(self.norm(x.mean(1, keepdim=True)))
        if self.way == "cross":
            return x + branch(self.norm(x), memory)
        return x + branch(self.norm(x))


class Network(nn.Module):
    """An encoder whose output later blocks may attend to, then blocks; returns the loss beside unused outputs."""

    def __init__(
        self, blocks: list[tuple[str, tuple[str, str]]], repeat: bool, frozen_stem: bool, outputs: bool
    ) -> None:
        super().__init__()
        self.encoder, self.stem = nn.Linear(D, D), nn.Linear(D, D)
        self.stem.requires_grad_(not frozen_stem)
        self.encoder_block = Branch("mlp")
        self.blocks = nn.ModuleList(Block(*block) for block in blocks)
        self.head = nn.Linear(D, D)
        self.repeat, self.outputs = repeat, outputs

    def forward(self, x: Tensor) -> Any:
        memory = self.encoder(x)
        memory = memory + self.encoder_block(memory)
        x = self.stem(x)
        for _ in range(1 + self.repeat):
            for block in self.blocks:
                x = block(x, memory)
        loss = self.head(x).square().mean()
        return (loss, memory, x) if self.outputs else loss


def points_of(model: Network) -> list[Any]:
    """Where eager detaches each branch, in execution order."""
    calls = 1 + model.repeat
    memory_is_read = model.outputs or any(
        block.way == "cross" for block in model.blocks
    )  # else nobody needs the branch
    points: list[Any] = ["encoder_block"] if memory_is_read else []
    for call in range(calls):
        for index, block in enumerate(model.blocks):
            for number in range(len(block.branches)):  # type: ignore[arg-type]
                path = f"blocks.{index}.branches.{number}"
                points.append((path, call) if model.repeat else path)
    return points


FORMS = ("minus", "lerp", "highway", "indexed", "broadcast")
WAYS = ("pre", "post", "scaled", "in place", "parallel", "cross", "frozen", *FORMS)
#: Without "cross", "frozen" and "highway": its gate belongs to the stream and runs before the branch, so it is below it.
WAYS_ALONE = ("pre", "post", "scaled", "in place", "parallel", *(form for form in FORMS if form != "highway"))
KINDS = st.sampled_from(("mlp", "attention", "conv"))
BLOCKS = st.lists(
    st.sampled_from(WAYS).flatmap(
        lambda way: st.tuples(st.just(way), st.tuples(KINDS if way != "cross" else st.just("attention"), KINDS))
    ),
    min_size=1,
    max_size=3,
)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


networks = given(
    blocks=BLOCKS,
    repeat=st.booleans(),
    frozen_stem=st.booleans(),
    outputs=st.booleans(),
    dynamic=st.booleans(),
    bits=st.lists(st.integers(0, 2**7 - 1), min_size=3, max_size=3),
)


@examples(4)
@networks
def test_random_networks_agree_with_detach(**network: Any) -> None:
    check_network(**network)


@pytest.mark.long
@pytest.mark.thorough
@examples(12)
@networks
def test_more_random_networks_agree_with_detach(**network: Any) -> None:
    check_network(**network)


def check_network(
    blocks: list[Any], repeat: bool, frozen_stem: bool, outputs: bool, dynamic: bool, bits: list[int]
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Network(blocks, repeat, frozen_stem, outputs)
    points = points_of(model)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend, dynamic=dynamic or None)
    x = torch.randn(2, 5, D)

    def loss(m: Any) -> Tensor:
        result = m(x)
        return result[0] if outputs else result

    with backend.disabled():
        assert_equal(compiled(model, loss, run), eager(model, loss, []), what="nothing dropped")
    reading = [branch.droppable for branch in backend.branches]
    assert len(reading) == len(points), [branch.name for branch in backend.branches]
    keep = next(i for i, branch in enumerate(backend.branches) if branch.trainable and branch.droppable)
    for number in bits:
        pattern = [i for i in range(len(points)) if number >> i & 1 and i != keep]
        with backend.pinned(pattern):
            actual = compiled(model, loss, run)
        assert_equal(actual, eager(model, loss, [points[i] for i in pattern]), what=f"pattern {pattern} of {points}")


class Stack(nn.Module):
    """A stem, blocks, and a head."""

    def __init__(self, blocks: list[tuple[str, tuple[str, str]]]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.blocks = nn.ModuleList(Block(*block) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, x)
        return self.head(x).square().mean()


stacks = given(
    blocks=st.lists(
        st.tuples(st.sampled_from(WAYS_ALONE), st.tuples(KINDS, KINDS)),
        min_size=2,
        max_size=4,
    ),
    bits=st.lists(st.integers(0, 2**7 - 1), min_size=3, max_size=3),
)


@examples(4)
@stacks
def test_below_the_first_kept_branch_the_stream_is_detached(**stack: Any) -> None:
    check_stack(**stack)


@pytest.mark.long
@pytest.mark.thorough
@examples(12)
@stacks
def test_below_the_first_kept_branch_of_more_networks_the_stream_is_detached(**stack: Any) -> None:
    check_stack(**stack)


def check_stack(blocks: list[Any], bits: list[int]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Stack(blocks)
    owners = [index for index, block in enumerate(model.blocks) for _ in block.branches]  # type: ignore[union-attr]
    points = [f"blocks.{o}.branches.{i - owners.index(o)}" for i, o in enumerate(owners)]
    backend = make_backend(inner="aot_eager", drop="below", pattern="lowest")
    run = torch.compile(model, backend=backend)
    x = torch.randn(2, 5, D)

    def loss(m: Any) -> Tensor:
        return m(x)

    lowest = [2**count - 1 for count in range(1, len(points))]
    for number in (0, *lowest, *bits):
        pattern = [index for index in range(len(points)) if number >> index & 1]
        if len(pattern) == len(points):
            pattern.pop()
        first = next(owners[index] for index in range(len(points)) if index not in pattern)
        cut = model.blocks[first].register_forward_pre_hook(lambda _, inputs: tuple(x.detach() for x in inputs))
        if 0 not in pattern:
            cut.remove()
        expected = eager(model, loss, [points[index] for index in pattern])
        cut.remove()
        with backend.pinned(pattern):
            actual = compiled(model, loss, run)
        assert_equal(actual, expected, what=f"pattern {pattern}")
