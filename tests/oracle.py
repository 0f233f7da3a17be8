"""The oracle: an eager model with ``.detach()`` on the dropped branches."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dropbp_fx import DropBPBackend

#: Where to detach to drop one branch: a module's output, or only its n-th call's for a module that runs several times;
#: a list of modules where the branch is the sum of their outputs and no module's own.
DetachPoint = str | tuple[str, int] | list[str]


@dataclasses.dataclass(frozen=True)
class Result:
    """A loss and its gradients by parameter name; ``None`` where no gradient exists."""

    loss: Tensor
    gradients: dict[str, Tensor | None]


@contextlib.contextmanager
def detached(model: nn.Module, points: Collection[DetachPoint]) -> Iterator[None]:
    """Detach the outputs of the modules at ``points`` for the length of the block."""
    handles = []
    singles = [single for point in points for single in (point if isinstance(point, list) else [point])]
    for point in singles:
        path, call = point if isinstance(point, tuple) else (point, None)
        calls = iter(range(10**6))

        def hook(_m: nn.Module, _a: Any, output: Any, call: int | None = call, calls: Iterator[int] = calls) -> Any:
            if call is not None and next(calls) != call:
                return output
            if isinstance(output, tuple):
                return (output[0].detach(), *output[1:])
            return output.detach()

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def eager(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], points: Collection[DetachPoint]) -> Result:
    """Loss and gradients of ``model`` in eager with the branches at ``points`` detached."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with detached(model, points):
        loss = loss_of(model)
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return Result(loss.detach(), dict(zip(named, gradients, strict=True)))


def compiled(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], run: Callable[..., Any]) -> Result:
    """Loss and gradients of the compiled ``run`` of ``model``, read off ``.grad``."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(run)  # type: ignore[arg-type]
    loss.backward()
    return Result(loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad})


def assert_equal(actual: Result, expected: Result, *, rtol: float = 1e-4, atol: float = 1e-5, what: str = "") -> None:
    """Equal loss, equal set of ``None`` gradients, equal gradients."""
    torch.testing.assert_close(actual.loss, expected.loss, rtol=rtol, atol=atol)
    missing = {name for name, g in actual.gradients.items() if g is None}
    wanted = {name for name, g in expected.gradients.items() if g is None}
    assert missing == wanted, f"{what}: None here only {missing - wanted}, None in eager only {wanted - missing}"
    for name, gradient in expected.gradients.items():
        if gradient is not None:
            torch.testing.assert_close(
                actual.gradients[name],
                gradient,
                rtol=rtol,
                atol=atol,
                msg=lambda text, name=name: f"{what}: gradient of {name}: {text}",
            )


def some_patterns(count: int, *, randoms: int = 3, trainable: Sequence[int] | None = None) -> list[frozenset[int]]:
    """Keep-all, every single branch, drop-all-but-one (first and last), and random patterns that keep one branch."""
    everything = frozenset(range(count))
    allowed = list(range(count)) if trainable is None else list(trainable)
    patterns = [frozenset(), *(frozenset({index}) for index in range(count))]
    patterns += [everything - {allowed[0]}, everything - {allowed[-1]}]
    rng = random.Random(count)
    for _ in range(randoms):
        drawn = frozenset(index for index in range(count) if rng.random() < 0.5)
        patterns.append(drawn - {rng.choice(allowed)})
    return [p for p in dict.fromkeys(patterns) if not set(allowed) <= p]


def assert_exact(
    model: nn.Module,
    run: Callable[..., Any],
    backend: DropBPBackend,
    loss_of: Callable[[nn.Module], Tensor],
    points: Sequence[DetachPoint],
    *,
    patterns: Sequence[Collection[int]] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    what: str = "",
) -> None:
    """Compare ``run`` (the compiled ``model``) with the oracle for many patterns. ``points[i]`` drops branch i."""
    for pattern in some_patterns(len(points)) if patterns is None else patterns:
        with backend.pinned(sorted(pattern)):
            actual = compiled(model, loss_of, run)
        expected = eager(model, loss_of, [points[index] for index in sorted(pattern)])
        assert len(backend.branches) == len(points), [branch.name for branch in backend.branches]
        assert_equal(actual, expected, rtol=rtol, atol=atol, what=f"{what}pattern {sorted(pattern)}")
