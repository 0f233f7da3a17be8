"""Let the processes of a distributed run agree on what decides patterns."""

from __future__ import annotations

import math

import torch.distributed as dist

from dropbp_fx.policy.sensitivity import Sensitivity


def agreed(sensitivity: Sensitivity) -> Sensitivity:
    """The mean over all ranks, where ``torch.distributed`` runs: ranks see different data but must drop alike.

    A collective operation then: every rank must call it.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return sensitivity
    everybody: list[tuple[float, ...] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, sensitivity.values)
    given = [values for values in everybody if values is not None]
    mean = tuple(math.fsum(column) / len(given) for column in zip(*given, strict=True))
    return Sensitivity(sensitivity.names, mean, sensitivity.metric, sensitivity.batches * len(given))
