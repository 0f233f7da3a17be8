"""What Dynamo knows of the code that it captures: modules, guards, frames and graph breaks.

| hook | why it is needed |
| --- | --- |
| ``torch._dynamo`` sources, scopes and guards | ``eval()`` must reach a graph that never read ``module.training`` |
| ``torch._dynamo`` reasons for breaks, ``grapharg`` | warnings name the breaks that hide branches |
| ``torch._dynamo.exc.Unsupported`` | an explanation goes on past a graph break |
| ``torch._dynamo`` code tracker, ``reset_code``, counters | an explanation leaves Dynamo's caches as they were |
| ``torch._dynamo.utils.counters`` | DDPOptimizer takes a backend that AOTAutograd ran in for AOTAutograd |
| ``torch._dynamo.convert_frame.register_bytecode_hook`` | notice an optimizer step that is compiled for each pattern |
| ``OptimizedModule``, ``Module._compiled_call_impl`` | layers that are compiled one by one are told from a whole model |
"""

from __future__ import annotations

import collections
import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx


@contextlib.contextmanager
def isolated_dynamo() -> Iterator[None]:
    """Compilations within the block leave nothing behind on the code objects that Dynamo compiles there first, and count
    neither in Dynamo's statistics nor in its random state.
    """
    from torch._dynamo import convert_frame, eval_frame
    from torch._dynamo.utils import preserve_rng_state

    before = {id(code) for code in _tracked_codes(convert_frame)}
    try:
        with preserve_rng_state(), uncounted():
            yield
    finally:
        for code in _tracked_codes(convert_frame):
            if id(code) not in before:
                eval_frame.reset_code(code)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """What is traced to be looked at does not count in PyTorch's statistics of compilations."""
    from torch._dynamo.utils import counters

    counted = {name: collections.Counter(values) for name, values in counters.items()}
    try:
        yield
    finally:
        counters.clear()
        for name, values in counted.items():
            counters[name].update(values)


def _tracked_codes(convert_frame: Any) -> list[Any]:
    tracked = [*convert_frame.input_codes.seen, *convert_frame.output_codes.seen]
    return [code for code in (reference() for reference in tracked) if code is not None]


def on_compiled(look: Callable[[Any], None]) -> None:
    """Call ``look`` with each code object that Dynamo has compiled, from now on.

    The hook is never removed: that could happen, by itself or by the collector, while Dynamo iterates over its hooks, and is
    an error there. Let ``look`` refer weakly to whom it serves.
    """
    from torch._dynamo.convert_frame import register_bytecode_hook

    register_bytecode_hook(lambda code, _: look(code))


def is_cut_by_ddp_optimizer(gm: fx.GraphModule) -> bool:
    """Whether a graph is a piece of what Dynamo captured, cut off by its DDPOptimizer."""
    reason = getattr(getattr(gm, "compile_subgraph_reason", None), "reason", "")
    return "DDPOptimizer" in reason


@contextlib.contextmanager
def unseen_by_ddp_optimizer(gm: fx.GraphModule) -> Iterator[None]:
    """Within the block AOTAutograd may compile code for a piece of a graph, not all of it.

    Where DDPOptimizer sees that it ran, it takes the backend's result for AOTAutograd's own: that runs on fake tensors when
    called first, and leaves its metadata behind.
    """
    from torch._dynamo.utils import counters

    before = counters["aot_autograd"]["total"]
    try:
        yield
    finally:
        if is_cut_by_ddp_optimizer(gm):
            counters["aot_autograd"]["total"] = before


def _source_name(source: Any) -> str:
    name = source.name  # a method in older releases, a property since
    return str(name() if callable(name) else name)


#: Before torch 2.13 Dynamo does not look at a module's parameters again while the module holds the same ones.
_FREEZING_GOES_UNSEEN = torch.__version__ < "2.13"


