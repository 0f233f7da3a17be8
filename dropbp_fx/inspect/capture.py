"""Capture a model's training graphs without running it, compiling anything or touching it: on a copy of fake tensors."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from dropbp_fx import _torch
from dropbp_fx.rehearsal import Captures, Rehearsal


class _Captured(BaseException):
    """Leaves the model's forward once its only graph is there; not an ``Exception``, so that no model catches it."""


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rehearse: Callable[[], Rehearsal]
) -> Captures:
    """The training graphs that a new backend makes of ``model(*args, **kwargs)``.

    A model in one graph is captured with one trace and no operator run. A model that Dynamo breaks into several has its
    operators run on fake tensors, so that the later graphs are seen.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: the model cannot be copied, or cannot run without its data.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"explain() takes a torch.nn.Module, or a backend that has seen its model, not {type(model).__name__}. Pass "
            "the module itself and the arguments of its forward."
        )
    model = _torch.original_module(model)
    mode = _torch.fake_mode_of(model.parameters()) or _torch.new_fake_mode()
    arguments = _torch.tree_map_only(torch.Tensor, lambda t: _torch.fake_copy(t, mode), (tuple(args), dict(kwargs)))
    try:
        return _captures(fake_copy(model, mode), arguments, mode, rehearse(), whole=True)
    except _torch.unsupported_code():  # a graph break: what the first rehearsal has seen is a part of the model
        return _captures(fake_copy(model, mode), arguments, mode, rehearse(), whole=False)


def _captures(fake: nn.Module, arguments: tuple[Any, Any], mode: Any, rehearsal: Rehearsal, *, whole: bool) -> Captures:
    def keep(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Any:
        run = fx.GraphModule(gm, copy.deepcopy(gm.graph)) if not whole else None
        rehearsal.capture(gm)
        return _leave if run is None else run.forward

    # Dynamo keeps its caches on code objects; one of its own keeps them apart from the caller's.
    call = types.FunctionType(_call.__code__.replace(), _call.__globals__)
    with _torch.isolated_dynamo(), torch.enable_grad(), mode:
        try:
            torch.compile(call, backend=keep, dynamic=False, fullgraph=whole)(fake, *arguments)
        except _Captured:
            pass
        except _torch.unsupported_code():
            raise
        except Exception as error:
            raise RuntimeError(
                f"{type(fake).__name__} could not be traced on tensors without data: {_first_line(error)} Where its "
                "forward depends on the values of its inputs, train one step with a backend and pass that backend to "
                "explain()."
            ) from error
    return rehearsal.captures


def _leave(*_arguments: Any) -> Any:
    raise _Captured


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # what Dynamo wraps says only that a backend failed
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."


def _call(self: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return self(*args, **kwargs)  # the name `self` is what branches' names are relative to


def fake_copy(model: nn.Module, mode: Any) -> nn.Module:
    """A copy of ``model`` whose tensors have sizes and no data, in training mode unless the model is there already.

    Tensors on the meta device become fake ones on the CPU. Parameters shared within the model stay shared.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in memo:
                memo[id(tensor)] = _torch.fake_copy(tensor, mode)
    try:
        with _torch.fake_copying(mode):
            twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise RuntimeError(
            f"explain() works on a copy of the model, and {type(model).__name__} could not be copied: {_first_line(error)} "
            "Train one step with a backend instead and pass that backend to explain()."
        ) from error
    return twin if model.training else twin.train()
