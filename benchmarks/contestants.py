"""Ways to train the same model, each a function that returns a training loss for a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import Llama
from dropbp_fx import dropbp_backend
from dropbp_fx.graph import regions

Loss = Callable[[Tensor], Tensor]


def patterns(branches: int, rate: float, seed: int = 0) -> Callable[[], set[int]]:
    """Random patterns of exactly ``round(rate * branches)`` branches, the same for every contestant."""
    rng = random.Random(seed)
    return lambda: set(rng.sample(range(branches), round(rate * branches)))


def eager(model: Llama, rate: float) -> Loss:
    return _by_hand(model, rate, compiled=False)


def careful_user(model: Llama, rate: float) -> Loss:
    """Attention and MLP each compiled once; adds and ``detach`` between them in eager: the best one can do by hand."""
    return _by_hand(model, rate, compiled=True)


def _by_hand(model: Llama, rate: float, *, compiled: bool) -> Loss:
    draw = patterns(2 * len(model.layers), rate)
    wrap = torch.compile if compiled else lambda function: function
    kind = type(model.layers[0])
    attention, feed_forward, loss = wrap(kind.attention), wrap(kind.feed_forward), wrap(type(model).loss)

    def run(ids: Tensor) -> Tensor:
        dropped = draw()
        x = F.embedding(ids[:, :-1], model.embedding)
        for index, layer in enumerate(model.layers):
            h = branch(attention, 2 * index in dropped, layer, x, model.cos, model.sin)
            x = x + h
            x = x + branch(feed_forward, 2 * index + 1 in dropped, layer, x)
        return loss(model, x, ids)

    def branch(function: Callable[..., Tensor], drop: bool, *arguments: object) -> Tensor:
        if not drop:
            return function(*arguments)
        with torch.no_grad():
            return function(*arguments)

    return run


def torch_compile(model: Llama, rate: float) -> Loss:
    return torch.compile(model)


def dropbp(model: Llama, rate: float) -> Loss:
    backend = dropbp_backend(rate=rate)
    compiled = torch.compile(model, backend=backend)
    draw = patterns(2 * len(model.layers), rate)

    def run(ids: Tensor) -> Tensor:
        first = not backend.branches
        with backend.pinned(draw()):
            loss = compiled(ids)
        if first:
            backend.warmup()  # so that the first step's figure holds every variant a run needs
        return loss

    return run


def dropbp_layer_regions(model: Llama, rate: float) -> Loss:
    """dropbp_fx with one region for each layer instead of one for each branch."""
    merge = regions._merge_overlapping

    def merge_pairs(intervals: Sequence[tuple[int, int, list[int]]]) -> list[tuple[int, int, list[int]]]:
        groups = merge(intervals)
        pairs = zip(groups[::2], groups[1::2], strict=True)
        return [(a[0], b[1], a[2] + b[2]) for a, b in pairs]

    run = dropbp(model, rate)

    def patched(ids: Tensor) -> Tensor:
        with mock.patch.object(regions, "_merge_overlapping", merge_pairs):
            return run(ids)

    return patched


def forward_only(model: Llama, rate: float) -> Loss:
    compiled = torch.compile(model)

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(ids)

    return run


CONTESTANTS: dict[str, Callable[[Llama, float], Loss]] = {
    "eager": eager,
    "torch.compile": torch_compile,
    "careful user": careful_user,
    "dropbp_fx": dropbp,
    "dropbp_fx, layer regions": dropbp_layer_regions,
    "forward only": forward_only,
}
