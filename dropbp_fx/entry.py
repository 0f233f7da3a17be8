"""How a backend is made: by a call, or by its name in ``torch.compile(backend="dropbp")``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropbp_fx.backend import DropBPBackend
from dropbp_fx.config import BackendConfig
from dropbp_fx.named import dropbp
from dropbp_fx.policy.drop_policy import DropPolicy, PolicyName
from dropbp_fx.runtime.compiler import InnerCompiler

__all__ = ["dropbp", "dropbp_backend"]


def dropbp_backend(
    rate: float | None = None,
    *,
    policy: PolicyName | DropPolicy = "dropbp",
    inner: InnerCompiler = "inductor",
    options: Mapping[str, Any] | None = None,
    activation_memory_budget: float | None = None,
    seed: int | None = None,
    strict: bool = False,
) -> DropBPBackend:
    """Make a ``torch.compile`` backend that trains with DropBP (Woo et al., NeurIPS 2024, arXiv 2402.17812).

    Usage::

        backend = dropbp_backend(rate=0.5)
        model = torch.compile(model, backend=backend)

    Args:
        rate: share of the residual branches' backward work (FLOPs) that is dropped, in [0, 1); ``None`` for the policy's.
        policy: what is dropped, and when: a :class:`~dropbp_fx.DropPolicy`, or the name of one. "dropbp": the paper's random
            branches at the constant rate 0.5. "freezing": the lower half of the layers is not trained.
            "progressive_freezing": exact in the first half of the run, then the lowest layers end their training one after
            the other, a quarter of the backward in all (at rate 0.7 nearly half of the layers are frozen from the start);
            it must be told of the run's :attr:`~DropBPBackend.progress`. "lisa": the weights of a random eighth of the
            layers are trained, of others every 20 forwards.
        inner: what compiles the pruned graphs: "inductor", "aot_eager" (no code generation, for debugging and tests), or
            a pair (forward compiler, backward compiler) of functions from a flat ATen graph and its inputs to a callable.
        options: Inductor configuration, as for ``torch.compile(options=...)``.
        activation_memory_budget: the share, in [0, 1], of their activations that kept branches save; what is cheapest to
            compute is recomputed in the backward instead (``torch._functorch.config.activation_memory_budget``, for each
            region). ``None`` leaves PyTorch's setting, which saves all.
        seed: seeds the patterns; ``None`` takes ``torch.initial_seed()`` when the first one is sampled. PyTorch's own
            random streams are never touched.
        strict: refuse a training graph without residual branches instead of warning.

    Raises:
        TypeError, ValueError: a bad value, before anything is compiled.
    """
    config = BackendConfig.checked(
        rate,
        policy=policy,
        activation_memory_budget=activation_memory_budget,
        inner=inner,
        options=options,
        seed=seed,
        strict=strict,
    )
    return DropBPBackend(config)
