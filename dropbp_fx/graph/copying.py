"""Copy graphs that are to be rewritten while the original is still somebody else's."""

from __future__ import annotations

from typing import Any

from torch import fx

from dropbp_fx.graph.checkpoints import checkpoint_bodies


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graphs, checkpoint bodies included, may be rewritten; tensors are shared."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    graph.output(graph.graph_copy(gm.graph, values))
    (old_output,) = (node for node in gm.graph.nodes if node.op == "output")
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.meta = dict(old_output.meta)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)  # a selective checkpoint's policy, for one
    for call, body in list(checkpoint_bodies(copy)):
        setattr(copy, str(call.args[0].target), copy_graph_module(body))  # type: ignore[union-attr]
    return copy
