"""Training semantics: which forwards drop, and that each backward belongs to its own forward."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropbp_fx import DropBPBackend, NoResidualBranchWarning, dropbp_backend
from dropbp_fx.entry import dropbp
from tests.helpers import compile_model, dropped_in, make_backend, recording_compilers
from tests.oracle import assert_equal, assert_exact, compiled, eager
from tests.test_models import ResidualMLP, X, square_loss

POINTS = ["blocks.0", "blocks.1", "blocks.2"]


def make(rate: float = 0.5, **options: Any) -> tuple[nn.Module, DropBPBackend, Any]:
    model = ResidualMLP()
    return model, *compile_model(model, rate, **options)


def test_eval_with_gradients_on_never_drops_even_if_the_model_never_reads_its_training_flag() -> None:
    model, backend, run = make(0.6)
    for _ in range(3):
        model.train()
        assert dropped_in(backend, run)
        model.eval()
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, []))
    assert backend.stats.graphs == 2, "one graph for training and one for evaluation, however often the mode changes"
    assert backend.stats.forwards == 3


def test_forwards_without_gradients_never_drop_and_are_not_counted() -> None:
    model, backend, run = make()
    with torch.no_grad():
        assert square_loss(run) == square_loss(model)
    assert backend.stats.forwards == 0
    assert [branch.name for branch in backend.branches] == POINTS
    dropped_in(backend, run)
    with torch.no_grad():
        square_loss(run)
    assert backend.stats.forwards == 1
    assert len(backend.branches) == 3, "training and evaluation graphs share their branches"


def test_several_forwards_before_one_backward_keep_their_own_patterns() -> None:
    model, backend, run = make()
    patterns: list[list[int]] = [[0], [1, 2], [], [2]]
    model.zero_grad()
    losses = []
    for pattern in patterns:
        with backend.pinned(pattern):
            losses.append(square_loss(run))
    torch.stack(losses[::-1]).sum().backward()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for pattern in patterns:
        for name, gradient in eager(model, square_loss, [POINTS[i] for i in pattern]).gradients.items():
            if gradient is not None:
                expected[name] += gradient
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_dropped_branch_leaves_accumulated_gradients_alone() -> None:
    model, backend, run = make()
    with backend.disabled():
        square_loss(run).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with backend.pinned(["blocks.1"]):
        square_loss(run).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name]) == name.startswith("blocks.1"), name


def test_two_models_on_two_equal_backends_do_not_follow_each_other() -> None:
    model_a, backend_a, run_a = make()
    model_b, backend_b, run_b = make()
    assert backend_a == backend_b, "interchangeable while unused"
    with backend_a.pinned([0, 1]), backend_b.pinned([2]):
        actual_a, actual_b = compiled(model_a, square_loss, run_a), compiled(model_b, square_loss, run_b)
    assert backend_a != backend_b
    assert_equal(actual_a, eager(model_a, square_loss, POINTS[:2]))
    assert_equal(actual_b, eager(model_b, square_loss, POINTS[2:]))
    assert (backend_a.stats.forwards, backend_b.stats.forwards) == (1, 1)


def test_one_backend_on_two_models() -> None:
    model, backend, run = make()
    other = ResidualMLP(depth=2, width=24)
    run_other = torch.compile(other, backend=backend)
    with backend.pinned([0]):
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, POINTS[:1]))
        assert_equal(compiled(other, square_loss, run_other), eager(other, square_loss, POINTS[:1]))
    with backend.pinned([1, 2]):
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, POINTS[1:]))


def test_threads_have_their_own_pins_and_backwards() -> None:
    model, backend, run = make()
    backend_patterns = {0: [0], 1: [1, 2]}
    with backend.disabled():
        square_loss(run)
    barrier = threading.Barrier(2, timeout=60)
    found: dict[int, dict[str, Tensor | None]] = {}

    def work(number: int) -> None:
        named = dict(model.named_parameters())
        for _ in range(5):
            with backend.pinned(backend_patterns[number]):
                barrier.wait()
                loss = square_loss(run)
                barrier.wait()
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            found[number] = dict(zip(named, gradients, strict=True))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, pattern in backend_patterns.items():
        expected = eager(model, square_loss, [POINTS[i] for i in pattern]).gradients
        for name, gradient in expected.items():
            actual = found[number][name]
            assert (actual is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(actual, gradient)


def test_drawing_patterns_leaves_other_random_streams_alone() -> None:
    _, backend, run = make(seed=None)
    dropped_in(backend, run)
    states = torch.get_rng_state(), random.getstate()
    for _ in range(3):
        dropped_in(backend, run)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_equal_seeds_draw_equal_patterns_and_others_do_not() -> None:
    sequences = []
    for seed in (1, 1, 2):
        torch._dynamo.reset()
        _, backend, run = make(seed=seed)
        sequences.append([dropped_in(backend, run) for _ in range(12)])
    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]


def test_without_a_seed_the_patterns_follow_torch_manual_seed() -> None:
    sequences = []
    for seed in (5, 5, 6):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        _, backend, run = make(seed=None)
        sequences.append([dropped_in(backend, run) for _ in range(12)])
    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]


def test_a_resumed_run_draws_what_the_uninterrupted_one_would_have() -> None:
    _, backend, run = make()
    for _ in range(4):
        dropped_in(backend, run)
    state = pickle.loads(pickle.dumps(backend.state_dict()))
    expected = [dropped_in(backend, run) for _ in range(8)]
    torch._dynamo.reset()
    _, resumed, run = make(seed=77)
    resumed.load_state_dict(state)
    assert [dropped_in(resumed, run) for _ in range(8)] == expected
    assert resumed.stats.forwards == backend.stats.forwards
    assert resumed.stats.realised_rate == backend.stats.realised_rate


def test_a_state_of_another_model_is_refused() -> None:
    _, backend, run = make()
    dropped_in(backend, run)
    state = backend.state_dict()
    other = ResidualMLP(depth=4)
    fresh = dropbp_backend(inner="aot_eager")
    fresh.load_state_dict(state)
    with pytest.raises(Exception, match="does not fit this model: the model has a branch named 'blocks.3'"):
        square_loss(torch.compile(other, backend=fresh))
    torch._dynamo.reset()
    shallow, fresh = ResidualMLP(depth=2), dropbp_backend(inner="aot_eager")
    fresh.load_state_dict(state)
    run = torch.compile(shallow, backend=fresh)
    square_loss(run)
    with pytest.raises(ValueError, match=r"1 of its 3 branches, such as 'blocks.2', are not in the model"):
        square_loss(run)
    with pytest.raises(ValueError, match="it has 3 branches, the model has 4"):
        met = dropbp_backend(inner="aot_eager")
        square_loss(torch.compile(other, backend=met))
        met.load_state_dict(state)
    with pytest.raises(ValueError, match="granularity='branch', this backend has granularity='layer'"):
        make_backend(granularity="layer").load_state_dict(state)
    with pytest.raises(ValueError, match="its version is None"):
        dropbp_backend().load_state_dict({})


def test_a_deep_copy_stays_under_the_original_handle() -> None:
    model, backend, _ = make()
    copied = copy.deepcopy(backend)
    assert copied == backend
    assert hash(copied) == hash(backend)
    run = torch.compile(model, backend=copied)
    with backend.pinned([1]):
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, POINTS[1:2]))
    assert backend.stats.forwards == 1


def test_a_pickled_backend_is_an_independent_one_with_the_same_state() -> None:
    model, backend, run = make(0.6)
    dropped_in(backend, run)
    other = pickle.loads(pickle.dumps(backend))
    assert other.state_dict() == backend.state_dict()
    expected = [dropped_in(backend, run) for _ in range(5)]
    torch._dynamo.reset()
    run = torch.compile(model, backend=other)
    assert [dropped_in(other, run) for _ in range(5)] == expected


def test_resetting_dynamo_forgets_code_and_keeps_the_policy() -> None:
    model, backend, run = make()
    expected = make()[1:]
    del expected
    first = [dropped_in(backend, run) for _ in range(3)]
    rounds = backend.state_dict()["rounds"]
    variants = backend.stats.compiled_variants
    torch._dynamo.reset()
    assert backend.state_dict()["rounds"] == rounds == len(first)
    with backend.pinned([2]):
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, POINTS[2:]))
    assert backend.stats.compiled_variants > variants
    assert len(backend.branches) == 3


def test_a_new_rate_holds_from_the_next_forward_without_recompiling() -> None:
    _, backend, run = make(0.0)
    assert dropped_in(backend, run) == []
    backend.rate = 2 / 3
    sizes = [len(dropped_in(backend, run)) for _ in range(6)]
    assert sizes == [2] * 6
    assert backend.stats.graphs == 1
    assert [branch.rate for branch in backend.branches] == [2 / 3] * 3
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), not 1"):
        backend.rate = 1


def test_pinning_by_name_and_what_is_refused() -> None:
    model, backend, run = make()
    with backend.pinned(["blocks.1", 2]):
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, POINTS[1:]))
    with pytest.raises(KeyError, match="no branch named 'blocks.9'; did you mean"), backend.pinned(["blocks.9"]):
        pass
    with pytest.raises(IndexError, match="no branch 3: the model has 3 residual branches"), backend.pinned([3]):
        pass
    with pytest.raises(TypeError, match=r"by its index or its name, not by 1.5"), backend.pinned([1.5]):  # type: ignore[list-item]
        pass
    with (
        pytest.raises(ValueError, match="drops all 3 branches that have trainable parameters"),
        backend.pinned([0, 1, 2]),
    ):
        pass
    with pytest.raises(TypeError, match=r"for one branch pass \['blocks.1'\]"):
        backend.pinned("blocks.1")


def test_pins_made_before_the_first_forward_are_checked_when_the_branches_are_known() -> None:
    _, backend, run = make()
    with pytest.raises(KeyError, match="no branch named 'blocks.7'"), backend.pinned(["blocks.7"]):
        square_loss(run)
    torch._dynamo.reset()
    _, backend, run = make()
    with pytest.raises(ValueError, match="so nothing would be trained"), backend.pinned(POINTS):
        square_loss(run)


def test_nested_pins_and_an_exception_inside_one() -> None:
    model, backend, run = make()
    with backend.pinned([0]):
        with pytest.raises(RuntimeError, match="inside"), backend.disabled():
            assert_equal(compiled(model, square_loss, run), eager(model, square_loss, []))
            raise RuntimeError("inside")
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, POINTS[:1]))


def test_layer_granularity_drops_all_branches_of_a_layer_together() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0), 4, enable_nested_tensor=False)
    backend = make_backend(0.5, granularity="layer", inner="aot_eager", seed=0)
    run = torch.compile(model, backend=backend)
    for _ in range(6):
        before = [branch.times_dropped for branch in backend.branches]
        run(torch.ones(3, 2, 16)).sum().backward()
        after = [b.times_dropped - (before[b.index] if before else 0) for b in backend.branches]
        assert after[::2] == after[1::2]
        assert sum(after) == 4


def test_the_backend_by_name() -> None:
    model = ResidualMLP()
    run = torch.compile(model, backend=dropbp, options={"rate": 0.6, "inner": "aot_eager", "seed": 3})
    missing = 0
    for _ in range(4):
        missing += sum(g is None for g in compiled(model, square_loss, run).gradients.values())
    assert missing > 0
    torch._dynamo.reset()
    with pytest.raises(Exception, match="has no option 'rats'; its options are rate, policy, inner"):
        square_loss(torch.compile(model, backend=dropbp, options={"rats": 0.6}))


def test_a_model_without_residual_branches_warns_or_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    with pytest.warns(NoResidualBranchWarning, match="No residual branch was found in this graph"):
        torch.compile(model, backend=dropbp_backend(inner="aot_eager"))(X).sum().backward()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="No residual branch was found in this graph"):
        torch.compile(model, backend=dropbp_backend(inner="aot_eager", strict=True))(X)


def test_module_compile_and_a_pair_of_compilers() -> None:
    calls, compilers = recording_compilers()
    model = ResidualMLP()
    backend = dropbp_backend(inner=compilers)
    reference = copy.deepcopy(model)
    model.compile(backend=backend)
    for pattern in ([], [1]):
        with backend.pinned(pattern):
            actual = compiled(model, square_loss, model)
        assert_equal(actual, eager(reference, square_loss, [POINTS[i] for i in pattern]))
    assert set(calls) == {"forward", "backward"}


def test_gradients_with_respect_to_the_input() -> None:
    model, backend, run = make()
    for pattern in ([], [0], [1, 2]):
        x = X.clone().requires_grad_()
        with backend.pinned(pattern):
            run(x).square().mean().backward()
        reference = X.clone().requires_grad_()

        def loss(m: Any, reference: Tensor = reference) -> Tensor:
            return m(reference).square().mean()

        from tests.oracle import detached

        with detached(model, [POINTS[i] for i in pattern]):
            (expected,) = torch.autograd.grad(loss(model), [reference])
        torch.testing.assert_close(x.grad, expected)


def test_eval_never_drops_under_a_checkpoint_inside_the_compiled_model() -> None:
    class Inside(ResidualMLP):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(lambda x, b=block: x + b(x), x, use_reentrant=False)
            return self.head(x)

    model = Inside()
    backend = dropbp_backend(0.6, inner="aot_eager", seed=0)
    run = torch.compile(model, backend=backend)
    assert dropped_in(backend, run)
    assert [branch.trainable for branch in backend.branches] == [True] * 3
    model.eval()
    for _ in range(3):
        assert_equal(compiled(model, square_loss, run), eager(model, square_loss, []))


def test_dropping_with_an_optimizer_leaves_dropped_parameters_where_they_are() -> None:
    model, backend, run = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with backend.pinned([1]):
        square_loss(run).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("blocks.1"), name


def test_assert_exact_would_notice_a_wrong_gradient() -> None:
    model, backend, run = make()
    with pytest.raises(AssertionError):
        assert_exact(model, run, backend, square_loss, ["blocks.1", "blocks.0", "blocks.2"], patterns=[[0]])
