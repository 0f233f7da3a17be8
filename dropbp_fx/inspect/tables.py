"""An explanation as a table, as JSON and as a data frame."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from dropbp_fx import _torch
from dropbp_fx.inspect.figures import ExplainedBranch
from dropbp_fx.inspect.findings import Findings

if TYPE_CHECKING:
    import pandas as pd

#: Rates that the second table of ``print(explanation)`` shows.
_SHOWN_RATES = (0.0, 0.25, 0.5, 0.75, 0.875)
_SCALES = ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
_JSON_VERSION = 1


@dataclasses.dataclass(frozen=True)
class BranchGroup:
    """Branches of equal figures whose names differ in numbers only: those of identical layers.

    Attributes:
        name: their common name, a range where the numbers differ: ``model.layers.{0..31}.mlp``.
        branches: in execution order.
    """

    name: str
    branches: tuple[ExplainedBranch, ...]


def group_branches(branches: Iterable[ExplainedBranch]) -> tuple[BranchGroup, ...]:
    """Merge the branches of identical layers, in the order of the first of each."""
    groups: dict[object, list[ExplainedBranch]] = {}
    for branch in branches:
        figures = dataclasses.replace(branch, index=0, name="", layer="", region=0)
        groups.setdefault((re.sub(r"\d+", "#", branch.name), figures), []).append(branch)
    return tuple(BranchGroup(_common_name([b.name for b in group]), tuple(group)) for group in groups.values())


def _common_name(names: Sequence[str]) -> str:
    parts = [re.split(r"(\d+)", name) for name in names]
    return "".join(_one_or_range(column) for column in zip(*parts, strict=True))


def _one_or_range(column: Sequence[str]) -> str:
    different = list(dict.fromkeys(column))
    if len(different) == 1:
        return different[0]
    numbers = [int(text) for text in different]
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    shown = ",".join(map(str, numbers)) if len(numbers) <= 6 else f"{numbers[0]},{numbers[1]},..,{numbers[-1]}"
    return f"{{{shown}}}"


def text(findings: Findings, style: str = "simple") -> str:
    """The tables of an explanation in one of tabulate's styles, with a line above and one below."""
    given = textwrap.wrap(f"Given: {', '.join(findings.given.facts)}.", 120)
    lines = [headline(findings), *given, "", branch_table(findings, style), "", prediction_table(findings, style)]
    for sentence in findings.shortfall:
        lines += ["", *textwrap.wrap(sentence, 120)]
    return "\n".join([*lines, "", *textwrap.wrap(footnote(findings), 120)])


def headline(findings: Findings) -> str:
    """One sentence on the model and one on what is compiled for it."""
    droppable = len(findings.droppable)
    what = f"{findings.given.model}: {_count(len(findings.branches), 'residual branch', 'residual branches')}"
    if droppable != len(findings.branches):
        what += f", {droppable} of them droppable"
    if findings.parameters is not None and findings.trainable_parameters is not None:
        what += f"; {quantity(findings.parameters)} parameters, {quantity(findings.trainable_parameters)} trainable"
    return (
        f"{what}. {_count(findings.graphs, 'graph')} in {_count(findings.regions, 'region')}, "
        f"{findings.unique_regions} unique; {_count(findings.variants, 'variant')} to compile."
    )


def footnote(findings: Findings) -> str:
    """What the figures mean."""
    return (
        "FLOPs: matrix products, convolutions and attention; backward FLOPs are what dropping the branch saves. Saved: "
        "bytes held for the backward, branch kept / dropped. Step cost: forward and backward FLOPs against rate 0, "
        f"without the optimizer; mean over samples of the pattern {findings.pattern!r} (granularity "
        f"{findings.granularity!r}, inner {findings.inner!r})."
    )


BRANCH_HEADERS = (
    *("branch", "count", "kind", "parameters", "trainable", "forward FLOPs", "backward FLOPs", "saved", "nodes pruned"),
    *("rate", "sensitivity"),
)


