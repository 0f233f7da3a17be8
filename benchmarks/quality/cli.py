"""``python -m benchmarks quality``: fine-tune with every policy, and say at what time each would have been as good."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measure import Record
from benchmarks.pages import filled
from benchmarks.processes import Clock
from benchmarks.quality import endurance, pictures, report, statistics
from benchmarks.quality.methods import EXACT, methods
from benchmarks.quality.tasks import LORA_RANK, SHIFTS, SIZES, TUNINGS, Task, Workshop
from benchmarks.quality.training import Plan, before_tuning, run
from benchmarks.results import ResultsFile, Run, load_records

#: Learning rates that every method is tuned over, by tuning.
_RATES = {"full": (1.5e-4, 3e-4, 6e-4), "lora": (1e-3, 2e-3, 4e-3)}
_SHARES = (1.0, 0.85, 0.7, 0.55, 0.4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks quality``."""
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=["mild", "strong"])
    parser.add_argument("--tunings", nargs="+", choices=TUNINGS, default=list(TUNINGS))
    parser.add_argument("--methods", nargs="+", choices=methods(), metavar="NAME",
                        default=["none", "checkpointing", "random", "sensitivity", "window", "window, ramp"],
                        help=f"of {', '.join(map(repr, methods()))}")  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5])
    parser.add_argument("--shares", nargs="+", type=float, default=list(_SHARES), help='of the steps, for "none"')
    parser.add_argument("--lrs", nargs="+", type=float, help="learning rates to tune over")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--windows", type=int, help="size of the data set, for the data-limited regime")
    parser.add_argument("--lora-rank", type=int, default=LORA_RANK)
    parser.add_argument("--steps", type=int, help="instead of the size's")
    parser.add_argument("--pretrain-steps", type=int, help="instead of the size's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--folder", type=Path, default=Path("outputs/quality"), help="keeps pretrained weights")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop after so many seconds, keep what is there")
    parser.add_argument("--out", type=Path, help="write the results to this file, after every run")
    parser.add_argument("--append", action="store_true", help="add a run to the file instead of replacing it")
    parser.add_argument(
        "--statistics", action="store_true", help="bias and variance of gradients, instead of trainings"
    )
    parser.add_argument(
        "--endurance",
        action="store_true",
        help="one long run a method (--steps), watched, and resumed from its middle, instead of trainings",
    )
    parser.add_argument("--by-flops", nargs="*", choices=SIZES, metavar="SIZE", help="let FLOPs stand for time, of these "
                        "sizes or of all; right where several runs shared a device, or the host was the limit")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="only print what the methods are")
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE", help="only print the tables of these files")
    parser.add_argument(
        "--page", type=Path, help="with --report: put the tables into this page instead of printing them"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="SVG", help="with --report: draw the files' losses against time, too"
    )


def main(chosen: argparse.Namespace) -> None:
    """Run what was asked for and print the tables."""
    if chosen.list:
        print(report.listed())
        return
    by_flops = () if chosen.by_flops is None else chosen.by_flops or tuple(SIZES)
    if chosen.report:
        records = load_records(chosen.report)
        if chosen.page is None:
            report.show(records, by_flops=by_flops)
        else:
            tables = report.tables(records, by_flops=by_flops)
            chosen.page.write_text(filled(chosen.page.read_text(), tables))
        if chosen.plot:
            pictures.draw(records, chosen.plot, by_flops=by_flops)
        return
    clock = Clock(chosen.time_limit)
    file = ResultsFile(chosen.out, Run.here(chosen.command_line, chosen.device), append=chosen.append)
    torch.set_float32_matmul_precision("high")
    workshop = Workshop(chosen.size, chosen.device, chosen.inner, chosen.folder, chosen.pretrain_steps, chosen.steps)
    tasks = [
        Task(chosen.size, shift, tuning, chosen.windows, chosen.lora_rank)
        for tuning, shift in itertools.product(chosen.tunings, chosen.shifts)
    ]
    file.add(before_tuning(workshop, tasks))
    if chosen.statistics:
        settings = list(itertools.product(chosen.methods, chosen.rates))
        for task in tasks:
            lr = (chosen.lrs or _RATES[task.tuning])[0]
            for record in statistics.measure(workshop, task, settings, learning_rate=lr):
                _keep(file, record)
        report.show(file.run.records)
        return
    if chosen.endurance:
        for task, name, rate in itertools.product(tasks, chosen.methods, chosen.rates):
            lr = (chosen.lrs or _RATES[task.tuning])[0]
            for record in endurance.endure(workshop, task, name, rate, learning_rate=lr):
                _keep(file, record)
        report.show(file.run.records)
        return
    plans = [(task, plan) for task in tasks for plan in _plans(chosen, task)]
    for task, plan in (progress := tqdm(plans, unit="method")):
        progress.set_postfix_str(f"{task.name}, {plan.method}")
        for record in run(workshop, task, plan):
            _keep(file, record)
            if clock.left() == 0:
                break
        if clock.left() == 0:
            break
    report.show(file.run.records, by_flops=by_flops)


def _keep(file: ResultsFile, record: Record) -> None:
    """Write a record down at once, and tell about a failure."""
    if "error" in record:
        tqdm.write(f"{record['method']} failed: {record['error']}", file=sys.stderr)
    file.add([record])


def _plans(chosen: argparse.Namespace, task: Task) -> Iterator[Plan]:
    lrs = tuple(chosen.lrs or _RATES[task.tuning])
    for name in chosen.methods:
        if name == "none":
            yield from (Plan(name, 0.0, share, lrs, chosen.seeds) for share in chosen.shares)
        elif name in EXACT:  # only time and memory are wanted
            rates = [0.0] if name == "checkpointing" else chosen.rates
            yield from (Plan(name, rate, 0.1, lrs[:1], 1) for rate in rates)
        else:
            yield from (Plan(name, rate, 1.0, lrs, chosen.seeds) for rate in chosen.rates)
