"""The harness for learning quality: its data, its methods, its arithmetic, on tiny models."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import main
from benchmarks.models import Decoder, Linear
from benchmarks.pages import filled
from benchmarks.processes import ROOT
from benchmarks.quality import corpora, pictures, report, statistics
from benchmarks.quality.attempts import Attempt, Setting
from benchmarks.quality.baselines import KeepRows, Skipping
from benchmarks.quality.corpora import Batches
from benchmarks.quality.dropping import Engine
from benchmarks.quality.endurance import endure
from benchmarks.quality.frontier import Frontier, Result, results
from benchmarks.quality.methods import methods
from benchmarks.quality.patterns import CyclicWindow, FixedWindow, Sometimes, Windows
from benchmarks.quality.tasks import Task, Workshop, cosine, make_optimizer, set_learning_rate
from benchmarks.quality.training import Plan, run
from benchmarks.results import ResultsFile, Run, load, load_records
from dropbp_fx.policy.balanced import Unit
from dropbp_fx.policy.patterns import WindowPattern
from tests.oracle import detached

pytestmark = pytest.mark.thorough

TASK = Task("tiny", "strong", "full")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop("tiny", "cpu", "aot_eager", tmp_path_factory.mktemp("weights"))


def attempt_of(
    workshop: Workshop, name: str, rate: float = 0.5, steps: int = 8, task: Task = TASK
) -> tuple[Decoder, Any]:
    torch._dynamo.reset()
    model = workshop.model(task)
    return model, methods()[name].make(model, Setting(rate, "aot_eager", steps, contextlib.nullcontext))


def ids_of(workshop: Workshop, number: int = 0) -> Tensor:
    return workshop.batches("headers", seed=0)[number]


# ---- data ------------------------------------------------------------------------------------------------------------


def test_corpora_are_split_by_file_and_share_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = {f"folder/{number}.h": f"int x{number};\n" * 3 for number in range(60)}
    texts |= {"copy.h": texts["folder/1.h"], "spaced.h": texts["folder/2.h"].replace(" ", "  "), "no.txt": "text"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(corpora._SOURCES, "headers", ((tmp_path,), (".h",)))
    corpus = corpora.read("headers")
    assert corpus.files == 60
    parts = [set(bytes(part.tolist()).split(b"\0")) - {b""} for part in (corpus.train, corpus.held_out)]
    assert len(parts[0]) + len(parts[1]) == 60
    assert not parts[0] & parts[1]
    assert 1 <= len(parts[1]) <= 20
    assert corpora.read("headers").digest == corpus.digest


def test_a_machine_without_the_files_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(corpora._SOURCES, "headers", ((tmp_path,), (".h",)))
    with pytest.raises(
        FileNotFoundError,
        match=r"Found 0 files of the corpus 'headers' below .* Install PyTorch and what it depends on",
    ):
        corpora.read("headers")


def test_batches_show_every_window_once_an_epoch_in_an_order_of_the_seed() -> None:
    text = torch.arange(101, dtype=torch.uint8)
    batches = Batches(text, tokens=10, batch=2, seed=3)
    assert batches.steps_per_epoch == 5
    epoch = torch.cat([batches[step] for step in range(5)])
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 10))
    assert torch.equal(epoch[:, -1] - epoch[:, 0], torch.full((10,), 10))
    assert not torch.equal(epoch, torch.cat([batches[step] for step in range(5, 10)]))
    assert torch.equal(batches[2], Batches(text, 10, 2, seed=3)[2])
    assert not torch.equal(batches[2], Batches(text, 10, 2, seed=4)[2])
    few = Batches(text, tokens=10, batch=2, seed=3, windows=4)
    assert sorted(torch.cat([few[0], few[1]])[:, 0].tolist()) == [0, 30, 60, 90]
    with pytest.raises(ValueError, match="10 windows of 10 bytes, too few for a batch of 11"):
        Batches(text, tokens=10, batch=11, seed=0)


# ---- methods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "checkpointing", "accumulation"])
def test_exact_methods_have_exact_gradients(workshop: Workshop, name: str) -> None:
    model, attempt = attempt_of(workshop, name)
    ids = ids_of(workshop)
    loss = attempt.training_loss(ids)
    loss.backward()
    reference = workshop.model(TASK)
    expected = reference(ids)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_freezing_trains_the_upper_layers_only(workshop: Workshop) -> None:
    model, attempt = attempt_of(workshop, "freezing")
    attempt.training_loss(ids_of(workshop)).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in trained if name.startswith("layers.")} == {"2", "3"}
    assert not any(name.startswith("embedding") for name in trained)


def test_freezing_with_lora_leaves_out_updates_below_and_may_raise_the_rank_above(workshop: Workshop) -> None:
    task, ids = Task("tiny", "strong", "lora", lora_rank=4), ids_of(workshop)
    trained = sum(p.numel() for p in workshop.model(task).parameters() if p.requires_grad)
    for name, rank, size in (("freezing", 4, trained / 2), ("freezing, same size", 8, trained)):
        model, attempt = attempt_of(workshop, name, task=task)
        ranks = [{m.rank for m in layer.modules() if isinstance(m, Linear)} for layer in model.layers]
        assert ranks == [{0}, {0}, {rank}, {rank}]
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == size
        loss = attempt.training_loss(ids)
        torch.testing.assert_close(loss, workshop.model(task)(ids))  # updates add nothing at first
        loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        again, _ = attempt_of(workshop, name, task=task)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("name", "sizes"), [("nested batch", [2, 2, 4, 4]), ("nested batch, gradual", [2, 3, 3, 4])])
def test_a_layer_of_a_nested_batch_is_trained_on_its_windows_without_bias(
    workshop: Workshop, name: str, sizes: list[int]
) -> None:
    model, attempt = attempt_of(workshop, name, rate=0.25)
    ids = torch.cat([ids_of(workshop, 0), ids_of(workshop, 1)])
    loss = attempt.training_loss(ids)
    loss.backward()
    reference = workshop.model(TASK)
    torch.testing.assert_close(loss, reference(ids))
    for layer, size in enumerate(sizes):
        reference.zero_grad()
        reference(ids[:size]).backward()  # the mean over these windows
        mine, other = model.layers[layer].parameters(), reference.layers[layer].parameters()
        for gradient, expected in ((a.grad, b.grad) for a, b in zip(mine, other, strict=True)):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    optimizer = make_optimizer(attempt.groups(), "cpu")
    set_learning_rate(optimizer, 1e-3)
    attempt.before_update(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-3 * share**0.5 for share in (*attempt.shares, 1.0)])


def test_an_embedding_below_frozen_layers_is_not_trained_either(workshop: Workshop) -> None:
    model, attempt = attempt_of(workshop, "progressive freezing", rate=0.7)
    attempt.before_step(0.0, lambda: ids_of(workshop))
    attempt.training_loss(ids_of(workshop)).backward()
    trained = {name.split(".")[1] for name, p in model.layers.named_parameters("l") if p.grad is not None}
    assert trained == {"2", "3"}  # the rate begins at 2 * 0.7 - 0.95
    assert model.embedding.grad is None
    assert model.output.grad is not None


def test_flops_of_dropped_layers_are_counted_like_those_of_frozen_ones(workshop: Workshop) -> None:
    """Attention included, for which FlopCounterMode has no formula on a CPU."""
    ids, whole = ids_of(workshop), workshop.flops(TASK)
    _, frozen = attempt_of(workshop, "freezing")
    _, lowest = attempt_of(workshop, "lowest")
    lowest.training_loss(ids)
    assert lowest.flops_share(whole, ids) == pytest.approx(frozen.flops_share(whole, ids), rel=1e-3)


def test_lisa_trains_the_weights_of_a_layer_for_a_while_and_passes_gradients_through_all(workshop: Workshop) -> None:
    model, attempt = attempt_of(workshop, "LISA", rate=0.75)
    seen = []
    for step in range(20):
        attempt.training_loss(ids_of(workshop, step)).backward()
        seen.append({name.split(".")[1] for name, p in model.layers.named_parameters("l") if p.grad is not None})
        assert model.embedding.grad is not None
        model.zero_grad()
    assert all(layers == seen[0] and len(layers) == 1 for layers in seen)


@pytest.mark.parametrize("scaled", [False, True])
def test_freeze_out_gives_every_layer_a_cosine_of_its_own_and_drops_it_at_its_end(
    workshop: Workshop, scaled: bool
) -> None:
    model, attempt = attempt_of(workshop, "FreezeOut, scaled" if scaled else "FreezeOut", rate=0.25, steps=400)
    optimizer = make_optimizer(attempt.groups(), "cpu")
    groups = optimizer.param_groups
    assert [len(group["params"]) for group in groups[:-1]] == [len(list(layer.parameters())) for layer in model.layers]
    rates, dropped = [], []
    for step in range(0, 400, 5):
        set_learning_rate(optimizer, cosine(step, 400))
        attempt.before_step(step / 400, lambda: ids_of(workshop))
        attempt.before_update(optimizer)
        rates.append([group["lr"] for group in groups])
        dropped.append(round(attempt.backend.schedule(step / 400) * len(model.layers)))
    for layer, end in enumerate([0.5 + 0.5 * (i + 0.5) / 4 for i in range(4)]):
        peak = 1 / end if scaled else 1.0
        assert max(row[layer] for row in rates) == pytest.approx(peak, rel=0.02)
        for number, row in enumerate(rates):
            assert row[layer] == pytest.approx(peak * cosine(min(5 * number, end * 400), end * 400))
            assert (dropped[number] > layer) == (5 * number / 400 >= end)
    assert [row[-1] for row in rates] == pytest.approx([cosine(step, 400) for step in range(0, 400, 5)])


@pytest.mark.parametrize("progressive", [False, True])
def test_skipped_layers_keep_the_mean_and_the_share(workshop: Workshop, progressive: bool) -> None:
    model = workshop.model(TASK)
    attempt = Skipping(model, Setting(0.25, "eager", 8, contextlib.nullcontext), progressive=progressive)
    attempt.restart(seed=1)
    calls, losses = 0, []
    kind = type(model.layers[0])

    def counted(*arguments: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return kind.attention(*arguments)

    attempt._attention, attempt._feed_forward, attempt._head = counted, kind.feed_forward, type(model).loss
    attempt.before_step(1.0, lambda: ids_of(workshop))
    for _ in range(400):
        with torch.no_grad():
            losses.append(float(attempt.loss(ids_of(workshop))))
    assert calls / (400 * 4) == pytest.approx(0.75, abs=0.03)
    attempt.before_step(0.0, lambda: ids_of(workshop))
    calls = 0
    with torch.no_grad():
        for _ in range(20):
            attempt.loss(ids_of(workshop))
    assert (calls == 80) == progressive  # which begins with all layers


@pytest.mark.parametrize("sampled", [False, True])
def test_kept_rows_are_the_largest_or_an_unbiased_sample(sampled: bool) -> None:
    torch.manual_seed(0)
    grad = torch.randn(4, 10, 8) * torch.logspace(-1, 1, 40).view(4, 10, 1)
    total = torch.zeros_like(grad)
    for _ in range(2000 if sampled else 1):
        x = torch.zeros_like(grad, requires_grad=True)
        KeepRows.apply(x, 0.25, sampled).backward(grad)
        assert x.grad is not None
        total += x.grad
    if sampled:
        error = (total / 2000 - grad).norm() / grad.norm()
        assert error < 0.05
        assert int(x.grad.any(-1).sum()) < 20
    else:
        kept = total.any(-1)
        assert int(kept.sum()) == 10
        assert torch.equal(total[kept], grad[kept])
        assert grad[kept].norm(dim=-1).min() >= grad[~kept].norm(dim=-1).max()


def test_a_smaller_batch_is_a_part_of_the_batch(workshop: Workshop) -> None:
    model, attempt = attempt_of(workshop, "smaller batch")
    ids = torch.cat([ids_of(workshop, 0), ids_of(workshop, 1)])
    torch.testing.assert_close(attempt.training_loss(ids), model(ids[:2]))


def test_selective_steps_are_on_the_hardest_windows(workshop: Workshop) -> None:
    model, attempt = attempt_of(workshop, "selective")
    ids = torch.cat([ids_of(workshop, 0), ids_of(workshop, 1)])
    losses = torch.stack([model(row[None]) for row in ids])
    attempt.training_loss(ids).backward()
    expected = workshop.model(TASK)
    expected(ids[losses.topk(2).indices]).backward()
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_coasting_takes_the_step_that_adamw_would_take_if_its_moments_stayed(workshop: Workshop) -> None:
    model, attempt = attempt_of(workshop, "window, coasting")
    optimizer = torch.optim.AdamW(attempt.groups(), lr=1e-3, weight_decay=0.0)
    coasted = 0
    for step in range(4):
        attempt.training_loss(ids_of(workshop, step)).backward()
        before = {p: p.detach().clone() for p in model.layers.parameters() if p.grad is None}
        attempt.before_update(optimizer)
        for p, value in before.items():
            assert p.grad is None
            if p in optimizer.state:
                state, copied = optimizer.state[p], value.clone().requires_grad_()
                copied.grad = torch.zeros_like(
                    copied
                )  # with moments that a zero gradient would turn into the present ones
                other = torch.optim.AdamW([copied], lr=1e-3, weight_decay=0.0, betas=optimizer.defaults["betas"])
                beta1, beta2 = optimizer.defaults["betas"]
                moments = {"exp_avg": state["exp_avg"] / beta1, "exp_avg_sq": state["exp_avg_sq"] / beta2}
                other.state[copied] = {"step": state["step"] - 1, **moments}
                other.step()
                torch.testing.assert_close(p.detach(), copied.detach())
                coasted += not torch.equal(p, value)
            else:
                assert torch.equal(p, value)
        optimizer.step()
        optimizer.zero_grad()
    assert coasted


def test_scaling_lifts_the_layers_rate(workshop: Workshop) -> None:
    _, attempt = attempt_of(workshop, "window, scaled")
    optimizer = torch.optim.AdamW(attempt.groups(), lr=1e-3)
    attempt.training_loss(ids_of(workshop)).backward()
    attempt.before_update(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-3 * 2**0.5), 1e-3]


def test_a_controlled_rate_rises_while_dropping_adds_little_variance(workshop: Workshop) -> None:
    _, attempt = attempt_of(workshop, "window, controlled", rate=0.1)
    attempt.training_loss(ids_of(workshop))
    numbers = iter(range(100))
    for share, rises in ((1e9, True), (0.0, False)):
        attempt._control, attempt._controlled = share, []
        before = attempt.backend.rate
        attempt.before_step(0.0, lambda: ids_of(workshop, next(numbers)))
        assert (attempt.backend.rate > before) == rises


def units(count: int, rate: float) -> list[Unit]:
    return [Unit(rate=rate, trainable=True, flops=1.0, layer=f"l{i}", name=f"l{i}") for i in range(count)]


@pytest.mark.parametrize(
    "pattern",
    [CyclicWindow(), FixedWindow(0.5), Windows(2), Sometimes(WindowPattern(), 0.9)],
    ids=repr,
)
def test_patterns_on_trial_drop_the_rate_on_average(pattern: Any) -> None:
    rng, many = random.Random(0), units(12, 0.4)
    drawn = [frozenset(pattern.sample(many, rng)) for _ in range(3000)]
    assert sum(map(len, drawn)) / (12 * len(drawn)) == pytest.approx(0.4, abs=0.02)
    if isinstance(pattern, FixedWindow):
        assert frozenset.intersection(*drawn) == set(range(4, 8))
        assert frozenset.union(*drawn) == set(range(3, 9))
    if isinstance(pattern, Sometimes):
        assert {len(dropped) for dropped in drawn} <= {0, 10, 11}


# ---- trainings -------------------------------------------------------------------------------------------------------


def test_a_run_is_the_same_again_and_another_with_another_seed(workshop: Workshop) -> None:
    plan = Plan("window", 0.5, 1.0, (1e-3,), 2)
    first, other = run(workshop, TASK, plan)
    again, _ = run(workshop, TASK, plan)
    assert first["eval_loss"] == pytest.approx(again["eval_loss"], abs=1e-6)
    assert abs(first["eval_loss"] - other["eval_loss"]) > 1e-5
    assert first["realised_rate"] == 0.5
    assert 0.5 < first["flops_share"] < 0.8
    before = workshop.held_out_loss(workshop.model(TASK), "headers")
    assert first["eval_loss"] < before


def test_learning_rates_are_tuned_with_the_first_seed_and_the_grid_grows_where_its_end_is_best(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.quality import training

    tried = []

    def pretended(_w: Any, _t: Any, _a: Any, _m: Any, _s: int, rate: float, seed: int) -> dict[str, float]:
        tried.append((rate, seed))
        return {"eval_loss": abs(math.log(rate / 8.0))}

    monkeypatch.setattr(training, "_train", pretended)
    list(run(workshop, TASK, Plan("none", 0.0, 1.0, (1.0, 2.0), 3)))
    assert tried == [(1.0, 0), (2.0, 0), (4.0, 0), (8.0, 0), (8.0, 1), (8.0, 2)]


def test_a_failing_run_is_a_record_that_says_why(workshop: Workshop) -> None:
    broken = dataclasses.replace(methods()["none"], make=lambda model, setting: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.quality.training.methods", lambda: {"none": broken})
        (record,) = run(workshop, TASK, Plan("none", 0.0, 1.0, (1e-3,), 1))
    assert "ZeroDivisionError" in record["error"]


def test_a_run_that_diverges_ends_early_and_its_learning_rate_is_not_taken(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.quality import training

    monkeypatch.setattr(training, "_DIVERGED", 0.05)
    made, make = [], training.prepared

    def counted(*arguments: Any) -> Any:
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(training, "prepared", counted)
    long = Workshop("tiny", "cpu", "aot_eager", workshop._folder, steps=40)
    bad, good, *_ = run(long, TASK, Plan("none", 0.0, 1.0, (5.0, 1e-3), 1))
    assert re.fullmatch(
        r"DivergedError: The loss was 5\.\d+ at first and .* over the last of \d+ steps\.", bad["error"]
    )
    assert "eval_loss" not in bad
    assert good["eval_loss"] < 5.5
    assert len(made) == 1  # nothing was compiled anew


def test_statistics_of_patterns_that_are_known(workshop: Workshop) -> None:
    """The top layers' gradients above the lowest layers are exact, those below are gone: a bias of one and no variance."""
    (size,) = [workshop.size.shape.layers]
    found = list(
        statistics.measure(
            workshop,
            TASK,
            [("lowest", 0.5), ("none", 0.0)],
            learning_rate=1e-3,
            points=(0.0,),
            batches=2,
            samples=2,
        )
    )
    assert "does not" in found[-1]["error"]
    by_part = {record["part"]: record for record in found[:-1]}
    assert len(by_part) == size + 1
    for layer in range(size):
        record = by_part[f"layers.{layer}"]
        assert record["sampling_variance"] > 0
        assert record["bias"] == pytest.approx(1.0 if layer < size // 2 else 0.0, abs=1e-4)
        assert record["added_variance"] < 1e-6
        assert record["kept"] == (0.0 if layer < size // 2 else 1.0)


def test_kept_gradients_are_those_of_detached_branches(workshop: Workshop) -> None:
    """The harness' models and the engine together, against the oracle."""
    model, attempt = attempt_of(workshop, "window")
    assert isinstance(attempt, Engine)
    assert isinstance(attempt, Attempt)
    ids = ids_of(workshop)
    attempt.training_loss(ids)
    names = [branch.name for branch in attempt.backend.branches]
    with attempt.backend.pinned([2, 3]):
        attempt.training_loss(ids).backward()
    dropped = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.rsplit(".", 1)[0] for name in dropped if "layers" in name}
    assert all(name.startswith("layers.1.") for name in dropped), names
    with detached(model, []):
        assert torch.isfinite(attempt.training_loss(ids))


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_frontier_gives_losses_of_times_and_times_of_losses() -> None:
    frontier = Frontier(Result("none", 0.0, t, 1e-3, (2.0 - t,), t, None, 1.0, t) for t in (0.4, 0.6, 1.0))
    assert frontier.loss(0.8) == pytest.approx(1.2)
    assert frontier.loss(1.01) == pytest.approx(1.0)
    assert frontier.loss(0.3) is None
    assert frontier.time(1.3) == pytest.approx(0.7)
    assert frontier.time(1.6) == pytest.approx(0.4)
    assert frontier.time(0.9) is None
    assert Frontier([]).loss(1.0) is None
    uneven = Frontier(
        Result("none", 0.0, t, 1e-3, (loss,), t, None, 1.0, t) for t, loss in ((0.65, 0.7), (0.8, 0.1), (1.0, 0.03))
    )
    assert [uneven.time(loss) for loss in (0.7, 0.1, 0.03)] == pytest.approx([0.65, 0.8, 1.0])


def record_of(method: str, lr: float, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    common = {"measurement": "quality", "task": "t", "rate": 0.5, "share": 1.0, "steps": 10, "step_ms": 7.0}
    return {**common, "method": method, "lr": lr, "seed": seed, "eval_loss": loss, "activation_gib": 1.0,
            "flops_share": 0.6, **more}  # fmt: skip


def test_results_are_those_of_the_learning_rate_that_the_first_seed_chose() -> None:
    records = [
        record_of("none", 1.0, 0, 2.0, rate=0.0, step_ms=10.0, activation_gib=4.0),
        record_of("window", 1.0, 0, 2.3),
        record_of("window", 2.0, 0, 2.2),
        record_of("window", 2.0, 1, 2.4),
        record_of("window", 1.0, 1, 1.0),
        {"measurement": "quality", "task": "t", "method": "window", "error": "x"},
    ]
    none, window = results(records)
    assert (none.loss, none.time, none.memory) == (2.0, 1.0, 1.0)
    assert (window.lr, window.losses, window.time, window.memory) == (2.0, (2.2, 2.4), 0.7, 0.25)
    assert window.spread == pytest.approx(0.1414, abs=1e-3)
    assert results(records, by_flops=True)[1].time == 0.6
    assert results([{**record, "activation_gib": 0.0} for record in records if "error" not in record])[1].time == 0.6


def test_times_compare_within_one_machine() -> None:
    here, there, elsewhere = ({"machine": name} for name in ("here", "there", "elsewhere"))
    none, window, suffix = results(
        [
            record_of("none", 1.0, 0, 2.0, rate=0.0, step_ms=10.0, **here),
            record_of("none", 1.0, 0, 2.2, rate=0.0, step_ms=20.0, **there),
            record_of("none", 1.0, 1, 3.0, rate=0.0, step_ms=20.0, **there),
            record_of("window", 1.0, 0, 2.5, step_ms=7.0, **here),
            record_of("window", 1.0, 1, 2.5, step_ms=14.0, **there),
            record_of("suffix", 1.0, 0, 2.4, step_ms=1.0, **elsewhere),
        ]
    )
    assert (none.time, window.time) == (1.0, pytest.approx(0.7))
    assert none.losses == pytest.approx((2.1, 3.0))  # a seed that ran twice counts once
    assert (suffix.loss, suffix.time, suffix.step_ms) == (2.4, None, None)


def test_a_result_without_a_time_is_told_and_not_compared(tmp_path: Path) -> None:
    def task(*records: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**record, "size": "mini", "task": "a task"} for record in records]

    records = task(
        record_of("none", 1.0, 0, 2.0, rate=0.0, step_ms=10.0, machine="here"),
        record_of("none", 1.0, 0, 3.0, rate=0.0, step_ms=10.0, share=0.5, steps=5, machine="here"),
        record_of("checkpointing", 1.0, 0, 9.0, rate=0.0, step_ms=12.5, share=0.1, steps=1, activation_gib=0.3,
                  machine="here"),
        record_of("window", 1.0, 0, 2.5, step_ms=0.1, machine="there"),
        {"measurement": "quality before", "eval_loss": 4.0, "machine": "here"},
        {"measurement": "quality before", "eval_loss": 4.1, "machine": "there"},
    )  # fmt: skip
    (table,) = report.tables(records).values()
    row = next(dict(zip(cells(table)[0], row, strict=False)) for row in cells(table) if row[0] == "window")
    assert (row["loss"], row["time"], row["step, ms"]) == ("2.500", "", "")
    assert not {"gap, equal time", "gap, equal time and memory"} & set(row)  # nothing has one here
    assert table.endswith(
        "started from 2 models, each pretrained anew in the same way; held-out losses before: 4.000, 4.100."
    )
    (table,) = report.tables([record for record in records if record.get("eval_loss") != 4.1]).values()
    assert "pretrained anew" not in table
    pictures.draw(records, tmp_path / "q.svg")
    assert ">window<" not in (tmp_path / "q.svg").read_text()


def test_records_are_read_with_their_machine(tmp_path: Path) -> None:
    for name in ("here", "there"):
        run = Run(
            "c", name, {}, "x", "now", [{**record_of("none", 1.0, 0, 2.0), "size": "mini", "shift": "s", "tuning": "t"}]
        )
        ResultsFile(tmp_path / f"{name}.json", run).write()
    files = [tmp_path / f"{name}.json" for name in ("here", "there")]
    assert [record["machine"] for record in load_records(files)] == ["here", "there"]


def test_a_rank_of_its_own_is_in_the_tasks_name() -> None:
    assert Task("tiny", "mild", "lora").name == "tiny, mild, lora"
    task = Task("tiny", "mild", "lora", 64, lora_rank=32)
    assert (task.name, task.shape.lora_rank) == ("tiny, mild, lora, rank 32, 64 windows", 32)
    assert (dataclasses.replace(task, tuning="full").name, task.conditions["lora_rank"]) == (
        "tiny, mild, full, 64 windows",
        32,
    )


def test_what_would_be_another_task_or_corpus_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"lora_rank must be at least 1, not 0\. To train all weights, take the tuning 'full'\."
    ):
        Task("tiny", "mild", "lora", lora_rank=0)
    with pytest.raises(
        ModuleNotFoundError, match="The package nowhere_to_be_found, whose source is part of a corpus, is not"
    ):
        corpora._folders("sympy", "nowhere_to_be_found")


