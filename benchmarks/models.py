"""The model every contestant trains: a plain Llama whose attention and MLP branches are methods of their own."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model and of a batch."""

    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int
    lora_rank: int = 0


SHAPES = {
    "tiny": Shape(4, 64, 128, 4, 256, 2, 32),
    "tiny-lora": Shape(4, 64, 128, 4, 256, 2, 32, lora_rank=4),
    "1b": Shape(16, 2048, 8192, 16, 32000, 4, 2048),
    "1b-lora": Shape(16, 2048, 8192, 16, 32000, 4, 2048, lora_rank=8),
    "8b-lora": Shape(32, 4096, 14336, 32, 128256, 2, 4096, lora_rank=8),
}


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs).normal_(std=0.02), requires_grad=rank == 0)
        self.rank = rank
        if rank:
            self.a = nn.Parameter(torch.empty(rank, inputs).normal_(std=0.02))
            self.b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y + F.linear(F.linear(x, self.a), self.b) if self.rank else y


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        rank, width = shape.lora_rank, shape.width
        self.heads = shape.heads
        self.norm_1 = nn.Parameter(torch.ones(width), requires_grad=rank == 0)
        self.norm_2 = nn.Parameter(torch.ones(width), requires_grad=rank == 0)
        self.q, self.k, self.v, self.o = (LoRALinear(width, width, rank) for _ in range(4))
        self.gate, self.up = (LoRALinear(width, shape.mlp, rank) for _ in range(2))
        self.down = LoRALinear(shape.mlp, width, rank)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        h = rms_norm(x, self.norm_1)
        q, k, v = (p(h).view(batch, tokens, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o(h.transpose(1, 2).reshape(batch, tokens, width))

    def feed_forward(self, x: Tensor) -> Tensor:
        h = rms_norm(x, self.norm_2)
        return self.down(F.silu(self.gate(h)) * self.up(h))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(x, cos, sin)
        return x + self.feed_forward(x)


class Llama(nn.Module):
    """``forward`` returns the mean next-token loss of a batch of token ids, shape (batch, tokens + 1)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        full = shape.lora_rank == 0
        self.embedding = nn.Parameter(torch.empty(shape.vocabulary, shape.width).normal_(std=0.02), full)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width), requires_grad=full)
        self.head = nn.Parameter(torch.empty(shape.vocabulary, shape.width).normal_(std=0.02), full)
        half = shape.width // shape.heads // 2
        angles = torch.outer(torch.arange(shape.tokens), 10000.0 ** -(torch.arange(half) / half))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids[:, :-1], self.embedding)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.loss(x, ids)

    def loss(self, x: Tensor, ids: Tensor) -> Tensor:
        logits = F.linear(rms_norm(x, self.norm), self.head)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin
