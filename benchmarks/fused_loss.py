"""Cross entropy of a linear head without the logits: they are made, used and forgotten a chunk of tokens at a time.

One operator for all methods alike, eager or compiled: Dynamo captures it as one node of the graph, so it breaks no graph
and no compiler treats it differently from another. Since the loss is one number, its gradients are computed in the
forward and only scaled in the backward, as fused implementations do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

#: Logits at any one time: 32 MiB of float32.
_LOGITS = 2**23


@torch.library.custom_op("dropbp_benchmarks::linear_cross_entropy", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor, targets: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, vocabulary = x.shape[0], weight.shape[0]
    chunk = min(tokens, max(_LOGITS // vocabulary, 16))
    loss = x.new_zeros((), dtype=torch.float32)
    grad_x = torch.empty_like(x) if want_x else x.new_empty(0)
    grad_weight = torch.zeros_like(weight) if want_weight else x.new_empty(0)
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        logits = (x[rows] @ weight.T).float()
        aims = targets[rows, None]
        normaliser = logits.logsumexp(-1, keepdim=True)
        loss += (normaliser - logits.gather(-1, aims)).sum()
        if not (want_x or want_weight):
            del logits
            continue
        grad = logits.sub_(normaliser).exp_()
        grad.scatter_add_(-1, aims, grad.new_full((), -1.0).expand(aims.shape))
        grad = grad.div_(tokens).to(x.dtype)
        if want_x:
            torch.mm(grad, weight, out=grad_x[rows])
        if want_weight:
            grad_weight.addmm_(grad.T, x[rows])
        del logits, grad
    return loss / tokens, grad_x, grad_weight


@_operator.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, want_x: bool, want_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((), dtype=torch.float32),
        torch.empty_like(x) if want_x else x.new_empty(0),
        torch.empty_like(weight) if want_weight else x.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.want_x, ctx.want_weight = inputs[3:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = ctx.saved_tensors
    return grad_x * grad if ctx.want_x else None, grad_weight * grad if ctx.want_weight else None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.dropbp_benchmarks.linear_cross_entropy)
def _flops(x: Any, weight: Any, targets: Any, want_x: bool, want_weight: bool, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0] * (1 + want_x + want_weight)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean of ``cross_entropy(x @ weight.T, targets)`` over tokens; ``x`` has the shape (tokens, width)."""
    wanted = torch.is_grad_enabled()
    loss, _, _ = _operator(x, weight, targets, wanted and x.requires_grad, wanted and weight.requires_grad)
    return loss