def source_of(placeholder: fx.Node) -> str | None:
    """The expression through which Dynamo reached a graph input, ``None`` where it does not tell."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    return None if source is None else _source_name(source)


class Owned(NamedTuple):
    """A parameter or buffer as a graph input: the outermost module it was reached through, and itself, if it can be told."""

    module: torch.nn.Module
    value: Any


def outermost_modules(placeholders: Sequence[fx.Node]) -> dict[fx.Node, Owned]:
    """Find for each parameter or buffer the outermost module it was reached through, and guard on its training mode, and on
    what is trainable where Dynamo does not.

    Dynamo guards on ``module.training`` only where the traced code reads it. A graph that never did would go on
    dropping after ``model.eval()``; so a guard on that flag is installed here for each outermost module, and flipping it
    makes Dynamo compile again, as it does for a model with dropout. Placeholders that belong to no module are left out.

    Must be called while Dynamo is compiling (inside a backend); elsewhere it returns an empty mapping.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import TracingContext

    if TracingContext.try_get() is None:
        return {}
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # thread-local not set: not inside Dynamo
        return {}
    scope = {"L": output.local_scope, "G": output.global_scope}
    values: dict[str, Any] = {}

    def evaluate(name: str) -> Any:
        if name not in values:
            try:
                values[name] = eval(name, scope)
            except Exception:  # an expression that only Dynamo's guards can evaluate
                values[name] = None
        return values[name]

    guarded: set[str] = set()
    found: dict[fx.Node, Owned] = {}
    for node in placeholders:
        own = source = getattr(node.meta.get("grapharg"), "source", None)
        outermost: tuple[Any, torch.nn.Module] | None = None
        while source is not None:
            module = evaluate(_source_name(source))
            if isinstance(module, torch.nn.Module):
                outermost = (source, module)
            source = getattr(source, "base", None)
        if outermost is None:
            continue
        source, module = outermost
        name = _source_name(source)
        if name not in guarded:
            guarded.add(name)
            install_guard(AttrSource(source, "training").make_guard(GuardBuilder.EQUALS_MATCH))
        found[node] = Owned(module, evaluate(_source_name(own)))
        if _FREEZING_GOES_UNSEEN and own is not None and isinstance(found[node].value, torch.nn.Parameter):
            install_guard(AttrSource(own, "requires_grad").make_guard(GuardBuilder.EQUALS_MATCH))
    return found


class Callers(NamedTuple):
    """The modules up this thread's stack, innermost first, each as often as it is there.

    Attributes:
        called: those that are being called.
        running: those whose methods run, called or not: ``LightningModule.training_step`` is not.
    """

    called: tuple[torch.nn.Module, ...]
    running: tuple[torch.nn.Module, ...]


def calling_modules() -> Callers:
    """The modules that this thread is calling, or runs methods of, at this point."""
    called: list[torch.nn.Module] = []
    running: list[torch.nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        # A frame whose locals are looked at keeps their values until it ends; a training loop's may be large.
        if "self" in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            module = frame.f_locals.get("self")
            if isinstance(module, torch.nn.Module):
                running.append(module)
                if code is torch.nn.Module.__call__.__code__:
                    called.append(module)
        frame = frame.f_back
    return Callers(tuple(called), tuple(running))


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether ``module.compile()`` was called, or ``module`` is what ``torch.compile`` made of a module."""
    from torch._dynamo import OptimizedModule

    return isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


class GraphBreak(NamedTuple):
    """Where Dynamo ended a graph before the code did, and its reason in one line."""

    place: str
    reason: str


def graph_break_after(gm: fx.GraphModule) -> GraphBreak | None:
    """The break that ends a graph from Dynamo, ``None`` if the code that it captured ends there."""
    known = getattr(gm, "compile_subgraph_reason", None)
    if known is None or not getattr(known, "graph_break", False):
        return None
    stack = list(getattr(known, "user_stack", None) or ())
    place = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "a place that Dynamo does not tell"
    return GraphBreak(place, next(iter(str(known.reason).strip().splitlines()), "").strip().rstrip("."))


def given_value(placeholder: fx.Node) -> Any:
    """The tensor that a graph from Dynamo is about to be called with for an input, ``None`` where it cannot be told."""
    try:
        return placeholder.meta["grapharg"].example
    except (KeyError, AttributeError, AssertionError):  # an input of a backend's own, or one that was let go of
        return None


def original_module(module: Any) -> Any:
    """The module that ``torch.compile`` was given, where ``module`` is what it returned; else ``module``."""
    return getattr(module, "_orig_mod", module)


def unsupported_code() -> type[Exception]:
    """What Dynamo raises where it would have to break a graph that must stay whole."""
    from torch._dynamo.exc import Unsupported

    return Unsupported
