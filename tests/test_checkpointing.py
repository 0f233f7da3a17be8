"""Activation checkpointing and hooks on saved tensors: the gradients are those of the pattern that the forward had.

Checkpoints *inside* are in the graph that Dynamo captures; checkpoints *around* are eager, with compiled blocks inside them
that run again in the backward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from dropbp_fx import DropBPBackend, dropbp_backend
from tests.matrix import LLAMA_LIKE, language_loss
from tests.oracle import assert_equal, assert_exact, compiled, detached, eager
from tests.test_models import SMALL, X

pytestmark = pytest.mark.thorough

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def save_products(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


FULL: dict[str, Any] = {"use_reentrant": False}
REENTRANT: dict[str, Any] = {"use_reentrant": True}
SELECTIVE: dict[str, Any] = {
    "use_reentrant": False,
    "context_fn": functools.partial(create_selective_checkpoint_contexts, save_products),
}


class Block(nn.Module):
    """Two branches whose saved tensors have equal shapes: a recomputation in the wrong pattern would go unnoticed."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class Checkpointed(nn.Module):
    """Three blocks, each in a checkpoint, unless ``how`` is ``None``."""

    def __init__(self, how: dict[str, Any] | None, dropout: float = 0.3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        self.head = nn.Linear(8, 8)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.how is None else checkpoint(block, x, **self.how)
        return self.head(x)


POINTS = [f"blocks.{i}.{branch}" for i in range(3) for branch in ("first", "second")]


def loss(model: Any) -> Tensor:
    torch.manual_seed(5)  # for dropout
    value: Tensor = model(X.clone().requires_grad_()).square().sum()
    return value


def reference(model: Checkpointed) -> Checkpointed:
    """The same model without checkpoints."""
    other = Checkpointed(None)
    other.load_state_dict(model.state_dict())
    for block, own in zip(other.blocks, model.blocks, strict=True):
        block.first[2].p = block.second[2].p = own.first[2].p
    return other


# ---- inside the graph ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [FULL, REENTRANT, SELECTIVE], ids=["full", "reentrant", "selective"])
def test_checkpoints_inside_the_graph_are_exact(how: dict[str, Any]) -> None:
    model = Checkpointed(how)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    other = reference(model)
    for pattern in ([], [0], [0, 1], [2, 3, 5], [0, 1, 2, 3, 4]):
        with backend.pinned(pattern):
            actual = compiled(model, loss, run)
        assert_equal(actual, eager(other, loss, [POINTS[i] for i in pattern]), what=f"pattern {pattern}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_enable(use_reentrant: bool) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, use_cache=False)).train()
    other = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    points = list(LLAMA_LIKE.values())
    for pattern in ([], [1, 2], [0, 1, 2]):
        with backend.pinned(pattern):
            actual = compiled(model, language_loss, run)
        assert_equal(actual, eager(other, language_loss, [points[i] for i in pattern]), what=f"pattern {pattern}")


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes kept for the backward, parameters not counted, each memory once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = run()
    total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    value.backward()
    return total


def test_a_selective_policy_inside_the_graph_decides_what_is_saved_as_without_dropping() -> None:
    """Nothing dropped, as many bytes as ``torch.compile`` saves; and each policy fewer under dropping."""

    def measured(how: dict[str, Any] | None, backend: Any) -> dict[str, int]:
        torch._dynamo.reset()
        model = Checkpointed(how, dropout=0.0)
        run = torch.compile(model, backend=backend)
        found = {}
        for name, pattern in {"kept": [], "dropped": [0, 1, 2, 3, 4]}.items():
            if isinstance(backend, DropBPBackend):
                with backend.pinned(pattern):
                    loss(run).backward()
                    found[name] = saved_bytes(lambda run=run: loss(run), model)
            else:
                loss(run).backward()
                found[name] = saved_bytes(lambda run=run: loss(run), model)
        return found

    found = {
        name: measured(how, dropbp_backend(inner="aot_eager"))
        for name, how in {"none": None, "selective": SELECTIVE, "full": FULL}.items()
    }
    assert found["full"]["kept"] < found["selective"]["kept"] < found["none"]["kept"]
    for each in found.values():
        assert each["dropped"] < each["kept"]
    assert found["selective"]["kept"] == measured(SELECTIVE, "aot_eager")["kept"]
    assert found["none"]["kept"] == measured(None, "aot_eager")["kept"]


def test_layers_share_code_under_equal_policies_and_only_then() -> None:
    def policy(operators: tuple[Any, ...]) -> Callable[[], Any]:
        def decide(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE

        return lambda: create_selective_checkpoint_contexts(decide)

    class Own(Checkpointed):
        policies: tuple[Any, ...] = ()

        def forward(self, x: Tensor) -> Tensor:
            for block, context in zip(self.blocks, self.policies, strict=True):
                x = checkpoint(block, x, use_reentrant=False, context_fn=context)
            return self.head(x)

    regions = []
    for operators in ((PRODUCTS, PRODUCTS, PRODUCTS), (PRODUCTS, PRODUCTS, ())):
        torch._dynamo.reset()
        model = Own(None)
        model.policies = tuple(map(policy, operators))
        backend = dropbp_backend(inner="aot_eager")
        run = torch.compile(model, backend=backend)
        for pattern in ([], [1, 2], [0, 1, 4, 5]):
            with backend.pinned(pattern):
                actual = compiled(model, loss, run)
            assert_equal(actual, eager(reference(model), loss, [POINTS[i] for i in pattern]))
        regions.append(backend.stats.unique_regions)
    assert regions == [2, 3], "a region for the blocks and one for the head; the odd block has its own"


# ---- around compiled blocks ------------------------------------------------------------------------------------------


def dropped_now(backends: list[DropBPBackend]) -> list[list[int]]:
    return [[branch.times_dropped for branch in backend.branches] or [0, 0] for backend in backends]


def assert_blocks_exact(model: Checkpointed, value: Callable[[Any], Tensor] = loss, steps: int = 4) -> int:
    """Compile the blocks, each with a backend of its own, and hold some steps against the oracle; how many were dropped."""
    other = reference(model)
    backends = [dropbp_backend(inner="aot_eager", seed=i) for i in range(3)]
    for block, backend in zip(model.blocks, backends, strict=True):
        block.compile(backend=backend)
    dropped = 0
    for _ in range(steps):
        before = dropped_now(backends)
        actual = compiled(model, value, model)
        after = dropped_now(backends)
        points = [POINTS[2 * i + j] for i in range(3) for j in range(2) if after[i][j] > before[i][j]]
        assert_equal(actual, eager(other, loss, points))
        dropped += len(points)
    assert [backend.stats.forwards for backend in backends] == [steps] * 3, "a recomputation is no forward"
    return dropped


@pytest.mark.parametrize("how", [FULL, REENTRANT, SELECTIVE], ids=["full", "reentrant", "selective"])
def test_checkpoints_around_compiled_blocks_are_exact(how: dict[str, Any]) -> None:
    assert assert_blocks_exact(Checkpointed(how)) == 12


def test_a_recomputation_that_is_not_stopped_early_is_exact() -> None:
    with set_checkpoint_early_stop(False):
        assert assert_blocks_exact(Checkpointed(FULL)) == 12


def test_checkpoints_in_a_checkpoint_are_exact() -> None:
    model = Checkpointed(FULL)

    def nested(run: Any) -> Tensor:
        torch.manual_seed(5)
        x = X.clone().requires_grad_()
        value: Tensor = checkpoint(run, x, use_reentrant=False).square().sum()
        return value

    assert assert_blocks_exact(model, nested) == 12


def test_checkpoint_sequential_is_exact() -> None:
    model = Checkpointed(None)

    def sequential(run: Any) -> Tensor:
        torch.manual_seed(5)
        x = X.clone().requires_grad_()
        out = checkpoint_sequential(list(run.blocks), 2, x, use_reentrant=False)
        value: Tensor = run.head(out).square().sum()
        return value

    assert assert_blocks_exact(model, sequential) == 12


def test_several_checkpoints_of_one_block_on_inputs_made_inside_them() -> None:
    """What tells their forwards apart is the checkpoint: the blocks' inputs are made anew when they are recomputed."""
    block = Block(dropout=0.0)
    other = copy.deepcopy(block)
    backend = dropbp_backend(0.5, inner="aot_eager", seed=0)
    block.compile(backend=backend)
    patterns: list[list[str]] = []
    backend.on_sample(
        lambda _indices, dropped: patterns.append([("first", "second")[index] for index in sorted(dropped)])
    )

    def passes(run: Any, factor: int, x: Tensor) -> Tensor:
        out: Tensor = run(run(x * factor) * factor)
        return out

    block.zero_grad()
    total = torch.zeros(())
    for factor in range(1, 6):
        total = total + checkpoint(functools.partial(passes, block, factor), X, use_reentrant=False).square().sum()
    total.backward()
    assert len(patterns) == 10
    assert len({tuple(pattern) for pattern in patterns}) == 2, "patterns differ, or nothing is tested"
    expected = torch.zeros(())
    for factor in range(1, 6):
        with detached(other, patterns[2 * factor - 2]):
            x = other(X * factor)
        with detached(other, patterns[2 * factor - 1]):
            expected = expected + other(x * factor).square().sum()
    expected.backward()
    for (name, ours), theirs in zip(block.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_two_forwards_on_one_input_are_recomputed_in_their_own_patterns() -> None:
    block = Block(dropout=0.0)
    other = copy.deepcopy(block)
    backend = dropbp_backend(inner="aot_eager")
    block.compile(backend=backend)
    totals = []
    for model in (block, other):
        parts = []
        for branch, weight in (("first", 1.0), ("second", 2.0)):
            if model is block:
                with backend.pinned([branch]):
                    parts.append(weight * checkpoint(model, X, use_reentrant=False).square().sum())
            else:
                with detached(model, [branch]):
                    parts.append(weight * model(X).square().sum())
        totals.append(parts[0] + parts[1])
    for total in totals:
        total.backward()
    for ours, theirs in zip(block.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@torch._functorch.config.patch(donated_buffer=False)  # torch.compile's own condition for retain_graph
def test_a_backward_that_keeps_the_graph_recomputes_in_the_same_pattern_again() -> None:
    model = Checkpointed(FULL, dropout=0.0)
    backends = [dropbp_backend(inner="aot_eager", seed=i) for i in range(3)]
    for block, backend in zip(model.blocks, backends, strict=True):
        block.compile(backend=backend)
    value = loss(model)
    value.backward(retain_graph=True)
    once = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    value.backward()
    for name, parameter in model.named_parameters():
        if once[name] is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_a_function_that_does_something_else_when_recomputed_is_refused() -> None:
    block = Block(dropout=0.0)
    block.compile(backend=dropbp_backend(inner="aot_eager", seed=0))
    runs = []

    def fickle(x: Tensor) -> Tensor:
        runs.append(None)
        if len(runs) == 2:
            block(x)
        return block(x).sin()

    value = checkpoint(fickle, X, use_reentrant=False).sum()
    with (
        pytest.raises(
            RuntimeError, match=r"runs a compiled block for the 2\. time when it is recomputed, and ran it 1 times"
        ),
        set_checkpoint_early_stop(False),
    ):
        value.backward()


# ---- hooks on saved tensors ------------------------------------------------------------------------------------------


def through_bytes() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Keep what is saved as bytes, as an offload to a disk would."""

    def pack(tensor: Tensor) -> Any:
        return tensor.detach().contiguous().numpy().tobytes(), tensor.dtype, tensor.shape

    def unpack(packed: Any) -> Tensor:
        data, dtype, shape = packed
        values = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return values.reshape(shape)

    return pack, unpack


HOOKS: dict[str, Callable[[], Any]] = {
    "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(pin_memory=False),
    "bytes": lambda: torch.autograd.graph.saved_tensors_hooks(*through_bytes()),
}


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
def test_saved_tensors_that_are_offloaded_give_exact_gradients(hooks: Callable[[], Any]) -> None:
    model = Checkpointed(None, dropout=0.0)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)

    def offloaded(m: Any) -> Tensor:
        with hooks():
            return loss(m)

    assert_exact(model, run, backend, offloaded, POINTS, patterns=[(), (0, 1), (1, 2, 5), (0, 1, 2, 3, 4)])


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
def test_offloading_around_checkpoints_is_exact(hooks: Callable[[], Any]) -> None:
    def around(run: Any) -> Tensor:
        with hooks():
            return loss(run)

    assert assert_blocks_exact(Checkpointed(FULL), around, steps=2)


def test_hooks_see_less_the_more_is_dropped() -> None:
    model = Checkpointed(None, dropout=0.0)
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    sizes = []
    for pattern in ([], [2], [2, 3], [0, 1, 2, 3, 4]):
        with backend.pinned(pattern):
            loss(run).backward()
            sizes.append(saved_bytes(lambda: loss(run), model))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
