"""Find the model that a layer belongs to which Dynamo compiles by itself, from the modules whose forward calls it.

Dynamo hands over single layers where each was compiled, where the graph breaks inside of them, and where it does not trace
what calls them, such as ``nn.Sequential.forward`` under ``model.compile()``. Their model is running at that moment: it is a
module up the stack that holds the layer and others like it. Nothing is guessed: two models of one class that no module holds
stay apart.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dropbp_fx import _torch


def home_of(layer: nn.Module, callers: Sequence[nn.Module]) -> nn.Module | None:
    """The model of which ``layer``, the outermost module of a graph, is one of several of its class.

    Args:
        layer: the module whose code is compiled.
        callers: the modules whose forward runs now, innermost first.

    Returns:
        The outermost caller, or if some were compiled the outermost of these, that holds ``layer`` and another module of its
        class; right below a module of torch.nn, such as ``nn.Sequential``, of any class. Where ``layer`` was compiled by
        itself the other one must have been too: a whole model that was compiled is not a layer of whatever holds it.
        ``None`` if there is none.
    """
    around = [caller for caller in callers if unwrapped(caller) is not layer]
    itself = any(_torch.is_compiled(caller) and unwrapped(caller) is layer for caller in callers)
    untraced = not itself and bool(around) and type(around[0]).__module__.startswith("torch.nn.modules")
    homes = [
        home
        for home in around
        if (untraced and any(part is layer for part in home.modules()))
        or is_one_of_several(layer, unwrapped(home), compiled=itself)
    ]
    chosen = [home for home in homes if _torch.is_compiled(home)] or homes
    return unwrapped(chosen[-1]) if chosen else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inner = _torch.original_module(module) if _torch.is_compiled(module) else module
        if inner is module and isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = module.module
        if inner is module or not isinstance(inner, nn.Module):
            return module
        module = inner


def is_one_of_several(layer: nn.Module, home: nn.Module, *, compiled: bool = False) -> bool:
    """Whether ``home`` holds ``layer`` and another module of its class, that is ``compiled`` by itself if so asked."""
    alike: set[int] = set()
    compiled_ones: set[int] = set()
    for part in home.modules():
        own = unwrapped(part)
        if type(own) is type(layer):
            alike.add(id(own))
            if _torch.is_compiled(part):
                compiled_ones.add(id(own))
    return id(layer) in alike and len(compiled_ones | {id(layer)} if compiled else alike) > 1
