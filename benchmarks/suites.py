"""What is trained: shapes for one large GPU, a small twin of each for correctness on a CPU, and the model of a shape."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from benchmarks import huggingface, models
from benchmarks.models import Shape

_1B = Shape(16, 2048, 8192, 16, 32000, 4, 2048)
_8B = Shape(32, 4096, 14336, 32, 128256, 2, 4096, kv_heads=8)
_GPT2 = Shape(12, 768, 3072, 12, 50257, 4, 256, family="gpt2")
_TINY = Shape(4, 64, 128, 4, 256, 2, 32)
#: Llama-3.2-1B's shape and SmolLM2-135M's; GPT-2's own with its default dropout.
_HF_1B = Shape(16, 2048, 8192, 32, 128256, 4, 1024, family="hf-llama", kv_heads=8)
_HF_SMOLLM2 = Shape(30, 576, 1536, 9, 49152, 16, 512, family="hf-llama", kv_heads=3)
_HF_GPT2 = Shape(12, 768, 3072, 12, 50257, 8, 512, family="hf-gpt2", dropout=0.1)


def _lora(shape: Shape, rank: int = 8, *, four_bit: bool = False) -> Shape:
    return dataclasses.replace(shape, lora_rank=rank, four_bit=four_bit)


#: By name. Llama-shaped with about a billion parameters; Llama-3-8B's shape; GPT-2's with few tokens, so that the host
#: is the limit; one long sequence; and Hugging Face's own models as people fine-tune them.
SUITES: dict[str, Shape] = {
    "1b": _1B,
    "1b-lora": _lora(_1B),
    "8b": _8B,
    "8b-lora": _lora(_8B),
    "8b-qlora": _lora(_8B, four_bit=True),
    "gpt2": _GPT2,
    "long": dataclasses.replace(_1B, batch=1, tokens=32768),
    "hf-1b-lora": _lora(_HF_1B, 16),
    "hf-gpt2": _HF_GPT2,
    "hf-smollm2-lora": _lora(_HF_SMOLLM2, 16),
    "1b-eighth": Shape(4, 256, 1024, 2, 4000, 2, 512),  # an eighth of each of 1b's sizes; 4 layers
    "tiny": _TINY,
    "tiny-lora": _lora(_TINY, 4),
    "tiny-gqa": dataclasses.replace(_TINY, kv_heads=2),
    "tiny-gqa-lora": _lora(dataclasses.replace(_TINY, kv_heads=2), 4),
    "tiny-qlora": _lora(dataclasses.replace(_TINY, kv_heads=2), 4, four_bit=True),
    "tiny-gpt2": dataclasses.replace(_TINY, family="gpt2"),
    "tiny-long": dataclasses.replace(_TINY, layers=2, batch=1, tokens=256),
    "tiny-hf-lora": _lora(dataclasses.replace(_TINY, family="hf-llama", kv_heads=2), 4),
    "tiny-hf-gpt2": dataclasses.replace(_TINY, family="hf-gpt2", dropout=0.1),
}


def shape_of(suite: str, *, layers: int | None = None, batch: int | None = None, tokens: int | None = None) -> Shape:
    """A suite's shape, with other sizes where given."""
    sizes = {"layers": layers, "batch": batch, "tokens": tokens}
    return dataclasses.replace(SUITES[suite], **{name: size for name, size in sizes.items() if size is not None})


def check(shape: Shape, *, fused_loss: bool) -> None:
    """Can the shape's model be made here, with this loss?

    Raises:
        ValueError: a model of Hugging Face's has no loss but its own.
        ImportError: a package is not installed.
    """
    if not shape.hugging_face:
        return
    if fused_loss:
        raise ValueError(
            "A model of Hugging Face's computes its loss itself, so the fused loss cannot take its place. Use the plain "
            "loss, or a suite whose name does not begin with hf- or tiny-hf-."
        )
    huggingface.check_installed(shape)


def build(shape: Shape, *, device: str, dtype: torch.dtype, fused_loss: bool) -> nn.Module:
    """A model of this shape, which returns the loss of a batch of token ids; the same weights at every call.

    Raises:
        ValueError, ImportError: see :func:`check`.
    """
    check(shape, fused_loss=fused_loss)
    if shape.hugging_face:
        return huggingface.make_model(shape, device=device, dtype=dtype)
    return models.make_model(shape, device=device, dtype=dtype, fused_loss=fused_loss)
