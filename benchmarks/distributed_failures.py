"""What becomes of a distributed run when one rank goes wrong: an error in time, or a hang?

``python -m benchmarks.distributed_failures REQUEST RECORDS`` starts the processes, the last of which misbehaves after some
steps. A process may be ended by the process group itself, so it is this one that watches them and writes the records.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from benchmarks.distributed_worker import DistributedRequest, DistributedRun, common_record, join_processes
from benchmarks.measure import Record, error_text

#: The process group's: what waits longer for another rank than this is an error.
_TIMEOUT_S = 30.0
#: Beyond the group's time limit, for a process to notice and to end.
_GRACE_S = 30.0
_STEPS_BEFORE = 5


def main() -> None:
    request = DistributedRequest(**json.loads(Path(sys.argv[1]).read_text()))
    for failure in FAILURES:
        with Path(sys.argv[2]).open("a") as file:
            print(json.dumps({**common_record(request), **_watched(request, failure)}), file=file)


def _watched(request: DistributedRequest, failure: str) -> Record:
    """Run all processes; those that have not ended ``_GRACE_S`` after the group's time limit are hanging."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_process, args=(rank, request, failure, folder)) for rank in range(request.processes)
        ]
        for process in processes:
            process.start()
        while not (folder / "trouble").exists() and processes[0].is_alive():
            time.sleep(0.05)
        trouble = time.monotonic()
        ended_after = [_end(process, trouble + _TIMEOUT_S + _GRACE_S, trouble) for process in processes]
        texts = [
            (folder / f"error{rank}").read_text() if (folder / f"error{rank}").exists() else None
            for rank in range(request.processes)
        ]
        outputs = [(folder / f"output{rank}").read_text(errors="replace") for rank in range(request.processes)]
        return {
            "failure": failure,
            "timeout_s": _TIMEOUT_S,
            "hangs": None in ended_after,
            "ended_after_s": ended_after,
            "statuses": [process.exitcode for process in processes],
            "errors": texts,
            "last_output": [_telling_line(output) for output in outputs],
        }


def _end(process: BaseProcess, deadline: float, start: float) -> float | None:
    """Seconds from ``start`` until the process had ended by itself, ``None`` if it had to be killed."""
    process.join(max(deadline - time.monotonic(), 0.0))
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return round(time.monotonic() - start, 1)


def _telling_line(output: str) -> str | None:
    """What a process that was ended by its process group has said about it."""
    telling = ("timeout", "what():", "connection closed", "remote process exited")
    lines = [line for line in output.splitlines() if any(word in line.lower() for word in telling)]
    return lines[0][:400] if lines else None


def _process(rank: int, request: DistributedRequest, failure: str, folder: Path) -> None:
    with (folder / f"output{rank}").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    odd = rank == request.processes - 1
    join_processes(rank, request, str(folder / "store"), datetime.timedelta(seconds=_TIMEOUT_S))
    try:
        run = DistributedRun(request, seed=int(odd and failure == "another seed"))
        run.training.choose(0.5)
        assert run.backend is not None
        for step in range(_STEPS_BEFORE + 500):
            if step == (0 if failure == "another seed" else _STEPS_BEFORE) and odd:
                (folder / "trouble").touch()
                if failure == "a dead rank":
                    os._exit(9)
                if failure == "a rate of its own":
                    run.backend.rate = 0.25
            float(run.step())
    except Exception as error:
        (folder / f"error{rank}").write_text(error_text(error))
        os._exit(1)  # the group may wait for ranks that are not there
    dist.destroy_process_group()


#: What the last rank does.
FAILURES = ("another seed", "a rate of its own", "a dead rank")

if __name__ == "__main__":
    main()
