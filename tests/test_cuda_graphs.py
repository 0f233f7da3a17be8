"""Regions as CUDA graphs: exact in whatever order forwards and backwards come, and no more memory than what is kept needs.

Without ``--device cuda`` a stand-in replays what was captured, so that all of this is tested on the CPU; ``pytest --graphs``
runs every other test this way.
"""

from __future__ import annotations

import itertools
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dropbp_fx import CudaGraphsWarning, DropBPBackend, _torch, dropbp_backend
from dropbp_fx.runtime.compiler import Compiler
from dropbp_fx.runtime.device_graphs import DeviceGraphs
from dropbp_fx.runtime.fixed_memory import matched
from dropbp_fx.runtime.placement import copy_into, observe
from tests.graphs import Replayed
from tests.oracle import assert_equal, assert_exact, compiled, eager

DEPTH = 6
POINTS = [f"blocks.{index}" for index in range(DEPTH)]
PATTERNS: list[list[int]] = [[], [2], [0, 1, 2, 3], [1, 2, 3, 4], [0, 2, 4], [1, 3, 5]]


class Residual(nn.Module):
    """Blocks between a stem and a head, so that every block's region may be a graph."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, width))
            for _ in range(DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class ResidualBlock(nn.Module):
    """One block and its add."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Stacked(nn.Module):
    """The same model made of such blocks."""

    def __init__(self, stem: nn.Module, blocks: nn.ModuleList, head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, blocks, head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch(seed: int = 1) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed), device="cpu").to(where())


def loss_of(run: Callable[[Tensor], Tensor], seed: int = 1) -> Tensor:
    return run(batch(seed)).square().sum()


def where() -> torch.device:
    return torch.empty(0).device


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replayed | None]:
    """The stand-in, ``None`` where there are real graphs."""
    if where().type == "cuda":
        yield None
        return
    stand_in = Replayed()
    monkeypatch.setattr(_torch, "graph_capture", lambda _device: stand_in)
    yield stand_in


def compiled_with_graphs(model: nn.Module, **options: Any) -> tuple[DropBPBackend, Any]:
    backend = dropbp_backend(**{"inner": "aot_eager", "seed": 0, **options})
    return backend, torch.compile(model, backend=backend, mode="reduce-overhead")


def recorded(backend: DropBPBackend) -> int:
    return sum(memory.recorded for memory in backend._state.graph_memory.values())


def slots(backend: DropBPBackend) -> int:
    """How many regions' activations the backend's fixed memory holds."""
    programs = [runner._graphs for runner in backend._state.runners if runner._graphs is not None]
    return sum(len(own.slots) for program in programs for own in program._slots.values())


def step(model: nn.Module, run: Any, backend: DropBPBackend, pattern: Sequence[int], seed: int = 1) -> None:
    """One exact step."""
    with backend.pinned(pattern):
        actual = compiled(model, lambda m: loss_of(m, seed), run)
    expected = eager(model, lambda m: loss_of(m, seed), [POINTS[k] for k in pattern])
    assert_equal(actual, expected, what=f"pattern {pattern}")


def test_any_pattern_is_exact_and_soon_nothing_new_is_recorded(graphs: Replayed | None) -> None:
    model = Residual()
    backend, run = compiled_with_graphs(model)
    assert_exact(model, run, backend, loss_of, POINTS, patterns=PATTERNS * 3)
    before = recorded(backend)
    assert before > 2 * DEPTH
    replayed = 0 if graphs is None else graphs.replayed
    assert_exact(model, run, backend, loss_of, POINTS, patterns=PATTERNS * 2)
    assert recorded(backend) == before
    if graphs is not None:  # a graph for every region's forward, and for the backward of every kept one
        kept = sum(DEPTH - len(pattern) for pattern in PATTERNS)
        assert graphs.replayed - replayed == 2 * (DEPTH * len(PATTERNS) + kept)


