"""Draw a :class:`GraphView` with Graphviz: forward and backward side by side, a colour a branch, pruned nodes hollow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dropbp_fx.inspect.graph_view import GraphView, ViewNode
from dropbp_fx.inspect.tables import quantity

#: Colours of branches (Okabe and Ito's palette, told apart by the colour-blind too), in the order of a layer's branches.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_NEUTRAL = "#8a8f98"
_FORMATS = ("svg", "png", "pdf")


def render(view: GraphView, names: Mapping[int, str], title: str, path: Path, *, detail: bool = False) -> None:
    """Write the picture to ``path``, in the format its ending says: .svg, .png, .pdf, or .dot for the text.

    Args:
        view: what to draw.
        names: by branch index; what the legend calls it. The order gives the colours.
        title: goes above the picture.
        path: where to.
        detail: also draw edges from the forward to the backward: what is saved.

    Raises:
        ImportError: pydot is not installed.
        ValueError: another ending.
        RuntimeError: Graphviz is not installed, and the format needs it.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in (*_FORMATS, "dot"):
        raise ValueError(
            f"A graph is drawn as .svg, .png, .pdf or .dot, not {path.suffix!r}. Change the ending of {path.name!r}."
        )
    graph = _pydot_graph(view, names, title, detail)
    if kind == "dot":
        path.write_text(graph.to_string(), encoding="utf-8")
        return
    path.write_bytes(_layout(graph, kind))


def svg(view: GraphView, names: Mapping[int, str], title: str, *, detail: bool = False) -> str:
    """The picture as SVG text, without an XML header, to put into a page.

    Raises:
        ImportError: pydot is not installed.
        RuntimeError: Graphviz is not installed.
    """
    text = _layout(_pydot_graph(view, names, title, detail), "svg").decode()
    return text[text.index("<svg") :]


def can_draw() -> bool:
    """Whether Graphviz is installed."""
    return shutil.which("dot") is not None


def _layout(graph: Any, kind: str) -> bytes:
    if not can_draw():
        raise RuntimeError(
            f"Drawing a graph as .{kind} needs Graphviz, whose program 'dot' was not found. Install it (Debian and Ubuntu: "
            "apt install graphviz; macOS: brew install graphviz), or draw to a file ending in .dot."
        )
    return bytes(graph.create(prog="dot", format=kind))


def _pydot_graph(view: GraphView, names: Mapping[int, str], title: str, detail: bool) -> Any:
    try:
        import pydot
    except ImportError as error:
        raise ImportError(
            f"Drawing a graph needs pydot ({error}). Install the extra: pip install 'dropbp-fx[inspect]'."
        ) from error
    colour = {index: COLOURS[number % len(COLOURS)] for number, index in enumerate(names)}
    graph = pydot.Dot(
        "dropbp",
        graph_type="digraph",
        label=f'"{title}"',
        labelloc="t",
        fontname="Helvetica",
        fontsize="13",
        bgcolor="transparent",
        nodesep="0.15",
        ranksep="0.25",
        newrank="true",
    )
    graph.set_node_defaults(
        shape="box", style='"filled,rounded"', fontname="Helvetica", fontsize="10", margin='"0.08,0.03"', height="0.25"
    )
    graph.set_edge_defaults(arrowsize="0.5", color=f'"{_NEUTRAL}"', penwidth="0.8")
    sides = {
        False: pydot.Cluster(
            "forward", label="forward", fontname="Helvetica", fontsize="12", style="rounded", color=f'"{_NEUTRAL}"'
        ),
        True: pydot.Cluster(
            "backward", label="backward", fontname="Helvetica", fontsize="12", style="rounded", color=f'"{_NEUTRAL}"'
        ),
    }
    for node in view.nodes:
        sides[node.backward].add_node(pydot.Node(node.key, **_style(node, colour, names)))
    for cluster in sides.values():
        graph.add_subgraph(cluster)  # type: ignore[arg-type]
    found = {node.key: node for node in view.nodes}
    for source, target in view.edges:
        if found[source].backward != found[target].backward and not detail:
            continue  # what is saved has a double border instead
        graph.add_edge(pydot.Edge(source, target, **_edge_style(found[source], found[target])))
    graph.add_subgraph(_legend(pydot, names, colour))
    return graph


def _style(node: ViewNode, colour: Mapping[int, str], names: Mapping[int, str]) -> dict[str, Any]:
    own = _NEUTRAL if node.branch is None else colour.get(node.branch, _NEUTRAL)
    label = node.label + (f"\\n{quantity(node.flops)}FLOP" if node.flops else "")
    where = "" if node.branch is None else f" of {names.get(node.branch, '')}"
    style = {
        "label": f'"{label}"',
        "color": f'"{own}"',
        "tooltip": f'"{node.label}{where} {node.shape}{" (pruned)" if node.pruned else ""}"',
        "class": f'"{"pruned" if node.pruned else "kept"}"',
    }
    if node.pruned:
        return {**style, "style": '"dashed,rounded"', "fontcolor": f'"{own}"', "fillcolor": '"none"'}
    if node.saved:
        style["peripheries"] = "2"
    if node.kind == "gate":
        style["shape"] = "diamond"
        style["style"] = "filled"
    return {**style, "fillcolor": f'"{own}"', "fontcolor": '"white"'}


def _edge_style(source: ViewNode, target: ViewNode) -> dict[str, Any]:
    style: dict[str, Any] = {}
    if source.backward != target.backward:  # saved for the backward
        style = {"style": "dashed", "constraint": "false", "color": '"#56B4E9"'}
    if source.pruned or target.pruned:
        style |= {"style": "dotted", "color": '"#9aa0a8"'}
    return style


def _legend(pydot: Any, names: Mapping[int, str], colour: Mapping[int, str]) -> Any:
    filled = {"fillcolor": f'"{_NEUTRAL}"', "color": f'"{_NEUTRAL}"', "fontcolor": '"white"'}
    hollow = {"style": '"dashed,rounded"', "color": f'"{_NEUTRAL}"', "fontcolor": f'"{_NEUTRAL}"'}
    entries: list[tuple[str, dict[str, str]]] = [
        (name, {**filled, "fillcolor": f'"{colour[index]}"', "color": f'"{colour[index]}"'})
        for index, name in names.items()
    ]
    entries += [("the stream", filled), ("pruned", hollow), ("saved for the backward", {**filled, "peripheries": "2"})]
    legend = pydot.Cluster("legend", label="", style="invis")
    for number, (label, style) in enumerate(entries):
        legend.add_node(pydot.Node(f"legend_{number}", label=f'"{label}"', **style))
    for below in range(1, len(entries)):
        legend.add_edge(pydot.Edge(f"legend_{below - 1}", f"legend_{below}", style="invis"))
    return legend
