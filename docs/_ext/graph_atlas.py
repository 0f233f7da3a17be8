"""The directive ``graph-atlas``: the explanation of a model family, table and picture, made when the site is built.

``````
```{graph-atlas} llama
:set: num_hidden_layers=2
:dropped: 1
```
``````

takes a Hugging Face model type; ``:set:``, ``:batch:``, ``:seq:`` and ``:dtype:`` are those of ``dropbp-fx explain``.
``{graph-atlas-families}`` has a section for every family of the test matrix that is of the kinds named.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, ClassVar

import families
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_STORE = "graph_atlas.json"
#: Tracing every family takes minutes.
_WITH_FAMILIES = os.environ.get("DOCS_ATLAS", "1") != "0"


class GraphAtlas(SphinxDirective):
    """One Hugging Face model type."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {
        "set": directives.unchanged,
        "batch": directives.positive_int,
        "seq": directives.positive_int,
        "dtype": lambda text: directives.choice(text, ("float32", "bfloat16", "float16")),
        "dropped": directives.nonnegative_int,
    }

    def run(self) -> list[nodes.Node]:
        """The table and the picture."""
        explanation = families.explain_model_type(
            self.arguments[0],
            self.options.get("set", "").split(),
            batch=self.options.get("batch", 1),
            tokens=self.options.get("seq", 512),
            dtype=self.options.get("dtype", "bfloat16"),
        )
        return rendered(families.entry_of(explanation, self.options.get("dropped", 0)))


class GraphAtlasFamilies(SphinxDirective):
    """A section for every family of the test matrix whose kind is one of the arguments, which are parted by commas."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The sections, in the order of the matrix."""
        if not _WITH_FAMILIES:
            return [nodes.paragraph(text="This build leaves the families out (DOCS_ATLAS=0).")]
        kinds = [kind.strip() for kind in self.arguments[0].split(",")]
        found: list[nodes.Node] = []
        for name, entry in families.read(Path(self.env.doctreedir) / _STORE, kinds).items():
            section = nodes.section(ids=[nodes.make_id(f"family-{name}")])
            section += nodes.title(text=name)
            section += rendered(entry)
            found.append(section)
        return found


def explain_all(app: Sphinx, _env: Any, outdated: list[str]) -> None:
    """Explain every family before the pages are read, in as many processes as Sphinx may use."""
    if _WITH_FAMILIES and any(name.startswith("atlas/") for name in outdated):
        families.update(Path(app.doctreedir) / _STORE, app.parallel)


def rendered(entry: families.Entry) -> list[nodes.Node]:
    """An entry as docutils nodes."""
    found: list[nodes.Node] = [nodes.paragraph(text=entry.headline)]
    if entry.rows:
        found.append(_table(entry.headers, entry.rows))
    if entry.svg:
        found.append(_folded(entry.caption, entry.svg))
    return found


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
    text = f'<details class="atlas-graph"><summary>{title}</summary><div>{svg}</div></details>'
    return nodes.raw("", text, format="html")


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.add_directive("graph-atlas", GraphAtlas)
    app.add_directive("graph-atlas-families", GraphAtlasFamilies)
    app.connect("env-before-read-docs", explain_all)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
