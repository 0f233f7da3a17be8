"""What the project aims at, as ratios of figures from one run, and whether a run meets it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.measure import Record
from benchmarks.results import Run

#: What is held to the targets: the default, and the settings that recompute some of what kept branches would save.
OURS = ("dropbp_fx", "dropbp_fx, budget 0.7", "dropbp_fx, budget 0")
COMPILED, FORWARD = "torch.compile", "forward alone"
CAREFUL = ("careful user, detach", "careful user, no_grad")
MEMORY_SAVERS = ("checkpointing", "memory budget")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One ratio that was measured, of the suite ``where``, in words."""

    where: str
    ratio: float


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on a ratio.

    Attributes:
        what: the ratio, in words.
        limit: what it must not exceed, or, where ``at_least``, not fall below.
        find: the ratios that a run holds.
        column: what it is called beside other targets of one setting, if it has one ratio for each.
    """

    what: str
    limit: float
    find: Callable[[Run], Iterable[Finding]]
    at_least: bool = False
    column: str | None = None

    @property
    def bound(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:.2f}"

    def met(self, finding: Finding) -> bool:
        return finding.ratio >= self.limit if self.at_least else finding.ratio <= self.limit


def table(runs: Sequence[Run]) -> str:
    """Every target with every ratio found for it; a target no run has the figures for is listed as not measured."""
    return _table(TARGETS, runs)


def pages(runs: Sequence[Run]) -> dict[str, str]:
    """Tables for the documentation by name: a verdict for each target, and the ratios behind those that have several."""
    others = [target for target in TARGETS if target.column is None and len(_findings(target, runs)) > 1]
    return {"verdicts": _verdicts(runs), "steps": _matrix(runs), "other ratios": _table(others, runs)}


def _findings(target: Target, runs: Iterable[Run]) -> list[Finding]:
    return [finding for run in runs for finding in target.find(run)]


def _table(targets: Iterable[Target], runs: Sequence[Run]) -> str:
    rows: list[list[Any]] = []
    for target in targets:
        found = _findings(target, runs)
        for finding in found:
            verdict = "met" if target.met(finding) else "missed"
            rows.append([target.what, finding.where, f"{finding.ratio:.3f}", target.bound, verdict])
        if not found:
            rows.append([target.what, "", "", target.bound, "not measured"])
    return tabulate(rows, ["what", "where", "measured", "target", "verdict"], tablefmt="github", disable_numparse=True)


def _verdicts(runs: Sequence[Run]) -> str:
    """How many of a target's ratios meet it, and between what they lie."""
    rows = []
    for target in TARGETS:
        found = _findings(target, runs)
        met, ratios = sum(map(target.met, found)), sorted({f"{finding.ratio:.3f}" for finding in found}, key=float)
        verdict = "met" if met == len(found) else "missed" if not met else f"met in {met} of {len(found)}"
        measured = " to ".join(dict.fromkeys((ratios[0], ratios[-1]))) if found else ""
        rows.append([target.what, target.bound, verdict if found else "not measured", measured])
    return tabulate(rows, ["what", "target", "verdict", "measured"], tablefmt="github", disable_numparse=True)


def _matrix(runs: Sequence[Run]) -> str:
    """A row for each setting of each run, a column for each target that has one ratio a setting."""
    columns = [target for target in TARGETS if target.column is not None]
    rows: dict[tuple[int, str], dict[str, str]] = {}
    for number, run in enumerate(runs):
        for target in columns:
            for finding in target.find(run):
                row = rows.setdefault((number, finding.where), {"where": finding.where})
                row[f"{target.column} ({target.bound})"] = f"{finding.ratio:.3f}"
    headers = ["where", *(f"{target.column} ({target.bound})" for target in columns)]
    body = [[row.get(header, "") for header in headers] for row in rows.values()]
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


# ---- reading a run ---------------------------------------------------------------------------------------------------


def _setting(record: Record) -> dict[str, Any]:
    """What two records must share to be compared."""
    return {key: record[key] for key in ("suite", "loss_function", "layers", "batch", "tokens")}


