"""Ways to train the same model. Each is made from a model and says how to get a batch's training loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from benchmarks.models import Checkpointed, Decoder, Shape
from dropbp_fx import dropbp_backend
from dropbp_fx.graph import regions


def _nothing() -> None:
    pass


@dataclasses.dataclass
class Training:
    """One method at work on one model.

    Attributes:
        loss: the loss of a batch of token ids; its backward is the method's.
        choose: sets the knob (drop rate, share of checkpointed layers, memory budget) from the next step on.
        compile_all: compiles whatever later steps may need, after the first step.
        facts: figures of the method's own, for its records.
    """

    loss: Callable[[Tensor], Tensor]
    choose: Callable[[float], None] = lambda value: None
    compile_all: Callable[[], None] = _nothing
    facts: Callable[[], dict[str, Any]] = dict


@dataclasses.dataclass(frozen=True)
class Method:
    """How to make a training, and what its knob is.

    Attributes:
        knob: "rate", "share" or "budget", ``None`` where there is nothing to choose.
        recompiles: a new value of the knob compiles everything again, so it has a first step of its own.
        by_hand: it calls or replaces parts of the model, which must be a :class:`Decoder`; others take any module that
            returns the loss.
        cuda_graphs: on a GPU it keeps activations in the memory of CUDA graphs, between steps as well.
    """

    make: Callable[[Any, str], Training]
    knob: str | None = None
    recompiles: bool = False
    by_hand: bool = False
    cuda_graphs: bool = False

    def trains(self, shape: Shape) -> bool:
        """Can it train a model of this shape?"""
        return not (self.by_hand and shape.hugging_face)


class Patterns:
    """Random patterns of exactly ``round(rate * branches)`` branches, the same for every method."""

    def __init__(self, branches: int) -> None:
        self.branches = branches
        self.choose(0.0)

    def choose(self, rate: float) -> None:
        self.rate, self._rng = rate, random.Random(0)

    def draw(self) -> set[int]:
        return set(self._rng.sample(range(self.branches), round(self.rate * self.branches)))


def eager(model: nn.Module, inner: str) -> Training:
    return Training(model)


def torch_compile(model: nn.Module, inner: str) -> Training:
    return Training(torch.compile(model, backend=inner, dynamic=False))


def reduce_overhead(model: nn.Module, inner: str) -> Training:
    """Inductor's CUDA graphs. Another inner compiler has no modes, and a CPU no graphs: it is torch.compile there."""
    mode = "reduce-overhead" if inner == "inductor" else None
    return Training(torch.compile(model, backend=inner, mode=mode, dynamic=False))


