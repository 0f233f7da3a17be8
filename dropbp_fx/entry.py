"""How a backend is made: by a call, or by its name in ``torch.compile(backend="dropbp")``."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from typing import Any

from dropbp_fx.backend import DropBPBackend
from dropbp_fx.config import BackendConfig
from dropbp_fx.named import NamedBackends
from dropbp_fx.policy.drop_policy import DropPolicy, PolicyName
from dropbp_fx.runtime.compiler import InnerCompiler


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
        rate=rate,
        policy=policy,
        inner=inner,
        options=options,
        activation_memory_budget=activation_memory_budget,
        seed=seed,
        strict=strict,
    )
    return DropBPBackend(config)


dropbp = NamedBackends(
    "dropbp", __name__, {name: own.default for name, own in inspect.signature(dropbp_backend).parameters.items()}
)


def named_backend(**options: Any) -> DropBPBackend:
    """The backend that ``torch.compile(backend="dropbp", options=options)`` compiles with, made if there is none yet.

    For what has to be said before the first forward, where a program takes a backend's name only::

        backend = dropbp_fx.named_backend()
        backend.register(model)  # layers that are compiled one by one, and called by no module

    Keep the object until the model has run: models that it has compiled or that were registered hold it, nothing else does.

    Args:
        options: as they are given to ``torch.compile``: none where it gets the name alone, and the environment the rest.

    Raises:
        TypeError, ValueError: an unknown option or environment variable, or a bad value.
    """
    return dropbp.of(options)


def current() -> DropBPBackend:
    """The one backend that is in use by its name, ``torch.compile(backend="dropbp")``, to steer the run with.

    ::

        backend = dropbp_fx.current()
        backend.progress = step / total
        checkpoint["dropbp"] = backend.state_dict()

    It is there once a first graph is compiled, or :func:`named_backend` was called, and as long as the model lives, also
    after ``torch._dynamo.reset()``.

    Raises:
        RuntimeError: there is none, or more than one.
    """
    if len(dropbp.in_use()) > 1:
        gc.collect()  # those of models that are no more
    found = dropbp.in_use()
    if not found:
        raise RuntimeError(
            "No backend is in use by its name: one is made when torch.compile(backend='dropbp') compiles the first graph, "
            "and lives as long as the model. Call dropbp_fx.current() after the first forward; before it, "
            "dropbp_fx.named_backend(), with the options that torch.compile gets, makes the backend. One from "
            "dropbp_backend() is not found here: keep the object."
        )
    if len(found) > 1:
        rates = ", ".join(f"{backend.rate:g}" for backend in found)
        raise RuntimeError(
            f"{len(found)} backends are in use by their name, of the rates {rates}: torch.compile got different options, or "
            "the environment has changed. Take the one that you mean from dropbp_fx.backends(), or from "
            "dropbp_fx.named_backend(...) with its options; or give all graphs the same options."
        )
    return found[0]


def backends() -> tuple[DropBPBackend, ...]:
    """All backends that are in use by their name, in the order in which they were made.

    That of a model which is no more may be among them until Python's garbage collection has run.
    """
    return dropbp.in_use()