def _where(record: Record, *more: str) -> str:
    setting = record["method"].removeprefix(OURS[0]).lstrip(", ")
    words = [
        record["suite"],
        f"{record['layers']} layers",
        f"{record['loss_function']} loss",
        *filter(None, [setting]),
        *more,
    ]
    return ", ".join(words)


def _ours(run: Run, rate: float) -> Iterator[Record]:
    for name in OURS:
        yield from run.figures("steps", method=name, value=rate)


def _one(run: Run, measurement: str, **where: Any) -> Record | None:
    return next(run.figures(measurement, **where), None)


def _against(rate: float, baseline: str, figure: str, *, baseline_rate: float | None = None, loss: str | None = None,
             suite: str | None = None, inverse: bool = False) -> Callable[[Run], Iterator[Finding]]:  # fmt: skip
    """Our ``figure`` at ``rate`` over the baseline's, or the ``inverse``, in every setting that has both."""

    def find(run: Run) -> Iterator[Finding]:
        for record in _ours(run, rate):
            other = _one(run, "steps", method=baseline, value=baseline_rate, **_setting(record))
            if other is None or (loss or record["loss_function"]) != record["loss_function"]:
                continue
            if suite is not None and suite != record["suite"]:
                continue
            top, bottom = (other, record) if inverse else (record, other)
            if bottom[figure]:
                time = f"{record['step_ms']:.1f} against {other['step_ms']:.1f} ms"
                more = [time] if figure == "activation_gib" else []  # memory is cheap for who takes the time
                yield Finding(_where(record, *more), top[figure] / bottom[figure])

    return find


def _over_floor(rate: float) -> Callable[[Run], Iterator[Finding]]:
    def find(run: Run) -> Iterator[Finding]:
        for record in _ours(run, rate):
            setting = _setting(record)
            whole = _one(run, "steps", method=COMPILED, **setting)
            forward = _one(run, "steps", method=FORWARD, **setting)
            optimizer = _one(run, "optimizer", method=COMPILED, **setting)
            if whole is None or forward is None or optimizer is None:
                continue
            f, o = forward["step_ms"], optimizer["optimizer_ms"]
            floor = f + (1 - rate) * (whole["step_ms"] - f - o) + o
            yield Finding(_where(record), record["step_ms"] / floor)

    return find


def _against_memory_saver(rate: float, baseline: str, *, full_only: bool) -> Callable[[Run], Iterator[Finding]]:
    """Our step over the baseline's, in the baseline's setting with the least memory that is not less than ours.

    The baseline is thus never asked to use less memory than we do. Plain torch.compile is a setting of it too.
    """

    def find(run: Run) -> Iterator[Finding]:
        for record in _ours(run, rate):
            if full_only and "lora" in record["suite"]:
                continue
            settings = list(run.figures("steps", method=baseline, **_setting(record)))
            if not settings:
                continue
            settings += run.figures("steps", method=COMPILED, **_setting(record))
            enough = [other for other in settings if other["activation_gib"] >= record["activation_gib"]]
            if enough:
                other = min(enough, key=lambda one: one["activation_gib"])
                chosen = COMPILED if other["knob"] is None else f"{baseline} at {other['value']}"
                memory = f"{record['activation_gib']:.2f} against {other['activation_gib']:.2f} GiB"
                yield Finding(_where(record, chosen, memory), record["step_ms"] / other["step_ms"])

    return find


def _longest(run: Run) -> Iterator[Finding]:
    lengths: dict[tuple[str, str, float], dict[str, int]] = {}
    for record in run.figures("length", fits=True):
        if record["method"] in OURS and record["value"] != 0.875:
            continue
        key = record["suite"], record["loss_function"], record["cap_gib"]
        best = lengths.setdefault(key, {})
        best[record["method"]] = max(best.get(record["method"], 0), record["tokens"])
    for (suite, loss, cap), best in lengths.items():
        for ours in OURS:
            if ours in best and COMPILED in best:
                where = f"{suite}, {loss} loss, {ours}, {cap:g} GiB: {best[ours]} against {best[COMPILED]} tokens"
                yield Finding(where, best[ours] / best[COMPILED])


