"""Compare dropbp_fx with torch.compile on several devices of one machine, under DDP and FSDP2.

python -m benchmarks.distributed 1b --processes 2 --out results.json
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import distributed_tables
from benchmarks.distributed_worker import DistributedRequest
from benchmarks.processes import Clock, failed, in_own_process, without_first_steps
from benchmarks.results import ResultsFile, Run
from benchmarks.suites import SUITES, shape_of

_METHODS = {
    "ddp": ("torch.compile", "dropbp_fx", "dropbp_fx, present gradients"),
    "fsdp2": ("torch.compile", "dropbp_fx", "dropbp_fx, needed gathers"),
}
_MEASUREMENTS = ("steps", "losses", "patterns", "failures")
#: Sequences of this length are enough to see which branches are dropped.
_PATTERN_TOKENS = 256


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = _parser().parse_args(given)
    command = shlex.join(["python", "-m", "benchmarks.distributed", *given])
    file = ResultsFile(chosen.out, Run.here(command, chosen.device), append=chosen.append, go_on=chosen.go_on)
    clock = Clock(chosen.time_limit)
    progress = tqdm(list(_requests(chosen)))
    for request in progress:
        progress.set_postfix_str(f"{request.engine}, {request.method}, {request.measurement}")
        if clock.left() == 0:
            records = [failed(request, "The run's time limit was reached before this one started.")]
        else:
            failures = request.measurement == "distributed failures"
            worker = "benchmarks.distributed_failures" if failures else "benchmarks.distributed_worker"
            records = in_own_process(request, clock, chosen.cache, worker=worker)
        if chosen.cache:
            records = without_first_steps(records)
        for record in records:
            record.setdefault("engine", request.engine)
            record.setdefault("processes", request.processes)
            if "error" in record:
                tqdm.write(f"{request.engine}, {request.method} failed: {record['error']}", file=sys.stderr)
        file.add(records)
    print(distributed_tables.text([file.run]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    suites = [name for name, shape in SUITES.items() if not shape.hugging_face]  # engines take the model's layers
    parser.add_argument("suite", choices=suites, metavar="SUITE", help=f"one of {', '.join(suites)}")
    parser.add_argument("--processes", type=int, default=2, help="one a device")
    parser.add_argument("--engines", nargs="+", choices=_METHODS, default=list(_METHODS))
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="instead of all of an engine")
    parser.add_argument("--measure", nargs="+", choices=_MEASUREMENTS, default=list(_MEASUREMENTS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.5, 0.875])
    parser.add_argument("--rate", type=float, default=0.5, help="of loss curves and patterns")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--curve-steps", type=int, default=50, help="length of the loss curves")
    parser.add_argument("--pattern-steps", type=int, default=500)
    parser.add_argument("--compile", choices=("whole", "blocks"), default="whole", help="the model, or each layer")
    parser.add_argument("--loss", choices=("plain", "fused"), default="plain")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop after so many seconds, keep what is there")
    parser.add_argument("--out", type=Path, help="write the results to this file, after every method")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep compiled code here; first steps are not recorded then"
    )
    adding = parser.add_mutually_exclusive_group()
    adding.add_argument("--append", action="store_true", help="add a run to the file instead of replacing it")
    adding.add_argument("--continue", action="store_true", dest="go_on", help="add to the last run, same conditions")
    for size in ("layers", "batch", "tokens"):
        parser.add_argument(f"--{size}", type=int, help="instead of the suite's; the batch is that of one process")
    return parser


def _requests(chosen: argparse.Namespace) -> Iterator[DistributedRequest]:
    """Steps of all engines first, because a run may meet its time limit."""
    names = ("suite", "loss", "device", "inner", "layers", "batch", "tokens", "steps", "warmup", "processes", "compile")
    common = {name: getattr(chosen, name) for name in names}
    plans = [(kind, engine) for kind in _MEASUREMENTS if kind in chosen.measure for engine in chosen.engines]
    for kind, engine in plans:
        names = chosen.methods or _METHODS[engine]
        if kind == "steps":
            for name in names:
                values = [None] if name == "torch.compile" else chosen.rates
                yield DistributedRequest("distributed steps", name, values=values, engine=engine, **common)
            continue
        request = DistributedRequest(f"distributed {kind}", names[-1], values=[chosen.rate], engine=engine, **common)
        if kind == "failures":
            # As most people use the engine: a hook of one's own has failures of its own.
            yield dataclasses.replace(request, method=names[min(1, len(names) - 1)], batch=1)
            continue
        if kind == "patterns":
            tokens = min(_PATTERN_TOKENS, shape_of(chosen.suite, tokens=chosen.tokens).tokens)
            yield dataclasses.replace(request, train_steps=chosen.pattern_steps, batch=1, tokens=tokens)
            continue
        # Together as many sequences as one process otherwise has, so that one device can hold them alone.
        alone = max(shape_of(chosen.suite, batch=chosen.batch).batch // chosen.processes, 1) * chosen.processes
        for processes in (chosen.processes, 1):
            yield dataclasses.replace(
                request, train_steps=chosen.curve_steps, processes=processes, batch=alone // processes
            )


if __name__ == "__main__":
    main()
