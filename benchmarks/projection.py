"""``python -m benchmarks.projection FILE...``: what steps measured on few ranks would come to on more of them.

A projection, not a measurement. Time for communication is computed from the bytes that ``benchmarks.distributed`` counted,
by rings with a latency for each hop and a bandwidth (alpha-beta). Ranks fill nodes; where there are several, a collective
goes around the ranks of each node and, with what each of them then holds, around the nodes. A rank's batch stays what it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.measure import Record
from benchmarks.results import Run, load

#: DistributedDataParallel's default; its buckets are reduced one by one.
_BUCKET = 25 * 2**20


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Links between ranks.

    Attributes:
        node: ranks of a node.
        inside_gb_s, between_gb_s: speed of a rank's link within its node and to other nodes, in one direction, GB/s. The
            defaults are NVLink 4 (450 GB/s) and 400 Gb/s Ethernet or InfiniBand a rank.
        efficiency: share of these speeds that a collective reaches.
        inside_us, between_us: latency of a hop.
    """

    node: int = 8
    inside_gb_s: float = 450.0
    between_gb_s: float = 50.0
    efficiency: float = 0.8
    inside_us: float = 3.0
    between_us: float = 10.0

    def ring_ms(self, bytes_: float, calls: int, ranks: int) -> float:
        """Once around: what a gather or a reduction with scattered results of that many bytes takes, in ``calls`` calls.

        Raises:
            ValueError: the ranks do not fill nodes.
        """
        local = min(ranks, self.node)
        if ranks % local:
            raise ValueError(
                f"{ranks} ranks do not fill nodes of {self.node}: give a multiple, or at most {self.node}."
            )
        nodes = ranks // local
        inside = bytes_ * (local - 1) / local / self.inside_gb_s
        between = bytes_ / local * (nodes - 1) / nodes / self.between_gb_s
        latency = (local - 1) * self.inside_us + (nodes - 1) * self.between_us
        return (inside + between) / self.efficiency / 1e6 + calls * latency / 1e3


@dataclasses.dataclass(frozen=True)
class Projected:
    """Steps of one record on more ranks.

    Attributes:
        communication_ms: of a step, whether it hides behind computing or not.
        hidden_ms: the step if communication beyond that of the measured run hides behind the step as it was measured.
        exposed_ms: the step if none of it does.
    """

    communication_ms: float
    hidden_ms: float
    exposed_ms: float


def communication_ms(record: Record, ranks: int, fabric: Fabric) -> float:
    """Of a step: under DDP all-reduces, which go around twice, under FSDP2 gathers and reductions."""
    if record["engine"] == "ddp":
        return 2 * fabric.ring_ms(record["gradient_bytes"], math.ceil(record["gradient_bytes"] / _BUCKET), ranks)
    parts = record["layers"] + 1  # of which the outermost is gathered once, the layers for the backward too
    gathers = fabric.ring_ms(record["gathered_bytes"], 2 * parts - 1, ranks)
    return gathers + fabric.ring_ms(record["gradient_bytes"], parts, ranks)


def project(record: Record, ranks: int, fabric: Fabric) -> Projected:
    """One record of "distributed steps" on ``ranks`` ranks, each with the same batch."""
    now, then = (communication_ms(record, number, fabric) for number in (record["processes"], ranks))
    return Projected(then, max(record["step_ms"], then), record["step_ms"] + then - now)


def rows(runs: Iterable[Run], ranks: Sequence[int] = (8, 64), fabric: Fabric | None = None) -> list[Record]:
    """A row for each record: communication on as many ranks as measured and on more, steps, speed-ups over torch.compile."""
    fabric = fabric or Fabric()
    found = []
    for run in runs:
        for record in run.figures("distributed steps"):
            row = label(record) | {
                f"comm. ms, {record['processes']}": _ms(communication_ms(record, record["processes"], fabric))
            }
            base = compiled(run, record)
            for number in ranks:
                ours = project(record, number, fabric)
                row |= {
                    f"comm. ms, {number}": _ms(ours.communication_ms),
                    f"step ms, {number}": _span(ours.hidden_ms, ours.exposed_ms),
                }
                if base is not None and base is not record:
                    theirs = project(base, number, fabric)
                    speed_ups = theirs.hidden_ms / ours.hidden_ms, theirs.exposed_ms / ours.exposed_ms
                    row[f"speed-up, {number}"] = _span(*speed_ups, digits=2)
            found.append(row)
    return found


def label(record: Record) -> Record:
    """What a row of a table is about."""
    engine = {"ddp": "DDP", "fsdp2": "FSDP2"}[record["engine"]]
    blocks = ", layers compiled" if record["compile"] == "blocks" else ""
    return {
        "suite": record["suite"],
        "engine": engine + blocks,
        "method": record["method"],
        "rate": record["value"],
    }


def compiled(run: Run, record: Record) -> Record | None:
    """torch.compile on the same engine in the same run."""
    same = {key: record[key] for key in ("suite", "loss_function", "batch", "tokens", "engine", "compile", "processes")}
    return next(run.figures("distributed steps", method="torch.compile", **same), None)


def _ms(value: float) -> str:
    return f"{value:.1f}"


def _span(one: float, other: float, digits: int = 1) -> str:
    texts = [f"{value:.{digits}f}" for value in (one, other)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.projection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, help="files that python -m benchmarks.distributed wrote")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    for field in dataclasses.fields(Fabric):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    files, ranks = given.pop("files"), given.pop("ranks")
    runs = [run for file in files for run in load(file)]
    print(tabulate(rows(runs, ranks, Fabric(**given)), "keys", tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
