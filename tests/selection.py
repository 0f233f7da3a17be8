"""Which cases of a test ``make test`` runs; the others wait for ``make test-all``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """All ``cases``, those that are not among ``quick`` marked as thorough. A tuple is a case of several arguments."""
    return [case if case in quick else thorough(*(case if isinstance(case, tuple) else (case,))) for case in cases]


def thorough(*values: Any) -> Any:
    """A case of ``pytest.mark.parametrize`` that is marked as thorough."""
    return pytest.param(*values, marks=pytest.mark.thorough)
