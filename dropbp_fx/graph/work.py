"""Tell real work (a matrix product, a convolution, attention, an expert) from what only moves, scales or gates values."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dropbp_fx import _torch
from dropbp_fx.graph.values import example_value

_WORK_FUNCTIONS = frozenset(
    {
        F.linear,
        F.bilinear,
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        operator.matmul,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.mv,
        torch.addmm,
        torch.baddbmm,
        torch.addbmm,
        torch.einsum,
        torch.tensordot,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    }
)
_WORK_METHODS = frozenset({"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "addbmm"})


def does_work(node: fx.Node) -> bool:
    """Whether a node is a matrix product, convolution, attention or an operator that PyTorch does not know."""
    if node.op == "call_method":
        return node.target in _WORK_METHODS
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    target: Any = node.target
    if target in _WORK_FUNCTIONS:
        return True
    if _torch.is_registered_operator(target):
        name = str(target)
        if not name.startswith(("aten.", "aten::", "prims.", "prim.", "dropbp_fx.")):
            return True
        return any(word in name for word in ("mm", "matmul", "linear", "conv", "einsum", "attention"))
    if _torch.is_higher_order_operator(target):
        forward = _autograd_function_body(node)
        if forward is not None:
            return any(does_work(inner) and (_is_known(inner) or _multiplies(node)) for inner in forward.nodes)
        return "autocast" not in target.name() and "grad_enabled" not in target.name()
    module = getattr(target, "__module__", None) or ""
    if module.startswith(_torch.FOURIER_MODULES):
        return True
    name = getattr(target, "__name__", "")
    return any(word in name for word in ("grouped_mm", "scaled_mm", "_rnn", "lstm", "gru", "fft"))


def _is_known(node: fx.Node) -> bool:
    """Whether PyTorch tells what a node that does work computes, as it does not of a kernel of somebody else's."""
    target: Any = node.target
    if _torch.is_higher_order_operator(target):
        return not target.name().startswith("triton_kernel_wrapper")
    return not _torch.is_registered_operator(target) or str(target).startswith("aten")


def _multiplies(node: fx.Node) -> bool:
    """Whether a node could be a product: two of its operands are matrices. A norm has one, and vectors for weights."""
    values = map(example_value, node.all_input_nodes)
    return sum(isinstance(value, torch.Tensor) and value.dim() > 1 for value in values) > 1


def _autograd_function_body(node: fx.Node) -> fx.Graph | None:
    """The forward of a ``torch.autograd.Function`` that Dynamo traced: it does work if what it runs does."""
    target: Any = node.target
    body = node.args[0] if node.args and target.name() == "autograd_function_apply" else None
    owner = node.graph.owning_module
    if not isinstance(body, fx.Node) or body.op != "get_attr" or owner is None:
        return None
    module = getattr(owner, str(body.target), None)
    return module.graph if isinstance(module, fx.GraphModule) else None
