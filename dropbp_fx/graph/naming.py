"""Readable, stable names for residual branches, from the module tree Dynamo records on every node."""

from __future__ import annotations

import dataclasses
import itertools
import re
import weakref
from collections import Counter
from collections.abc import Sequence

from torch import Tensor, fx, nn

from dropbp_fx import _torch
from dropbp_fx.graph.branch import ResidualBranch

_ROOT = re.compile(r"^[LG]\[['\"](?P<root>\w+)['\"]\]")
#: What Dynamo calls the compiled module: ``self`` in its own frame, ``fn`` around one of torch.nn's, the first of ``args``
#: in that of a decorator around its forward.
_COMPILED = re.compile(r"^[LG]\[['\"](self['\"]|fn['\"]|args['\"]\]\[0)\]")
#: Where a module keeps what a graph input may be.
_KIND = re.compile(r"\._(parameters|buffers)\b")
_INDEX = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")


@dataclasses.dataclass(frozen=True)
class BranchName:
    """How a branch is called: ``name`` is unique within its graph, ``layer`` is shared by the branches of one layer."""

    name: str
    layer: str

    def below(self, prefix: str) -> BranchName:
        """The same branch seen from a module that holds this graph's at ``prefix``."""
        if not prefix:
            return self
        alone = self.layer == self.name and prefix.rpartition(".")[2].isdigit()  # the graph is a layer, in a list
        return BranchName(f"{prefix}.{self.name}", prefix if alone else f"{prefix}.{self.layer}")


class ModuleTree:
    """The outermost modules of the graphs seen so far, and models that were registered.

    After a graph break, or where layers are compiled one by one, Dynamo hands over a part of a model as a graph of its
    own, whose paths start at that part; its branches are named from the model, if the model was seen before.
    """

    def __init__(self) -> None:
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def outermost(self) -> list[nn.Module]:
        """The modules seen so far that are part of no other one, those that are still there."""
        return list(self._roots)

    def roots_around(self, module: nn.Module) -> list[nn.Module]:
        """``module`` and the modules seen before that hold it."""
        return [module, *(root for root in list(self._roots) if root is not module and module in set(root.modules()))]

    def register(self, model: nn.Module) -> None:
        """Name what belongs to ``model`` from there on after its place in it."""
        parts = set(map(id, model.modules()))
        for root in [root for root in self._roots if id(root) in parts]:
            self._roots.discard(root)
        self._roots.add(model)

    def knows(self, module: nn.Module) -> bool:
        """Whether ``module`` is a module seen before or a part of one."""
        return any(part is module for root in list(self._roots) for part in root.modules())

    def path_of(self, module: nn.Module) -> str:
        """Where ``module`` sits in a module seen before; empty for a new or outermost one, which is remembered."""
        if module not in self._roots:
            for root in list(self._roots):
                for path, part in root.named_modules():
                    if part is module:
                        return _without_wrappers(path)
            self._roots.add(module)
        return ""

    def place_of(self, parameters: Sequence[Tensor], names: Sequence[str]) -> tuple[nn.Module, str] | None:
        """Where the module is that calls ``parameters`` by these ``names``: in which module seen before, and its path there.
        ``None`` if no such module is known.
        """
        for root in list(self._roots):
            paths: dict[int, list[str]] = {}  # a tied parameter has several
            for path, p in root.named_parameters(remove_duplicate=False):
                paths.setdefault(id(p), []).append(_without_wrappers(path))
            prefixes = [
                {prefix for path in paths.get(id(p), ()) if (prefix := _without_suffix(path, name)) is not None}
                for p, name in zip(parameters, names, strict=True)
            ]
            common = set[str].intersection(*prefixes) if prefixes else set()
            if len(common) == 1:
                return root, common.pop()
        return None


def parameter_name(module: nn.Module, value: object) -> str | None:
    """What ``module`` calls a parameter of its, ``None`` if it has no such parameter."""
    found = (path for path, parameter in module.named_parameters(remove_duplicate=False) if parameter is value)
    return next(map(_without_wrappers, found), None)


def _without_suffix(path: str, name: str) -> str | None:
    if path == name:
        return ""
    return path.removesuffix(f".{name}") if path.endswith(f".{name}") else None


