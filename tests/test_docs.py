"""The code in the README and in the documentation runs, and the output shown is the output there is.

Blocks of a page share one namespace, in order. ``<!-- python ... -->`` is code that runs and is not shown. The commands of a
``console`` block are run; what is shown of their output is compared on the torch version of ``constraints.txt`` only.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from dropbp_fx.inspect import cli
from tests.matrix import FAMILIES

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in path.parts and re.search(r"^```(python|console)$", path.read_text(), re.MULTILINE)
)
BLOCK = re.compile(r"^```(?P<kind>python|console)\n(?P<code>.*?)^```$|^<!-- python\n(?P<hidden>.*?)^-->$", re.M | re.S)
PINNED = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Kind, text and line of every block."""
    text = page.read_text()
    return [
        (match["kind"] or "python", match["code"] or match["hidden"], text[: match.start()].count("\n") + 2)
        for match in BLOCK.finditer(text)
    ]


def test_every_page_with_code_is_found() -> None:
    names = {page.name for page in PAGES}
    assert {
        "README.md",
        "tutorial.md",
        "choosing.md",
        "trainer.md",
        "peft.md",
        "distributed.md",
        "policy.md",
        "debugging.md",
    } <= names


def test_the_atlas_shows_every_kind_of_family_once() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "atlas").glob("*.md"))
    shown = [kind.strip() for kinds in re.findall(r"\{graph-atlas-families\} (.*)", pages) for kind in kinds.split(",")]
    assert sorted(shown) == sorted({family.kind for family in FAMILIES})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    for kind, code, line in blocks(page):
        if kind == "python":
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
        else:
            check_console(code)


def check_console(text: str) -> None:
    """Run ``$ dropbp-fx ...`` (lines may go on after a backslash) and compare what it prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = re.sub(r"\\\n\s*", " ", part).partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "dropbp-fx", f"only dropbp-fx is run: {command}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert cli.main(arguments) == 0, command
        assert PINNED is not None
        if shown.strip() and torch.__version__.split("+")[0] == PINNED[1]:
            assert printed.getvalue().split() == shown.split(), f"{command} now prints:\n{printed.getvalue()}"
