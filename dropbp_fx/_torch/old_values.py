"""What a backward needs of an input that the forward writes into.

AOTAutograd writes new values into inputs at the end of the forward graph and saves inputs as they are, so that the backward
reads the new value where the old one was used (torch 2.11 to 2.15, with and without a memory budget; no version counter
tells, because the write comes before the save). The old value is copied here before it is overwritten.

| hook | why it is needed |
| --- | --- |
| ``torch.ops.aten.copy_`` in forward graphs | where AOTAutograd writes into inputs |
"""

from __future__ import annotations

import torch
from torch import fx

from dropbp_fx._torch.operators import storage_identity


def save_old_values(forward: fx.GraphModule, outputs: int) -> None:
    """Let ``forward`` save copies of inputs that it overwrites; its first ``outputs`` results are its own."""
    graph = forward.graph
    written = {_storage(node.args[0]) for node in graph.nodes if node.target is torch.ops.aten.copy_.default} - {None}
    if not written:
        return
    output = graph.output_node()
    (results,) = output.args
    assert isinstance(results, (list, tuple))
    saved = [node for node in results[outputs:] if isinstance(node, fx.Node)]
    copies = {node: _copy_of(graph, node) for node in saved if _storage(node) in written}
    if not copies:
        return
    kept = [copies.get(node, node) if isinstance(node, fx.Node) else node for node in results[outputs:]]
    output.args = ((*results[:outputs], *kept),)
    graph.lint()
    forward.recompile()


def _storage(node: object) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return storage_identity(value)


def _copy_of(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A copy taken at once: whatever is written comes later."""
    after = node if node.op != "placeholder" else [other for other in graph.nodes if other.op == "placeholder"][-1]
    with graph.inserting_after(after):
        copy = graph.call_function(torch.ops.aten.clone.default, (node,))
    copy.meta = dict(node.meta)
    copy.meta["val"] = torch.clone(node.meta["val"])
    copy.meta.pop("tensor_meta", None)
    return copy
