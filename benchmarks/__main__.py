"""Compare ways to train one model, each in a process of its own.

python -m benchmarks run SUITE measures training steps, first-step what compiling costs, longest the longest sequence that
fits; compare prints the targets beside what was measured, and plot draws it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import longest, targets
from benchmarks.measure import Record, Request
from benchmarks.methods import DEFAULT, METHODS
from benchmarks.methods import check as check_methods
from benchmarks.pages import filled
from benchmarks.processes import Clock, failed, in_own_process, without_first_steps
from benchmarks.quality import cli as quality
from benchmarks.results import ResultsFile, Run, load
from benchmarks.suites import SUITES
from benchmarks.suites import check as check_shape


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    chosen = parser.parse_args(given)
    if chosen.command is None:
        parser.print_help()
        return
    if "suite" in chosen:
        _settle_methods(parser, chosen)
    chosen.command_line = shlex.join(["python", "-m", "benchmarks", *given])
    chosen.action(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument("suite", choices=SUITES, metavar="SUITE", help=f"one of {', '.join(SUITES)}")
    measuring.add_argument("--loss", choices=("plain", "fused"), default="plain")
    measuring.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measuring.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor", help="what makes the code")
    measuring.add_argument(
        "--time-limit", type=float, metavar="S", help="stop after so many seconds, keep what is there"
    )
    measuring.add_argument("--out", type=Path, help="write the results to this file, after every method")
    adding = measuring.add_mutually_exclusive_group()
    adding.add_argument("--append", action="store_true", help="add a run to the file instead of replacing it")
    adding.add_argument(
        "--continue", action="store_true", dest="go_on", help="add to the file's last run, same conditions"
    )
    for size in ("layers", "batch", "tokens"):
        measuring.add_argument(f"--{size}", type=int, help="instead of the suite's")

    run = commands.add_parser("run", parents=[measuring], help="time and memory of training steps")
    run.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(map(repr, METHODS))}"
    )
    run.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.5, 0.75, 0.875])
    run.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.5], help="of layers that are checkpointed")
    run.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.5], help="of the memory partitioner")
    run.add_argument("--steps", type=int, default=20)
    run.add_argument("--warmup", type=int, default=5)
    run.add_argument("--cache", type=Path, metavar="FOLDER",
                     help="keep compiled code here; first steps are not recorded then")  # fmt: skip
    run.set_defaults(action=_run)

    first = commands.add_parser("first-step", parents=[measuring], help="what compiling costs, cold and warm")
    first.add_argument("--methods", nargs="+", choices=METHODS, default=["torch.compile", "dropbp_fx"],
                       metavar="NAME")  # fmt: skip
    first.add_argument("--rate", type=float, default=0.5)
    first.add_argument("--depths", nargs="+", type=int, help="numbers of layers, one after the other")
    first.add_argument("--patterns", type=int, default=0, help="random patterns to draw afterwards")
    first.add_argument("--cold-only", action="store_true", help="no second process on the first one's caches")
    first.set_defaults(action=_first_step)

    length = commands.add_parser("longest", parents=[measuring], help="the longest sequence that fits")
    length.add_argument("--methods", nargs="+", choices=METHODS, default=["torch.compile", "dropbp_fx"],
                        metavar="NAME")  # fmt: skip
    length.add_argument("--rate", type=float, default=0.875)
    length.add_argument("--cap-gib", type=float, default=80.0)
    length.add_argument("--start", type=int, default=8192, help="the first length to try")
    length.add_argument("--multiple", type=int, default=1024, help="lengths are multiples of this")
    length.add_argument("--probes", type=int, default=5, help="lengths to try at most, for each method")
    length.set_defaults(action=_longest)

    quality_parser = commands.add_parser("quality", help="fine-tune small models with every policy: does dropping pay?")
    quality.add_arguments(quality_parser)
    quality_parser.set_defaults(action=quality.main)

    compare = commands.add_parser("compare", help="print the targets and what was measured")
    compare.add_argument("results", nargs="+", type=Path)
    compare.add_argument("--page", type=Path, help="put the tables into this page instead of printing them")
    compare.set_defaults(action=_compare)

    plot = commands.add_parser("plot", help="draw time against memory, and first steps")
    plot.add_argument("results", nargs="+", type=Path)
    plot.add_argument("--out", type=Path, required=True, help="an SVG file")
    plot.set_defaults(action=_plot)
    return parser


def _settle_methods(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    """Refuse what the suite cannot be trained with before anything runs; by default, what it can be trained with."""
    shape = SUITES[chosen.suite]
    if chosen.methods is None:
        chosen.methods = [name for name in DEFAULT if METHODS[name].trains(shape)]
    try:
        check_methods(chosen.methods, chosen.suite, shape)
        check_shape(shape, fused_loss=chosen.loss == "fused")
    except (ValueError, ImportError) as error:
        parser.error(str(error))


def _request(chosen: argparse.Namespace, measurement: str, method: str, **more: object) -> Request:
    common = {name: getattr(chosen, name) for name in ("suite", "loss", "device", "inner", "layers", "batch", "tokens")}
    return Request(measurement, method, **{**common, **more})


def _file(chosen: argparse.Namespace) -> ResultsFile:
    return ResultsFile(
        chosen.out, Run.here(chosen.command_line, chosen.device), append=chosen.append, go_on=chosen.go_on
    )


def _measure(file: ResultsFile, request: Request, clock: Clock, cache: Path | None = None) -> list[Record]:
    """Measure in a process of its own, unless the time is over, and tell about failures at once."""
    if clock.left() == 0:
        records = [failed(request, "The run's time limit was reached before this one started.")]
    else:
        records = in_own_process(request, clock, cache)
    for record in records:
        if "error" in record:
            tqdm.write(f"{record['method']} failed: {record['error']}", file=sys.stderr)
    return records


def _run(chosen: argparse.Namespace) -> None:
    file, clock = _file(chosen), Clock(chosen.time_limit)
    values = {"rate": chosen.rates, "share": chosen.shares, "budget": chosen.budgets, None: [None]}
    progress = tqdm(chosen.methods, unit="method")
    for name in progress:
        progress.set_postfix_str(name)
        request = _request(chosen, "steps", name, values=values[METHODS[name].knob],
                           steps=chosen.steps, warmup=chosen.warmup)  # fmt: skip
        records = _measure(file, request, clock, chosen.cache)
        file.add(without_first_steps(records) if chosen.cache else records)
    keys = ["method", "knob", "value", "first_step_s", "step_ms", "step_ms_mean", "host_ms", "activation_gib"]
    _print(file, "steps", keys)


def _first_step(chosen: argparse.Namespace) -> None:
    file, clock = _file(chosen), Clock(chosen.time_limit)
    depths = chosen.depths or [chosen.layers]
    for layers, name in tqdm([(layers, name) for layers in depths for name in chosen.methods]):
        values = [chosen.rate if METHODS[name].knob == "rate" else None]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            for warm in (False,) if chosen.cold_only else (False, True):
                request = _request(chosen, "first step", name, values=values, layers=layers,
                                   patterns=0 if warm else chosen.patterns)  # fmt: skip
                file.add({**record, "warm": warm} for record in _measure(file, request, clock, Path(cache)))
    keys = ["method", "layers", "value", "warm", "first_step_s", "all_variants_s", "inner_compile_s"]
    _print(file, "first step", [*keys, "compiled_variants", "patterns", "recompiles", "new_variants"])


def _longest(chosen: argparse.Namespace) -> None:
    file, clock = _file(chosen), Clock(chosen.time_limit)
    for name in chosen.methods:
        values = [chosen.rate if METHODS[name].knob == "rate" else None]
        search = longest.Search(chosen.start, chosen.cap_gib, chosen.multiple)
        for _ in range(chosen.probes):
            tokens = search.next_length()
            if tokens is None or clock.left() == 0:
                break
            tqdm.write(f"{name}: trying {tokens} tokens", file=sys.stderr)
            request = _request(chosen, "length", name, values=values, batch=1, tokens=tokens, steps=1,
                               cap_gib=chosen.cap_gib)  # fmt: skip
            records = _measure(file, request, clock)
            file.add(records)
            if any("error" in record for record in records):
                break
            search.tell(records[0])
    _print(file, "length", ["method", "value", "tokens", "fits", "step_ms", "held_gib", "peak_gib"])


def _compare(chosen: argparse.Namespace) -> None:
    runs: list[Run] = []
    for path in chosen.results:
        try:
            runs += load(path)
        except ValueError as error:
            print(f"Left out: {error}", file=sys.stderr)
    if chosen.page is None:
        print(targets.table(runs))
    else:
        chosen.page.write_text(filled(chosen.page.read_text(), targets.pages(runs)))


def _plot(chosen: argparse.Namespace) -> None:
    from benchmarks import plots

    plots.draw([run for path in chosen.results for run in load(path)], chosen.out)


def _print(file: ResultsFile, measurement: str, keys: Sequence[str]) -> None:
    records = [record for record in file.run.records if record["measurement"] == measurement]
    failed_at = keys[-1]
    rows = [
        ["failed" if key == failed_at and "error" in record else record.get(key) for key in keys] for record in records
    ]
    print(tabulate(rows, keys, tablefmt="github"))


if __name__ == "__main__":
    main()