def name_branches(branches: Sequence[ResidualBranch]) -> tuple[BranchName, ...]:
    """Name ``branches`` (in execution order) after the modules that do their work.

    The name is the deepest module that holds all of a branch's work (``model.layers.3.self_attn``). Where that module
    also holds the add, and so would name the whole layer, the names of the children that work are joined
    (``encoder.layers.0.linear1+linear2``). A module that runs several times (ALBERT) gets ``#1``, ``#2``, ...

    The layer is the deepest element of a module list whose branch-holding siblings all have one class: a decoder layer,
    not the list of sub-layers inside a T5 block, nor the stages around Swin's blocks.
    """
    stacks = [_Stack.of(branch) for branch in branches]
    kinds: dict[str, set[str]] = {}
    for stack in stacks:
        for path, kind in stack.modules:
            head, _, last = path.rpartition(".")
            if last.isdigit():
                kinds.setdefault(head, set()).add(kind)
    names = [
        _plain_name(branch, stack, index) for index, (branch, stack) in enumerate(zip(branches, stacks, strict=True))
    ]
    layers = [_layer(stack, kinds, name) for stack, name in zip(stacks, names, strict=True)]
    repeated = Counter(names)
    seen: Counter[str] = Counter()
    unique: list[BranchName] = []
    for name, layer in zip(names, layers, strict=True):
        if repeated[name] > 1:
            seen[name] += 1
            unique.append(BranchName(f"{name}#{seen[name]}", f"{layer}#{seen[name]}"))
        else:
            unique.append(BranchName(name, layer))
    return tuple(unique)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The modules around a branch: of its add, and of its work."""

    modules: tuple[tuple[str, str], ...]  # (path, class) from the outermost to the innermost that holds all the work
    of_add: tuple[str, ...]
    of_work: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, branch: ResidualBranch) -> _Stack:
        add = module_stack(branch.outputs[0][1])
        work = [module_stack(node) for node in branch.work]
        common = [entry for entry in work[0] if all(entry in other for other in work)] if work else []
        return cls(
            modules=tuple(common or add),
            of_add=tuple(path for path, _ in add),
            of_work=tuple(tuple(path for path, _ in stack) for stack in work),
        )


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module a node belongs to, empty at the root."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def module_stack(node: fx.Node) -> list[tuple[str, str]]:
    """The modules around a node, from the outermost to the innermost: path and class."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = []
    for path, kind in stack.values():
        cleaned = _clean(str(path))
        if cleaned:
            entries.append((cleaned, getattr(kind, "__name__", str(kind))))
    return entries


@dataclasses.dataclass(frozen=True)
class CalledModules:
    """The modules that one call of a graph is about.

    Attributes:
        around: paths of the modules that make the call, from the outermost to the innermost.
        operands: paths of what the graph is called with, ``None`` where an operand has none.
    """

    around: tuple[str, ...]
    operands: tuple[str | None, ...]

    @classmethod
    def of(cls, call: fx.Node, sources: Sequence[str | None]) -> CalledModules:
        """``sources`` are what Dynamo calls the operands."""
        paths = [None if source is None else _clean(_KIND.sub("", source)) for source in sources]
        return cls(tuple(path for path, _ in module_stack(call)), tuple(paths))

    def place_in(self, other: CalledModules, path: str) -> str:
        """Where the module of ``other`` is that has the place of the one at ``path``: the one whose parameters the graph
        is called with there, or for one without the one at the same place below the caller.
        """
        found: set[str] = set()
        for mine, its in zip(self.operands, other.operands, strict=True):
            if mine is not None and its is not None and mine.startswith(f"{path}."):
                rest = mine.removeprefix(path)
                found.add(its.removesuffix(rest) if its.endswith(rest) else path)
        if found:
            return found.pop() if len(found) == 1 else path
        for mine, its in zip(reversed(self.around), reversed(other.around), strict=False):
            if path == mine or path.startswith(f"{mine}."):
                return its + path.removeprefix(mine)
        return path


def rename_modules(node: fx.Node, traced: CalledModules, here: CalledModules) -> None:
    """Let ``node`` belong to the modules of the call ``here`` of a graph, and not to those of the one that was traced."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        node.meta["nn_module_stack"] = {
            key: (f"L['self'].{traced.place_in(here, _clean(str(path)))}", kind) if _clean(str(path)) else (path, kind)
            for key, (path, kind) in stack.items()
        }


def _clean(path: str) -> str:
    """``L['self'].model.layers[0].mlp`` -> ``model.layers.0.mlp``; any other root keeps its name."""
    path = _COMPILED.sub("", path)
    match = _ROOT.match(path)
    if match is not None:
        path = f"{match['root']}{path[match.end() :]}"
    path = _INDEX.sub(r".\1", path)
    return _without_wrappers(path)


def _without_wrappers(path: str) -> str:
    """A path without what wrappers around modules (of torch.compile, FSDP, checkpoints) put into it."""
    for internal in ("._modules", ".__dict__", *_torch.WRAPPED_MODULES):
        path = path.replace(internal, "")
    return re.sub(r"\.{2,}", ".", path).strip(".")


def _plain_name(branch: ResidualBranch, stack: _Stack, index: int) -> str:
    home = stack.modules[-1][0] if stack.modules else ""
    if home and home not in stack.of_add:
        return home
    children: list[str] = []
    for path in stack.of_work:
        below = [entry for entry in path if entry != home and (not home or entry.startswith(f"{home}."))]
        if below:
            child = below[0].removeprefix(f"{home}.")
            if child not in children:
                children.append(child)
    if children:
        return ".".join(part for part in (home, "+".join(children)) if part)
    return home or f"branch.{index}"


def _layer(stack: _Stack, kinds: dict[str, set[str]], name: str) -> str:
    for path, _ in reversed(stack.modules):
        head, _, last = path.rpartition(".")
        if last.isdigit() and len(kinds[head]) == 1:
            return path
    around = [path for path in stack.of_add if path]
    if not around:
        return name
    pairs = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(name.split("."), around[-1].split("."), strict=False)
    )
    return ".".join(part for part, _ in pairs) or name
