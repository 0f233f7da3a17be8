"""The benchmarks, for correctness: small copies of their suites, without generated code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import fused_loss, plots, targets
from benchmarks.__main__ import main
from benchmarks.at_peak import held_at_peak
from benchmarks.at_peak import measure as held_at_peak_of
from benchmarks.four_bit import dequantise, four_bit_linear, quantise
from benchmarks.longest import Search
from benchmarks.measure import Record, Request, measure
from benchmarks.methods import DEFAULT, METHODS, Patterns
from benchmarks.processes import ROOT
from benchmarks.results import ResultsFile, Run, load

pytestmark = pytest.mark.thorough

#: For each knob a value at which nothing is dropped.
EXACT = {"rate": 0.0, "share": 0.5, "budget": 0.5, None: None}


def steps(method: str, suite: str, **more: Any) -> list[Record]:
    values = more.pop("values", [EXACT[METHODS[method].knob]])
    request = Request("steps", method, suite, values, steps=1, warmup=0, inner="aot_eager", layers=2, **more)
    return list(measure(request))


# ---- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_loss_is_the_plain_one_and_so_are_its_gradients(
    frozen: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "_LOGITS", 50 * 16)  # three chunks, the last of them short
    x, weight = torch.randn(37, 8, requires_grad=True), torch.randn(50, 8, requires_grad=not frozen)
    goals = torch.randint(50, (37,))
    plain = F.cross_entropy(x @ weight.T, goals)
    wanted = torch.autograd.grad(3 * plain, [x] if frozen else [x, weight])
    loss = torch.compile(fused_loss.linear_cross_entropy, backend="aot_eager", fullgraph=True) if compiled else None
    fused = (loss or fused_loss.linear_cross_entropy)(x, weight, goals)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(torch.autograd.grad(3 * fused, [x] if frozen else [x, weight]), wanted)
    with torch.no_grad():
        torch.testing.assert_close((loss or fused_loss.linear_cross_entropy)(x, weight, goals), plain)


def test_four_bit_weights_are_close_and_linear_in_them_is_exact() -> None:
    weight = torch.randn(32, 128)
    packed, scales = quantise(weight)
    unpacked = dequantise(packed, scales)
    assert packed.numel() * 2 == weight.numel()
    assert (unpacked - weight).abs().mean() < 0.1
    torch.testing.assert_close(quantise(unpacked)[0], packed)
    x = torch.randn(2, 3, 128, requires_grad=True)
    expected = F.linear(x, unpacked)
    torch.testing.assert_close(four_bit_linear(x, packed, scales), expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(torch.autograd.grad(four_bit_linear(x, packed, scales), x, grad), wanted)


def test_every_method_gets_the_same_patterns() -> None:
    one, other = Patterns(8), Patterns(8)
    one.choose(0.5)
    drawn = [one.draw() for _ in range(5)]
    other.choose(0.5)
    assert drawn == [other.draw() for _ in range(5)]
    assert {len(pattern) for pattern in drawn} == {4}


@pytest.mark.parametrize("limit", [1500, 10240, 100_000])
def test_the_search_for_the_longest_sequence_ends_next_to_the_limit(limit: int) -> None:
    """Memory is 10 GiB and 70 more at the limit, with a bend that the linear prediction does not know."""
    search = Search(start=8192, cap_gib=80, multiple=256)
    tried = 0
    while (tokens := search.next_length()) is not None:
        peak = 10 + 70 * (tokens / limit) ** 1.02
        search.tell({"tokens": tokens, "fits": peak <= 80, "held_gib": 10, "peak_gib": peak})
        tried += 1
    assert limit - 256 <= search.fits <= limit
    assert tried <= 9


def test_what_is_held_at_the_peak() -> None:
    """Only what the step allocated counts, at the moment when that is most."""
    assert held_at_peak([5, 3, -5, -7, 4, 4, -3, 1]) == {4: 2, 3: 1}
    everything, first_alone = (held_at_peak_of("tiny", dropped, inner="aot_eager") for dropped in ([], range(1, 8)))
    hidden = 2 * 32 * 128 * 4  # an MLP's activations; the second step keeps one attention alone
    assert everything[hidden] > 2 * first_alone[hidden]


# ---- methods -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eager_losses() -> list[float]:
    return steps("eager", "tiny")[0]["losses"]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("eager", "forward alone")])
def test_a_method_that_drops_nothing_trains_as_eager_does(method: str, eager_losses: list[float]) -> None:
    """The second loss is after an optimizer step, so it tells of the gradients."""
    record = steps(method, "tiny")[0]
    assert "error" not in record, record
    assert record["losses"] == pytest.approx(eager_losses, rel=1e-5)
    assert record["step_ms"] > 0
    assert record["activation_gib"] > 0


@pytest.mark.parametrize("suite", ["tiny-lora", "tiny-qlora", "tiny-gpt2", "tiny-long"])
def test_every_suites_copy_runs_with_the_fused_loss_and_saves_memory(suite: str) -> None:
    expected = steps("eager", suite)[0]["losses"]
    exact, dropping = steps("dropbp_fx", suite, loss="fused", values=[0.0, 0.5])
    assert exact.get("losses") == pytest.approx(expected, rel=1e-5), exact
    assert dropping["realised_rate"] == 0.5
    assert dropping["activation_gib"] < 0.8 * exact["activation_gib"]
    assert dropping["graphs_compiled"] == 0


def test_forward_alone_saves_nothing() -> None:
    record = steps("forward alone", "tiny")[0]
    assert record["activation_gib"] == 0


def test_first_steps_and_lengths_are_measured() -> None:
    request = Request("first step", "dropbp_fx", "tiny", [0.5], inner="aot_eager", layers=2, patterns=10)
    (first,) = measure(request)
    assert first["all_variants_s"] >= first["first_step_s"] > 0
    assert first["recompiles"] == first["new_variants"] == 0
    request = Request("length", "eager", "tiny", steps=1, layers=2, batch=1, tokens=48, cap_gib=1.0)
    (length,) = measure(request)
    assert length["fits"]
    assert length["tokens"] == 48


# ---- files, targets, plots -------------------------------------------------------------------------------------------


def synthetic() -> Run:
    """Figures chosen so that ratios are easy to see: a forward of 30 ms, a backward of 60, an optimizer of 10."""
    common = {"suite": "8b-lora", "loss_function": "fused", "layers": 32, "batch": 2, "tokens": 64}

    def step(method: str, knob: str | None, value: float | None, ms: float, gib: float) -> Record:
        figures = {"step_ms": ms, "synchronized_ms": ms, "host_ms": 1.0, "activation_gib": gib, "losses": [1.0, 1.0]}
        return {"measurement": "steps", "method": method, "knob": knob, "value": value, "first_step_s": 1.0,
                **common, **figures}  # fmt: skip

    records = [
        step("torch.compile", None, None, 100.0, 10.0),
        step("forward alone", None, None, 30.0, 0.5),
        step("eager", None, None, 150.0, 15.0),
        step("checkpointing", "share", 1.0, 130.0, 1.0),
        step("checkpointing", "share", 0.5, 115.0, 5.0),
        step("dropbp_fx", "rate", 0.0, 99.0, 10.0),
        step("dropbp_fx", "rate", 0.5, 70.0, 5.5),
        step("dropbp_fx", "rate", 0.875, 50.0, 0.9),
        {**common, "measurement": "optimizer", "method": "torch.compile", "knob": None, "value": None,
         "optimizer_ms": 10.0},
        {**common, "measurement": "steps", "method": "memory budget", "knob": None, "value": None, "error": "Full."},
    ]  # fmt: skip
    return Run("python -m benchmarks run 8b-lora", "a machine", {"torch": "2.11"}, "abc", "now", records)


def test_targets_are_ratios_of_one_runs_figures(tmp_path: Path) -> None:
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:6]] for line in
            targets.table([synthetic()]).splitlines()}  # fmt: skip
    assert rows["step at rate 0 / torch.compile's"][1:] == ["0.990", "<= 1.00", "met"]
    assert rows["step at rate 0.5 / the floor F + (1-p)(T0-F-O) + O"][1:] == ["1.000", "<= 1.00", "met"]
    assert rows["step at rate 0.875 / the floor F + (1-p)(T0-F-O) + O"][1:] == ["1.053", "<= 1.00", "missed"]
    where, *memory = rows["activation memory at .875 / torch.compile's, fused loss"]
    assert where == "8b-lora, 32 layers, fused loss, 50.0 against 100.0 ms"
    assert memory == ["0.090", "<= 0.08", "missed"]
    assert rows["step at .875 / checkpointing's with no less memory"][1:] == ["0.385", "<= 0.40", "met"]
    ours = synthetic()
    ours.records = [dict(r, method="dropbp_fx, budget 0") if r["value"] == 0.875 else r for r in ours.records]
    assert "8b-lora, 32 layers, fused loss, budget 0, 50.0 against 100.0 ms" in targets.table([ours])
    assert rows["tokens a second at .875 / eager's, 8B LoRA"][1:] == ["3.000", ">= 2.60", "met"]
    assert rows["step at .875 / memory budget's with no less memory"][1:] == ["", "<= 0.40", "not measured"]
    lengths = synthetic()
    common = {key: lengths.records[0][key] for key in ("suite", "loss_function", "layers", "batch")} | {"cap_gib": 80.0}
    lengths.records = [
        {**common, "measurement": "length", "method": name, "knob": None, "value": value, "tokens": n, "fits": fits}
        for name, value, n, fits in [
            ("torch.compile", None, 10, True), ("torch.compile", None, 11, False),
            ("dropbp_fx, budget 0", 0.875, 105, True), ("dropbp_fx, budget 0", 0.5, 999, True),
        ]
    ]  # fmt: skip
    assert "80 GiB: 105 against 10 tokens | 10.500     | >= 10.00 | met" in targets.table([lengths])
    apart = [synthetic(), synthetic()]
    apart[0].records = [r for r in apart[0].records if r["method"] == "dropbp_fx"]
    apart[1].records = [r for r in apart[1].records if r["method"] != "dropbp_fx"]
    assert "| met" not in targets.table(apart)  # figures of two runs make no ratio


def test_a_page_has_a_verdict_for_each_target_and_the_ratios_behind_it(tmp_path: Path) -> None:
    def cells(table: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]

    slower = synthetic()
    slower.records = [dict(r, step_ms=120.0) if r["value"] == 0.0 else r for r in slower.records]
    tables = targets.pages([synthetic(), slower])
    verdicts = {row[0]: row[1:] for row in cells(tables["verdicts"])}
    assert list(verdicts)[2:] == [target.what for target in targets.TARGETS]
    assert verdicts["step at rate 0 / torch.compile's"] == ["<= 1.00", "met in 1 of 2", "0.990 to 1.200"]
    assert verdicts["step at rate 0.875 / the floor F + (1-p)(T0-F-O) + O"] == ["<= 1.00", "missed", "1.053"]
    assert verdicts["tokens a second at .875 / eager's, 8B LoRA"] == [">= 2.60", "met", "3.000"]
    assert verdicts["first step, warm / torch.compile's"] == ["<= 1.00", "not measured", ""]
    headers, _, first, second = cells(tables["steps"])
    assert headers[:3] == ["where", "torch.compile, rate 0 (<= 1.00)", "floor, 0.5 (<= 1.00)"]
    assert first[:3] == ["8b-lora, 32 layers, fused loss", "0.990", "1.000"]
    assert second[:3] == ["8b-lora, 32 layers, fused loss", "1.200", "1.000"]
    others = [row[0] for row in cells(tables["other ratios"])[2:]]
    assert others.count("step at .875 / checkpointing's with no less memory") == 2
    assert not {"step at rate 0 / torch.compile's", "first step, warm / torch.compile's"} & set(others)


def test_the_pages_tables_are_those_of_the_files(tmp_path: Path) -> None:
    """After new results: the command on the page that fills it."""
    page = ROOT / "docs" / "experiments" / "performance.md"
    command = re.search(r"^python -m benchmarks compare (.*)\{(.*)\}\.json --page", page.read_text(), re.MULTILINE)
    assert command is not None
    files = [f"{ROOT / command[1]}{name}.json" for name in command[2].split(",")]
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    main(["compare", *files, "--page", str(copy)])
    assert copy.read_text() == page.read_text()


def test_a_run_writes_a_file_that_compare_and_plot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "results.json", tmp_path / "plot.svg"
    options = ["--steps", "1", "--warmup", "0", "--device", "cpu", "--inner", "aot_eager", "--layers", "2"]
    main(["run", "tiny", "--methods", "eager", "dropbp_fx", "--rates", "0.5", *options, "--out", str(out)])
    (run,) = load(out)
    assert [(r["method"], r["measurement"]) for r in run.records] == [
        ("eager", "steps"), ("eager", "optimizer"), ("dropbp_fx", "steps"),
    ]  # fmt: skip
    assert run.machine
    assert run.commit
    assert run.versions["torch"] == str(torch.__version__)
    main(["run", "tiny", "--methods", "eager", "--device", "cpu", "--time-limit", "0", "--out", str(out), "--append"])
    first, second = load(out)
    assert first.records == run.records
    assert "time limit" in second.records[0]["error"]
    capsys.readouterr()
    (old := tmp_path / "old.json").write_text("{}")
    main(["compare", str(out), str(old)])
    shown = capsys.readouterr()
    assert "step at rate 0 / torch.compile's" in shown.out
    assert shown.err.startswith(f"Left out: {old} is no file of results")
    pytest.importorskip("matplotlib")
    main(["plot", str(out), "--out", str(picture)])
    assert "dropbp_fx" in picture.read_text()


def test_a_method_that_fails_is_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    main(["run", "tiny", "--methods", "eager", "--device", "cpu", "--batch", "-1", "--out", str(out)])
    assert "status 1" in load(out)[0].records[0]["error"]


def test_plots_of_failures_alone_say_that_there_is_nothing_to_draw(tmp_path: Path) -> None:
    run = synthetic()
    run.records = run.records[-1:]
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="There is nothing to draw"):
        plots.draw([run], tmp_path / "plot.svg")


def test_a_file_that_lacks_something_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    run = synthetic()
    file = ResultsFile(path, run)
    file.write()
    assert load(path) == [run]
    del run.records[0]["step_ms"]
    file.write()
    with pytest.raises(ValueError, match=r"lacks step_ms: "):
        load(path)
    path.write_text(json.dumps({"results": []}))
    with pytest.raises(ValueError, match='must hold an object with a list of "runs"'):
        load(path)


def test_a_run_goes_on_only_under_the_same_conditions(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    ResultsFile(path, synthetic()).write()
    again = synthetic()
    ResultsFile(path, again, go_on=True).add(again.records[:1])
    (run,) = load(path)
    assert len(run.records) == len(again.records) + 1
    again.commit = "def"
    with pytest.raises(ValueError, match="its commit was abc and is now def"):
        ResultsFile(path, again, go_on=True)
    ResultsFile(path, again, append=True).write()
    assert [run.commit for run in load(path)] == ["abc", "def"]


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    for command in ("run", "first-step", "longest", "compare", "plot"):
        assert command in shown
    assert set(DEFAULT) <= set(METHODS)
