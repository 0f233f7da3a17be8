"""Regions that follow each other run under one autograd node, and do what autograd would have done between them."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import boxed_nop

from dropbp_fx import _torch, dropbp_backend
from dropbp_fx.runtime import chain
from tests.oracle import assert_exact


class Residual(nn.Module):
    def __init__(self, width: int = 8, depth: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return x


POINTS = [f"blocks.{index}" for index in range(6)]


def batch() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def loss_of(run: Callable[..., Tensor]) -> Tensor:
    return run(batch()).square().sum()


def autograd_nodes(loss: Tensor) -> int:
    seen: set[Any] = set()
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen and not hasattr(node, "variable"):
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return len(seen)


def test_a_step_of_small_regions_is_one_autograd_node_whatever_is_dropped() -> None:
    model = Residual()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    for pattern in ([], [2], [0, 1, 2, 3], [1, 2, 3, 4, 5]):
        with backend.pinned(pattern):
            loss = loss_of(run)
        assert autograd_nodes(loss) == 3, pattern  # the chain, square, sum
    assert_exact(model, run, backend, loss_of, POINTS)


@pytest.mark.parametrize("regions_a_chain", [1, 2])
def test_chains_hold_back_no_more_gradients_than_they_may(
    monkeypatch: pytest.MonkeyPatch, regions_a_chain: int
) -> None:
    """Where parameters are large a chain has few kept regions; dropped ones cost nothing and join any chain."""
    gradients = (8 * 8 + 8) * 4
    monkeypatch.setattr(chain, "_HELD_BACK", regions_a_chain * gradients)
    model = Residual()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with backend.pinned([]):
        assert autograd_nodes(loss_of(run)) == 2 + 6 // regions_a_chain
    with backend.pinned([1, 2, 3, 4]):
        assert autograd_nodes(loss_of(run)) == 2 + 2 // regions_a_chain
    assert_exact(model, run, backend, loss_of, POINTS)


def test_the_backward_lets_go_of_what_each_region_saved_as_soon_as_it_was_used() -> None:
    saved_by: list[weakref.ref[Tensor]] = []
    still_there: list[int] = []

    def forward(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = _torch.run_graph_eagerly(gm, inputs)

        def run(arguments: list[Any]) -> Any:
            made = compiled(arguments)
            saved_by.extend(weakref.ref(value) for value in made[1:] if not isinstance(value, nn.Parameter))
            return made

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backward(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = _torch.run_graph_eagerly(gm, inputs)

        def run(arguments: list[Any]) -> Any:
            made = compiled(arguments)
            still_there.append(sum(reference() is not None for reference in saved_by))
            return made

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    backend = dropbp_backend(rate=0.0, inner=(forward, backward))
    loss = loss_of(torch.compile(Residual(), backend=backend))
    before = sum(reference() is not None for reference in saved_by)
    loss.backward()
    counts = [before, *still_there]
    assert len(still_there) == 6
    assert all(later < earlier for earlier, later in itertools.pairwise(counts)), counts


def test_gradients_of_a_value_with_several_uses_add_up_across_regions() -> None:
    class Shared(Residual):
        """Every block reads the first activation, and all blocks share one bias."""

        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            first = x * self.bias
            x = first
            for block in self.blocks:
                x = x + block(x * first + self.bias)
            return x

    model = Shared()
    backend = dropbp_backend(inner="aot_eager")
    assert_exact(model, torch.compile(model, backend=backend), backend, loss_of, POINTS, rtol=1e-3)


def test_a_gradient_of_other_strides_than_the_output_is_taken() -> None:
    model = Residual()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)

    def transposed(forward: Callable[..., Tensor]) -> Tensor:
        output = forward(batch())
        output.register_hook(lambda gradient: gradient.t().contiguous().t())
        return output.sum()

    assert_exact(model, run, backend, transposed, POINTS)


def test_hooks_on_saved_tensors_see_one_region_at_a_time() -> None:
    """Offloaded activations would else all come back at once."""
    model = Residual()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    with backend.disabled(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert autograd_nodes(loss_of(run)) == 2 + 6

    def offloaded(forward: Callable[..., Tensor]) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return loss_of(forward)

    assert_exact(model, run, backend, offloaded, POINTS)


def test_code_compiled_under_autocast_runs_under_autocast() -> None:
    model = Residual()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)

    def mixed(forward: Callable[..., Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(batch()).float().square().sum()

    assert_exact(model, run, backend, mixed, POINTS, rtol=2e-2, atol=1e-1)


def test_first_derivatives_with_a_graph_are_right_and_second_ones_are_refused() -> None:
    model = Residual()
    backend = dropbp_backend(rate=0.0, inner="aot_eager")
    loss = loss_of(torch.compile(model, backend=backend))
    parameters = list(model.parameters())
    once = torch.autograd.grad(loss, parameters, create_graph=True)
    for first, exact in zip(once, torch.autograd.grad(loss_of(model), parameters), strict=True):
        torch.testing.assert_close(first.detach(), exact)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice: .* with the eager model\."):
        once[0].square().sum().backward()


def test_a_second_derivative_is_refused_and_not_zero_whatever_it_is_taken_by() -> None:
    backend = dropbp_backend(rate=0.0, inner="aot_eager")
    model = Residual()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    run = torch.compile(model, backend=backend)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice"):
        torch.autograd.functional.hvp(lambda x: run(x * 1).square().sum(), batch(), batch())


def test_switching_determinism_on_between_forward_and_backward_is_refused() -> None:
    backend = dropbp_backend(inner="aot_eager")
    loss = loss_of(torch.compile(Residual(), backend=backend))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"was switched on between .* Switch it on before the forward"):
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_backward_that_writes_over_what_was_saved_may_be_repeated() -> None:
    """It then gets copies of what it may write over, as long as the graph is kept."""
    wiped: list[int] = []

    def wiping(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        context = torch._guards.TracingContext.get()
        donated = list(context.fw_metadata.bw_donated_idxs)  # type: ignore[union-attr, arg-type]
        run = boxed_nop(gm, list(inputs))

        def call(arguments: list[Any]) -> Any:
            mine = [arguments[position] for position in donated]
            made = run(arguments)
            for tensor in mine:
                tensor.fill_(float("nan"))
            wiped.extend(donated)
            return made

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    model = Residual()
    parameters = list(model.parameters())
    exact = torch.autograd.grad(loss_of(model), parameters)
    backend = dropbp_backend(rate=0.0, inner=(boxed_nop, wiping))
    with torch._functorch.config.patch(donated_buffer=True):
        loss = loss_of(torch.compile(model, backend=backend))
        for keep in (True, True, False):
            for mine, theirs in zip(torch.autograd.grad(loss, parameters, retain_graph=keep), exact, strict=True):
                torch.testing.assert_close(mine, theirs)
    assert wiped, "nothing was donated, so nothing is shown"


def test_a_backward_may_be_repeated_where_nothing_is_written_over() -> None:
    model = Residual()
    backend = dropbp_backend(rate=0.0, inner="aot_eager")
    with torch._functorch.config.patch(donated_buffer=False):
        loss = loss_of(torch.compile(model, backend=backend))
        parameters = list(model.parameters())
        once = torch.autograd.grad(loss, parameters, retain_graph=True)
        for first, second in zip(once, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(first, second)


class TwoHeads(nn.Module):
    """Returns two values that different blocks lead to, as an encoder-decoder does beside its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for block in self.blocks[:2]:
            x = x + torch.relu(block(x))
        left = right = x
        for a, b in zip(self.blocks[2:4], self.blocks[4:], strict=True):
            left = left + torch.relu(a(left))
            right = right + torch.tanh(b(right))
        return left, right, left + right


def test_outputs_that_nobody_differentiates_leave_gradients_none() -> None:
    """Within one autograd node too, a gradient that does not exist is told from one that is zero."""
    model = TwoHeads()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    order = [f"blocks.{index}" for index in (0, 1, 2, 4, 3, 5)]
    for used in ((0,), (1,), (2,), (0, 1), (0, 1, 2)):

        def some(forward: Callable[..., tuple[Tensor, ...]], used: tuple[int, ...] = used) -> Tensor:
            outputs = forward(batch())
            return torch.stack([outputs[index].square().sum() for index in used]).sum()

        patterns: list[set[int]] = [set(), {1}, {2, 5}, {0, 3, 4}]
        assert_exact(model, run, backend, some, order, patterns=patterns, what=f"outputs {used} used, ")
    with backend.disabled():
        node = run(batch())[0].grad_fn
    assert type(node).__name__ == "_ChainFunctionBackward"
