"""Every private name of PyTorch that the package uses is in one registry, and is used in one room."""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

import dropbp_fx
from dropbp_fx import _torch
from dropbp_fx._torch.registry import Hook

PACKAGE = Path(dropbp_fx.__file__).parent
ROOM = PACKAGE / "_torch"
REGISTERED = {hook.name for hook in _torch.HOOKS}


#: Private names of Transformers.
OTHERS = {"_from_config"}


@dataclasses.dataclass(frozen=True)
class Use:
    """A name of PyTorch that a source file uses, and where."""

    path: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(PACKAGE.parent)}:{self.line}: {self.name}"


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def is_module(name: str) -> bool:
    """Whether a full name is that of a module: a way to names, not one by itself."""
    parent, _, last = name.rpartition(".")
    try:
        return isinstance(getattr(importlib.import_module(parent), last, None), ModuleType) or bool(
            importlib.import_module(name)
        )
    except ImportError:
        return False


def chain(node: ast.expr) -> str | None:
    """``a.b.c`` as a string, ``None`` for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = chain(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def within(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module, class or function, without those of functions inside of it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from within(child)


def names_of_torch(path: Path, scope: ast.AST, outer: Mapping[str, str] | None = None) -> Iterator[Use]:
    """What a file imports from PyTorch's modules, and the chains of attributes that start at one of them."""
    known = dict(outer or {})
    nodes = list(within(scope))
    for node in nodes:
        module = node.module or "" if isinstance(node, ast.ImportFrom) else None
        for name in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            full = name.name if module is None else f"{module}.{name.name}"
            if full.split(".")[0] in ("torch", "functorch"):
                bound = name.asname or (name.name if module is not None else full.split(".")[0])
                known[bound] = full if name.asname or module is not None else bound
                yield Use(path, node.lineno, full)
    inner = {node.value for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and node not in inner and (text := chain(node)) is not None:
            root, _, rest = text.partition(".")
            if root in known:
                yield Use(path, node.lineno, f"{known[root]}.{rest}")
        elif isinstance(node, ast.Call) and (text := chain(node.func)) is not None and text.endswith("config.patch"):
            settings = [word.arg for word in node.keywords if text.split(".")[0] in known]
            yield from (Use(path, node.lineno, f"{known[text.split('.')[0]]}.{name}") for name in settings)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from names_of_torch(path, node, known)


def private_attributes(path: Path, tree: ast.Module) -> Iterator[Use]:
    """Private attributes of anything, whether written as such or as a string that is looked up."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield Use(path, node.lineno, node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            word = node.args[1]
            looks_up = node.func.id in ("getattr", "hasattr", "setattr", "delattr")
            if looks_up and isinstance(word, ast.Constant) and is_private(str(word.value)):
                yield Use(path, node.lineno, str(word.value))


def own_names(tree: ast.Module) -> Iterator[str]:
    """What a file defines: functions, classes, fields, and attributes that are set on ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and chain(node.value) == "self":
            yield node.attr


def sources() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


def used_names() -> list[Use]:
    """Every private name of PyTorch that the package reaches through PyTorch's modules."""
    uses = [use for path, tree in sources() for use in names_of_torch(path, tree) if is_private(use.name)]
    return [use for use in uses if not is_module(use.name)]


def is_registered(name: str) -> bool:
    return name in REGISTERED or any(name.startswith(f"{hook}.") for hook in REGISTERED)


def test_every_private_name_is_registered() -> None:
    uses = used_names()
    assert len({use.name for use in uses}) > 40  # the search works
    assert [str(use) for use in uses if not is_registered(use.name)] == []


def test_private_names_are_used_in_one_room_only() -> None:
    assert [str(use) for use in used_names() if not use.path.is_relative_to(ROOM)] == []


def test_no_other_file_goes_through_private_modules() -> None:
    uses = [use for path, tree in sources() for use in names_of_torch(path, tree) if not path.is_relative_to(ROOM)]
    assert [str(use) for use in uses if is_private(use.name)] == []


def test_private_attributes_are_the_packages_own_or_registered() -> None:
    files = sources()
    own = {name for path, tree in files for name in own_names(tree)} | {"_torch"} | OTHERS
    registered = {part for name in REGISTERED for part in name.split(".")}
    uses = [use for path, tree in files for use in private_attributes(path, tree) if use.name not in own]
    outside = [use for use in uses if use.name not in registered or not use.path.is_relative_to(ROOM)]
    assert [str(use) for use in outside] == []


def test_this_pytorch_has_every_hook_that_is_needed() -> None:
    assert [name for name, found in _torch.hooks().items() if not found] == []


def test_hooks_are_listed_once_and_say_what_for() -> None:
    assert len(REGISTERED) == len(_torch.HOOKS)
    assert all(hook.why and hook.checked for hook in _torch.HOOKS)


@pytest.mark.parametrize(
    ("module", "attribute", "there"),
    [
        ("torch", "Tensor._use_count", True),
        ("torch._ops", "OpOverload._schema", True),  # set on instances
        ("functorch.compile", "make_boxed_func._boxed_call", True),  # set on what the function makes
        ("torch", "Tensor._gone", False),
        ("torch", "_gone._further", False),
        ("torch._gone", "anything", False),
    ],
)
def test_a_hook_is_looked_up(module: str, attribute: str, there: bool) -> None:
    assert Hook(module, attribute, "to be looked up").is_there() is there


def test_optional_hooks_are_no_fault() -> None:
    optional = [hook for hook in _torch.HOOKS if hook.optional]
    assert optional
    assert not {hook.name for hook in optional} & set(_torch.hooks())


def test_a_private_name_that_nobody_registered_is_found() -> None:
    """The search sees imports, aliases, chains, settings and look-ups by a string."""
    text = """
import torch
from torch._somewhere import thing
from torch import autograd
from torch._functorch import config
torch._C._nothing(1)
autograd._engine.run()
config.patch(unknown_setting=1)
getattr(torch, "_by_string")
"""
    tree = ast.parse(text)
    found = {use.name for use in names_of_torch(PACKAGE, tree) if is_private(use.name) and not is_module(use.name)}
    assert found == {
        "torch._somewhere.thing",
        "torch._C._nothing",
        "torch.autograd._engine.run",
        "torch._functorch.config.patch",
        "torch._functorch.config.unknown_setting",
    }
    assert not any(is_registered(name) for name in found - {"torch._functorch.config.patch"})
    assert "_by_string" in {use.name for use in private_attributes(PACKAGE, tree)}
    assert not hasattr(torch, "_by_string")
