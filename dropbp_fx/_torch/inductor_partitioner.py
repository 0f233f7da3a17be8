"""Inductor's partitioner, replaced by :func:`~dropbp_fx._torch.partitioning.partition`.

A module of its own, imported on first use because importing Inductor takes long. Inductor's caches pickle the object, so
its class must be found in a module.

| hook | why it is needed |
| --- | --- |
| ``torch._inductor.custom_graph_pass.CustomPartitionerFn`` | what Inductor accepts as a partitioner |
| ``torch._inductor.config.custom_partitioner_fn`` | a partitioner of the user's goes first |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files

from dropbp_fx._torch import partitioning


class Partitioner(CustomPartitionerFn):
    """Partitions as Inductor does, but that no random operator runs twice."""

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        return partitioning.partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        return get_hash_for_files((partitioning.__file__,))


def with_partitioner(options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's ``options`` and this partitioner, unless the user has one."""
    if options.get("custom_partitioner_fn", config.custom_partitioner_fn) is not None:
        return dict(options)
    return {**options, "custom_partitioner_fn": Partitioner()}
