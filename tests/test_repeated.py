"""``backend.repeated()``: forwards that drop what earlier ones did, as optimizers of two passes need it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from dropbp_fx.inspect import record_patterns
from tests.oracle import assert_equal, compiled, detached, eager
from tests.test_trainability import Net, X, loss, make, train_only


def names(pattern: Any) -> list[str]:
    return [f"blocks.{index}.inner" for index in sorted(pattern)]


def sam_step(model: nn.Module, first: Any, second: Any, *, rho: float, lr: float) -> None:
    """Sharpness-aware minimisation (Foret et al., 2021), as its usual implementations skip what has no gradient."""
    first().backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    old = {}
    with torch.no_grad():
        for p in parameters:
            old[p] = p.clone()
            p.add_(p.grad, alpha=float(rho / norm))  # type: ignore[arg-type]
    model.zero_grad()
    second().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None and p in old:
                p.copy_(old[p])
                p.sub_(p.grad, alpha=lr)
    model.zero_grad()


@pytest.mark.parametrize("breaks", [None, 1])
def test_a_sam_step_is_that_of_the_eager_model_with_one_pattern(breaks: int | None) -> None:
    model, backend, run = make(0.5, breaks=breaks)
    reference = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]

    def again() -> Tensor:
        with backend.repeated():
            return loss(run)

    sam_step(model, lambda: loss(run), again, rho=0.05, lr=0.0)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True)), "they came back"
    for _ in range(4):
        with record_patterns(backend) as history:
            sam_step(model, lambda: loss(run), again, rho=0.05, lr=0.01)
        assert history.patterns[0] == history.patterns[1] != frozenset()
        with detached(reference, names(history.patterns[0])):
            sam_step(reference, lambda: loss(reference), lambda: loss(reference), rho=0.05, lr=0.01)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert backend.stats.forwards == 10
    assert backend.state_dict()["rounds"] == 5


def test_layers_compiled_one_by_one_repeat_the_whole_models_pattern() -> None:
    model = Net()
    backend = dropbp_backend(0.5, inner="aot_eager", seed=0)
    backend.register(model)
    for block in model.blocks:
        block.compile(backend=backend)
    loss(model)
    for _ in range(3):
        with record_patterns(backend) as history:
            loss(model)
            with backend.repeated():
                loss(model)
        assert history.patterns[0] == history.patterns[1]
        assert len(history.patterns[0]) == 2


def test_several_forwards_a_step_are_repeated_in_their_order() -> None:
    model, backend, run = make(0.5, depth=6)
    for _ in range(3):
        with record_patterns(backend) as history:
            for _ in range(3):
                loss(run).backward()
            with backend.repeated(3):
                for _ in range(5):
                    loss(run).backward()
            with backend.repeated(2):
                loss(run).backward()
        a, b, c, *rest = history.patterns
        assert rest == [a, b, c, a, b, b]
        assert len({a, b, c}) > 1
    with backend.repeated():
        assert_equal(compiled(model, loss, run), eager(model, loss, names(c)))


def test_scales_repeat_and_so_does_their_absence() -> None:
    model, backend, run = make(0.5, rescale=True, pattern="independent")
    first = compiled(model, loss, run)
    backend.rate = 0.25
    with backend.repeated():
        assert_equal(compiled(model, loss, run), first)
    with backend.pinned([1]):
        pinned = compiled(model, loss, run)
    with backend.repeated():
        assert_equal(compiled(model, loss, run), pinned)
    assert_equal(pinned, eager(model, loss, names([1])))


def test_blocks_nest_and_the_innermost_holds() -> None:
    _, backend, run = make(0.5)
    with record_patterns(backend) as history:
        loss(run)
        with backend.repeated():
            loss(run)
            with backend.disabled():
                loss(run)
            with backend.pinned([2]):
                loss(run)
                with backend.repeated():
                    loss(run)
            loss(run)
        loss(run)
    drawn, again, none, pinned, of_pinned, outer, fresh = history.patterns
    assert drawn == again == outer
    assert (none, pinned, of_pinned) == (frozenset(), {2}, {2})
    assert len(fresh) == 2
    assert backend.stats.forwards == 7
    assert sum(branch.times_dropped for branch in backend.branches) == sum(map(len, history.patterns))


def test_repeating_draws_nothing() -> None:
    _, backend, run = make(0.5)
    _, other, run_other = make(0.5)
    with record_patterns(backend) as history, record_patterns(other) as plain:
        for _ in range(4):
            loss(run)
            with backend.repeated():
                loss(run)
            loss(run_other)
    assert history.patterns[::2] == history.patterns[1::2] == plain.patterns


def test_nothing_to_repeat_is_an_error_before_the_block() -> None:
    _, backend, run = make()
    with (
        pytest.raises(RuntimeError, match=r"repeated\(\) repeats the pattern of a training forward.*Run the forward"),
        backend.repeated(),
    ):
        pytest.fail("the block must not be entered")
    loss(run)
    with (
        pytest.raises(RuntimeError, match=r"repeated\(3\) repeats the pattern of 3 training forwards"),
        backend.repeated(3),
    ):
        pytest.fail("the block must not be entered")
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with backend.repeated():
                pass
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(30)
    assert len(errors) == 1, "patterns are a thread's own"
    backend.load_state_dict(backend.state_dict())
    with pytest.raises(RuntimeError, match="or a state was loaded"), backend.repeated():
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize(
    ("forwards", "kind", "text"),
    [
        (0, ValueError, "goes back 1 to 256 forwards, not 0"),
        (257, ValueError, "not 257"),
        (True, TypeError, "takes a whole number of forwards, not True"),
        (1.0, TypeError, r"not 1\.0"),
    ],
)
def test_bad_counts_are_refused(forwards: Any, kind: type[Exception], text: str) -> None:
    _, backend, _ = make()
    with pytest.raises(kind, match=text):
        backend.repeated(forwards)


def test_a_model_that_has_not_run_cannot_repeat() -> None:
    _, backend, run = make()
    loss(run)
    other = torch.compile(nn.Sequential(Net(depth=3)), backend=backend)
    with pytest.raises(Exception, match="is of a model that has not run as many training forwards"), backend.repeated():
        other(X)


def test_a_layer_frozen_between_the_passes_is_left_alone() -> None:
    model, backend, run = make(0.5)
    with backend.pinned([1]):
        loss(run)
    train_only(model, 1, 3)
    with backend.repeated():
        assert_equal(compiled(model, loss, run), eager(model, loss, names([1])))
