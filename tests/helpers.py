"""What tests of many files do: compile a model, look at what a forward drops, watch the inner compilers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dropbp_fx import DropBPBackend, DropPolicy, dropbp_backend
from tests.test_models import square_loss

Compiler = Callable[[fx.GraphModule, Any], Any]


POLICY_FIELDS = {field.name for field in dataclasses.fields(DropPolicy)}


def make_backend(rate: Any = None, *, policy: Any = "dropbp", **options: Any) -> DropBPBackend:
    """``dropbp_backend`` with the fields of a policy among its arguments: they take the place of ``policy``'s."""
    fields = {name: options.pop(name) for name in POLICY_FIELDS.intersection(options)}
    if not fields:
        return dropbp_backend(rate, policy=policy, **options)
    if rate is not None:
        fields["rate"] = rate
    base = policy if isinstance(policy, DropPolicy) else DropPolicy.named(policy)
    return dropbp_backend(policy=dataclasses.replace(base, **fields), **options)


def compile_model(model: nn.Module, rate: float | None = 0.5, **options: Any) -> tuple[DropBPBackend, Any]:
    """A backend, seeded and without code generation unless told otherwise, and the model compiled with it."""
    backend = make_backend(rate, **{"inner": "aot_eager", "seed": 0, **options})
    return backend, torch.compile(model, backend=backend)


def dropped_in(backend: DropBPBackend, run: Any, loss_of: Callable[[Any], Tensor] = square_loss) -> list[int]:
    """Indices of the branches that one training forward drops."""
    before = {branch.name: branch.times_dropped for branch in backend.branches}
    loss_of(run).backward()
    return [b.index for b in backend.branches if b.times_dropped > before.get(b.name, 0)]


def recording_compilers() -> tuple[list[str], tuple[Compiler, Compiler]]:
    """A pair of inner compilers that run graphs as they are, and the list of their calls: "forward", "backward"."""
    calls: list[str] = []

    def recording(name: str) -> Compiler:
        def compiler(gm: fx.GraphModule, _inputs: Any) -> Any:
            calls.append(name)
            return gm.forward

        return compiler

    return calls, (recording("forward"), recording("backward"))


@torch.library.custom_op("dropbp_fx_tests::scale", mutates_args=())
def scale(x: Tensor, weight: Tensor) -> Tensor:
    """A kernel that PyTorch cannot look into."""
    return x * weight


@scale.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)
