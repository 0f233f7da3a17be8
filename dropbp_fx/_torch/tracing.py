"""Tracing: contexts that compilations run in, and fake tensors.

| hook | why it is needed |
| --- | --- |
| ``torch._guards`` tracing context | compile regions apart from each other and after Dynamo has finished |
| ``torch.utils._python_dispatch._disable_current_modes`` | a variant is compiled apart from the user's dispatch modes |
| ``torch.compiler._is_compiling_flag`` | other threads may call compiled functions while a variant is traced |
| ``torch._dispatch.python.enable_python_dispatcher`` | run fake tensors with symbolic sizes |
| ``torch._dynamo.convert_frame.compile_lock`` | threads must not trace at the same time |
| ``torch._subclasses`` fake tensor mode, fake copying | explain a model on a copy that has no data |
| ``torch.utils._pytree`` | arguments and results of any nesting |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch


@contextlib.contextmanager
def fresh_tracing_context(fake_mode: Any) -> Iterator[None]:
    """Give one region its own tracing context: AOTAutograd writes per-graph metadata into the current one, and a
    variant compiled after Dynamo has returned has none. Such a variant may also be compiled under the user's dispatch modes
    (a selective checkpoint's, for one), which Dynamo takes off before it calls a backend.
    """
    from torch._guards import TracingContext, tracing
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), tracing(TracingContext(fake_mode)), _known_to_compile():
        yield


@contextlib.contextmanager
def _known_to_compile() -> Iterator[None]:
    """Say that this is a compilation, as Dynamo does during its own: another thread that calls a compiled function meanwhile
    would be told that it must not be traced symbolically. Under :func:`compile_lock`, as Dynamo's are.
    """
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    compiler._is_compiling_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag = before


@contextlib.contextmanager
def fake_execution(fake_mode: Any) -> Iterator[None]:
    """Run operators on fake tensors as Dynamo does: without the Python dispatcher, composite operators of older releases
    specialise symbolic sizes; and hooks on saved tensors are the user's, not to be shown fake ones.
    """
    from torch._dispatch.python import enable_python_dispatcher

    hide_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with fake_mode, enable_python_dispatcher(), hide_hooks:
        yield


def compile_lock() -> contextlib.AbstractContextManager[Any]:
    """The lock under which Dynamo compiles: tracing and its configuration are global, so a variant that is compiled
    from a running forward must not overlap with another thread's compilation.
    """
    from torch._dynamo.convert_frame import compile_lock as lock

    return lock


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The fake tensor mode that Dynamo traced ``values`` in.

    Not the tracing context's: Dynamo gives backends a new one, for backends that make fake tensors of their own.
    """
    from torch._subclasses import FakeTensor

    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
        if isinstance(value, torch.Tensor) and torch.utils._python_dispatch.is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            return fake_mode_of([getattr(value, name) for name in names])
    return None


def new_fake_mode() -> Any:
    """A mode whose tensors have sizes, strides and types but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_copying(fake_mode: Any) -> contextlib.AbstractContextManager[Any]:
    """Within the block ``copy.deepcopy`` makes fake copies of tensors."""
    from torch._subclasses.fake_tensor import FakeCopyMode

    return cast("contextlib.AbstractContextManager[Any]", FakeCopyMode(fake_mode))


def fake_copy(tensor: torch.Tensor, fake_mode: Any) -> torch.Tensor:
    """A fake tensor (parameter) like ``tensor``, of its device, or the CPU where it is on the meta device."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        copy = fake_mode.from_tensor(tensor)
        return cast("torch.Tensor", copy)
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    with fake_mode, torch.no_grad():
        if tensor.layout is torch.strided:
            data = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        else:
            data = torch.empty_like(tensor, device=device)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
        return data.requires_grad_(tensor.requires_grad)


def tree_map_only(kind: type[Any], change: Callable[[Any], Any], tree: Any) -> Any:
    """Arguments of any nesting with ``change`` made to each value of a kind."""
    from torch.utils import _pytree

    return _pytree.tree_map_only(kind, change, tree)
