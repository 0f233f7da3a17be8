"""The models every method trains: a plain Llama and a plain GPT-2 whose branches are methods of their own."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.four_bit import four_bit_linear, quantise
from benchmarks.fused_loss import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model and of a batch.

    Attributes:
        family: "llama" (rotary positions, RMS norm, gated MLP) or "gpt2" (learned positions, layer norm, GELU, biases,
            a head tied to the embedding); "hf-llama" and "hf-gpt2" are those of transformers (`benchmarks.huggingface`).
        kv_heads: heads of keys and values where several query heads share one, 0 for as many as query heads.
        lora_rank: rank of the update on every linear layer; all else is then frozen. 0 trains everything.
        four_bit: keep the frozen linear weights in four bits.
        dropout: on embeddings, attention and what a branch returns; of "hf-gpt2" alone.
    """

    layers: int
    width: int
    mlp: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int
    family: str = "llama"
    kv_heads: int = 0
    lora_rank: int = 0
    four_bit: bool = False
    dropout: float = 0.0

    @property
    def hugging_face(self) -> bool:
        """It is a model of transformers, not one of this module's."""
        return self.family.startswith("hf-")

    def __post_init__(self) -> None:
        if self.four_bit and not self.lora_rank:
            raise ValueError("Four-bit weights are frozen: give the shape a lora_rank above 0, or nothing would train.")


class Linear(nn.Module):
    """A linear layer: trained whole, or frozen with a low-rank update, its frozen weight in four bits or not."""

    def __init__(self, inputs: int, outputs: int, shape: Shape, *, bias: bool = False) -> None:
        super().__init__()
        full = shape.lora_rank == 0
        weight = torch.empty(outputs, inputs).normal_(std=0.02)
        self.four_bit = shape.four_bit
        self.a: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        if self.four_bit:
            packed, scales = quantise(weight)
            self.register_buffer("packed", packed)
            self.register_buffer("scales", scales)
        else:
            self.weight = nn.Parameter(weight, full)
        self.bias = nn.Parameter(torch.zeros(outputs), full) if bias else None
        self.inputs, self.outputs = inputs, outputs
        self.begin_update(shape.lora_rank)

    def begin_update(self, rank: int) -> None:
        """Put a new low-rank update in place of the present one; it changes nothing yet. With rank 0 there is none."""
        self.rank = rank
        like = {} if self.a is None else {"dtype": self.a.dtype, "device": self.a.device}
        self.a = nn.Parameter(torch.empty(rank, self.inputs, **like).normal_(std=0.02)) if rank else None
        self.b = nn.Parameter(torch.zeros(self.outputs, rank, **like)) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        if self.four_bit:
            y = four_bit_linear(x, self.packed, self.scales)
            y = y if self.bias is None else y + self.bias
        else:
            y = F.linear(x, self.weight, self.bias)
        if self.a is None or self.b is None:
            return y
        return y + F.linear(F.linear(x, self.a), self.b)


class LlamaLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        full, width = shape.lora_rank == 0, shape.width
        self.heads, self.kv_heads = shape.heads, shape.kv_heads or shape.heads
        narrow = width // self.heads * self.kv_heads
        self.norm_1 = nn.Parameter(torch.ones(width), requires_grad=full)
        self.norm_2 = nn.Parameter(torch.ones(width), requires_grad=full)
        self.q, self.o = Linear(width, width, shape), Linear(width, width, shape)
        self.k, self.v = Linear(width, narrow, shape), Linear(width, narrow, shape)
        self.gate, self.up = Linear(width, shape.mlp, shape), Linear(width, shape.mlp, shape)
        self.down = Linear(shape.mlp, width, shape)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        h = rms_norm(x, self.norm_1)
        q = self.q(h).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = (p(h).view(batch, tokens, self.kv_heads, -1).transpose(1, 2) for p in (self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.o(h.transpose(1, 2).reshape(batch, tokens, width))

    def feed_forward(self, x: Tensor) -> Tensor:
        h = rms_norm(x, self.norm_2)
        return self.down(F.silu(self.gate(h)) * self.up(h))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(x, cos, sin)
        return x + self.feed_forward(x)


class GPT2Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = Linear(width, 3 * width, shape, bias=True), Linear(width, width, shape, bias=True)
        self.up, self.down = Linear(width, shape.mlp, shape, bias=True), Linear(shape.mlp, width, shape, bias=True)
        for norm in (self.norm_1, self.norm_2):
            norm.requires_grad_(shape.lora_rank == 0)

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        return self.o(h.transpose(1, 2).reshape(batch, tokens, width))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class Checkpointed(nn.Module):
    """A layer whose activations are recomputed in the backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return checkpoint(self.layer, *inputs, use_reentrant=False)


class Decoder(nn.Module):
    """``forward`` returns the mean next-token loss of a batch of token ids, shape (batch, tokens + 1).

    The parts of a forward are methods of their own (``embed``, the layers' ``attention`` and ``feed_forward``,
    ``loss``), so that a method can put a forward together by hand.
    """

    def __init__(self, shape: Shape, *, fused_loss: bool = False) -> None:
        super().__init__()
        self.fused_loss = fused_loss
        self.layers = nn.ModuleList()

    def embed(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def context(self) -> tuple[Tensor, ...]:
        """What every attention takes besides the residual stream."""
        return ()

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normed residual stream, and the weight that turns it into logits."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, *self.context())
        return self.loss(x, ids)

    def loss(self, x: Tensor, ids: Tensor) -> Tensor:
        x, weight = self.head(x)
        targets = ids[:, 1:].flatten()
        if self.fused_loss:
            return linear_cross_entropy(x.flatten(0, 1), weight, targets)
        return F.cross_entropy(F.linear(x, weight).float().flatten(0, 1), targets)


class Llama(Decoder):
    def __init__(self, shape: Shape, *, fused_loss: bool = False) -> None:
        super().__init__(shape, fused_loss=fused_loss)
        full = shape.lora_rank == 0
        self.embedding = nn.Parameter(torch.empty(shape.vocabulary, shape.width).normal_(std=0.02), full)
        self.layers.extend(LlamaLayer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.width), requires_grad=full)
        self.output = nn.Parameter(torch.empty(shape.vocabulary, shape.width).normal_(std=0.02), full)
        half = shape.width // shape.heads // 2
        positions, dimensions = (torch.arange(size, dtype=torch.float32) for size in (shape.tokens, half))
        angles = torch.outer(positions, 10000.0 ** -(dimensions / half))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1).to(self.embedding.dtype))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1).to(self.embedding.dtype))

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids[:, :-1], self.embedding)

    def context(self) -> tuple[Tensor, ...]:
        return self.cos, self.sin

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, self.norm), self.output


class GPT2(Decoder):
    def __init__(self, shape: Shape, *, fused_loss: bool = False) -> None:
        super().__init__(shape, fused_loss=fused_loss)
        full = shape.lora_rank == 0
        self.embedding = nn.Parameter(torch.empty(shape.vocabulary, shape.width).normal_(std=0.02), full)
        self.positions = nn.Parameter(torch.empty(shape.tokens, shape.width).normal_(std=0.02), full)
        self.layers.extend(GPT2Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width).requires_grad_(full)

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids[:, :-1], self.embedding) + self.positions

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x), self.embedding


def make_model(shape: Shape, *, device: str, dtype: torch.dtype, fused_loss: bool) -> Decoder:
    """The same weights at every call: made in ``dtype`` at once, since a copy in float32 may not fit."""
    families = {"llama": Llama, "gpt2": GPT2}
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return families[shape.family](shape, fused_loss=fused_loss)
    finally:
        torch.set_default_dtype(before)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin
