"""An explanation as one self-contained page. The page is ``report.html.j2``; this module hands it its figures."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from dropbp_fx import _torch
from dropbp_fx.inspect import draw, heatmap, tables
from dropbp_fx.inspect.figures import RATES
from dropbp_fx.inspect.findings import Findings
from dropbp_fx.version import __version__

#: Layers with more branches than this show single drops only, not every variant.
_EVERY_VARIANT = 3


def html(findings: Findings, layer: str | None, svg: Callable[..., str]) -> str:
    """The page as text.

    Args:
        findings: what it shows.
        layer: the layer whose graph is shown; the first one with a droppable branch if ``None``.
        svg: draws that graph, given the ``layer`` and the indices of the branches that are ``dropped``.

    Raises:
        ImportError: jinja2 or pydot is not installed.
        KeyError: there is no such layer.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(
            f"The report needs jinja2 ({error}). Install the extra: pip install 'dropbp-fx[inspect]'."
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dropbp_fx.inspect", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    predictions = [findings.predict(rate) for rate in RATES]
    graphs, no_graph = _graphs(findings, layer, svg)
    headers, rows = _table(findings)
    return environment.get_template("report.html.j2").render(
        explanation=findings,
        given=findings.given,
        settings=_settings(findings),
        breakable=_breakable,
        headers=headers,
        rows=rows,
        quantity=tables.quantity,
        cost_points=_points([prediction.relative_cost for prediction in predictions]),
        memory_points=_points([prediction.relative_memory for prediction in predictions]),
        graphs=graphs,
        no_graph=no_graph,
        grid=heatmap.grid(findings),
        values={value: label for value, label in heatmap.VALUES.items() if _known(findings, value)},
        data={
            "predictions": [
                {
                    "rate": prediction.rate,
                    "dropped": prediction.dropped,
                    "cost": prediction.relative_cost,
                    "memory": prediction.relative_memory,
                    "forward": prediction.forward_flops,
                    "backward": prediction.backward_flops,
                    "bytes": prediction.saved_bytes,
                }
                for prediction in predictions
            ],
            "heat": _heat(findings),
        },
    )


#: What columns of the branches' table are called where there is room, and the unit that their figures get.
_COLUMNS = {
    "trainable": ("trainable parameters", ""),
    "forward FLOPs": ("forward", "FLOPs"),
    "backward FLOPs": ("backward, if kept", "FLOPs"),
    "saved": ("held for the backward, kept / dropped", ""),
    "nodes pruned": ("backward operators pruned", ""),
    "rate": ("drop rate", ""),
}


def _table(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the branches, every figure with its unit."""
    headers, rows = tables.shown_columns(findings)
    columns = [_COLUMNS.get(header, (header, "")) for header in headers]
    return [header for header, _ in columns], [
        [_with_unit(cell, unit) for cell, (_, unit) in zip(row, columns, strict=True)] for row in rows
    ]


def _with_unit(text: str, unit: str) -> str:
    """43.8G becomes 43.8 GFLOPs."""
    return re.sub(r"^([\d.]+)([a-zA-Z]?)$", rf"\1 \2{unit}", text) if unit else text


def _settings(findings: Findings) -> dict[str, str]:
    """What else decides the figures, by name."""
    versions = {"dropbp_fx": __version__, **_torch.versions()}
    return {
        "dropped": "single branches" if findings.granularity == "branch" else "all branches of a layer together",
        "pattern": findings.pattern,
        "inner compiler": findings.inner,
        "graphs": f"{findings.graphs}, regions: {findings.regions}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _breakable(name: str) -> Any:
    """A dotted name, which may go on in the next line behind each dot."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in re.split(r"(?<!\.)\.(?!\.)", name))


def _points(values: list[float]) -> str:
    """A curve over the rates for an SVG polyline in a box of 100 x 100, 0 at the bottom."""
    return " ".join(f"{100 * rate:.1f},{100 - 100 * value:.2f}" for rate, value in zip(RATES, values, strict=True))


def _known(findings: Findings, value: str) -> bool:
    return any(heatmap.figure_of(branch, value) is not None for branch in findings.branches)


def _heat(findings: Findings) -> dict[str, list[list[float | None]]]:
    cells = heatmap.grid(findings).cells
    return {
        value: [[None if cell is None else heatmap.figure_of(cell, value) for cell in row] for row in cells]
        for value in heatmap.VALUES
        if _known(findings, value)
    }


def _graphs(findings: Findings, layer: str | None, svg: Callable[..., str]) -> tuple[list[dict[str, Any]], str]:
    """The pictures of a layer's variants, each with a title; or how to get some."""
    layers = findings.layers()
    if not layers:
        return [], ""
    if not draw.can_draw():
        return [], (
            "Where Graphviz is installed (Debian and Ubuntu: apt install graphviz; macOS: brew install graphviz), a report "
            "also has a picture of a layer's graph."
        )
    layer = layers[0] if layer is None else layer
    mine = [branch for branch in findings.droppable if branch.layer == layer]
    return [
        {
            "title": ", ".join(branch.kind for branch in pattern) + " dropped" if pattern else "nothing dropped",
            "names": [branch.name for branch in pattern],
            "svg": _inline(svg(layer=layer, dropped=[branch.index for branch in pattern])),
        }
        for pattern in _variants(mine)
    ], ""


def _variants(branches: list[Any]) -> Iterator[tuple[Any, ...]]:
    most = len(branches) if len(branches) <= _EVERY_VARIANT else 1
    for count in range(most + 1):
        yield from itertools.combinations(branches, count)


def _inline(svg: str) -> Any:
    """An SVG to put into a page beside others: without ids, and as wide as there is room, if it can then be read."""
    from markupsafe import Markup

    svg = re.sub(r' id="[^"]*"', "", svg)
    width, height = re.search(r'width="(\d+)pt" height="(\d+)pt"', svg).groups()  # type: ignore[union-attr]
    wide = round(int(width) * 1.1)
    size = f'style="width:{wide}px;min-width:{round(0.75 * wide)}px" role="img"'
    return Markup(svg.replace(f'width="{width}pt" height="{height}pt"', size, 1))  # Graphviz escapes what it is given
