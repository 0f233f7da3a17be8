"""``python -m benchmarks.distributed_tables``: tables of what ``benchmarks.distributed`` measured, for the documentation.

Reads the files of several devices and those of one device to compare speed-ups with. ``--page`` puts the tables into a page,
each between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import projection
from benchmarks.measure import Record
from benchmarks.pages import filled
from benchmarks.processes import ROOT
from benchmarks.results import Run, load

#: The share of one device's speed-up that is to be left under an engine.
TARGET = 0.95
#: Columns that a table leaves out: "kept" is the ratio of the two speed-ups, and memory follows the peak.
_BEHIND = ("activation GiB", "speed-up", "one GPU's")
#: One device's method behind each of several devices'.
_ALONE = {"dropbp_fx, present gradients": "dropbp_fx", "dropbp_fx, needed gathers": "dropbp_fx"}
_RESULTS = ROOT / "benchmarks" / "results"
#: What is in the documentation.
FILES = tuple(
    _RESULTS / f"{name}.json"
    for name in (
        "h200x2-1b-ddp",
        "h200x2-1b-fsdp2",
        "h200x2-1b-fsdp2-blocks",
        "h200x2-8b-lora-ddp",
        "h200x2-8b-lora-fsdp2",
        "h200x2-1b-losses",
        "h200x2-8b-lora-losses",
        "cpu-8b-lora-patterns",
        "h200x2-failures",
    )
)
ALONE = tuple(_RESULTS / f"h200-{name}.json" for name in ("1b-suite", "8b-lora"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, default=FILES, help="without any, those in benchmarks/results")
    parser.add_argument("--alone", nargs="*", type=Path, default=ALONE, help="of one device")
    parser.add_argument("--page", type=Path, help="replace the tables of this page instead of printing them")
    chosen = parser.parse_args(arguments)
    runs, alone = _runs(chosen.files), _runs(chosen.alone)
    if chosen.page is None:
        print(text(runs, alone))
    else:
        chosen.page.write_text(filled(chosen.page.read_text(), tables(runs, alone)))


def text(runs: Sequence[Run], alone: Sequence[Run] = ()) -> str:
    """All tables that have rows, each under its name."""
    return "\n".join(f"\n{name}\n\n{table}" for name, table in tables(runs, alone).items() if table)


def tables(runs: Sequence[Run], alone: Sequence[Run] = ()) -> dict[str, str]:
    """Tables in GitHub's Markdown by name."""
    rows = {
        "steps": [
            {name: value for name, value in row.items() if name not in _BEHIND}
            for row in steps(runs, alone)
            if row["rate"] != 0.0  # these are as torch.compile's
        ],
        "losses": losses(runs),
        "patterns": patterns(runs),
        "failures": failures(runs),
    }
    return {name: tabulate(found, "keys", tablefmt="github", disable_numparse=True) for name, found in rows.items()}


def _runs(files: Iterable[Path]) -> list[Run]:
    return [run for file in files for run in load(file)]


# ---- rows ------------------------------------------------------------------------------------------------------------


def steps(runs: Iterable[Run], alone: Sequence[Run] = ()) -> list[Record]:
    """Step times, memory and bytes, and what is left of one device's speed-up over torch.compile."""
    rows = []
    for run in runs:
        for record in run.figures("distributed steps"):
            row = projection.label(record) | {"step ms": f"{record['step_ms']:.1f}"}
            one = _alone(alone, record)
            if one is not None:
                row["step ms, one GPU"] = f"{one[1]:.1f}"
            row |= {
                "host ms": f"{record['host_ms']:.1f}",
                "peak GiB": f"{record['peak_gib']:.1f}",
                "activation GiB": f"{record['activation_gib']:.1f}",
                "reduced GB": f"{record['gradient_bytes'] / 1e9:.3f}",
                "gathered GB": f"{record['gathered_bytes'] / 1e9:.2f}",
            }
            base = projection.compiled(run, record)
            if base is not None and base is not record:
                speed_up = base["step_ms"] / record["step_ms"]
                row["speed-up"] = f"{speed_up:.3f}"
                if one is not None:
                    kept = speed_up / (one[0] / one[1])
                    row["one GPU's"] = f"{one[0] / one[1]:.3f}"
                    row["kept"] = f"{kept:.1%}, {'met' if kept >= TARGET else 'missed'}"
            rows.append(row)
    return rows


def _alone(alone: Iterable[Run], record: Record) -> tuple[float, float] | None:
    """Step times of torch.compile and of the record's method on one device."""
    same = {key: record[key] for key in ("suite", "loss_function", "layers", "batch", "tokens")}
    method = _ALONE.get(record["method"], record["method"])
    for run in alone:
        base = next(run.figures("steps", method="torch.compile", **same), None)
        ours = next(run.figures("steps", method=method, value=record["value"], **same), None)
        if base is not None and ours is not None:
            return base["step_ms"], ours["step_ms"]
    return None


def losses(runs: Iterable[Run]) -> list[Record]:
    """Loss curves of several ranks beside that of one with all their batches."""
    rows = []
    for run in runs:
        curves = list(run.figures("distributed losses"))
        for many in curves:
            for one in curves:
                if many["processes"] > one["processes"] and many["engine"] == one["engine"]:
                    apart = [abs(a - b) for a, b in zip(many["losses"], one["losses"], strict=True)]
                    rows.append(
                        projection.label(many)
                        | {
                            "steps": len(apart),
                            "first loss": f"{many['losses'][0]:.4f}",
                            f"last, {many['processes']} ranks": f"{many['losses'][-1]:.4f}",
                            "last, one rank": f"{one['losses'][-1]:.4f}",
                            "furthest apart": f"{max(apart):.4f}",
                        }
                    )
    return rows


def patterns(runs: Iterable[Run]) -> list[Record]:
    """Whether ranks dropped alike."""
    return [
        projection.label(record)
        | {
            "machine": run.machine,
            "layers": record["layers"],
            "steps": record["steps"],
            "different patterns": record["different_patterns"],
            "ranks agree": _yes(record["agree"]),
            "a resumed run samples the same": _yes(record["resumed_alike"]),
        }
        for run in runs
        for record in run.figures("distributed patterns")
    ]


def failures(runs: Iterable[Run]) -> list[Record]:
    """What a failure was reported as, and when the processes had ended."""
    return [
        {
            "engine": projection.label(record)["engine"],
            "the last rank has": record["failure"],
            "reported, by rank": _each(map(reported, record["errors"], record["last_output"])),
            "reported after s": _each(record.get("reported_after_s") or []),
            "ended after s": _each("killed" if after is None else after for after in record["ended_after_s"]),
        }
        for run in runs
        for record in run.figures("distributed failures")
    ]


def reported(error: str | None, output: str | None) -> str | None:
    """The gist of an exception or of a library's last words."""
    if error is not None:
        kind, _, said = error.partition(": ")
        differ = re.search(r"They differ in (.*?)\. ", said)
        return f"`{kind}`, {differ[1]}" if differ else f"`{kind}`"
    if output is None:
        return None
    watchdog = re.search(r"Watchdog caught collective operation timeout.*ran for (\d+) milliseconds", output)
    return f"NCCL's watchdog, a collective that ran for {int(watchdog[1]) / 1e3:.1f} s" if watchdog else output


def _each(values: Iterable[Any]) -> str:
    """Values of all ranks, once where they are alike."""
    texts = ["nothing" if value is None else str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    main()
