"""The examples for other packages' trainers run, and drop what they say. Skipped where the package is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.thorough


def example(name: str) -> Any:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trl_sft(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    trainer = example("trl_sft").main(["--steps", "4"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rates = [entry["dropbp_rate"] for entry in trainer.state.log_history if "dropbp_rate" in entry]
    assert len(losses) == len(rates) == 4
    assert rates[0] == 0
    assert rates[-1] > 0.5
    assert losses[-1] < losses[0]
    assert "sensitivity (gradnorm)" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_lightning_module(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    first, second = example("lightning_module").main(["--steps", "4"])
    assert first.backend.stats.forwards == 4
    assert second.backend.stats.forwards == 8, "the state of the first half was restored"
    assert second.backend.progress == 3 / 4
    assert "held_out_loss" in capsys.readouterr().out
