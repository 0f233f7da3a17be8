"""Tables of what was measured: each method beside what the baseline, training without dropping, reached in the same time."""

from __future__ import annotations

import statistics
from collections.abc import Container, Sequence

from tabulate import tabulate

from benchmarks.measure import Record
from benchmarks.quality.frontier import Frontier, Result, results_by_task
from benchmarks.quality.methods import EXACT, methods

_HEADERS = ("method", "rate", "lr", "loss", "sd", "step, ms", "FLOPs", "time", "gap, equal time",
            "gap, equal time and memory", "baseline's time", "memory")  # fmt: skip
#: The method that nothing is dropped of, and what tables call it.
_BASELINE = {"none": "baseline"}
#: Of a long run's parts, one in so many is shown, and the last.
_PARTS_SHOWN = 5


def tables(records: Sequence[Record], *, by_flops: Container[str] = ()) -> dict[str, str]:
    """Markdown tables by the name of what they are about: each task, its gradient statistics, its long runs.

    Args:
        records: of any kind.
        by_flops: sizes in whose tables FLOPs stand for time.
    """
    return {
        **{
            task: "\n\n".join([_losses(found), *_starts(records, task)])
            for task, found in results_by_task(records, by_flops=by_flops)
        },
        **_statistics(records),
        **_long_runs(records),
    }


def show(records: Sequence[Record], *, by_flops: Container[str] = ()) -> None:
    """Print all tables; arguments are those of :func:`tables`."""
    for name, table in tables(records, by_flops=by_flops).items():
        print(f"\n{name}\n\n{table}")


def _losses(found: Sequence[Result]) -> str:
    rows = _rows(found)
    known = [number for number in range(len(_HEADERS)) if any(row[number] is not None for row in rows)]
    table = [[row[number] for number in known] for row in rows]
    headers = [_HEADERS[number] for number in known]
    as_they_are = [index for index, number in enumerate(known) if any(isinstance(row[number], str) for row in rows)]
    text = tabulate(table, headers, tablefmt="github", floatfmt=".3f", disable_numparse=as_they_are)
    steps = [
        f"A step of {result.method} takes {result.time / result.share:.3f} of the baseline's time and "
        f"{result.memory:.3f} of its memory."
        for result in found
        if result.method in EXACT and result.memory is not None and result.time is not None
    ]
    return "\n\n".join([text, *steps])


def _starts(records: Sequence[Record], task: str) -> list[str]:
    """That not all runs of a task started from the same weights, where that is so: each machine pretrains its own."""
    mine = [record for record in records if record["task"] == task and record["measurement"] == "quality before"]
    losses = sorted({record["eval_loss"] for record in mine})
    if len(losses) < 2:
        return []
    return [
        f"These runs started from {len(losses)} models, each pretrained anew in the same way; held-out losses before: "
        f"{', '.join(f'{loss:.3f}' for loss in losses)}."
    ]


def _rows(found: Sequence[Result]) -> list[list[object]]:
    """Rows under ``_HEADERS``, the baseline's first.

    A gap is a loss minus the baseline's, which has the same time; or the same time and memory: as many of its layers are
    recomputed as bring its memory down to the method's, so that it can take fewer steps. "baseline's time" is what the
    baseline takes to the method's loss.
    """
    frontier = Frontier(result for result in found if result.method in _BASELINE)
    recomputing = next((result for result in found if result.method == "checkpointing"), None)
    shown = [result for result in found if result.method not in EXACT]
    shown.sort(key=lambda result: -result.share if result.method in _BASELINE else 0.0)
    return [_row(result, frontier, recomputing) for result in shown]


def _row(result: Result, frontier: Frontier, recomputing: Result | None) -> list[object]:
    baseline = result.method in _BASELINE  # it has no rate, and no gap to itself
    name = _BASELINE.get(result.method, result.method)
    name = name if result.share == 1.0 else f"{name}, {result.share:.0%} of the steps"
    slower = recomputing and slower_at(result.memory, recomputing)
    return [
        name,
        None if baseline else result.rate,
        f"{result.lr:.2g}",
        result.loss,
        result.spread,
        None if result.step_ms is None else f"{result.step_ms:.1f}",
        None if result.step_ms is None else result.flops,
        result.time,
        None if baseline else _gap(result.loss, frontier, result.time),
        _gap(result.loss, frontier, result.time / slower) if slower and result.time and not baseline else None,
        None if baseline else frontier.time(result.loss),
        result.memory,
    ]