def test_the_baseline_of_equal_memory_recomputes_as_many_layers_as_it_takes() -> None:
    recomputing = Result("checkpointing", 0.0, 0.1, 1.0, (2.0,), 0.13, 0.25, 13.0, 0.1)
    assert report.slower_at(0.25, recomputing) == pytest.approx(1.3)
    assert report.slower_at(0.625, recomputing) == pytest.approx(1.15)
    assert report.slower_at(1.1, recomputing) == 1.0
    assert report.slower_at(0.2, recomputing) is None
    assert report.slower_at(None, recomputing) is None


def test_tables_go_by_time_or_by_flops_for_each_size() -> None:
    def task(size: str) -> list[dict[str, Any]]:
        return [
            {**record, "size": size, "task": f"{size}, a task"}
            for record in (
                record_of("none", 1.0, 0, 2.0, rate=0.0, step_ms=10.0, activation_gib=4.0, flops_share=1.0),
                record_of("none", 1.0, 0, 3.0, rate=0.0, step_ms=10.0, activation_gib=4.0, flops_share=1.0, share=0.5,
                          steps=5),
                record_of("checkpointing", 1.0, 0, 9.0, rate=0.0, step_ms=12.5, activation_gib=1.0, steps=1, share=0.1),
                record_of("window", 1.0, 0, 2.5, activation_gib=2.5),
                record_of("suffix", 1.0, 0, 2.9, step_ms=5.5, flops_share=0.5, activation_gib=2.5),
                record_of("lowest", 1.0, 0, 2.8, step_ms=4.0, flops_share=0.4, activation_gib=4.0),
            )
        ]  # fmt: skip

    timed, by_flops = report.tables([*task("12x768"), *task("mini")], by_flops=["mini"]).values()
    rows = [dict(zip(cells(timed)[0], row, strict=False)) for row in cells(timed)[2:]]
    window = next(row for row in rows if row["method"] == "window")
    assert (window["step, ms"], window["FLOPs"], window["time"]) == ("7.0", "0.600", "0.700")
    assert float(window["gap, equal time"]) == pytest.approx(2.5 - 2.6)
    # Half of the layers recomputed: 1.125 times as long a step.
    baseline = 3 - (0.7 / 1.125 - 0.5) / 0.5
    assert float(window["gap, equal time and memory"]) == pytest.approx(2.5 - baseline, abs=1e-3)
    gaps = slice(cells(timed)[0].index("gap, equal time"), cells(timed)[0].index("baseline's time"))
    bounds = {row[0]: row[gaps] for row in cells(timed)}
    assert bounds["suffix"] == ["0.000", "< -0.100"]  # half of the layers recomputed take too long
    assert bounds["lowest"] == ["< -0.200"] * 2
    assert bounds["baseline"] == ["", ""]  # none to itself
    assert [row[0] for row in cells(timed)[2:4]] == ["baseline", "baseline, 50% of the steps"]
    assert "step, ms" not in by_flops
    assert next(row for row in cells(by_flops) if row[0] == "window")[cells(by_flops)[0].index("time")] == "0.600"


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