def _first_step(figure: str, *, warm: bool) -> Callable[[Run], Iterator[Finding]]:
    def find(run: Run) -> Iterator[Finding]:
        for record in run.figures("first step", method=OURS[0], warm=warm):
            other = _one(run, "first step", method=COMPILED, warm=warm, **_setting(record))
            if other is not None and (warm or record["layers"] >= 32):
                yield Finding(_where(record), record[figure] / other["first_step_s"])

    return find


def _depth(run: Run) -> Iterator[Finding]:
    shallow = _one(run, "first step", method=OURS[0], warm=False, layers=8)
    for record in run.figures("first step", method=OURS[0], warm=False, layers=64):
        if shallow is not None and shallow["suite"] == record["suite"]:
            yield Finding(record["suite"], record["inner_compile_s"] / shallow["inner_compile_s"])


def _recompiles(run: Run) -> Iterator[Finding]:
    for record in run.figures("first step", method=OURS[0]):
        if record.get("patterns", 0) >= 1000:
            yield Finding(_where(record), record["recompiles"] + record["new_variants"])


def _targets() -> Iterator[Target]:
    rates = (0.5, 0.75, 0.875)
    yield Target(
        "step at rate 0 / torch.compile's", 1.0, _against(0.0, COMPILED, "step_ms"), column="torch.compile, rate 0"
    )
    for rate in rates:
        what = f"step at rate {rate} / the floor F + (1-p)(T0-F-O) + O"
        yield Target(what, 1.0, _over_floor(rate), column=f"floor, {rate}")
    for name in CAREFUL:
        by_hand = _against(0.875, name, "step_ms", baseline_rate=0.875)
        yield Target(f"step at .875 / {name}'s", 0.95, by_hand, column=f"{name}, 0.875")
    memory = _against(0.875, COMPILED, "activation_gib", loss="fused")
    yield Target("activation memory at .875 / torch.compile's, fused loss", 0.08, memory)
    for name in CAREFUL:
        memory = _against(0.875, name, "activation_gib", baseline_rate=0.875, loss="fused")
        yield Target(f"activation memory at .875 / {name}'s, fused loss", 0.6, memory)
    for baseline in MEMORY_SAVERS:
        step = _against_memory_saver(0.875, baseline, full_only=False)
        yield Target(f"step at .875 / {baseline}'s with no less memory", 0.4, step)
    for baseline in MEMORY_SAVERS:
        step = _against_memory_saver(0.5, baseline, full_only=True)
        yield Target(f"step at .5 / {baseline}'s with no less memory, full", 0.6, step)
    yield Target("longest sequence at .875 / torch.compile's", 10.0, _longest, at_least=True)
    cold = "first step, cold, 32 layers / torch.compile's"
    yield Target(cold, 0.25, _first_step("first_step_s", warm=False))
    yield Target(f"{cold}, every variant compiled", 0.35, _first_step("all_variants_s", warm=False))
    yield Target("first step, warm / torch.compile's", 1.0, _first_step("first_step_s", warm=True))
    yield Target("inner compile seconds, 64 layers / 8 layers", 1.1, _depth)
    for rate, limit in ((0.0, 1.1), (0.875, 0.7)):
        host = _against(rate, COMPILED, "host_ms", suite="gpt2")
        yield Target(f"host time a step at rate {rate:g} / torch.compile's, GPT-2", limit, host)
    yield Target("recompiles over 1,000 random patterns", 0.0, _recompiles)
    speed = _against(0.875, "eager", "step_ms", suite="8b-lora", inverse=True)
    yield Target("tokens a second at .875 / eager's, 8B LoRA", 2.6, speed, at_least=True)


TARGETS: tuple[Target, ...] = tuple(_targets())
