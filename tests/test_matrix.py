"""Every family of tests/matrix.py: the branches written down by hand are found, and gradients are exact for any pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropbp_fx import dropbp_backend
from tests.matrix import FAMILIES, Family, language_loss
from tests.oracle import assert_equal, assert_exact, compiled, eager, some_patterns

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_family_is_exact_and_its_branches_are_those_of_its_source(family: Family) -> None:
    model = family.build().train()
    backend = dropbp_backend(inner="aot_eager")
    run = torch.compile(model, backend=backend)
    points = list(family.branches.values())
    assert_exact(model, run, backend, family.loss, points, patterns=some_patterns(len(points), randoms=1))
    assert [branch.name for branch in backend.branches] == list(family.branches)