@pytest.mark.long
def test_the_command_writes_records_and_prints_gaps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workshop: Workshop
) -> None:
    out = tmp_path / "quality.json"
    common = ["quality", "--size", "tiny", "--inner", "aot_eager", "--device", "cpu", "--folder", str(workshop._folder)]
    main([*common, "--tunings", "lora", "--shifts", "mild", "--methods", "none", "checkpointing", "window",
          "--shares", "1", "0.5", "--lrs", "2e-3", "--out", str(out)])  # fmt: skip
    (first,) = load(out)
    assert [record["measurement"] for record in first.records] == ["quality before", *["quality"] * 4]
    printed = capsys.readouterr().out
    assert "tiny, mild, lora" in printed
    assert "baseline, 50% of the steps" in printed
    main(["quality", "--report", str(out)])
    assert capsys.readouterr().out.strip() == printed.strip()
    main(["quality", "--list"])
    assert "DropBP as published" in capsys.readouterr().out
    main([*common, "--tunings", "full", "--shifts", "mild", "--methods", "window", "--statistics", "--steps", "2"])
    assert "added variance" in capsys.readouterr().out


# ---- long runs and pictures ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_long_run_is_watched_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workshop = Workshop("tiny", "cpu", "aot_eager", tmp_path, steps=40)
    found = list(endure(workshop, TASK, "progressive freezing", 0.5, learning_rate=1e-3))
    *parts, last = found
    assert [record["part"] for record in parts] == list(range(20))
    assert parts[-1]["loss"] < parts[0]["loss"]
    assert {(record["variants"], record["graphs"]) for record in parts} == {(parts[0]["variants"], 1)}
    asked, realised = ([record[name] for record in parts] for name in ("asked", "realised"))
    assert asked == sorted(asked)
    assert asked[0] < 0.1
    assert asked[-1] == pytest.approx(0.75)  # of four layers one is always kept
    assert sum(realised) == pytest.approx(sum(asked), rel=0.15)
    assert all(last[name] for name in ("same_losses", "same_drops", "same_parameters"))
    report.show(found)
    out = capsys.readouterr().out
    assert "endurance: tiny, strong, full, progressive freezing, rate 0.5, 40 steps" in out
    assert "the same bit for bit: losses, drops, parameters." in out


