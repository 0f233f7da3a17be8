"""Frozen weights in four bits: the NF4 code of QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314), without double
quantisation.

The linear layer is one operator, as in bitsandbytes: the weight is unpacked again in the backward rather than saved, and
neither Dynamo nor a partitioner can decide otherwise for one method and not for another.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

#: Weights that share one scale.
BLOCK = 64
#: The quantiles of a normal distribution, scaled to [-1, 1], of the paper's appendix E.
_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight of shape (outputs, inputs): two codes a byte, and a scale for each block of inputs."""
    if weight.shape[1] % BLOCK:
        raise ValueError(f"A four-bit weight needs a multiple of {BLOCK} inputs, but this one has {weight.shape[1]}.")
    blocks = weight.float().view(weight.shape[0], -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    code = torch.tensor(_CODE, dtype=torch.float32, device=weight.device)
    codes = torch.bucketize(blocks / scales, (code[1:] + code[:-1]) / 2).to(torch.uint8).view(weight.shape)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales.squeeze(-1).to(weight.dtype)


@functools.cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two weights that a byte stands for, for every byte."""
    code = torch.tensor(_CODE, device=device, dtype=dtype)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], -1)


def dequantise(packed: Tensor, scales: Tensor) -> Tensor:
    """The weight, in the scales' dtype."""
    outputs, blocks = scales.shape
    weight = F.embedding(packed.int(), _pairs(packed.device, scales.dtype))
    return weight.view(outputs, blocks, BLOCK).mul_(scales.unsqueeze(-1)).view(outputs, blocks * BLOCK)


@torch.library.custom_op("dropbp_benchmarks::four_bit_linear", mutates_args=())
def four_bit_linear(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """``F.linear`` with a packed weight; the gradient is for ``x`` alone."""
    return F.linear(x, dequantise(packed, scales))


@torch.library.custom_op("dropbp_benchmarks::four_bit_linear_backward", mutates_args=())
def _four_bit_linear_backward(grad: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return grad @ dequantise(packed, scales)


@four_bit_linear.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@_four_bit_linear_backward.register_fake
def _(grad: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], 2 * packed.shape[1]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
    packed, scales = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    return _four_bit_linear_backward(grad.contiguous(), packed, scales) if wanted else None, None, None


four_bit_linear.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(
    [torch.ops.dropbp_benchmarks.four_bit_linear, torch.ops.dropbp_benchmarks.four_bit_linear_backward]
)
def _flops(x: Any, packed: Any, scales: Any, *_: Any, **__: Any) -> int:
    rows = functools.reduce(lambda a, b: a * b, x[:-1], 1)
    return 2 * rows * packed[0] * packed[1] * 2
