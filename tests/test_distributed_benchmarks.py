"""What is made of measurements on several devices: verdicts on failures, tables, a projection. Nothing is measured here."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import distributed_tables, projection
from benchmarks.distributed_failures import Rank
from benchmarks.measure import Record
from benchmarks.pages import filled
from benchmarks.projection import Fabric, Projected, communication_ms, project
from benchmarks.results import Run, load

pytestmark = pytest.mark.thorough

PAGE = Path(__file__).parent.parent / "docs" / "experiments" / "distributed.md"
#: 1 GB a ms within a node, a tenth of it between nodes, nothing lost.
PLAIN = Fabric(node=4, inside_gb_s=1000.0, between_gb_s=100.0, efficiency=1.0, inside_us=0.0, between_us=0.0)


def record(method: str, value: float | None, ms: float, *, gradients: float = 4e9, **more: Any) -> Record:
    return {
        "measurement": "distributed steps", "suite": "1b", "method": method, "loss_function": "plain", "layers": 3,
        "batch": 4, "tokens": 64, "knob": None, "value": value, "engine": "ddp", "processes": 2, "compile": "whole",
        "losses": [1.0, 1.0], "step_ms": ms, "host_ms": 5.0, "activation_gib": 1.0, "peak_gib": 2.0,
        "gradient_bytes": gradients, "gathered_bytes": 0, **more,
    }  # fmt: skip


def run_of(*records: Record) -> Run:
    return Run("python -m benchmarks.distributed 1b", "a machine", {"torch": "2.11"}, "abc", "now", list(records))


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reported", "ended", "hangs"),
    [(30.4, None, False), (30.4, 90.5, False), (None, 0.1, False), (None, None, True), (None, 90.0, True)],
)
def test_a_rank_hangs_that_neither_reports_an_error_in_time_nor_ends(
    reported: float | None, ended: float | None, hangs: bool
) -> None:
    assert Rank(reported_after_s=reported, ended_after_s=ended).hangs is hangs


def test_when_an_error_was_reported_is_when_it_was_first_seen(tmp_path: Path) -> None:
    error, output, rank = tmp_path / "error", tmp_path / "output", Rank()
    rank.look(error, output, 1.0)
    output.write_text("compiling\n")
    rank.look(error, output, 2.0)
    assert rank == Rank()
    output.write_text("compiling\nWatchdog caught collective operation timeout: ran for 30033 milliseconds\nmore\n")
    rank.look(error, output, 30.04)
    error.write_text("DistBackendError: too late\n")
    rank.look(error, output, 40.0)
    assert rank.last_output == "Watchdog caught collective operation timeout: ran for 30033 milliseconds"
    assert (rank.error, rank.reported_after_s) == (None, 30.0)
    assert distributed_tables.reported(rank.error, rank.last_output) == (
        "NCCL's watchdog, a collective that ran for 30.0 s"
    )
    text = (
        "RankDisagreementError: The ranks would not drop the same branches. They differ in seed: 0 on rank 0. Give it."
    )
    assert distributed_tables.reported(text, None) == "`RankDisagreementError`, seed: 0 on rank 0"


# ---- the projection --------------------------------------------------------------------------------------------------


def test_rings_take_what_their_bytes_and_hops_take() -> None:
    assert PLAIN.ring_ms(4e9, 1, 1) == 0
    assert PLAIN.ring_ms(4e9, 1, 2) == pytest.approx(2.0)  # half of it has to come
    assert PLAIN.ring_ms(4e9, 1, 4) == pytest.approx(3.0)
    # A quarter of it goes around two nodes at a tenth of the speed: half of that has to come.
    assert PLAIN.ring_ms(4e9, 1, 8) == pytest.approx(3.0 + 5.0)
    slow = Fabric(node=4, inside_gb_s=math.inf, between_gb_s=math.inf, inside_us=3.0, between_us=10.0)
    assert slow.ring_ms(4e9, 7, 8) == pytest.approx(7 * (3 * 3.0 + 10.0) / 1e3)
    assert Fabric(efficiency=0.5).ring_ms(1e9, 0, 8) == pytest.approx(2 * Fabric(efficiency=1.0).ring_ms(1e9, 0, 8))
    with pytest.raises(ValueError, match="10 ranks do not fill nodes of 4: give a multiple, or at most 4"):
        PLAIN.ring_ms(1.0, 1, 10)


def test_all_reduces_go_around_twice_and_shards_are_gathered_and_reduced() -> None:
    assert communication_ms(record("dropbp_fx", 0.5, 50.0), 4, PLAIN) == pytest.approx(2 * 3.0)
    sharded = record("dropbp_fx", 0.5, 50.0, gradients=2e9, engine="fsdp2", gathered_bytes=4e9)
    assert communication_ms(sharded, 4, PLAIN) == pytest.approx(3.0 + 1.5)
    hops = Fabric(inside_gb_s=math.inf, between_gb_s=math.inf, inside_us=1000.0)
    assert communication_ms(sharded, 2, hops) == pytest.approx(
        (2 * 3 + 1) + (3 + 1)
    )  # calls, of three layers and the rest
    assert communication_ms(record("dropbp_fx", 0.5, 50.0, gradients=26 * 2**20), 2, hops) == pytest.approx(2 * 2)


def test_a_projected_step_lies_between_hiding_all_that_is_added_and_none() -> None:
    ours = record("dropbp_fx", 0.5, 50.0)
    assert project(ours, 2, PLAIN) == Projected(4.0, 50.0, 50.0)
    assert project(ours, 8, PLAIN) == Projected(16.0, 50.0, 62.0)
    assert project(record("dropbp_fx", 0.875, 10.0), 8, PLAIN).hidden_ms == 16.0  # there is not enough to hide behind
    runs = [run_of(record("torch.compile", None, 100.0), ours)]
    base, row = projection.rows(runs, [8], PLAIN)
    assert row == {
        "suite": "1b", "engine": "DDP", "method": "dropbp_fx", "rate": 0.5,
        "comm. ms, 2": "4.0", "comm. ms, 8": "16.0", "step ms, 8": "50.0 to 62.0", "speed-up, 8": "2.00 to 1.81",
    }  # fmt: skip
    assert "speed-up, 8" not in base


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_what_is_kept_of_a_speed_up_compares_with_one_device() -> None:
    def alone(method: str, value: float | None, ms: float, **more: Any) -> Record:
        figures = {"measurement": "steps", "first_step_s": 1.0, "synchronized_ms": ms}
        return {**record(method, value, ms), **figures, **more}

    two = run_of(
        record("torch.compile", None, 120.0),
        record("dropbp_fx", 0.5, 60.0),
        record("dropbp_fx, present gradients", 0.875, 60.0),
        record("dropbp_fx", 0.875, 50.0, tokens=128),
    )
    one = run_of(alone("torch.compile", None, 100.0), alone("dropbp_fx", 0.5, 49.0), alone("dropbp_fx", 0.875, 47.0))
    rows = distributed_tables.steps([two], [run_of(), one])
    assert [row.get("step ms, one GPU") for row in rows] == ["100.0", "49.0", "47.0", None]
    assert [row.get("speed-up") for row in rows] == [None, "2.000", "2.000", None]  # other tokens have no base
    assert [row.get("kept") for row in rows] == [None, "98.0%, met", "94.0%, missed", None]
    assert "kept" not in distributed_tables.steps([two], [])[1]


def test_a_page_gets_its_tables_anew() -> None:
    tables = distributed_tables.tables([run_of(record("torch.compile", None, 120.0))])
    page = "Before.\n\n<!-- table: steps -->\nold\n<!-- end of table -->\n\nAfter.\n"
    anew = filled(page, tables)
    assert "old" not in anew
    assert anew.startswith("Before.\n\n<!-- table: steps -->\n\n| suite")
    assert anew.endswith("|\n\n<!-- end of table -->\n\nAfter.\n")
    assert filled(anew, tables) == anew
    with pytest.raises(ValueError, match="The page asks for a table 'speed'; there are 'steps', 'losses'"):
        filled(page.replace("steps", "speed"), tables)


def test_the_pages_tables_are_those_of_the_files() -> None:
    """After new results: python -m benchmarks.distributed_tables --page docs/experiments/distributed.md"""
    runs = [run for file in distributed_tables.FILES for run in load(file)]
    alone = [run for file in distributed_tables.ALONE for run in load(file)]
    page = PAGE.read_text()
    tables = distributed_tables.tables(runs, alone)
    summed_up = ["losses", "patterns"]  # in a sentence each
    assert re.findall("<!-- table: (.*) -->", page) == [name for name in tables if name not in summed_up]
    assert filled(page, tables) == page
