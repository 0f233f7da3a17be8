"""The reference, made from what the modules say is public: their ``__all__``, or all names without an underscore.

A page asks for a module, or for some of its names:

``````
```{public-api} dropbp_fx
dropbp_backend DropBPBackend
```
``````

and gets an autodoc directive for each, classes with every member that has a docstring. ``tests/test_reference.py`` holds the
pages against the modules.
"""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx

_BLOCK = re.compile(r"^```\{public-api\} (?P<module>\S+)\n(?P<names>.*?)^```$", re.MULTILINE | re.DOTALL)


def names(module: ModuleType) -> list[str]:
    """The public names of a module."""
    stated = getattr(module, "__all__", None)
    if stated is not None:
        return list(stated)
    # What it imports is not its own.
    return [name for name, value in vars(module).items() if name[0] != "_" and _home(value) == module.__name__]


def members(cls: type) -> list[str]:
    """The public methods and properties of a class that a page shows: those with a docstring."""
    return [name for name in public_members(cls) if inspect.getdoc(inspect.getattr_static(cls, name))]


def public_members(cls: type) -> list[str]:
    """The public methods and properties that a class of this package defines or takes over from another one of it.

    What it overrides of another package's class, such as the events of a callback, is that package's to document.
    """
    found: dict[str, None] = {}
    foreign = {name for base in cls.__mro__ if not base.__module__.startswith("dropbp_fx") for name in vars(base)}
    for base in cls.__mro__:
        if base.__module__.startswith("dropbp_fx"):
            found |= {name: None for name, value in vars(base).items() if name[0] != "_" and _is_member(value)}
    return [name for name in found if name not in foreign]


def expanded(text: str) -> str:
    """The text of a page with autodoc directives in place of its ``public-api`` blocks.

    Raises:
        ValueError: a block names what its module does not offer.
    """

    def block(match: re.Match[str]) -> str:
        module = importlib.import_module(match["module"])
        chosen = match["names"].split() or names(module)
        unknown = sorted(set(chosen) - set(names(module)))
        if unknown:
            raise ValueError(f"{module.__name__} has no public name {unknown[0]!r}. Mend the page's public-api block.")
        lines = [line for name in chosen for line in _directive(module, name)]
        return "\n".join(["```{eval-rst}", *lines, "```"])

    return _BLOCK.sub(block, text)


def _directive(module: ModuleType, name: str) -> list[str]:
    value, full = getattr(module, name), f"{module.__name__}.{name}"
    if inspect.isclass(value):
        if issubclass(value, BaseException):
            return [f".. autoexception:: {full}"]
        shown = members(value)
        return [f".. autoclass:: {full}", *([f"   :members: {', '.join(shown)}"] if shown else [])]
    if callable(value):
        return [f".. autofunction:: {full}"]
    return [f".. py:data:: {full}", f"   :type: {type(value).__name__}"]


def _home(value: Any) -> str | None:
    return value.__module__ if inspect.isclass(value) or inspect.isroutine(value) else None


def _is_member(value: Any) -> bool:
    return isinstance(value, (property, classmethod, staticmethod)) or inspect.isroutine(value)


def _read(_app: Sphinx, _page: str, source: list[str]) -> None:
    source[0] = expanded(source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.connect("source-read", _read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
