"""The reference has every public name, links resolve, quoted messages are the package's; nothing is built here."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dropbp_fx

pytest.importorskip("sphinx")
DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
public_api: ModuleType = importlib.import_module("public_api")
sys.path.remove(str(DOCS / "_ext"))

#: What users import from. All other modules are the package's own affair.
MODULES = ("dropbp_fx", "dropbp_fx.distributed", "dropbp_fx.inspect", "dropbp_fx.integrations.transformers")


@pytest.fixture(scope="module")
def page() -> str:
    return str(public_api.expanded((DOCS / "reference.md").read_text()))


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_reference(name: str, page: str) -> None:
    if name.endswith("transformers"):
        pytest.importorskip("transformers")
    shown = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)\.(\w+)$", page, re.MULTILINE)
    module, documented = importlib.import_module(name), [getattr(importlib.import_module(m), n) for m, n in shown]
    # By identity: what two modules offer needs one place only.
    missing = [n for n in public_api.names(module) if not any(getattr(module, n) is value for value in documented)]
    assert not missing, f"Name them in a public-api block of docs/reference.md: {missing}"


def test_every_member_of_the_backend_is_shown(page: str) -> None:
    backend = dropbp_fx.DropBPBackend
    assert public_api.members(backend) == public_api.public_members(backend), "what has no docstring is not shown"
    (line,) = re.findall(r"autoclass:: dropbp_fx\.DropBPBackend\n   :members: (.*)", page)
    assert set(line.split(", ")) == {
        name
        for name in dir(backend)
        if name[0] != "_" and (isinstance(value := inspect.getattr_static(backend, name), property) or callable(value))
    }
    assert {"calibrate", "rates", "progress"} <= set(line.split(", "))


def test_public_means_all_or_what_a_module_defines() -> None:
    module = ModuleType("some_module")
    exec("import re\nfrom pathlib import Path\ndef open_one(): ...\ndef _hidden(): ...\nSIZE = 3", vars(module))
    assert public_api.names(module) == ["open_one"]
    module.__dict__["__all__"] = ["SIZE"]
    assert public_api.names(module) == ["SIZE"]


def test_a_block_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="dropbp_fx has no public name 'Branches'"):
        public_api.expanded("```{public-api} dropbp_fx\nBranch Branches\n```\n")


def test_the_messages_that_troubleshooting_quotes_are_the_packages() -> None:
    said = [
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in text.values)
        if isinstance(text, ast.JoinedStr)
        else text.value
        for path in Path(dropbp_fx.__file__).parent.rglob("*.py")
        for text in ast.walk(ast.parse(path.read_text()))
        if isinstance(text, ast.JoinedStr) or (isinstance(text, ast.Constant) and isinstance(text.value, str))
    ]
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = [quote for quote in re.findall(r"^\| `([^`]+)`", page, re.MULTILINE) if quote.count(" ") > 1]
    assert len(quoted) > 25
    unknown = [quote for quote in quoted if not any(quote in text for text in said)]
    assert not unknown, f"No message of the package has these words; mend docs/troubleshooting.md: {unknown}"


ROOT = DOCS.parent
PAGES = sorted(page for page in (*ROOT.glob("*.md"), *DOCS.rglob("*.md")) if "_build" not in page.parts)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub and the site make them."""
    headings = re.findall(
        r"^#{1,4} (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_resolves(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if not name.startswith("http"):
            target = page.parent / name if name else page
            assert target.exists(), f"{link}: there is no {target}"
            assert not anchor or anchor in anchors(target), f"{link}: {target.name} has {sorted(anchors(target))}"


def test_pages_named_in_the_code_exist() -> None:
    for folder in ("dropbp_fx", "benchmarks", "examples", "tests", "docs/_ext"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"docs/[\w/-]+\.(?:md|svg)\b", path.read_text()):
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize(
    "page",
    [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"],
    ids=lambda page: page.name,
)
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*\.py)`", page.read_text()))
    bases = (ROOT, ROOT / "dropbp_fx", ROOT / "dropbp_fx" / "graph", ROOT / "dropbp_fx" / "_torch", ROOT / "examples")
    assert [name for name in sorted(named) if not any((base / name).exists() for base in bases)] == []
