"""The models of the graph atlas: every family that the tests train, and any Hugging Face model type.

A family is a builder of a small model and a function that calls it, both from the test matrix, so that a family that is
tested is documented too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import dropbp_fx
from dropbp_fx import _torch
from dropbp_fx.inspect import Explanation, huggingface, tables

_ROOT = Path(__file__).parent.parent.parent
#: Columns that are the same in every row of the atlas: everything is trained, at the default rate.
_LEFT_OUT = ("trainable", "rate")
_SOURCES = ("dropbp_fx/**/*.py", "tests/matrix.py", "docs/_ext/*.py")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the atlas shows of a family, in plain Python types.

    Attributes:
        headline: a sentence on the model, or why it could not be explained.
        headers: of the table of branches.
        rows: of that table.
        caption: what the picture shows; empty without one.
        svg: the picture.
    """

    headline: str
    headers: list[str] = dataclasses.field(default_factory=list)
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    caption: str = ""
    svg: str = ""


class _Called(Exception):
    """Carries the arguments that a loss function calls its model with."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.arguments = args, kwargs


def _record(*args: Any, **kwargs: Any) -> Any:
    raise _Called(args, kwargs)


def matrix() -> Any:
    """The test matrix; imported when it is needed, because it imports torch and transformers."""
    return importlib.import_module("tests.matrix")


def explain_family(name: str) -> Explanation:
    """Explain a family of the test matrix."""
    family = matrix().family(name)
    try:
        family.loss(_record)
    except _Called as called:
        args, kwargs = called.arguments
    else:
        raise TypeError(f"The loss of the family {name!r} did not call its model.")
    return dropbp_fx.explain(family.build().train(), *args, **kwargs)


def explain_model_type(model_type: str, settings: list[str], *, batch: int, tokens: int, dtype: str) -> Explanation:
    """Explain a Hugging Face model type, as ``dropbp-fx explain`` does."""
    model, inputs = huggingface.build(model_type, settings, batch=batch, tokens=tokens, dtype=dtype, lora_rank=0)
    return dropbp_fx.explain(model, **inputs)


def entry_of(explanation: Explanation, dropped: int | None) -> Entry:
    """What is shown of an explanation; ``dropped`` is the branch of the drawn layer that the picture drops."""
    headers, rows = tables.shown_columns(explanation)
    shown = [column for column, header in enumerate(headers) if header not in _LEFT_OUT]
    entry = Entry(tables.headline(explanation), [headers[c] for c in shown], [[row[c] for c in shown] for row in rows])
    layers = explanation.layers()
    if dropped is None or not layers:
        return entry
    layer = next((one for one in layers if len(_of(explanation, one)) > 1), layers[0])
    mine = _of(explanation, layer)
    chosen = mine[min(dropped, len(mine) - 1)]
    svg = explanation.to_svg(layer=layer, dropped=[chosen])
    return dataclasses.replace(entry, caption=f"The graph of {layer} with {chosen} dropped", svg=svg)


def _of(explanation: Explanation, layer: str) -> list[str]:
    return [branch.name for branch in explanation.droppable if branch.layer == layer]


def _entry_of_family(name: str) -> Entry:
    try:
        return entry_of(explain_family(name), 0)
    except RuntimeError as error:  # a forward that depends on the values of its inputs
        return Entry(f"Not to be explained without data: {error}")


def update(store: Path, processes: int) -> None:
    """Explain every family into the file ``store``, unless it is there and no source has changed since."""
    sources = sorted(path for pattern in _SOURCES for path in _ROOT.glob(pattern))
    texts = b"".join(path.read_bytes() for path in sources)
    state = hashlib.sha256(texts + repr(_torch.versions()).encode()).hexdigest()
    kept = json.loads(store.read_text()) if store.exists() else {}
    if kept.get("state") == state:
        return
    names = [family.name for family in matrix().FAMILIES]  # imported once: the processes are forks of this one
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        found = dict(zip(names, map(dataclasses.asdict, pool.map(_entry_of_family, names)), strict=True))
    store.write_text(json.dumps({"state": state, "entries": found}))


def read(store: Path, kinds: Sequence[str]) -> dict[str, Entry]:
    """The entries of the families of some kinds, in the order of the matrix, as :func:`update` wrote them."""
    found = json.loads(store.read_text())["entries"]
    return {family.name: Entry(**found[family.name]) for family in matrix().FAMILIES if family.kind in kinds}
