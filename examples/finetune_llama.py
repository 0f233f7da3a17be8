"""Train a small Hugging Face Llama on the CPU with and without DropBP, and compare speed and memory.

The text is the source code of Python's own standard library, so nothing is downloaded. Two copies of one model, started
from the same random weights, take the same batches in turn: one drops nothing, the other drops residual branches in the
backward pass. Taking turns keeps the comparison fair on a machine that is busy with other things.

Run it with ``make demo``, or ``python examples/finetune_llama.py --help``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import platform
import shutil
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from dropbp_fx import DropBPBackend, dropbp_backend

try:
    import matplotlib
    import transformers
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(f"This demo needs the package {error.name!r}. Install the extra: pip install 'dropbp-fx[examples]'")

BYTES = 256
#: Every so many steps a step is measured for memory instead of time: looking at each saved tensor takes a while.
MEMORY_EVERY = 10
#: The first steps of a run still fill the allocator's and the processor's caches; their times do not count.
UNTIMED = 5


@dataclasses.dataclass
class Run:
    """One of the two models and what has been measured on it."""

    model: LlamaForCausalLM
    backend: DropBPBackend
    compiled: Callable[..., transformers.modeling_outputs.CausalLMOutputWithPast]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    saved_bytes: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, model: LlamaForCausalLM, rate: float, arguments: argparse.Namespace) -> Run:
        backend = dropbp_backend(rate, seed=arguments.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return cls(model, backend, torch.compile(model, backend=backend), optimizer, schedule)

    def loss(self, batch: Tensor) -> Tensor:
        loss = self.compiled(input_ids=batch, labels=batch).loss
        assert loss is not None  # Hugging Face returns none only where there are no labels
        return loss

    def step(self, batch: Tensor) -> None:
        """Forward, backward, optimizer; every tenth one is measured for memory, the others for time."""
        number = len(self.losses)
        started = time.perf_counter()
        if number % MEMORY_EVERY == 0:
            loss, saved = self._forward_counting_saved_bytes(batch)
            self.saved_bytes.append(saved)
        else:
            loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)  # a dropped branch gets no gradient, and AdamW then skips it
        if number >= UNTIMED and number % MEMORY_EVERY:
            self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())

    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    def _forward_counting_saved_bytes(self, batch: Tensor) -> tuple[Tensor, int]:
        """A forward that adds up what autograd keeps for the backward.

        Autograd passes every tensor it saves through the hook, those of compiled code included. Several saved tensors
        may be views of one piece of memory, so each storage counts once; parameters are saved too, but they are there
        anyway and do not count. ``kept`` holds on to the tensors: an address must not be used twice during the count.
        """
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, Tensor] = {}

        def count(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = self.loss(batch)
        return loss, sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in parameters)

    def evaluate(self, batches: Sequence[Tensor]) -> float:
        """Mean loss on held-out text, in eager mode: compiling for a few batches would take longer than running them."""
        self.model.eval()
        with torch.no_grad():
            return statistics.mean(self.model(input_ids=b, labels=b).loss.item() for b in batches)


def read_text() -> tuple[bytes, bytes, int]:
    """The standard library's modules, split by file: every tenth is for evaluation. Also returns how many there are."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py"))
    files = [file for file in files if not {"site-packages", "test"} & set(file.parts)]
    train = b"\n".join(file.read_bytes() for index, file in enumerate(files) if index % 10)
    held_out = b"\n".join(file.read_bytes() for file in files[::10])
    if len(held_out) < 100_000:
        sys.exit(
            f"The demo trains on the source of Python's standard library, but {folder} holds hardly any .py files."
        )
    return train, held_out, len(files)