def test_a_resumed_run_that_is_another_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = Workshop("tiny", "cpu", "aot_eager", tmp_path, steps=20)
    monkeypatch.setattr("dropbp_fx.DropBPBackend.load_state_dict", lambda *_a, **_k: None)
    last = list(endure(workshop, TASK, "window", 0.5, learning_rate=1e-3))[-1]
    assert not last["same_parameters"]
    assert not last["same_losses"]


def test_only_methods_of_the_engine_have_long_runs(workshop: Workshop) -> None:
    with pytest.raises(TypeError, match=r"Only methods of the engine are looked at here; 'none' is none\."):
        list(endure(workshop, TASK, "none", 0.0, learning_rate=1e-3))


def test_losses_are_drawn_against_time(tmp_path: Path) -> None:
    points = (("none", 0.0, 1.0), ("none", 0.0, 0.5), ("window", 0.5, 1.0), ("checkpointing", 0.0, 0.1))
    common = {
        "measurement": "quality",
        "task": "a task",
        "size": "mini",
        "lr": 1.0,
        "step_ms": 1.0,
        "activation_gib": 0.0,
    }
    records = [
        {
            **common,
            "method": name,
            "rate": rate,
            "share": share,
            "steps": round(100 * share),
            "seed": seed,
            "eval_loss": 2 - share + seed / 100,
            "flops_share": 1 - rate,
        }
        for name, rate, share in points
        for seed in (0, 1)
    ]
    pictures.draw(records, tmp_path / "q.svg", by_flops=["mini"])
    text = (tmp_path / "q.svg").read_text()
    assert all(f">{word}<" in text for word in ("a task", "baseline", "window", "0.5", "FLOPs of the run"))
    assert "checkpointing" not in text
    with pytest.raises(ValueError, match="no task has a run of the method 'none' with all of its steps"):
        pictures.draw(records[4:], tmp_path / "q.svg", by_flops=["mini"])


