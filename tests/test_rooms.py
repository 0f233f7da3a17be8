"""How the package's modules may know of each other: imports have no cycle, and what is private to a backend stays so."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dropbp_fx

PACKAGE = Path(dropbp_fx.__file__).parent


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_in(tree: ast.Module, known: frozenset[str]) -> Iterator[str]:
    """Those of the ``known`` modules that are imported anywhere: in functions and under ``TYPE_CHECKING`` too.

    The packages around a module, which Python imports before it, do not count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "The package imports its modules by their full names."
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if name in known:
                    yield name
                elif node.module in known:
                    yield node.module


def import_graph() -> dict[str, set[str]]:
    """For each module of the package those of the package that it imports."""
    paths = modules()
    known = frozenset(paths)
    return {name: set(imports_in(ast.parse(path.read_text()), known)) for name, path in paths.items()}


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One cycle, ends included; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_one_that_imports_it() -> None:
    assert cycle_in(import_graph()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import package.low",
        "from package import low",
        "from package.low import thing",
        "def f():\n    from package.low import thing",
        "if TYPE_CHECKING:\n    from package import low",
    ],
)
def test_imports_are_found_wherever_they_are(source: str) -> None:
    known = frozenset({"package", "package.low"})
    assert set(imports_in(ast.parse(source), known)) == {"package.low"}
    assert cycle_in({"package.low": {"package.high"}, "package.high": {"package.low"}})


def test_the_graph_is_that_of_the_package() -> None:
    graph = import_graph()
    assert "dropbp_fx.inspect.explanation" in graph["dropbp_fx.inspect"]
    assert "dropbp_fx.inspect" in graph["dropbp_fx"]  # under TYPE_CHECKING
    assert "dropbp_fx._torch" in graph["dropbp_fx.inspect.tables"]


# ---- what the outer rooms read of a backend ------------------------------------------------------------------------------


def private_reads(tree: ast.Module) -> list[str]:
    """Private attributes that are read of anything but the object or class whose method reads it."""
    return [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]


@pytest.mark.parametrize("room", ["inspect", "integrations"])
def test_a_room_that_looks_at_backends_reads_public_names_only(room: str) -> None:
    foreign = {"_from_config"}  # of Transformers
    sources = sorted((PACKAGE / room).glob("*.py"))
    found = {path.name: set(private_reads(ast.parse(path.read_text()))) - foreign for path in sources}
    assert {name: names for name, names in found.items() if names} == {}


def test_private_reads_are_found() -> None:
    tree = ast.parse("self._own\ncls._own\nbackend._state.graphs\nself.backend._config\n_torch.hooks\nf().__doc__")
    assert sorted(private_reads(tree)) == ["_config", "_state"]


#: What each room may import, besides itself; what is in no room may import all of them.
MAY_IMPORT = {
    "_torch": set(),
    "graph": {"_torch", "values"},
    "runtime": {"_torch", "graph", "values"},
    "sensitivity": {"_torch", "graph", "runtime", "policy", "values"},
    "_distributed": {"_torch", "optimizer_steps", "sensitivity", "values"},
    "policy": {"_distributed", "sensitivity", "values"},
}
#: Of the room of sensitivities, what the policy and the agreement of ranks know: numbers by branch, and no graph.
NUMBERS = {"dropbp_fx.sensitivity.sensitivity", "dropbp_fx.sensitivity.running"}


def room_of(module: str) -> str:
    """The part of a module's name behind the package's."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_what_is_below_them(room: str) -> None:
    known = import_graph()
    for module in (name for name in known if room_of(name) == room):
        for imported in known[module] - {"dropbp_fx"}:
            other = room_of(imported)
            assert other == room or other in MAY_IMPORT[room], f"{module} imports {imported}"
            if other == "sensitivity" and room in ("policy", "_distributed"):
                assert imported in NUMBERS, f"{module} imports {imported}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_have_one_concern(path: Path) -> None:
    """More than 400 lines are more than one."""
    assert len(path.read_text().splitlines()) <= 400
