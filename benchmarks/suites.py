"""What is trained: shapes for one large GPU, and a small twin of each for correctness on a CPU."""

from __future__ import annotations

import dataclasses

from benchmarks.models import Shape

_1B = Shape(16, 2048, 8192, 16, 32000, 4, 2048)
_8B = Shape(32, 4096, 14336, 32, 128256, 2, 4096, kv_heads=8)
_GPT2 = Shape(12, 768, 3072, 12, 50257, 4, 256, family="gpt2")
_TINY = Shape(4, 64, 128, 4, 256, 2, 32)


def _lora(shape: Shape, rank: int = 8, *, four_bit: bool = False) -> Shape:
    return dataclasses.replace(shape, lora_rank=rank, four_bit=four_bit)


#: By name. Llama-shaped with about a billion parameters; Llama-3-8B's shape; GPT-2's with few tokens, so that the host
#: is the limit; and one long sequence.
SUITES: dict[str, Shape] = {
    "1b": _1B,
    "1b-lora": _lora(_1B),
    "8b": _8B,
    "8b-lora": _lora(_8B),
    "8b-qlora": _lora(_8B, four_bit=True),
    "gpt2": _GPT2,
    "long": dataclasses.replace(_1B, batch=1, tokens=32768),
    "1b-eighth": Shape(4, 256, 1024, 2, 4000, 2, 512),  # an eighth of each of 1b's sizes; 4 layers
    "tiny": _TINY,
    "tiny-lora": _lora(_TINY, 4),
    "tiny-gqa": dataclasses.replace(_TINY, kv_heads=2),
    "tiny-gqa-lora": _lora(dataclasses.replace(_TINY, kv_heads=2), 4),
    "tiny-qlora": _lora(dataclasses.replace(_TINY, kv_heads=2), 4, four_bit=True),
    "tiny-gpt2": dataclasses.replace(_TINY, family="gpt2"),
    "tiny-long": dataclasses.replace(_TINY, layers=2, batch=1, tokens=256),
}


def shape_of(suite: str, *, layers: int | None = None, batch: int | None = None, tokens: int | None = None) -> Shape:
    """A suite's shape, with other sizes where given."""
    sizes = {"layers": layers, "batch": batch, "tokens": tokens}
    return dataclasses.replace(SUITES[suite], **{name: size for name, size in sizes.items() if size is not None})