def branch_rows(findings: Findings) -> list[list[str]]:
    """A row of texts for each group of branches, under :data:`BRANCH_HEADERS`."""
    rows = []
    for group in group_branches(findings.branches):
        one = group.branches[0]
        row = [group.name, str(len(group.branches)), one.kind]
        row += [quantity(one.parameters), quantity(one.trainable_parameters)]
        if one.droppable:
            row += [quantity(one.forward_flops), quantity(one.backward_flops)]
            row += [f"{byte_quantity(one.saved_bytes_kept)} / {byte_quantity(one.saved_bytes_dropped)}"]
            row += [f"{one.gradient_nodes_pruned} of {one.gradient_nodes}", f"{one.rate:g}"]
        else:
            row += ["", "", "", "", "never dropped"]
        row.append("" if one.sensitivity is None else f"{one.sensitivity:.3g}")
        rows.append(row)
    return rows


def shown_columns(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the branches without the columns that say nothing for this model."""
    rows = branch_rows(findings)
    shown = [column for column in range(len(BRANCH_HEADERS)) if any(row[column] for row in rows)]
    return [BRANCH_HEADERS[column] for column in shown], [[row[column] for column in shown] for row in rows]


def branch_table(findings: Findings, style: str = "simple") -> str:
    """The branches, those of identical layers merged; columns that say nothing for this model are left out."""
    headers, rows = shown_columns(findings)
    if not rows:
        return "No residual branch was found."
    align = ["left" if header in ("branch", "kind") else "right" for header in headers]
    return tabulate(rows, headers, tablefmt=style, colalign=align, disable_numparse=True)


def prediction_table(findings: Findings, style: str = "simple") -> str:
    """Predicted cost and memory at a few rates and at the backend's own."""
    rates = sorted({*_SHOWN_RATES, findings.rate})
    rows = [
        [
            f"{prediction.rate:g}",
            f"{prediction.dropped:.3f}",
            quantity(prediction.forward_flops),
            quantity(prediction.backward_flops),
            f"{prediction.relative_cost:.3f}",
            byte_quantity(prediction.saved_bytes),
            f"{prediction.relative_memory:.3f}",
        ]
        for prediction in map(findings.predict, rates)
    ]
    headers = ["rate", "dropped", "forward FLOPs", "backward FLOPs", "step cost", "saved", "saved, relative"]
    return tabulate(rows, headers, tablefmt=style, colalign=["right"] * len(headers), disable_numparse=True)


def quantity(number: float) -> str:
    """A count in three digits and a prefix: 1.79T."""
    for scale, prefix in _SCALES:
        if number >= scale:
            return f"{_three_digits(number / scale)}{prefix}"
    return f"{number:g}"


def byte_quantity(number: float) -> str:
    """Bytes in three digits and a binary unit: 209 MiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**power:
            return f"{_three_digits(number / 2**power)} {unit}"
    return f"{number:.0f} B"


def _three_digits(number: float) -> str:
    decimals = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{decimals}f}"


def _count(number: int, word: str, plural: str = "") -> str:
    return f"{number} {word if number == 1 else plural or word + 's'}"


def as_dict(findings: Findings, rates: Iterable[float]) -> dict[str, Any]:
    """Every figure in plain Python types; ``version`` grows when a key changes its meaning or goes away."""
    return {
        "version": _JSON_VERSION,
        "model": findings.model,
        "given": dataclasses.asdict(findings.given),
        "versions": _torch.versions(),
        "granularity": findings.granularity,
        "rate": findings.rate,
        "inner": findings.inner,
        "pattern": findings.pattern,
        "parameters": findings.parameters,
        "trainable_parameters": findings.trainable_parameters,
        "graphs": findings.graphs,
        "regions": findings.regions,
        "unique_regions": findings.unique_regions,
        "variants": findings.variants,
        "branches": [dataclasses.asdict(branch) for branch in findings.branches],
        "predictions": [dataclasses.asdict(findings.predict(rate)) for rate in rates],
        "shortfall": list(findings.shortfall),
        "rejected": [{"add": name, "reason": reason} for name, reason in findings.rejected],
    }


def json_text(findings: Findings, rates: Iterable[float]) -> str:
    """:func:`as_dict` as JSON."""
    return json.dumps(as_dict(findings, rates), indent=1)


def dataframe(findings: Findings) -> pd.DataFrame:
    """The branches as a data frame.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "to_dataframe() needs pandas: pip install 'dropbp-fx[inspect]', or pip install pandas."
        ) from error
    columns = [field.name for field in dataclasses.fields(ExplainedBranch)]
    return pandas.DataFrame([dataclasses.asdict(branch) for branch in findings.branches], columns=columns)
