"""What is trainable changes during a run, and one backend serves several models: draws go by what is so now."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dropbp_fx import DropBPBackend, dropbp_backend
from tests.helpers import make_backend
from tests.oracle import assert_equal, compiled, eager
from tests.selection import sweep

X = torch.linspace(-1, 1, 24).reshape(3, 8).cos()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x).tanh()
        return out


class Net(nn.Module):
    """Blocks and nothing else that is trained; in two graphs, where there is a break after so many of them."""

    def __init__(self, depth: int = 4, breaks: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks is None:
            return self.part(x, 0, len(self.blocks))
        x = self.part(x, 0, self.breaks)
        torch._dynamo.graph_break()
        return self.part(x, self.breaks, len(self.blocks))

    def part(self, x: Tensor, begin: int, end: int) -> Tensor:
        for number in range(begin, end):
            x = self.blocks[number](x)
        return x


def loss(run: Any) -> Tensor:
    value: Tensor = run(X).square().sum()
    return value


def make(rate: float = 0.5, *, depth: int = 4, breaks: int | None = None, **options: Any) -> tuple[Net, Any, Any]:
    model = Net(depth, breaks)
    backend = make_backend(rate, **{"inner": "aot_eager", "seed": 0, **options})
    return model, backend, torch.compile(model, backend=backend)


def train_only(model: Net, *trained: int) -> None:
    for number, block in enumerate(model.blocks):
        block.requires_grad_(number in trained)


def step(model: Net, backend: DropBPBackend, run: Any) -> list[str]:
    """One forward and backward, held against the oracle for the pattern that the counts say was drawn.

    Returns:
        The blocks that were trained.
    """
    before = {branch.name: branch.times_dropped for branch in backend.branches}
    result = compiled(model, loss, run)
    dropped = [b.name for b in backend.branches if b.times_dropped > before.get(b.name, 0)]
    assert_equal(result, eager(model, loss, [name.partition("@")[0] for name in dropped]), what=str(dropped))
    return sorted({name.rpartition(".inner")[0] for name, g in result.gradients.items() if g is not None})


# ---- layers frozen and unfrozen --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "rate"),
    sweep(
        itertools.product(("random", "independent", "lowest", "suffix", "window"), (0.5, 0.9)),
        [("random", 0.5), ("independent", 0.9), ("window", 0.5)],
    ),
)
def test_after_layers_are_frozen_every_step_trains_what_is_left(pattern: str, rate: float) -> None:
    model, backend, run = make(rate, pattern=pattern)
    step(model, backend, run)
    train_only(model, 2, 3)
    for _ in range(6):
        assert step(model, backend, run)
    train_only(model, 3)
    for _ in range(3):
        assert step(model, backend, run) == ["blocks.3"]
    assert backend.stats.forwards == 10
    assert [branch.droppable for branch in backend.branches] == [branch.trainable for branch in backend.branches]
    assert [branch.times_seen for branch in backend.branches] == [1, 1, 7, 10]


def test_budgets_are_of_what_can_be_dropped_now() -> None:
    model, backend, run = make(0.5, depth=8)
    for trained in ([0], [4], [2], [6]):  # everything from there on can be dropped, as in gradual unfreezing
        train_only(model, *range(trained[0], 8))
        before = [branch.times_dropped for branch in backend.branches] or [0] * 8
        for _ in range(4):
            step(model, backend, run)
        now = [branch.times_dropped for branch in backend.branches]
        assert sum(now) - sum(before) == 4 * (8 - trained[0]) // 2
        assert now[: trained[0]] == before[: trained[0]]
        assert backend.stats.attainable_rate == 0.5
    assert backend.stats.realised_rate == 0.5
    assert backend.stats.forwards == 16


def test_frozen_layers_above_the_trained_one_can_be_dropped_and_it_itself_cannot() -> None:
    model, backend, run = make(0.75)
    for turn in range(8):  # LISA: one layer at a time
        train_only(model, turn % 4)
        assert step(model, backend, run) == [f"blocks.{turn % 4}"]
        assert [branch.trainable for branch in backend.branches] == [k == turn % 4 for k in range(4)]
        assert [branch.droppable for branch in backend.branches] == [k >= turn % 4 for k in range(4)]
    assert backend.stats.forwards == 8
    assert backend.stats.graphs == 4, "flipping back and forth goes between compiled graphs"


def test_forwards_that_train_only_a_head_count_and_drop_nothing() -> None:
    model = nn.Sequential(Net(), nn.Linear(8, 2))
    backend = dropbp_backend(0.5, inner="aot_eager", seed=0)
    run = torch.compile(model, backend=backend)
    loss(run).backward()
    model[0].requires_grad_(False)
    for _ in range(3):
        result = compiled(model, loss, run)
    assert_equal(result, eager(model, loss, []))
    assert backend.stats.forwards == 4
    assert backend.stats.attainable_rate == 0.0
    assert not any(branch.droppable or branch.trainable for branch in backend.branches)
    model.requires_grad_(False)
    loss(run)
    assert backend.stats.forwards == 4, "nothing is trained"
    model.requires_grad_(True)
    model.eval()
    loss(run)
    assert backend.stats.forwards == 4
    assert not any(branch.droppable for branch in backend.branches), "an evaluation says nothing of training"
    model.train()
    loss(run).backward()
    assert backend.stats.forwards == 5
    assert sum(branch.times_dropped for branch in backend.branches) == 4


MORE_PIECES = [pytest.param(*case, marks=pytest.mark.thorough) for case in ((2, 0.5), (2, 0.95), (3, 0.7))]


@pytest.mark.parametrize(("breaks", "rate"), [(1, 0.95), *MORE_PIECES])
def test_a_model_in_pieces_keeps_one_in_the_first_forward_after_a_change(breaks: int, rate: float) -> None:
    for seed in range(2 if breaks == 2 else 1):
        torch._dynamo.reset()
        model, backend, run = make(rate, breaks=breaks, seed=seed)
        for trained in ((0, 1, 2, 3), (0,), (0, 1, 2, 3), (0, 1), (3,), (1,), (0, 2), (0,)):
            train_only(model, *trained)
            for _ in range(2):
                assert step(model, backend, run), (seed, trained)
        assert backend.stats.forwards == 16


@pytest.mark.filterwarnings("ignore:The rate asked for is 0.9")  # more than one layer of two can give
def test_layers_compiled_one_by_one_are_frozen_one_by_one() -> None:
    model = Net()
    backend = dropbp_backend(0.9, inner="aot_eager", seed=0)
    backend.register(model)
    for block in model.blocks:
        block.compile(backend=backend)
    reference = Net()
    reference.load_state_dict(model.state_dict())
    forwards = 0
    for trained in ((0, 1, 2, 3), (1,), (0,), (2, 3), (3,), (0, 3), (0,)):
        train_only(model, *trained)
        train_only(reference, *trained)
        for _ in range(3):
            before = [branch.times_dropped for branch in backend.branches] or [0] * 4
            result = compiled(model, loss, model)
            dropped = [b.name for b, old in zip(backend.branches, before, strict=True) if b.times_dropped > old]
            assert_equal(result, eager(reference, loss, dropped))
            assert any(gradient is not None for gradient in result.gradients.values()), trained
            forwards += 1
            assert backend.stats.forwards == forwards
    assert [branch.name for branch in backend.branches] == [f"blocks.{i}.inner" for i in range(4)]


def test_layers_of_several_branches_are_dropped_as_what_is_left_of_them() -> None:
    model, backend, run = make(0.5, granularity="layer", depth=6)
    step(model, backend, run)
    train_only(model, 4, 5)
    for _ in range(6):
        assert len(step(model, backend, run)) == 1
    assert backend.stats.attainable_rate == 0.5


def test_below_the_lowest_kept_branch_means_of_those_that_can_be_dropped() -> None:
    model, backend, run = make(0.5, pattern="lowest", drop="below")
    step(model, backend, run)
    train_only(model, 2, 3)
    for _ in range(4):
        assert step(model, backend, run) == ["blocks.3"]


# ---- what else goes by it --------------------------------------------------------------------------------------------


def test_pins_are_checked_against_what_is_trainable_at_the_forward() -> None:
    model, backend, run = make()
    step(model, backend, run)
    train_only(model, 3)
    with (
        pytest.raises(ValueError, match="drops all 1 branches that have trainable parameters"),
        backend.pinned(["blocks.3.inner"]),
    ):
        loss(run)
    with backend.pinned(["blocks.0.inner", "blocks.1.inner"]):  # frozen: they are not there to be dropped
        assert step(model, backend, run) == ["blocks.3"]
    with pytest.raises(ValueError, match="drops all 1 branches"), backend.pinned([3]):
        pytest.fail("the block must not be entered")
    model.requires_grad_(True)
    before = backend.branches[3].times_dropped
    with backend.pinned([3]):  # no forward has shown the others yet
        assert step(model, backend, run) == ["blocks.0", "blocks.1", "blocks.2"]
    assert backend.stats.forwards == 3
    assert backend.branches[3].times_dropped == before + 1


def test_sensitivities_are_shared_out_among_what_can_be_dropped_and_was_measured() -> None:
    model, backend, run = make(0.4, allocation="sensitivity", depth=6)
    train_only(model, 3, 4, 5)
    found = backend.calibrate(lambda: loss(run))
    assert [value > 0 for value in found.values] == [False] * 3 + [True] * 3
    rates = backend.rates
    assert sum(rates[f"blocks.{i}.inner"] for i in (3, 4, 5)) == pytest.approx(1.2)
    assert len({rates[f"blocks.{i}.inner"] for i in (3, 4, 5)}) > 1
    model.requires_grad_(True)
    step(model, backend, run)
    assert [rates[f"blocks.{i}.inner"] for i in range(3)] == [0.4] * 3, "they were never measured"
    assert sum(rates.values()) == pytest.approx(2.4)
    again = backend.sensitivity
    assert again is not None
    assert again.names == tuple(f"blocks.{i}.inner" for i in (3, 4, 5))
    train_only(model, 4, 5)
    step(model, backend, run)
    assert rates["blocks.4.inner"] + rates["blocks.5.inner"] == pytest.approx(0.8)
    model.requires_grad_(True)
    found = backend.calibrate(lambda: loss(run))
    assert all(value > 0 for value in found.values)
    assert sum(rates.values()) == pytest.approx(2.4)


def test_running_estimates_wait_for_newly_trainable_branches() -> None:
    model, backend, run = make(0.5, reallocate_every=20, allocation="sensitivity")
    train_only(model, 2, 3)
    for _ in range(45):
        loss(run).backward()
    model.requires_grad_(True)
    for _ in range(100):
        loss(run).backward()
    assert backend.sensitivity is not None
    assert all(value > 0 for value in backend.sensitivity.values)
    assert sum(backend.rates.values()) == pytest.approx(2.0)


@pytest.mark.parametrize("breaks", [None, 2])
def test_a_resumed_run_goes_on_in_the_middle_of_freezing(breaks: int | None) -> None:
    schedule = [(0, 1, 2, 3), (2, 3), (1, 2, 3), (3,), (0, 1, 2, 3)]

    def steps(model: Net, backend: DropBPBackend, run: Any, turns: Sequence[int]) -> list[list[str]]:
        found = []
        for turn in turns:
            train_only(model, *schedule[turn % 5])
            found += [step(model, backend, run) for _ in range(2)]
        return found

    model, backend, run = make(0.5, breaks=breaks)
    steps(model, backend, run, range(3))
    state = copy.deepcopy(backend.state_dict())
    expected = steps(model, backend, run, range(3, 8))
    torch._dynamo.reset()
    again, resumed, run = make(0.5, breaks=breaks)
    again.load_state_dict(model.state_dict())
    train_only(again, *schedule[2])
    resumed.load_state_dict(state)
    assert steps(again, resumed, run, range(3, 8)) == expected
    assert resumed.state_dict() == backend.state_dict()


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rate=st.floats(0.0, 0.97),
    breaks=st.sampled_from([None, None, 1, 2]),
    pattern=st.sampled_from(["random", "independent", "suffix", "window", "lowest"]),
    changes=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_whatever_is_frozen_every_forward_trains_something(
    rate: float, breaks: int | None, pattern: str, changes: list[set[int]], seed: int
) -> None:
    check_changes(rate, breaks, pattern, changes, seed)


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.parametrize("part", range(5))
def test_whatever_is_frozen_every_forward_trains_something_in_many_runs(part: int) -> None:
    @hypothesis.seed(part)
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        rate=st.floats(0.0, 0.97),
        breaks=st.sampled_from([None, None, 1, 2, 3]),
        pattern=st.sampled_from(["random", "independent", "suffix", "window", "lowest"]),
        changes=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=8),
        seed=st.integers(0, 2**31),
    )
    def check(rate: float, breaks: int | None, pattern: str, changes: list[set[int]], seed: int) -> None:
        check_changes(rate, breaks, pattern, changes, seed)

    check()


def check_changes(rate: float, breaks: int | None, pattern: str, changes: list[set[int]], seed: int) -> None:
    torch._dynamo.reset()
    model, backend, run = make(rate, breaks=breaks, pattern=pattern, seed=seed)
    forwards = 0
    for trained in changes:
        train_only(model, *trained)
        reached = breaks is None  # the second piece has been seen to hand on a gradient
        for _ in range(2):
            blocks = step(model, backend, run)
            assert set(blocks) <= {f"blocks.{k}" for k in trained}
            reached = reached or blocks[0] < f"blocks.{breaks}"
            assert any(p.grad is not None for p in model.parameters()), trained
            forwards += 1
            assert backend.stats.forwards == forwards
            droppable = {branch.index for branch in backend.branches if branch.droppable}
            can_be = set(range(min(trained), 4))
            second = range(breaks or 0, 4)  # the piece, whose branches below the first trained one may be unknown
            unknown = set() if reached else {k for k in second if trained.isdisjoint(second[: k - second.start + 1])}
            assert can_be - unknown <= droppable <= can_be
            assert {branch.index for branch in backend.branches if branch.trainable} == trained


def test_a_branch_is_weighed_as_what_it_is_now() -> None:
    model, backend, run = make(0.5)
    figures = []
    for trained in ((0, 2, 3), (0, 1, 2, 3), (0, 2, 3)):  # gradients pass block 1 in any case
        train_only(model, *trained)
        step(model, backend, run)
        figures.append([branch.backward_flops for branch in backend.branches])
    assert figures[0][1] > 0
    assert figures[1] == [figures[0][0], figures[0][1] * 2, *figures[0][2:]]
    assert figures[1][1] == figures[1][2]
    assert figures[2] == figures[0]
