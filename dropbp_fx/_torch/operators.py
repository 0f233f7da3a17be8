"""Operators and other targets of graphs that PyTorch has no public name for.

| hook | why it is needed |
| --- | --- |
| ``torch._C._set_grad_enabled``, ``torch.amp._enter_autocast`` | switches that Dynamo puts into graphs |
| ``torch._ops`` classes, ``OpOverload._schema`` | tell registered operators apart, and what they write into |
| ``torch._foreach_add`` | adds of whole lists are residual adds too |
| ``torch.ops.aten._unsafe_view`` | an output that is a view must not share memory with what the backward needs |
| ``torch._higher_order_ops.register_hook`` (2.13 and later) | hooks that a forward puts on its own tensors |
| ``GraphModule.meta["_checkpoint_context_fn"]`` | checkpoints that save different values are not alike |
| ``grad_fn._saved_alpha`` | a gradient that an add hands on as it is |
| ``UntypedStorage._cdata`` | whether two fake tensors share memory |
| names of wrapped modules | a branch is called the same, whatever wraps its module |
"""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

#: Switches in a graph from Dynamo.
SET_GRAD_ENABLED = torch._C._set_grad_enabled
ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp._enter_autocast, torch.amp._exit_autocast
#: Adds of two lists of tensors, out of place and in place.
FOREACH_ADD, FOREACH_ADD_ = torch._foreach_add, torch._foreach_add_
#: Modules whose functions are Fourier transforms.
FOURIER_MODULES = ("torch.fft", "torch._C._fft")
#: Attributes under which PyTorch's wrappers hold the module that they wrap.
WRAPPED_MODULES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def is_registered_operator(target: Any) -> bool:
    """Whether a node's target is an operator of PyTorch's dispatcher."""
    return isinstance(target, (OpOverload, OpOverloadPacket))


def is_operator_overload(target: Any) -> TypeGuard[OpOverload]:
    """Whether a node's target is one overload of an operator."""
    return isinstance(target, OpOverload)


def is_higher_order_operator(target: Any) -> bool:
    """Whether a node's target is an operator that runs graphs of its own."""
    return isinstance(target, HigherOrderOperator)


@functools.cache
def written_arguments(operator: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that a registered operator declares to write into."""
    if isinstance(operator, OpOverloadPacket):
        operator = getattr(operator, operator.overloads()[0])
    if not isinstance(operator, OpOverload):
        return ()
    arguments = enumerate(operator._schema.arguments)
    return tuple(
        (at, argument.name) for at, argument in arguments if argument.alias_info and argument.alias_info.is_write
    )


def unsafe_view(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor again, not as a view of itself."""
    found: torch.Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return found


def checkpoint_operator() -> Any:
    """The higher-order operator Dynamo puts around a layer under activation checkpointing."""
    return torch.ops.higher_order.tag_activation_checkpoint


def nested_region_operator() -> Any:
    """The higher-order operator that calls the graph of a ``torch.compiler.nested_compile_region``."""
    return torch.ops.higher_order.invoke_subgraph


def checkpoint_context(gm: fx.GraphModule) -> Any:
    """The ``context_fn`` of the checkpoint whose body a graph is, ``None`` if it has none."""
    return gm.meta.get("_checkpoint_context_fn")


def register_hook_operator() -> Any:
    """The higher-order operator Dynamo traces a forward's ``tensor.register_hook`` into, ``None`` in releases that break the
    graph there instead.
    """
    try:
        from torch._higher_order_ops.register_hook import register_hook_op
    except ImportError:
        return None
    return register_hook_op


def storage_identity(tensor: torch.Tensor) -> int:
    """What tells a (fake) tensor's memory from any other."""
    return int(tensor.untyped_storage()._cdata)


def saved_alpha(grad_fn: Any) -> Any:
    """The ``alpha`` of the add that an autograd node is of, ``None`` for any other node."""
    return getattr(grad_fn, "_saved_alpha", None)
