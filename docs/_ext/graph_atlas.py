"""The directive ``graph-atlas``: the explanation of a model family, table and picture, made when the site is built.

``````
```{graph-atlas} t5
:dropped: 1
```
``````

takes a family of the test matrix; with ``:type:`` the argument is a Hugging Face model type, and ``:set:``, ``:batch:``,
``:seq:`` and ``:dtype:`` are those of ``dropbp-fx explain``. ``{graph-atlas-families}`` has a section for every family.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import families
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dropbp_fx.inspect import Explanation, tables


class GraphAtlas(SphinxDirective):
    """One family."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {
        "type": directives.flag,
        "set": directives.unchanged,
        "batch": directives.positive_int,
        "seq": directives.positive_int,
        "dtype": lambda text: directives.choice(text, ("float32", "bfloat16", "float16")),
        "dropped": directives.nonnegative_int,
        "no-picture": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        """The table and the picture."""
        if "type" in self.options:
            explanation = families.explain_model_type(
                self.arguments[0],
                self.options.get("set", "").split(),
                batch=self.options.get("batch", 1),
                tokens=self.options.get("seq", 512),
                dtype=self.options.get("dtype", "bfloat16"),
            )
        else:
            explanation = families.explain_family(self.arguments[0])
        picture = "no-picture" not in self.options
        return rendered(explanation, self.options.get("dropped", 0) if picture else None)


class GraphAtlasFamilies(SphinxDirective):
    """A section for every family of the test matrix."""

    def run(self) -> list[nodes.Node]:
        """The sections, in the order of the matrix."""
        found: list[nodes.Node] = []
        for name in families.families():
            section = nodes.section(ids=[nodes.make_id(f"family-{name}")])
            section += nodes.title(text=name)
            try:
                section += rendered(families.explain_family(name), 0)
            except RuntimeError as error:  # a forward that depends on the values of its inputs
                section += nodes.paragraph(text=f"Not to be explained without data: {error}")
            found.append(section)
        return found


def rendered(explanation: Explanation, dropped: int | None) -> list[nodes.Node]:
    """The explanation as docutils nodes; ``dropped`` is the branch of the drawn layer that the picture drops."""
    headers, rows = tables.shown_columns(explanation)
    found: list[nodes.Node] = [nodes.paragraph(text=tables.headline(explanation)), _table(headers, rows)]
    layers = explanation.layers()
    if dropped is not None and layers:
        layer = next((one for one in layers if len(_of(explanation, one)) > 1), layers[0])
        mine = _of(explanation, layer)
        chosen = mine[min(dropped, len(mine) - 1)]
        svg = explanation.to_svg(layer=layer, dropped=[chosen])
        found.append(_folded(f"The graph of {layer} with {chosen} dropped", svg))
    return found


def _of(explanation: Explanation, layer: str) -> list[str]:
    return [branch.name for branch in explanation.droppable if branch.layer == layer]


def _table(headers: list[str], rows: list[list[str]]) -> nodes.Node:
    group = nodes.tgroup(cols=len(headers))
    group += [nodes.colspec(colwidth=1) for _ in headers]
    head, body = nodes.thead(), nodes.tbody()
    for part, lines in ((head, [headers]), (body, rows)):
        for line in lines:
            row = nodes.row()
            for text in line:
                entry = nodes.entry()
                entry += nodes.paragraph(text=text)
                row += entry
            part += row
    group += [head, body]
    table = nodes.table(classes=["atlas"])
    table += group
    return table


def _folded(title: str, svg: str) -> nodes.Node:
    svg = re.sub(r' id="[^"]*"', "", svg)
    svg = re.sub(
        r'<svg width="(\d+)pt" height="\d+pt"', r'<svg style="width:\1px;max-width:100%;height:auto"', svg, count=1
    )
    rules = ".atlas-graph text:not([fill]){fill:var(--color-foreground-primary)}.atlas-graph a{text-decoration:none}"
    style = f"<style>{rules} table.atlas{{font-size:.8em}}</style>"
    body = f'{style}<div style="overflow-x:auto">{svg}</div>'
    text = f'<details class="atlas-graph"><summary>{title}</summary>{body}</details>'
    return nodes.raw("", text, format="html")


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.add_directive("graph-atlas", GraphAtlas)
    app.add_directive("graph-atlas-families", GraphAtlasFamilies)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
