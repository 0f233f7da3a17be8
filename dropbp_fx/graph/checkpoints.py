"""The bodies of activation checkpoints, which are graphs of their own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dropbp_fx import _torch


def checkpoint_bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """The activation checkpoints of a graph: the call and the body it runs."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is _torch.checkpoint_operator():
            body = node.args[0]
            if isinstance(body, fx.Node) and body.op == "get_attr":
                yield node, getattr(gm, str(body.target))


def graphs_of(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Graph]]:
    yield gm, gm.graph
    for _, body in checkpoint_bodies(gm):
        yield from graphs_of(body)
