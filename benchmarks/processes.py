"""Run a request in a process of its own, with caches of its own and a limit on its time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Record, Request
from benchmarks.worker import as_json

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    """What is left of a run's time."""

    def __init__(self, limit_s: float | None) -> None:
        self._end = None if limit_s is None else time.monotonic() + limit_s

    def left(self) -> float | None:
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)


def in_own_process(
    request: Request, clock: Clock, cache: Path | None = None, *, worker: str = "benchmarks.worker"
) -> list[Record]:
    """Measure in a new process; what it had measured before it failed or ran out of time is kept.

    Args:
        request: what to measure.
        clock: stops the process when the run's time is over.
        cache: where compiled code is kept, ``None`` for a new place that nothing is in.
        worker: the module that the process runs, on a file with the request and a file for its records.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        asked, answered, log = place / "request.json", place / "records.jsonl", place / "log"
        asked.write_text(as_json(request))
        answered.touch()
        caches = str(cache or place / "cache")
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": caches, "PYTHONPATH": _python_path()}
        command = [sys.executable, "-m", worker, str(asked), str(answered)]
        with log.open("wb") as output:
            # A group of its own: compiling starts processes that must end with it.
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, process_group=0)
            try:
                process.wait(clock.left())
                failure = None if process.returncode == 0 else f"The process ended with status {process.returncode}"
            except subprocess.TimeoutExpired:
                failure = "The run's time limit was reached"
            finally:
                _end(process)
        records = [json.loads(line) for line in answered.read_text().splitlines() if line.endswith("}")]
        if failure is not None:
            tail = log.read_text(errors="replace")[-1500:]
            records.append(failed(request, f"{failure}. The end of its output: {tail}"))
        return records


def without_first_steps(records: list[Record]) -> list[Record]:
    """Where compiled code was kept from before, first steps say nothing."""
    return [{**record, "first_step_s": None} if "first_step_s" in record else record for record in records]


def failed(request: Request, reason: str) -> Record:
    """The record of a process that left none."""
    return {
        "measurement": request.measurement,
        "suite": request.suite,
        "method": request.method,
        "loss_function": request.loss,
        "layers": request.layers,
        "batch": request.batch,
        "tokens": request.tokens,
        "knob": None,
        "value": None,
        "error": reason,
    }


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return str(ROOT) if not inherited else f"{ROOT}{os.pathsep}{inherited}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
