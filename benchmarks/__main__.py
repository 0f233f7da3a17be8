"""``python -m benchmarks``: compare ways to train one model, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.contestants import CONTESTANTS
from benchmarks.measure import measure
from benchmarks.models import SHAPES
from dropbp_fx import _torch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.5, 0.875])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        result = measure(
            arguments.one,
            arguments.shape,
            arguments.rates,
            steps=arguments.steps,
            warmup=arguments.warmup,
            device=arguments.device,
        )
        print("RESULT", json.dumps(result), flush=True)
        return
    results = [_in_own_process(name, arguments) for name in arguments.contestants]
    rows = [
        [result["contestant"], rate, *figures.values()]
        for result in results
        for rate, figures in result["rates"].items()
    ]
    headers = ["contestant", "drop rate", "first step s", "step ms", "mean ms", "host ms", "activation GiB"]
    print(tabulate(rows, headers, tablefmt="github"))
    if arguments.json:
        machine = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
        report = {"machine": machine, "versions": _torch.versions(), "commit": _commit(), "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def _in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with_rates = name not in ("torch.compile", "forward only")
    rates = arguments.rates if with_rates else [0.0]
    command = [sys.executable, "-m", "benchmarks", "--one", name, "--shape", arguments.shape]
    command += ["--steps", str(arguments.steps), "--warmup", str(arguments.warmup), "--device", arguments.device]
    command += ["--rates", *map(str, rates)]
    print(f"running {name} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