#: Tables of results that the page on quality sums up in a sentence; ``--report`` prints them.
SUMMED_UP = {
    "12x1536, strong, lora",
    "12x1536, mild, lora",
    "12x1536, strong, lora, rank 128",
    "12x1536, mild, lora, rank 128",
    "12x256, mild, full",
    "12x256, strong, lora",
    "12x256-long, slight, full",
    "12x256-long, slight, lora",
    "mini, strong, full",
    "mini, mild, full",
    "mini, strong, lora",
    "mini, mild, lora",
    "mini, mild, lora, 2400 windows",
    "mini-long, strong, lora",
    "mini-long, mild, lora",
    "mini-long, strong, lora, rank 32",
    "statistics: mini, strong, full",
    "endurance: tiny, strong, full, progressive freezing, rate 0.5, 20000 steps",
    "12x768, strong, full",
    "12x768, mild, full",
    "12x768, strong, lora",
}


def test_the_pages_tables_are_those_of_the_files() -> None:
    """After new results: the command on the page that fills it."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*-quality-*.json"))
    records = load_records(files)
    page = (ROOT / "docs" / "experiments" / "quality.md").read_text()
    tables = report.tables(records, by_flops=["12x256", "12x256-long"])
    shown = re.findall("<!-- table: (.*) -->", page)
    assert sorted([*shown, *SUMMED_UP]) == sorted(tables)
    assert filled(page, tables) == page
    assert gaps(tables["mini, strong, full"]) in " ".join(page.split())


def gaps(table: str) -> str:
    """A table's gaps in equal time, the best method first, as the page lists them."""
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    found = sorted(
        (
            float(row["gap, equal time"]),
            row["method"] + ("" if row["rate"] == "0.500" else f" at {float(row['rate']):g}"),
        )
        for row in rows
        if row["gap, equal time"]
    )
    return "; ".join(f"{method} {gap:.3f}" for gap, method in found).replace("-", "\N{MINUS SIGN}")
