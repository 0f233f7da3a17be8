"""What PyTorch's engines for several processes need beside the backend."""

from __future__ import annotations

import torch.distributed as dist

from dropbp_fx._distributed.agreement import checked_group
from dropbp_fx._distributed.ddp import all_reduce_present
from dropbp_fx._distributed.sharded import (
    clip_grad_norm_,
    gathered_parameters,
    parameter_groups,
    skip_unneeded_gathers,
)
from dropbp_fx.backend import DropBPBackend
from dropbp_fx.values import as_float, checked_count, shown

__all__ = [
    "agree_across",
    "all_reduce_present",
    "check_ranks",
    "clip_grad_norm_",
    "gathered_parameters",
    "parameter_groups",
    "skip_unneeded_gathers",
]


def agree_across(
    backend: DropBPBackend, group: dist.ProcessGroup | None = None, *, every: int = 100, timeout_s: float = 600.0
) -> None:
    """In a distributed run: say which ranks must drop alike, and how they make sure of it.

    The ranks of the default process group agree without being told, once ``torch.distributed`` is initialised. Before
    the first pattern, when the model shows new branches and after ``load_state_dict()`` they wait for one another, compare
    all that decides patterns, and take the first rank's seed (where none was given) and FLOPs. After that, they
    compare digests once in ``every`` forwards, without waiting; a difference is an error on all ranks at the same step.

    Args:
        backend: the one that this rank's model is compiled with.
        group: the ranks that hold this model or this part of it, ``None`` for all; the data-parallel group of a
            pipeline stage.
        every: forwards between two comparisons; 0 for none.
        timeout_s: seconds to wait for the others before it is an error.

    Raises:
        TypeError, ValueError: ``backend`` is none, ``every`` is no count, ``timeout_s`` no positive number, or ``group`` no
            process group that this rank is in.
    """
    sampler = _checked_backend(backend)._state.sampler
    meaning = "; 0 compares nothing between the first pattern and the last"
    number = checked_count("every", every, least=0, of="forwards", meaning=meaning)
    seconds = as_float(timeout_s)
    if seconds is None:
        raise TypeError(f"timeout_s must be a number of seconds, not {shown(timeout_s)}.")
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"timeout_s must be above 0 seconds, and finite, not {shown(timeout_s)}: a rank that does not come would "
            "let the others wait forever."
        )
    sampler.agree_across(checked_group(group), every=number, timeout_s=seconds)


def check_ranks(backend: DropBPBackend) -> None:
    """Wait for all ranks and compare everything that decides patterns, at a place of the program that all come to.

    Raises:
        TypeError: ``backend`` is none.
        RankDisagreementError: on every rank, if they differ or one of them did not come.
    """
    _checked_backend(backend)._state.sampler.check_ranks()


def _checked_backend(backend: DropBPBackend) -> DropBPBackend:
    if not isinstance(backend, DropBPBackend):
        raise TypeError(f"backend must be what dropbp_backend() returns, not {shown(backend)}.")
    return backend