def forward_alone(model: nn.Module, inner: str) -> Training:
    compiled = torch.compile(model, backend=inner, dynamic=False)

    def run(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(ids)

    return Training(run)


# ---- dropping by hand ----------------------------------------------------------------------------------------------


def careful_detach(model: Decoder, inner: str) -> Training:
    """Attention and MLP each compiled once; adds, and ``detach`` of a dropped branch's output, in eager between them."""
    return _by_hand(model, inner, no_grad=False)


def careful_no_grad(model: Decoder, inner: str) -> Training:
    """The same with dropped branches under ``no_grad``, so that they never save anything: the best one can do by hand."""
    return _by_hand(model, inner, no_grad=True)


def compiled_parts(model: Decoder, inner: str) -> tuple[Callable[..., Tensor], ...]:
    """Any layer's attention, any layer's MLP, and the head with the loss, each compiled once."""
    kind = type(model.layers[0])
    functions = (kind.attention, kind.feed_forward, type(model).loss)
    return tuple(torch.compile(function, backend=inner, dynamic=False) for function in functions)


def _by_hand(model: Decoder, inner: str, *, no_grad: bool) -> Training:
    patterns = Patterns(2 * len(model.layers))
    attention, feed_forward, head = compiled_parts(model, inner)

    def branch(function: Callable[..., Tensor], dropped: bool, *arguments: object) -> Tensor:
        if not dropped:
            return function(*arguments)
        with torch.no_grad() if no_grad else contextlib.nullcontext():
            return function(*arguments).detach()

    def run(ids: Tensor) -> Tensor:
        dropped = patterns.draw()
        x = model.embed(ids)
        for index, layer in enumerate(model.layers):
            x = x + branch(attention, 2 * index in dropped, layer, x, *model.context())
            x = x + branch(feed_forward, 2 * index + 1 in dropped, layer, x)
        return head(model, x, ids)

    return Training(run, patterns.choose)


class _DropBP(nn.Module):
    """What the paper's implementation puts behind a branch: passes its output on, at chance ``p`` without its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.0

    def forward(self, h: Tensor) -> Tensor:
        if self.training and random.random() < self.p:
            return h.detach()
        return h


class _ReferenceLayer(nn.Module):
    """A decoder layer edited by hand, as the paper's users do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.drop_attention, self.drop_feed_forward = layer, _DropBP(), _DropBP()

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        x = x + self.drop_attention(self.layer.attention(x, *context))
        return x + self.drop_feed_forward(self.layer.feed_forward(x))


class _ReferenceHandler:
    """Decides before each step what drops: each branch by its own coin, and where that made too few, more from the
    first branch on until the rate is reached (never fewer where it made too many).
    """

    def __init__(self, model: Decoder) -> None:
        self._drops = [module for module in model.modules() if isinstance(module, _DropBP)]
        self.choose(0.0)

    def choose(self, rate: float) -> None:
        self._rate, self._rng = rate, random.Random(0)

    def set_dropped(self) -> None:
        dropped = [self._rng.random() < self._rate for _ in self._drops]
        for index in range(len(dropped)):
            if sum(dropped) >= self._rate * len(dropped):
                break
            dropped[index] = True
        for module, drop in zip(self._drops, dropped, strict=True):
            module.p = float(drop)


def reference(model: Decoder, inner: str) -> Training:
    return _reference(model, model)


def reference_compiled(model: Decoder, inner: str) -> Training:
    return _reference(model, torch.compile(model, backend=inner, dynamic=False))


def _reference(model: Decoder, run: Callable[[Tensor], Tensor]) -> Training:
    for index, layer in enumerate(model.layers):
        model.layers[index] = _ReferenceLayer(layer)
    handler = _ReferenceHandler(model)

    def loss(ids: Tensor) -> Tensor:
        handler.set_dropped()
        return run(ids)

    return Training(loss, handler.choose)


# ---- saving activation memory without dropping -----------------------------------------------------------------------


def checkpointing(model: Decoder, inner: str) -> Training:
    """A share of the layers, spread evenly, each recompute their activations."""
    layers = list(model.layers)

    def choose(share: float) -> None:
        torch._dynamo.reset()
        for index, layer in enumerate(layers):
            chosen = int((index + 1) * share) > int(index * share)
            model.layers[index] = Checkpointed(layer) if chosen else layer

    return Training(torch.compile(model, backend=inner, dynamic=False), choose)


def memory_budget(model: nn.Module, inner: str) -> Training:
    """The partitioner decides what to recompute, to save no more than a share of what it would."""
    from torch._functorch import config

    _count_shared_heads()
    compiled = torch.compile(model, backend=inner, dynamic=False)
    chosen = 1.0

    def choose(budget: float) -> None:
        nonlocal chosen
        torch._dynamo.reset()
        chosen = budget

    def run(ids: Tensor) -> Tensor:
        with config.patch(activation_memory_budget=chosen):
            return compiled(ids)

    return Training(run, choose)


def _count_shared_heads() -> None:
    """Torch 2.11's partitioner cannot weigh an attention whose query heads share keys and values: its formula refuses
    the sizes. Later releases count it like this.
    """
    aten = torch.ops.aten
    for operator in (
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    ):
        flop_registry[operator] = functools.partial(_attention_flops, flop_registry[operator])


def _attention_flops(formula: Callable[..., int], query: Any, key: Any, value: Any, *more: Any, **named: Any) -> int:
    """``formula`` takes tensors or their sizes."""
    query, key, value = (getattr(operand, "shape", operand) for operand in (query, key, value))
    key, value = (torch.Size([*other[:1], query[1], *other[2:]]) for other in (key, value))
    return formula(query, key, value, *more, **named)


# ---- dropbp_fx -----------------------------------------------------------------------------------------------------------


def dropbp(
    model: nn.Module, inner: str, *, activation_memory_budget: float | None = None, cuda_graphs: bool = False
) -> Training:
    """The backend's own random patterns, all of a kept branch's activations saved or a share of them.

    CUDA graphs are an option of Inductor's, which another inner compiler does not take.
    """
    if activation_memory_budget is not None:
        _count_shared_heads()
    backend = dropbp_backend(
        rate=0.0,
        inner=inner,
        seed=0,
        activation_memory_budget=activation_memory_budget,
        options={"triton.cudagraphs": True} if cuda_graphs and inner == "inductor" else None,
    )
    before = backend.stats

    def choose(rate: float) -> None:
        nonlocal before
        backend.rate, before = rate, backend.stats

    def facts() -> dict[str, Any]:
        stats = backend.stats
        dropped = stats.realised_rate * stats.forwards - before.realised_rate * before.forwards
        return {
            "realised_rate": round(dropped / max(stats.forwards - before.forwards, 1), 4),
            "compiled_variants": stats.compiled_variants,
            "inner_compile_s": round(stats.compile_seconds, 2),
        }

    compiled = torch.compile(model, backend=backend, dynamic=False)
    return Training(compiled, choose, backend.warmup, facts)


def dropbp_layer_regions(model: nn.Module, inner: str) -> Training:
    """One region for each layer instead of one for each branch: what docs/design.md compares with."""
    merge = regions._merge_overlapping

    def merge_pairs(intervals: Sequence[tuple[int, int, list[int]]]) -> list[tuple[int, int, list[int]]]:
        groups = merge(intervals)
        pairs = zip(groups[::2], groups[1::2], strict=True)
        return [(a[0], b[1], a[2] + b[2]) for a, b in pairs]

    training = dropbp(model, inner)

    def patched(ids: Tensor) -> Tensor:
        with mock.patch.object(regions, "_merge_overlapping", merge_pairs):
            return training.loss(ids)

    return dataclasses.replace(training, loss=patched)


METHODS: dict[str, Method] = {
    "eager": Method(eager),
    "torch.compile": Method(torch_compile),
    "torch.compile, reduce-overhead": Method(reduce_overhead, cuda_graphs=True),
    "reference DropBP": Method(reference, "rate", by_hand=True),
    "reference DropBP, torch.compile": Method(reference_compiled, "rate", by_hand=True),
    "careful user, detach": Method(careful_detach, "rate", by_hand=True),
    "careful user, no_grad": Method(careful_no_grad, "rate", by_hand=True),
    "checkpointing": Method(checkpointing, "share", recompiles=True, by_hand=True),
    "memory budget": Method(memory_budget, "budget", recompiles=True),
    "dropbp_fx": Method(dropbp, "rate"),
    "dropbp_fx, CUDA graphs": Method(functools.partial(dropbp, cuda_graphs=True), "rate", cuda_graphs=True),
    "dropbp_fx, budget 0.7": Method(functools.partial(dropbp, activation_memory_budget=0.7), "rate"),
    "dropbp_fx, budget 0": Method(functools.partial(dropbp, activation_memory_budget=0.0), "rate"),
    "dropbp_fx, layer regions": Method(dropbp_layer_regions, "rate"),
    "forward alone": Method(forward_alone),
}
#: What a run measures unless told otherwise: the most telling first, because a run may meet its time limit. Reference
#: DropBP under torch.compile compiles again and again before it gives up, so it is run on request.
DEFAULT = [
    "torch.compile",
    "dropbp_fx",
    "torch.compile, reduce-overhead",
    "dropbp_fx, CUDA graphs",
    "forward alone",
    "dropbp_fx, budget 0.7",
    "dropbp_fx, budget 0",
    "careful user, no_grad",
    "careful user, detach",
    "eager",
    "reference DropBP",
    "checkpointing",
    "memory budget",
]


def check(names: Iterable[str], suite: str, shape: Shape) -> None:
    """Can these methods train the suite's model?

    Raises:
        ValueError: some cannot.
    """
    refused = [name for name in names if not METHODS[name].trains(shape)]
    if refused:
        possible = ", ".join(repr(name) for name, method in METHODS.items() if method.trains(shape))
        raise ValueError(
            f"{', '.join(map(repr, refused))} cannot train the suite {suite!r}: such a method takes the benchmarks' own "
            f"models apart, and this is a model of Hugging Face's. Those that can are {possible}."
        )
