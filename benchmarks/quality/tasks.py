"""What is fine-tuned on what: a small byte-level Llama, pretrained on Python source, on a text that is new to it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.models import Decoder, Shape, make_model
from benchmarks.quality import corpora
from benchmarks.quality.attempts import step_flops
from benchmarks.quality.corpora import Batches, Corpus

_BYTES = 256
_CLIP = 1.0
_WARMUP = 0.05
#: The rank where none is asked for.
LORA_RANK = 8

#: Corpora by the strength of the shift from what the model was pretrained on.
SHIFTS = {"slight": "libraries", "mild": "sympy", "strong": "headers"}
TUNINGS = ("full", "lora")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model with what it is trained for.

    Attributes:
        shape: of the model and its batches.
        pretrain_steps: length of the pretraining.
        pretrain_lr: its peak learning rate.
        steps: length of a fine-tuning.
        held_out: held-out windows that a loss is taken over.
        megabytes: of each corpus.
    """

    shape: Shape
    pretrain_steps: int
    pretrain_lr: float
    steps: int
    held_out: int
    megabytes: float


def _llama(layers: int, width: int, batch: int, tokens: int) -> Shape:
    return Shape(layers, width, 8 * width // 3 // 32 * 32, max(width // 64, 2), _BYTES, batch, tokens)


#: "tiny" is for tests; "mini" is trained within two minutes on a CPU; the others are for one GPU.
SIZES = {
    "tiny": Size(_llama(4, 48, 2, 32), 4, 1e-3, 8, 4, 1.0),
    "mini": Size(_llama(12, 96, 16, 128), 800, 2e-3, 400, 64, 6.0),
    "mini-long": Size(_llama(12, 96, 16, 128), 800, 2e-3, 1200, 64, 6.0),  # where more steps gain less
    "12x256": Size(_llama(12, 256, 32, 256), 3000, 1e-3, 600, 256, 12.0),
    "12x256-long": Size(_llama(12, 256, 32, 256), 20000, 1e-3, 600, 256, 64.0),  # knows its language
    "12x768": Size(_llama(12, 768, 64, 512), 1200, 6e-4, 300, 128, 24.0),
    "12x1536": Size(_llama(12, 1536, 48, 512), 1000, 4e-4, 240, 96, 24.0),  # large enough that the GPU is the limit
    "24x512": Size(_llama(24, 512, 32, 512), 2000, 6e-4, 600, 128, 24.0),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One fine-tuning problem.

    Attributes:
        size: one of ``SIZES``.
        shift: one of ``SHIFTS``.
        tuning: "full" trains all parameters, "lora" low-rank updates of all linear layers.
        windows: size of the data set, ``None`` for as much as there is: each window is then seen once.
        lora_rank: of the updates.

    Raises:
        ValueError: the rank is below 1.
    """

    size: str
    shift: str
    tuning: str
    windows: int | None = None
    lora_rank: int = LORA_RANK

    def __post_init__(self) -> None:
        if self.lora_rank < 1:  # to a shape, 0 means that everything is trained
            raise ValueError(
                f"lora_rank must be at least 1, not {self.lora_rank}. To train all weights, take the tuning 'full'."
            )

    @property
    def shape(self) -> Shape:
        shape = SIZES[self.size].shape
        return dataclasses.replace(shape, lora_rank=self.lora_rank) if self.tuning == "lora" else shape

    @property
    def name(self) -> str:
        rank = "" if self.lora_rank == LORA_RANK or self.tuning == "full" else f", rank {self.lora_rank}"
        small = "" if self.windows is None else f", {self.windows} windows"
        return f"{self.size}, {self.shift}, {self.tuning}{rank}{small}"

    @property
    def conditions(self) -> dict[str, object]:
        """What every record of the task names."""
        return {"task": self.name, **dataclasses.asdict(self)}


class Workshop:
    """Corpora, pretrained weights and batches, each made once.

    Args:
        size: one of ``SIZES``.
        device: "cpu" or "cuda".
        inner: the compiler of pretraining.
        folder: where pretrained weights are kept between processes.
        pretrain_steps, steps: instead of the size's.
    """

    def __init__(
        self,
        size: str,
        device: str,
        inner: str,
        folder: Path,
        pretrain_steps: int | None = None,
        steps: int | None = None,
    ) -> None:
        lengths = {"pretrain_steps": pretrain_steps, "steps": steps}
        given = {name: value for name, value in lengths.items() if value is not None}
        self.size, self.device, self.inner = dataclasses.replace(SIZES[size], **given), device, inner
        self._folder = folder
        self._corpora: dict[str, Corpus] = {}
        self._weights: dict[str, Tensor] | None = None
        self._flops: dict[Task, int] = {}

    def corpus(self, name: str) -> Corpus:
        if name not in self._corpora:
            self._corpora[name] = corpora.read(name, megabytes=self.size.megabytes)
        return self._corpora[name]

    def batches(self, corpus: str, seed: int, windows: int | None = None) -> Batches:
        shape = self.size.shape
        return Batches(self.corpus(corpus).train, shape.tokens, shape.batch, seed, windows)

    def model(self, task: Task) -> Decoder:
        """The pretrained model, ready to be fine-tuned; the same at every call."""
        model = make_model(task.shape, device=self.device, dtype=torch.float32, fused_loss=False)
        unknown = model.load_state_dict(self._pretrained(), strict=False)
        assert not unknown.unexpected_keys
        return model

    @torch.no_grad()
    def held_out_loss(self, model: Decoder, corpus: str) -> float:
        """Mean loss a byte, in nats, over windows spread over the held-out files."""
        text, shape = self.corpus(corpus).held_out, self.size.shape
        batches = Batches(text, shape.tokens, shape.batch, seed=0, windows=max(self.size.held_out, shape.batch))
        losses = []
        for step in range(batches.steps_per_epoch):
            with self.precision():
                losses.append(model(batches[step].to(self.device)))
        return float(torch.stack(losses).double().mean())

    def train(
        self,
        run: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        steps: Iterable[int],
        of: int,
        learning_rate: float,
    ) -> None:
        """Exact steps, a stretch of a run of length ``of`` that peaks at ``learning_rate``."""
        for step in steps:
            set_learning_rate(optimizer, learning_rate * cosine(step, of))
            with self.precision():
                loss = run(moved(batches[step], self.device))
            loss.backward()
            update(optimizer)

    def flops(self, task: Task) -> int:
        """FLOPs of an exact forward and backward on a batch."""
        if task not in self._flops:
            self._flops[task] = step_flops(self.model(task), self.batches(SHIFTS[task.shift], 0)[0].to(self.device))
        return self._flops[task]

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Parameters are float32; GPUs compute in bf16."""
        if self.device == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def _pretrained(self) -> dict[str, Tensor]:
        if self._weights is None:
            corpus = self.corpus("python")
            conditions = (dataclasses.replace(self.size, steps=0), corpus.digest, self.device, torch.__version__)
            key = hashlib.blake2b(repr(conditions).encode(), digest_size=8).hexdigest()
            path = self._folder / f"pretrained-{key}.pt"
            if not path.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(f".partial{os.getpid()}")  # another process may be at it
                torch.save(self._pretrain(), partial)
                partial.rename(path)
            self._weights = torch.load(path, map_location=self.device)
        return self._weights

    def _pretrain(self) -> dict[str, Tensor]:
        size = self.size
        model = make_model(size.shape, device=self.device, dtype=torch.float32, fused_loss=False)
        # One graph, which nothing else runs beside: CUDA graphs spare the host, which limits small models.
        mode = "reduce-overhead" if self.device == "cuda" and self.inner == "inductor" else None
        run = torch.compile(model, backend=self.inner, mode=mode, dynamic=False)
        optimizer = make_optimizer([{"params": list(model.parameters())}], self.device)
        batches = self.batches("python", seed=0)
        steps = tqdm(range(size.pretrain_steps), "pretraining", leave=False)
        self.train(run, optimizer, batches, steps, size.pretrain_steps, size.pretrain_lr)
        torch._dynamo.reset()
        return model.state_dict()


def moved(ids: Tensor, device: str) -> Tensor:
    """On the device, and without waiting for what the device has yet to do: the host runs ahead of it as with any loader."""
    if device == "cuda":
        return ids.pin_memory().to(device, non_blocking=True)
    return ids.to(device)


def make_optimizer(groups: list[dict[str, object]], device: str) -> torch.optim.AdamW:
    """AdamW as everybody uses it here; learning rates are set at each step."""
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.01, fused=device == "cuda")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def update(optimizer: torch.optim.Optimizer, before: Callable[[], None] = lambda: None) -> None:
    """Clip, step, and forget the gradients."""
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], _CLIP)
    before()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def cosine(step: float, steps: float) -> float:
    """Share of the peak learning rate: up in the first twentieth of the run, then down to zero along a cosine."""
    progress = step / steps
    if progress < _WARMUP:
        return (step + 1) / max(_WARMUP * steps, 1)
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))
