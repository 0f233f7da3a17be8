"""The graphs that AOTAutograd makes, without compiling them.

| hook | why it is needed |
| --- | --- |
| ``torch._dynamo.backends.common.aot_autograd`` | trace a graph as compiling it would |
| ``functorch.compile`` partitioners | split a joint graph as compiling it would |
| ``torch._inductor.decomposition.select_decomp_table`` | predict what Inductor's variants save for the backward |
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from dropbp_fx._torch.compiling import JointPass, run_graph_eagerly
from dropbp_fx._torch.dynamo import uncounted
from dropbp_fx._torch.partitioning import partition


@dataclasses.dataclass(frozen=True)
class TracedGraphs:
    """What AOTAutograd makes of a graph: the joint graph, and the two that the partitioner splits it into.

    Attributes:
        joint: the joint graph as the partitioner gets it.
        forward: returns ``outputs`` values of its own, then what is saved for the backward.
        backward: takes what was saved, then the tangents.
        outputs: how many outputs of ``forward`` are its own.
    """

    joint: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    outputs: int


class _Traced(Exception):
    """Ends a compilation that was for its graphs only."""


def trace_joint_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule | None:
    """The joint forward/backward graph of ``gm``, ``None`` where nothing in it requires a gradient."""
    found: list[fx.GraphModule] = []

    def stop(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        found.append(joint)
        raise _Traced

    _trace_until(gm, inputs, partition=stop)
    return found[0] if found else None


def trace_graphs(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    joint_pass: JointPass | None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> TracedGraphs | None:
    """The graphs of ``gm`` after ``joint_pass``, ``None`` where nothing in it requires a gradient.

    ``decompositions`` are applied while tracing, as a compiler does that has some: they decide what is saved.
    """
    found: list[TracedGraphs] = []

    def stop(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        if joint_pass is not None:
            joint_pass(joint.graph)
            joint.recompile()
        forward, backward = partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
        found.append(TracedGraphs(joint, forward, backward, num_fwd_outputs))
        raise _Traced

    _trace_until(gm, inputs, partition=stop, decompositions=decompositions)
    return found[0] if found else None


def trace_forward_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """The ATen graph of ``gm`` when no gradient is recorded."""
    found: list[fx.GraphModule] = []

    def stop(graph: fx.GraphModule, _inputs: Any) -> Any:
        found.append(graph)
        raise _Traced

    with torch.no_grad():
        _trace_until(gm, inputs, forward=stop, decompositions=decompositions)
    return found[0]


def _trace_until(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    forward: Callable[..., Any] | None = None,
    partition: Callable[..., Any] | None = None,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> None:
    from functorch.compile import default_partition
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(
        fw_compiler=forward or run_graph_eagerly,
        bw_compiler=run_graph_eagerly,
        partition_fn=partition or default_partition,
        decompositions=decompositions,
    )
    with contextlib.suppress(_Traced), uncounted():
        backend(gm, list(inputs))


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """What Inductor takes operators apart into before it partitions."""
    from torch._inductor.decomposition import select_decomp_table

    return cast("Mapping[Any, Callable[..., Any]]", select_decomp_table())
