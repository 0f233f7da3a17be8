"""Files of results: JSON with one entry a run, each with its machine, versions and commit, and a flat list of records."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Record
from benchmarks.processes import ROOT
from dropbp_fx import _torch

#: What every record has; those of a kind that failed have "error" instead of figures.
_COMMON = {"measurement", "suite", "method", "loss_function", "layers", "batch", "tokens", "knob", "value"}
_FIGURES = {
    "steps": {"first_step_s", "step_ms", "synchronized_ms", "host_ms", "activation_gib", "losses"},
    "optimizer": {"optimizer_ms"},
    "first step": {"first_step_s", "all_variants_s", "warm"},
    "length": {"fits", "cap_gib"},
    "distributed steps": {"engine", "processes", "step_ms", "peak_gib", "gradient_bytes", "gathered_bytes", "losses"},
    "distributed losses": {"engine", "processes", "losses"},
    "distributed patterns": {"engine", "processes", "steps", "agree", "resumed_alike"},
    "distributed failures": {"engine", "processes", "failure", "timeout_s", "ended_after_s", "errors", "last_output"},
}
#: Fine-tunings and what they began with are told apart by the task.
_COMMON_OF_TASKS = {"measurement", "task", "size", "shift", "tuning"}
_FIGURES_OF_TASKS = {
    "quality": {"method", "rate", "share", "steps", "lr", "seed", "eval_loss", "step_ms", "activation_gib"},
    "quality statistics": {"method", "rate", "point", "part", "norm", "bias", "added_variance", "cosine"},
    "quality endurance": {"method", "rate", "steps", "lr"},
    "quality before": {"eval_loss", "pretraining_loss"},
}


@dataclasses.dataclass
class Run:
    """One invocation: all its records come from one machine, one commit, one stretch of time."""

    command: str
    machine: str
    versions: dict[str, str]
    commit: str
    started: str
    records: list[Record] = dataclasses.field(default_factory=list)

    @classmethod
    def here(cls, command: str, device: str) -> Run:
        machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(command, machine, _torch.versions(), _commit(), now)

    def figures(self, measurement: str, **where: Any) -> Iterator[Record]:
        """Records of a kind that have figures, and the given values."""
        for record in self.records:
            wanted = record["measurement"] == measurement and "error" not in record
            if wanted and all(record.get(key) == value for key, value in where.items()):
                yield record


class ResultsFile:
    """A file that is valid after every record: what a killed run had measured is not lost."""

    def __init__(self, path: Path | None, run: Run, *, append: bool = False, go_on: bool = False) -> None:
        """Start a run.

        Args:
            path: the file, ``None`` to write nothing.
            run: the run to add records to.
            append: keep the runs that the file holds.
            go_on: keep them, and add to the last one instead of starting another.

        Raises:
            ValueError: the run to go on with was of another machine, other versions or another commit.
        """
        self._path, self.run = path, run
        self._runs = load(path) if (append or go_on) and path is not None and path.exists() else []
        if go_on and self._runs:
            self.run = self._runs[-1]
            _check_same_conditions(self.run, run)
            self.run.command += f"; {run.command}"
        else:
            self._runs.append(run)

    def add(self, records: Iterable[Record]) -> None:
        self.run.records.extend(records)
        self.write()

    def write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"runs": [dataclasses.asdict(run) for run in self._runs]}, indent=1) + "\n")
        new.replace(self._path)


def load(path: Path) -> list[Run]:
    """Read and check a file of results.

    Raises:
        ValueError: it is none, or lacks something.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list):
        raise ValueError(f'{path} is no file of results: it must hold an object with a list of "runs".')
    runs = []
    for entry in content["runs"]:
        names = {field.name for field in dataclasses.fields(Run)}
        if set(entry) != names:
            raise ValueError(f"A run in {path} has {sorted(entry)}, but it must have {sorted(names)}.")
        for record in entry["records"]:
            _check(record, path)
        runs.append(Run(**entry))
    return runs


def load_records(paths: Iterable[Path]) -> list[Record]:
    """The records of all runs of some files, each with its run's "machine": measured times compare within one only.

    Raises:
        ValueError: see :func:`load`.
    """
    return [{**record, "machine": run.machine} for path in paths for run in load(path) for record in run.records]


def _check_same_conditions(earlier: Run, now: Run) -> None:
    for name in ("machine", "versions", "commit"):
        before, after = getattr(earlier, name), getattr(now, name)
        if before != after:
            raise ValueError(
                f"This cannot go on with the file's last run: its {name} was {before} and is now {after}. Use --append to "
                "start a run of its own in the same file."
            )


def _check(record: Record, path: Path) -> None:
    kind = record.get("measurement", "")
    common, figures = (_COMMON_OF_TASKS, _FIGURES_OF_TASKS) if kind in _FIGURES_OF_TASKS else (_COMMON, _FIGURES)
    missing = sorted((common if "error" in record else common | figures.get(kind, set())) - set(record))
    if missing:
        raise ValueError(f"A record in {path} lacks {', '.join(missing)}: {json.dumps(record)[:300]}.")
    if kind not in figures:
        known = ", ".join(map(repr, [*_FIGURES, *_FIGURES_OF_TASKS]))
        raise ValueError(f"A record in {path} is of the kind {kind!r}; known are {known}.")


def _commit() -> str:
    """The commit, marked where the code that was measured differs from it; changed results do not count."""
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "dropbp_fx", "benchmarks/*.py")
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