def _gap(loss: float, frontier: Frontier, time: float | None) -> str | None:
    """A loss minus what the baseline reaches in a time; a bound where all of its runs took longer."""
    if time is None:
        return None
    reached, least = frontier.loss(time), frontier.least_loss(time)
    if reached is not None:
        return f"{loss - reached:z.3f}"
    return None if least is None else f"< {loss - least:.3f}"


def slower_at(memory: float | None, recomputing: Result) -> float | None:
    """How much longer exact steps take with as many layers recomputed as bring their memory down to a share.

    Between none and all of the layers, memory and time are taken to be linear in their number. ``None`` where recomputing
    all of them leaves more.
    """
    if memory is None or recomputing.memory is None or recomputing.time is None or memory < recomputing.memory:
        return None
    layers = max(1.0 - memory, 0.0) / (1.0 - recomputing.memory)
    return 1.0 + layers * (recomputing.time / recomputing.share - 1.0)


def _long_runs(records: Sequence[Record]) -> dict[str, str]:
    """What a long run looked like, every fifth of its parts, and whether resuming it changed anything."""
    mine = [record for record in records if record["measurement"] == "quality endurance"]
    found = {}
    for key in dict.fromkeys((record["task"], record["method"], record["rate"]) for record in mine):
        task, method, rate = key
        rows = [record for record in mine if (record["task"], record["method"], record["rate"]) == key]
        names = ("part", "loss", "largest_loss", "asked", "realised", "memory_mib", "variants", "graphs")
        parts = [record for record in rows if "part" in record]
        shown = [*parts[::_PARTS_SHOWN], *parts[-1:]]
        body = [[record[name] for name in names] for record in shown]
        text = tabulate(body, [name.replace("_", " ") for name in names], tablefmt="github", floatfmt=".3f")
        for record in rows:
            if "resumed_from" in record:
                same = [name for name in ("same_losses", "same_drops", "same_parameters") if record[name]]
                told = ", ".join(name.removeprefix("same_") for name in same) or "nothing"
                text += f"\n\nResumed from the middle, the same bit for bit: {told}."
        found[f"endurance: {task}, {method}, rate {rate:g}, {rows[0]['steps']} steps"] = text
    return found


def _statistics(records: Sequence[Record]) -> dict[str, str]:
    """For each task and point, how far gradients are from exact ones, over all layers."""
    keys = ("point", "method", "rate")
    good = [r for r in records if r["measurement"] == "quality statistics" and "error" not in r and r["part"] != "rest"]
    headers = [
        "point",
        "method",
        "rate",
        "sampling variance",
        "bias",
        "added variance",
        "cosine of means",
        "mean cosine, kept",
    ]
    found = {}
    for task in dict.fromkeys(record["task"] for record in good):
        groups: dict[tuple[object, ...], list[Record]] = {}
        for record in (record for record in good if record["task"] == task):
            groups.setdefault(tuple(record[key] for key in keys), []).append(record)
        rows = [[*group, *_over_layers(mine)] for group, mine in groups.items()]
        found[f"statistics: {task}"] = tabulate(rows, headers, tablefmt="github", floatfmt=".3f", missingval="")
    return found


def _over_layers(mine: Sequence[Record]) -> list[float | None]:
    """Figures of all layers together: squares add up, weighted by the squared norms that they are shares of."""
    weights = [record["norm"] ** 2 for record in mine]

    def mean(figure: str, power: int = 1) -> float:
        total = sum(weight * record[figure] ** power for weight, record in zip(weights, mine, strict=True) if weight)
        return total / sum(weights)

    cosines = [record["kept_cosine"] for record in mine if record["kept"]]
    kept = statistics.fmean(cosines) if cosines else None
    return [mean("sampling_variance"), mean("bias", 2) ** 0.5, mean("added_variance"), mean("cosine"), kept]


def listed() -> str:
    """A table of all methods."""
    return tabulate([(name, method.about) for name, method in methods().items()], ["method", "what"], "github")
