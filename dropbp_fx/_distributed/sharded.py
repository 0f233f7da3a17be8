"""Parameters under ``fully_shard``: gathering, optimizer groups and clipping."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from dropbp_fx import _torch


@contextlib.contextmanager
def gathered_parameters(model: nn.Module, *, reshard_after_forward: bool = True) -> Iterator[None]:
    """Keep what ``fully_shard`` gathers in a forward, for :meth:`~dropbp_fx.DropBPBackend.calibrate`.

    Afterwards the model is sharded, and reshards after a forward as by default: all but the outermost module.

    Args:
        model: sharded by ``fully_shard``, whole or in parts; its parameters must fit whole.
        reshard_after_forward: what the model was sharded with.
    """
    parts = _sharded_parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(reshard_after_forward and part is not model, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)


def skip_unneeded_gathers(model: nn.Module) -> None:
    """Let ``fully_shard`` gather parameters for the backward only where the backward reads them.

    FSDP2 frees a layer's parameters after its forward and gathers them again for its backward, whatever that does. The
    backward of a layer all of whose branches are dropped reads none of them. Whether a forward's graph refers to a group's
    parameters is looked up after each forward, so this takes nothing for granted about models or patterns; gradients,
    and which of them are ``None``, are the same with and without it.

    Usage::

        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
        skip_unneeded_gathers(model)

    What it cannot see is an activation checkpoint in eager code *inside* of a layer whose parameters are frozen: its
    recomputation then meets sharded parameters, which is an error. Checkpoints around whole layers, and those inside of
    compiled code, are fine.

    Args:
        model: sharded by ``fully_shard``, whole or in parts. Calling this twice does nothing more.

    Raises:
        ValueError: no part of the model is sharded by ``fully_shard``.
    """
    parts = _sharded_parts(model)
    if not parts:
        raise ValueError(
            f"No part of this {type(model).__name__} is sharded by fully_shard, so there are no gathers to skip. Call "
            "skip_unneeded_gathers(model) after fully_shard."
        )
    for part in parts:
        _torch.leave_out_unneeded_gathers(part)


def _sharded_parts(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` took, each an ``FSDPModule``."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def parameter_groups(model: nn.Module, layers: Iterable[nn.Module]) -> list[dict[str, list[nn.Parameter]]]:
    """Groups for an optimizer, one a layer and one of all other parameters, for models under ``fully_shard``.

    ``fully_shard`` makes parameters DTensors, and PyTorch's foreach and fused optimizers step through the gradients of a
    group in one call. DTensor works out on the host how such a call runs on shards, once for every list of shapes. Which
    gradients exist depends on what was dropped, so with all parameters in one group nearly every step brings a list that is
    new; within a layer there are but a few. The steps are the same either way.

    Usage::

        optimizer = torch.optim.AdamW(parameter_groups(model, model.layers), lr=1e-5, fused=True)

    Args:
        model: after ``fully_shard``, which replaces parameters.
        layers: modules of the model, those that hold branches. Layers that repeat have the same few lists among them.

    Returns:
        Parameters that require gradients, each in one group: that of the first layer that has it, in the order of
        ``layers``, else the last. Groups that would be empty are left out.

    Raises:
        ValueError: a layer is no part of the model.
    """
    parts = set(model.modules())
    left = {parameter: None for parameter in model.parameters() if parameter.requires_grad}  # ordered
    groups = []
    for number, layer in enumerate(layers):
        if layer not in parts:
            raise ValueError(
                f"Layer {number}, a {type(layer).__name__}, is no part of the model, so an optimizer would train "
                "parameters that the model does not use. Give modules of the model, such as model.layers."
            )
        groups.append([parameter for parameter in layer.parameters() if parameter in left])
        for parameter in groups[-1]:
            del left[parameter]
    return [{"params": group} for group in [*groups, list(left)] if group]


@torch.no_grad()
def clip_grad_norm_(groups: Iterable[Mapping[str, Any]], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients down together so that the norm of all of them is at most ``max_norm``, a group at a time.

    The result is that of ``torch.nn.utils.clip_grad_norm_`` over the parameters of all groups, which computes the norms of
    all gradients in one call and scales them in another. Under ``fully_shard`` DTensor then works out anew how to run these
    calls for nearly every pattern of dropped branches, as :func:`parameter_groups` says of optimizers. Here the calls are
    one a group, and what is sent is one number for all groups together.

    Usage::

        clip_grad_norm_(optimizer.param_groups, 1.0)

    Args:
        groups: as in ``optimizer.param_groups``, under "params" their parameters, of any devices, floating-point types
            and shardings. Gradients that are ``None`` stay so and count as nothing.
        max_norm: the bound, at least 0.
        norm_type: the order of the norm, above 0; ``math.inf`` for the largest absolute value.

    Returns:
        The norm before scaling, a tensor without dimensions on the first gradient's device; the same on all ranks, and
        never a DTensor. A 0 on the CPU where there are no gradients at all.

    Raises:
        TypeError: something other than groups.
        ValueError: a bound or an order that is none.
    """
    if not max_norm >= 0:
        raise ValueError(
            f"max_norm is {max_norm}, but a norm is at least 0. Give the largest norm that gradients may have."
        )
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type}, but the order must be above 0. Give 2.0, or math.inf, say.")
    present = [[parameter for parameter in _parameters(group) if parameter.grad is not None] for group in groups]
    total = _norm_of_norms([norm for part in present for norm in _norms(part, norm_type)], norm_type)
    for part in present:
        clip_grads_with_norm_(part, max_norm, total)
    return total


def _parameters(group: Mapping[str, Any]) -> list[Tensor]:
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(
            f"clip_grad_norm_() takes groups of parameters, and was given a {type(group).__name__} as one. Give "
            'optimizer.param_groups, or what parameter_groups() returns: mappings with parameters under "params".'
        )
    parameters = group["params"]
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _norms(parameters: list[Tensor], norm_type: float) -> Iterable[Tensor]:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return _torch.norms(gradients, norm_type) if gradients else []


def _norm_of_norms(norms: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all, reduced over ranks once for each way of sharding."""
    from torch.distributed.tensor import DTensor

    if not norms:
        return torch.tensor(0.0)
    alike: dict[Any, list[Tensor]] = {}
    for norm in norms:
        key = (norm.device_mesh, norm.placements) if isinstance(norm, DTensor) else None
        alike.setdefault(key, []).append(norm.to_local() if isinstance(norm, DTensor) else norm)
    whole: list[Tensor] = []
    for key, local in alike.items():
        norm = _norm_of_numbers(local, norm_type)
        whole.append(norm if key is None else DTensor.from_local(norm, *key, run_check=False).full_tensor())
    return whole[0] if len(whole) == 1 else _norm_of_numbers(whole, norm_type)


def _norm_of_numbers(numbers: list[Tensor], norm_type: float) -> Tensor:
    device = numbers[0].device
    norm: Tensor = torch.linalg.vector_norm(torch.stack([number.to(device) for number in numbers]), norm_type)
    return norm