def batches_of(text: bytes, count: int, batch: int, tokens: int, seed: int) -> list[Tensor]:
    """Batches of random stretches of ``text``, one token a byte."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - tokens, (count, batch), generator=generator).tolist()
    return [torch.stack([data[at : at + tokens] for at in row]).long() for row in starts]


def compile_all(runs: Sequence[Run], batch: Tensor) -> float:
    """Compile everything the run will need before the clock starts; returns the seconds it took."""
    print("Compiling (about a minute the first time; later runs find most of it in the compiler's cache on disk).")
    started = time.perf_counter()
    # The run that drops goes first: its variants include the one that the other needs.
    for run in tqdm(sorted(runs, key=lambda run: -run.backend.rate), desc="compile", unit="model"):
        if run.backend.rate:
            run.loss(batch)
            run.backend.warmup()
        run.loss(batch).backward()
        run.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def train(runs: Sequence[Run], batches: Sequence[Tensor]) -> None:
    bar = tqdm(batches, desc="train", unit="step")
    for batch in bar:
        for run in runs:
            run.step(batch)
        bar.set_postfix({f"loss at rate {run.backend.rate:g}": f"{run.losses[-1]:.3f}" for run in runs})


def table(runs: Sequence[Run], held_out: Sequence[Tensor]) -> str:
    rows = [
        [
            f"{run.backend.rate:g}",
            f"{run.backend.stats.realised_rate:.3f}",
            f"{statistics.mean(run.losses[-10:]):.3f}",
            f"{run.evaluate(held_out):.3f}",
            f"{1e3 * run.step_seconds():.0f}",
            f"{runs[0].step_seconds() / run.step_seconds():.2f}x",
            f"{statistics.mean(run.saved_bytes) / 2**20:.1f}",
        ]
        for run in runs
    ]
    headers = ["drop rate", "realised rate", "train loss", "eval loss", "step ms", "speed-up", "saved MiB"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, stralign="right")


def plot(runs: Sequence[Run], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for run in runs:
        window = 5
        smooth = [statistics.mean(run.losses[max(0, i - window) : i + 1]) for i in range(len(run.losses))]
        clock = [number * run.step_seconds() for number in range(len(smooth))]
        by_step.plot(smooth, label=f"drop rate {run.backend.rate:g}")
        by_time.plot(clock, smooth, label=f"drop rate {run.backend.rate:g}")
    by_step.set(xlabel="step", ylabel="training loss (mean of six steps)", title="by step")
    by_time.set(xlabel="steps x median step time, s", title="by time")
    by_step.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.5, help="drop rate of the second run (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: 80, with --small 20)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: 8, with --small 3)")
    parser.add_argument("--width", type=int, help="hidden size, a multiple of 64 (default: 256, with --small 64)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="bytes in a sequence (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and patterns (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the processors this process may use)")
    parser.add_argument("--small", action="store_true", help="the smallest size, to see that everything works")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune_llama.png"), help="where the plot goes")
    arguments = parser.parse_args(argv)
    arguments.steps = arguments.steps or (20 if arguments.small else 80)
    arguments.layers = arguments.layers or (3 if arguments.small else 8)
    arguments.width = arguments.width or (64 if arguments.small else 256)
    if not 0 < arguments.rate < 1:
        parser.error(f"--rate must lie between 0 and 1, not {arguments.rate:g}: the other run has rate 0 already.")
    if arguments.width % 64:
        parser.error(f"--width must be a multiple of 64, not {arguments.width}.")
    if arguments.steps <= UNTIMED + 1:
        parser.error(f"--steps must be at least {UNTIMED + 2}: the first {UNTIMED} are not timed.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    compiler = os.environ.get("CXX", "g++")
    if not any(map(shutil.which, (compiler, "g++", "clang++"))):
        sys.exit("torch.compile needs a C++ compiler on the CPU, and none was found. Install g++, or set CXX.")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(arguments.threads or min(usable, torch.get_num_threads()))

    text, held_out_text, files = read_text()
    size = (arguments.batch, arguments.tokens)
    batches = batches_of(text, arguments.steps, *size, seed=arguments.seed)
    held_out = batches_of(held_out_text, 8, *size, seed=arguments.seed)

    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=arguments.width,
        intermediate_size=3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 64,
        max_position_embeddings=arguments.tokens,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    runs = [Run.start(copy.deepcopy(model), rate, arguments) for rate in (0.0, arguments.rate)]

    compile_seconds = compile_all(runs, batches[0])
    train(runs, batches)
    print()
    print(
        f"A Llama of {arguments.layers} layers x {arguments.width} ({parameters / 1e6:.1f} M parameters, random initial "
        f"weights) took {arguments.steps} steps of {arguments.batch} x {arguments.tokens} bytes from {files} modules of "
        f"Python {platform.python_version()}'s standard library, on {torch.get_num_threads()} CPU threads, with torch "
        f"{torch.__version__} and transformers {transformers.__version__}. Compiling took {compile_seconds:.0f} s."
    )
    print()
    print(table(runs, held_out))
    print()
    print(
        "Step ms: median of forward, backward and optimizer, after warm-up. Saved MiB: what autograd keeps for the "
        "backward, mean of the steps measured. Train loss: mean of the last ten steps.\n"
        "This shows speed and memory. Whether dropping pays in learning depends on which branches are dropped and when; "
        "docs/choosing.md says what is known."
    )
    plot(runs, arguments.output)
    print(f"The loss curves are in {arguments.output}.")


if __name__ == "__main__":
    main()