@pytest.mark.inductor
def test_inductors_code_is_exact_and_puts_its_results_where_they_stay(
    graphs: Replayed | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[Tensor] = []
    monkeypatch.setattr(
        "dropbp_fx.runtime.recorded.copy_into", lambda place, value: (copied.append(place), copy_into(place, value))
    )
    model = Residual()
    backend, run = compiled_with_graphs(model, inner="inductor")
    assert_exact(model, run, backend, loss_of, POINTS, patterns=PATTERNS * 2)
    forwards = [place for place in copied if place.shape == (4, 24)]
    assert not forwards  # what a block keeps of its own; the stream, which is the next block's too, is copied


def test_memory_is_that_of_the_regions_that_are_kept(graphs: Replayed | None) -> None:
    model = Residual()
    backend, run = compiled_with_graphs(model)
    for pattern in itertools.combinations(range(DEPTH), 4):
        step(model, run, backend, pattern)
    assert slots(backend) == 2
    step(model, run, backend, [])
    assert slots(backend) == DEPTH


def test_memory_that_is_not_needed_any_more_is_given_up(
    graphs: Replayed | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dropbp_fx.runtime.device_graphs._FORWARDS_UNUSED", 4)
    model = Residual()
    backend, run = compiled_with_graphs(model)
    for pattern in [[], [], *[[0, 1, 2, 3]] * 10]:
        step(model, run, backend, pattern)
    assert slots(backend) == 2
    assert_exact(model, run, backend, loss_of, POINTS, patterns=PATTERNS)


def test_any_sequence_of_patterns_is_exact(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm

    @settings(max_examples=25, deadline=None, database=None)
    @given(st.lists(st.sets(st.integers(0, DEPTH - 1), max_size=DEPTH - 1), min_size=1, max_size=8))
    def any_sequence(patterns: list[set[int]]) -> None:
        for seed, pattern in enumerate(patterns):
            step(model, run, backend, sorted(pattern), seed)

    any_sequence()


# ---- forwards and backwards in other orders ------------------------------------------------------------------------------


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def expected_sum(model: nn.Module, batches: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor | None]:
    """Accumulated gradients of several batches (seed, pattern), from the oracle."""
    total: list[Tensor | None] = [None for _ in model.parameters()]
    for seed, pattern in batches:
        result = eager(model, lambda m, seed=seed: loss_of(m, seed), [POINTS[k] for k in pattern])
        for k, gradient in enumerate(result.gradients.values()):
            if gradient is not None:
                before = total[k]
                total[k] = gradient if before is None else before + gradient
    return total


def assert_gradients(model: nn.Module, expected: Sequence[Tensor | None]) -> None:
    for actual, wanted in zip(gradients(model), expected, strict=True):
        assert (actual is None) == (wanted is None)
        if actual is not None and wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


BATCHES: list[tuple[int, list[int]]] = [(1, [0, 2]), (2, [1, 2, 3]), (3, []), (4, [0, 1, 4])]


@pytest.fixture
def warm(graphs: Replayed | None) -> tuple[Residual, DropBPBackend, Any]:
    """A model whose graphs are recorded."""
    model = Residual()
    backend, run = compiled_with_graphs(model)
    for _ in range(3):
        for _, pattern in BATCHES:
            with backend.pinned(pattern):
                compiled(model, loss_of, run)
    model.zero_grad(set_to_none=True)
    return model, backend, run


def test_gradients_accumulate(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    for seed, pattern in BATCHES:
        with backend.pinned(pattern):
            loss_of(run, seed).backward()
    assert_gradients(model, expected_sum(model, BATCHES))


def test_gradients_that_somebody_keeps_are_not_written_over(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    kept = []
    for seed, pattern in BATCHES:
        model.zero_grad(set_to_none=True)
        with backend.pinned(pattern):
            loss_of(run, seed).backward()
        kept.append([p.grad for p in model.parameters()])
    for (seed, pattern), mine in zip(BATCHES, kept, strict=True):
        for actual, wanted in zip(mine, expected_sum(model, [(seed, pattern)]), strict=True):
            assert (actual is None) == (wanted is None)
            if actual is not None and wanted is not None:
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_several_forwards_before_their_backwards(
    warm: tuple[Residual, DropBPBackend, Any], order: Sequence[int]
) -> None:
    model, backend, run = warm
    losses = []
    for seed, pattern in BATCHES:
        with backend.pinned(pattern):
            losses.append(loss_of(run, seed))
    for number in order:
        losses[number].backward()
    assert_gradients(model, expected_sum(model, BATCHES))
    step(model, run, backend, [0, 3])


def test_a_forward_whose_backward_never_comes(
    warm: tuple[Residual, DropBPBackend, Any], graphs: Replayed | None
) -> None:
    model, backend, run = warm
    loss = loss_of(run)
    step(model, run, backend, [1])  # without graphs: the memory is the other forward's
    del loss
    before = 0 if graphs is None else graphs.replayed
    step(model, run, backend, [1])
    assert graphs is None or graphs.replayed > before


def test_a_graph_that_is_retained_and_used_again(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    with backend.pinned([1, 4]):
        loss = loss_of(run)
    loss.backward(retain_graph=True)
    step_in_between = Residual()
    other, other_run = compiled_with_graphs(step_in_between)
    step(step_in_between, other_run, other, [2])
    with backend.pinned([0]):
        loss_of(run, 2).backward()
    loss.backward()
    assert_gradients(model, expected_sum(model, [(1, [1, 4]), (1, [1, 4]), (2, [0])]))


def test_a_second_backward_without_a_retained_graph_is_refused(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    loss = loss_of(run)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    step(model, run, backend, [3])


def test_gradients_of_a_batch_of_tangents(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    """``is_grads_batched``: tangents have no memory of their own, so their backward runs without graphs."""
    model, backend, run = warm
    x = torch.randn(4, 8)
    with backend.pinned([1]):
        out = run(x)
    with torch.no_grad():
        tangents = torch.eye(out.numel()).reshape(-1, *out.shape)[:3]
    parameters = list(model.parameters())
    actual = torch.autograd.grad(out, parameters, tangents, is_grads_batched=True, allow_unused=True)
    for k in range(3):
        model.zero_grad(set_to_none=True)
        with backend.pinned([1]):
            run(x).backward(tangents[k])
        for p, together in zip(parameters, actual, strict=True):
            assert (p.grad is None) == (together is None or not together.any())
            if p.grad is not None and together is not None:
                torch.testing.assert_close(together[k], p.grad)


def test_evaluation_in_between(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    with backend.pinned([0, 5]):
        loss = loss_of(run)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loss_of(run, 7), loss_of(model, 7))
    model.train()
    loss.backward()
    assert_gradients(model, expected_sum(model, [(1, [0, 5])]))


def test_disabled_calibration_and_observed_steps(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    with backend.disabled():
        loss_of(run).backward()
    assert_gradients(model, expected_sum(model, [(1, [])]))
    backend.calibrate(lambda: loss_of(run))
    assert len(backend.sensitivity.values) == DEPTH
    step(model, run, backend, [2, 3])


def test_other_threads_wait_for_their_turn(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    results: list[list[Tensor | None]] = []

    batches = {seed: batch(seed) for seed in range(1, 5)}  # a default device is each thread's own

    def train() -> None:
        for seed, x in batches.items():
            parameters = list(model.parameters())
            results.append([seed, *torch.autograd.grad(run(x).square().sum(), parameters)])  # type: ignore[list-item]

    backend.rate = 0.0
    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    for seed, *actual in results:
        for mine, wanted in zip(actual, expected_sum(model, [(seed, [])]), strict=True):  # type: ignore[list-item]
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


# ---- memory that moves, shapes that change -------------------------------------------------------------------------------


def test_parameters_that_move_are_read_where_they_are(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    for parameter in model.parameters():
        parameter.data = parameter.data.clone().mul_(1.1)
    for seed, pattern in BATCHES:
        step(model, run, backend, pattern, seed)


def test_an_optimizer_step_is_seen_by_the_next_forward(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for seed, pattern in BATCHES:
        step(model, run, backend, pattern, seed)
        optimizer.step()


def test_another_shape_has_graphs_of_its_own(graphs: Replayed | None) -> None:
    model = Residual()
    backend = dropbp_backend(inner="aot_eager", seed=0)
    run = torch.compile(model, backend=backend, mode="reduce-overhead", dynamic=False)

    def loss(m: Any, rows: int) -> Tensor:
        return m(torch.linspace(-1, 1, rows * 8).reshape(rows, 8)).square().sum()

    for rows in [4, 3, 4, 3, 3, 4, 4, 3]:
        for pattern in ([1], [0, 2, 3]):
            with backend.pinned(pattern):
                actual = compiled(model, lambda m, rows=rows: loss(m, rows), run)
            expected = eager(model, lambda m, rows=rows: loss(m, rows), [POINTS[k] for k in pattern])
            assert_equal(actual, expected)
    assert recorded(backend) > 4 * DEPTH


def test_symbolic_shapes_run_without_graphs(graphs: Replayed | None) -> None:
    model = Residual()
    backend = dropbp_backend(inner="aot_eager", seed=0)
    run = torch.compile(model, backend=backend, mode="reduce-overhead", dynamic=True)
    warnings.simplefilter("ignore", CudaGraphsWarning)
    for rows in (4, 3, 5):
        with backend.pinned([1]):
            x = torch.linspace(-1, 1, rows * 8).reshape(rows, 8)
            actual = compiled(model, lambda m, x=x: m(x).square().sum(), run)
        assert_equal(actual, eager(model, lambda m, x=x: m(x).square().sum(), [POINTS[1]]))
    assert recorded(backend) == 0


def test_dropout_takes_the_numbers_that_it_takes_without_graphs(graphs: Replayed | None) -> None:
    def losses(mode: str) -> list[list[Tensor]]:
        torch._dynamo.reset()
        model = Residual(dropout=0.3)
        backend = dropbp_backend(inner="aot_eager", seed=0)
        run = torch.compile(model, backend=backend, mode=mode)
        found = []
        torch.manual_seed(7)
        for seed, pattern in BATCHES * 3:
            with backend.pinned(pattern):
                loss = loss_of(run, seed)
            found.append([loss.detach(), *torch.autograd.grad(loss, list(model.stem.parameters()))])
        return found

    for mine, wanted in zip(losses("reduce-overhead"), losses("default"), strict=True):
        torch.testing.assert_close(mine, wanted)


# ---- what cannot be recorded ---------------------------------------------------------------------------------------------


def test_what_cannot_be_captured_runs_without_a_graph(graphs: Replayed | None) -> None:
    if graphs is None:
        pytest.skip("The stand-in can be made to fail.")
    graphs.fails = RuntimeError("operation not permitted when stream is capturing")
    model = Residual()
    backend, run = compiled_with_graphs(model)
    assert_exact(model, run, backend, loss_of, POINTS, patterns=PATTERNS)
    assert recorded(backend) == 0


def test_values_with_many_readers_are_not_copied_for_each(graphs: Replayed | None) -> None:
    class Conditioned(Residual):
        """Every block reads the stem's output too."""

        def forward(self, x: Tensor) -> Tensor:
            first = x = self.stem(x)
            for block in self.blocks:
                x = x + block(x * first)
            return self.head(x)

    model = Conditioned()
    backend, run = compiled_with_graphs(model)
    assert_exact(model, run, backend, loss_of, POINTS, patterns=PATTERNS * 2)
    (program,) = (r._graphs for r in backend._state.runners)
    assert isinstance(program, DeviceGraphs)
    assert len(program.values.lasting) == 1


def test_each_region_gets_a_slot_of_its_own_and_one_it_wants_where_that_is_possible() -> None:
    assert matched([[0, 1], [0], [1, 2]], 3) == [1, 0, 2]
    assert sorted(matched([[0], [0], [0]], 4)[:3])[0] == 0
    assert len(set(matched([[0], [0], [0]], 4))) == 3
    assert matched([], 0) == []


@pytest.mark.inductor
def test_where_the_results_of_code_lie_is_seen_in_its_first_run() -> None:
    from torch._inductor.compile_fx import compile_fx

    def pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = x @ y
        return z.relu(), x.t(), z.sum()

    codes: list[Any] = []

    def inner(gm: Any, examples: Any, **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        codes.append(compile_fx_inner(gm, examples, **options))
        return codes[-1]

    x, y = torch.randn(4, 4), torch.randn(4, 4)
    traced = torch.fx.experimental.proxy_tensor.make_fx(pair)(x, y)
    with torch.no_grad():
        compile_fx(traced, [x, y], inner_compile=inner)(x, y)
    made, placement = observe(_torch.BoxedCode(codes[0]), [x, y], x.device)
    for value, result in zip(made, placement.results, strict=True):
        assert result is not None
        assert tuple(value.stride()) == result.stride
    kinds = [origin.kind for origin in placement.origins]
    assert kinds.count("allocation") >= 2
    assert all(placement.fills[k] for k, kind in enumerate(kinds) if kind == "allocation")


@pytest.mark.inductor
@pytest.mark.parametrize("asked", ["option", "setting", "neither"])
def test_graphs_are_asked_for_by_an_option_or_by_inductors_setting(graphs: Replayed | None, asked: str) -> None:
    options = {"triton.cudagraphs": True} if asked == "option" else None
    backend = dropbp_backend(rate=0.0, options=options)
    run = torch.compile(Residual(), backend=backend)
    with torch._inductor.config.patch({"triton.cudagraphs": asked == "setting"}):
        for _ in range(3):
            loss_of(run).backward()
    assert (recorded(backend) > 0) == (asked != "neither")


# ---- what is said --------------------------------------------------------------------------------------------------------


def test_the_backend_shows_what_was_recorded(warm: tuple[Residual, DropBPBackend, Any]) -> None:
    model, backend, run = warm
    with backend.pinned([1]):
        for _ in range(20):
            compiled(model, loss_of, run)
    assert backend.stats.recorded_cuda_graphs == recorded(backend) > 0
    shown = repr(backend)
    assert f"graphs on {where().type}" in shown
    assert re.search(rf"{recorded(backend)} recorded, which ran 9\d.\d% of the branches' forwards", shown), shown


def test_nothing_is_shown_of_graphs_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "cuda_graphs", False)  # pytest --graphs asks for them everywhere
    backend = dropbp_backend(inner="aot_eager")
    loss_of(torch.compile(Residual(), backend=backend))
    assert "graphs on" not in repr(backend)
    assert backend.stats.recorded_cuda_graphs == 0


def test_symbolic_shapes_are_said_to_have_no_graphs(graphs: Replayed | None) -> None:
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(Residual(), backend=backend, mode="reduce-overhead", dynamic=True)
    with pytest.warns(CudaGraphsWarning, match=r"shapes are symbolic.* Compile with dynamic=False"):
        loss_of(run).backward()


def test_a_graph_that_returns_all_hidden_states_is_said_to_have_no_graphs(graphs: Replayed | None) -> None:
    class Chatty(Residual):
        def forward(self, x: Tensor) -> Any:
            states = [self.stem(x)]
            for block in self.blocks:
                states.append(states[-1] + block(states[-1]))
            return states

    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(Chatty(), backend=backend, mode="reduce-overhead")
    with pytest.warns(CudaGraphsWarning, match=r"each of its branches returns a value to the caller.* return the loss"):
        run(batch())[-1].sum().backward()
    assert backend.stats.recorded_cuda_graphs == 0


def test_forwards_that_mostly_find_the_memory_in_use_are_said_to(
    warm: tuple[Residual, DropBPBackend, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, backend, run = warm
    (program,) = (runner._graphs for runner in backend._state.runners)
    assert program is not None
    monkeypatch.setattr("dropbp_fx.runtime.device_graphs._FORWARDS_WATCHED", program._forwards + 40)
    losses = [loss_of(run) for _ in range(39)]
    with pytest.warns(CudaGraphsWarning, match=r"of the first \d+ forwards .* Compile the whole model"):
        losses.append(loss_of(run))


def test_layers_compiled_one_by_one_are_exact(graphs: Replayed | None) -> None:
    model = Residual()
    layers = nn.ModuleList(ResidualBlock(block) for block in model.blocks)
    whole = Stacked(model.stem, layers, model.head)
    backend = dropbp_backend(inner="aot_eager", seed=0)
    backend.register(whole)
    for layer in layers:
        layer.compile(backend=backend, mode="reduce-overhead")
    with pytest.warns(CudaGraphsWarning, match="Compile the whole model"):
        loss_of(whole).backward()
    assert_exact(model, whole, backend, loss_of, POINTS, patterns=PATTERNS)
