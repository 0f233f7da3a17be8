"""What becomes of a distributed run when one rank goes wrong: an error in time, or a hang?

``python -m benchmarks.distributed_failures REQUEST RECORDS`` starts the processes, the last of which misbehaves after some
steps. A process may be ended by the process group itself, so it is this one that watches them and writes the records.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from benchmarks.distributed_worker import DistributedRequest, DistributedRun, common_record, join_processes
from benchmarks.measure import Record, error_text

#: The process group's: what waits longer for another rank than this is an error.
_TIMEOUT_S = 30.0
#: Beyond the group's time limit, for an error to show. A rank that has said nothing and not ended by then hangs.
_SLACK_S = 10.0
#: Beyond the group's time limit, for a process to end: NCCL's group waits a minute for ranks that write down what they did.
_GRACE_S = 120.0
_STEPS_BEFORE = 5
_RATE = 0.5


def main() -> None:
    request = DistributedRequest(**json.loads(Path(sys.argv[1]).read_text()))
    for failure in FAILURES:
        with Path(sys.argv[2]).open("a") as file:
            print(json.dumps({**common_record(request), **_watched(request, failure)}), file=file)


@dataclasses.dataclass
class Rank:
    """What was seen of one process.

    Attributes:
        error: text of an exception.
        last_output: the line in which a library has said what is wrong.
        reported_after_s: from the trouble until there was either.
        ended_after_s: from the trouble until the process had ended by itself, ``None`` if it had to be killed.
    """

    error: str | None = None
    last_output: str | None = None
    reported_after_s: float | None = None
    ended_after_s: float | None = None

    @property
    def hangs(self) -> bool:
        """Whether it neither reported an error nor ended when the group's time limit had passed."""
        seen = [after for after in (self.reported_after_s, self.ended_after_s) if after is not None]
        return min(seen, default=float("inf")) > _TIMEOUT_S + _SLACK_S

    def look(self, error: Path, output: Path, after: float) -> None:
        """Read what the process has written by now, ``after`` seconds."""
        if self.reported_after_s is not None:
            return
        self.error = error.read_text() if error.exists() else None
        self.last_output = _telling_line(output.read_text(errors="replace")) if output.exists() else None
        if self.error or self.last_output:
            self.reported_after_s = round(after, 1)


def _watched(request: DistributedRequest, failure: str) -> Record:
    """Run all processes until they have ended, ``_GRACE_S`` after the group's time limit at the latest."""
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
        trouble, ranks = time.monotonic(), [Rank() for _ in processes]
        after = 0.0
        while None in (rank.ended_after_s for rank in ranks) and after < _TIMEOUT_S + _GRACE_S:
            time.sleep(0.1)
            after = time.monotonic() - trouble
            for number, (rank, process) in enumerate(zip(ranks, processes, strict=True)):
                ended = not process.is_alive()  # asked first: what it wrote is then complete
                rank.look(folder / f"error{number}", folder / f"output{number}", after)
                if ended and rank.ended_after_s is None:
                    rank.ended_after_s = round(after, 1)
        for process in processes:
            process.kill()
            process.join()
        return {
            "value": _RATE,
            "failure": failure,
            "timeout_s": _TIMEOUT_S,
            "hangs": any(rank.hangs for rank in ranks),
            "reported_after_s": [rank.reported_after_s for rank in ranks],
            "ended_after_s": [rank.ended_after_s for rank in ranks],
            "statuses": [process.exitcode for process in processes],
            "errors": [rank.error for rank in ranks],
            "last_output": [rank.last_output for rank in ranks],
        }


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
        run.training.choose(_RATE)
        assert run.backend is not None
        for step in range(_STEPS_BEFORE + 500):
            if step == (0 if failure == "another seed" else _STEPS_BEFORE) and odd:
                (folder / "trouble").touch()
                if failure == "a dead rank":
                    os._exit(9)
                if failure == "a rate of its own":
                    run.backend.rate = _RATE / 2
            float(run.step())
    except Exception as error:
        written = folder / f"written{rank}"
        written.write_text(error_text(error))
        written.rename(folder / f"error{rank}")  # complete when it is seen
        os._exit(1)  # the group may wait for ranks that are not there
    dist.destroy_process_group()


#: What the last rank does.
FAILURES = ("another seed", "a rate of its own", "a dead rank")

if __name__ == "__main__":
    main()
