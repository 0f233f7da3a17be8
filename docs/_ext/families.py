"""The models of the graph atlas: every family that the tests train, and any Hugging Face model type.

A family is a builder of a small model and a function that calls it, both from the test matrix, so that a family that is
tested is documented too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import dropbp_fx
from dropbp_fx.inspect import Explanation, huggingface


class _Called(Exception):
    """Carries the arguments that a loss function calls its model with."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.arguments = args, kwargs


def _record(*args: Any, **kwargs: Any) -> Any:
    raise _Called(args, kwargs)


def families() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """By name the builder of a model and the function that runs it: the families of the test matrix."""
    if importlib.util.find_spec("tests.matrix") is not None:
        matrix = importlib.import_module("tests.matrix").FAMILIES
        found: Iterable[Any] = matrix.values() if isinstance(matrix, dict) else matrix
        return {family.name: (family.build, family.loss) for family in found}
    cases = importlib.import_module("tests.test_models").CASES
    return {name: (case.build, case.loss) for name, case in cases.items()}


def explain_family(name: str) -> Explanation:
    """Explain a family of the test matrix.

    Raises:
        KeyError: there is none of that name.
    """
    known = families()
    if name not in known:
        raise KeyError(f"The test matrix has no family {name!r}; it has {', '.join(known)}.")
    build, loss = known[name]
    try:
        loss(_record)
    except _Called as called:
        args, kwargs = called.arguments
    else:
        raise TypeError(f"The loss of the family {name!r} did not call its model.")
    return dropbp_fx.explain(build().train(), *args, **kwargs)


def explain_model_type(model_type: str, settings: list[str], *, batch: int, tokens: int, dtype: str) -> Explanation:
    """Explain a Hugging Face model type, as ``dropbp-fx explain`` does."""
    model, inputs = huggingface.build(model_type, settings, batch=batch, tokens=tokens, dtype=dtype, lora_rank=0)
    return dropbp_fx.explain(model, **inputs)
