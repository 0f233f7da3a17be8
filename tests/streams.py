"""Random programs of several residual streams, and the oracle that knows their adds by construction.

A program is a list of steps over a set of streams, as plain data: streams are added to, split off, merged, stacked,
permuted, normalised, looked at by auxiliary losses, and end early. :class:`Program` runs it; ``cut`` names the adds whose
addend is detached. Every add has a module of its own, ``work.<number>``, by which its branch is recognised.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import re
import time
import warnings
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropbp_fx import LessDroppedWarning, NoResidualBranchWarning, dropbp_backend
from tests.oracle import Result, assert_equal

D = 4
REFUSED = "The loss depends on a value that a dropped branch hands to the compiled model's outputs"
Step = tuple[Any, ...]
#: A joint step's second add has the step's number and this.
SECOND = 1000
#: How a program ends: the loss inside, or outside of returned heads or of the streams themselves.
ENDINGS = ("loss", "heads", "raw")


class Work(nn.Module):
    """What one add computes from its own stream and others."""

    def __init__(self, kind: str, sources: int) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(D * (1 if kind == "attention" else sources), D)
        self.second = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)

    def forward(self, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The addend, and a value made on the way."""
        if self.kind == "attention":
            keys = self.first(self.norm(values[-1]))
            return self.second(F.scaled_dot_product_attention(self.norm(values[0]), keys, keys)), keys
        inside = self.first(torch.cat([self.norm(values[0]), *values[1:]], -1))
        if self.kind == "linear":
            return inside.tanh(), inside
        return self.second(F.gelu(inside)), inside


class Joint(nn.Module):
    """Attention over two streams together, as in models of text and images."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([a, b], 1)
        mixed = F.scaled_dot_product_attention(self.q(both), self.k(both), both)
        return mixed[:, : a.shape[1]], mixed[:, a.shape[1] :]


class Program(nn.Module):
    """Runs ``steps``; ``used`` says which of what it returns the loss outside depends on."""

    def __init__(self, steps: list[Step], streams: int, ending: str, seed: int) -> None:
        super().__init__()
        self.steps, self.streams, self.ending = steps, streams, ending
        self.rng = seed
        self.stems = nn.ModuleList(nn.Linear(D, D) for _ in range(streams))
        self.work, self.other, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.cut: frozenset[int] = frozenset()
        for number, step in enumerate(steps):
            if step[0] == "add":
                self.work[str(number)] = Work(step[3], len(step[2]))
            elif step[0] == "joint":
                self.other[str(number)] = Joint()
                self.work[str(number)], self.work[str(number + SECOND)] = nn.Linear(D, D), nn.Linear(D, D)
            elif step[0] in ("merge", "split"):
                self.work[str(number)] = nn.Linear(D, D)
            elif step[0] == "norm":
                self.other[str(number)] = nn.LayerNorm(D)
            elif step[0] == "aux":
                self.other[str(number)] = nn.Linear(D, 2)
        self.heads.update({str(at): nn.Linear(D, 2) for at in range(12)})

    def _addend(self, value: Tensor, number: int) -> Tensor:
        return value.detach() if number in self.cut else value

    def forward(self, x: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The loss inside, and everything else that is returned."""
        streams: list[Tensor | None] = [stem(x) for stem in self.stems]
        losses: list[Tensor] = []
        returned: list[Tensor] = []
        for number, (kind, at, *rest) in enumerate(self.steps):
            value = streams[at]
            assert value is not None
            if kind == "add":
                sources, _, tap = rest
                addend, inside = self.work[str(number)]([streams[k] for k in sources])
                streams[at] = value + self._addend(addend, number)
                if tap == "loss":
                    losses.append(inside.square().mean())
                elif tap == "return":
                    returned.append(inside)
            elif kind == "joint":
                (other,) = rest
                mine, its = self.other[str(number)](value, streams[other])
                streams[at] = value + self._addend(self.work[str(number)](mine), number)
                streams[other] = streams[other] + self._addend(self.work[str(number + SECOND)](its), number + SECOND)
            elif kind == "split":
                streams.append(self.work[str(number)](value))
            elif kind == "merge":
                (other,) = rest
                streams[at] = value + self._addend(self.work[str(number)](streams[other]), number)
            elif kind == "stack":
                (other,) = rest
                both = torch.stack([value, streams[other]], 1).transpose(1, 2).contiguous()
                streams[at], streams[other] = both.transpose(1, 2).unbind(1)
            elif kind == "permute":
                streams[at] = value.transpose(1, 2).contiguous().transpose(1, 2)
            elif kind == "norm":
                streams[at] = self.other[str(number)](value)
            elif kind == "aux":
                (where,) = rest
                found = self.other[str(number)](value).square().mean()
                (losses if where == "loss" else returned).append(found)
            elif kind == "end":
                streams[at] = None
        left = [(at, value) for at, value in enumerate(streams) if value is not None]
        if self.ending == "loss":
            losses += [self.heads[str(at)](value).square().mean() for at, value in left]
        elif self.ending == "heads":
            returned += [self.heads[str(at)](value) for at, value in left]
        else:
            returned += [value for _, value in left]
        return (torch.stack(losses).sum() if losses else None), returned

    def loss_of(self, run: Any, x: Tensor) -> Tensor:
        """The loss, of what is returned a random part of it."""
        inside, returned = run(x)
        rng = random.Random(self.rng)
        parts = [
            value.square().mean() for value in returned if rng.random() < 0.7 or (inside is None and len(returned) < 2)
        ]
        if inside is not None:
            parts.append(inside)
        return torch.stack(parts or [returned[-1].square().mean()]).sum()


def random_program(seed: int, *, length: int = 6) -> Program:
    """A program of one to three streams, a function of ``seed``."""
    rng = random.Random(seed)
    count = rng.choice((1, 2, 2, 2, 3))
    live = list(range(count))
    total = count
    steps: list[Step] = []
    adds = 0
    for _ in range(rng.randint(2, length)):
        at = rng.choice(live)
        others = [k for k in live if k != at]
        kind = rng.choices(
            ("add", "joint", "split", "merge", "stack", "permute", "norm", "aux", "end"),
            (10, 2, 1, 2, 1, 1, 2, 1, 1),
        )[0]
        if kind == "add":
            sources = [at, *(k for k in others if rng.random() < 0.6)]
            tap = rng.choices((None, "loss", "return"), (8, 1, 1))[0]
            steps.append(("add", at, sources, rng.choice(("linear", "mlp", "attention")), tap))
            adds += 1
        elif kind in ("joint", "merge", "stack") and others:
            steps.append((kind, at, rng.choice(others)))
            adds += kind == "joint"
        elif kind == "split" and total < 4:
            steps.append(("split", at))
            live.append(total)
            total += 1
        elif kind in ("permute", "norm"):
            steps.append((kind, at))
        elif kind == "aux":
            steps.append(("aux", at, rng.choice(("loss", "return"))))
        elif kind == "end" and others:
            steps.append(("end", at))
            live.remove(at)
    ends = live[: 1 if adds else None]
    steps += [("add", at, [at, *(k for k in live if k != at)], "mlp", None) for at in ends]
    torch.manual_seed(seed)
    return Program(steps, count, rng.choice(ENDINGS), seed)


def adds_of(program: Program, name: str) -> list[int]:
    """The adds whose addends a branch called ``name`` computes: the last one that it does work for, and those that are terms
    of the same sum and share its work. What else it works for (a projection that splits a stream off, an add that only this
    branch reads) is part of it.
    """
    numbers = {int(number) for number in re.findall(r"work\.(\d+)", name)}
    last = max(numbers, key=lambda number: (number % SECOND, number))
    return [number for number in sorted(numbers) if number in _same_sum(program, last)]


def _same_sum(program: Program, last: int) -> set[int]:
    """The adds in a row that end with ``last`` and whose sums nobody else reads: ``x + a + b``."""
    current: dict[int, int] = {}  # by stream, the number of the add that made its value, where one did
    uses: dict[int, int] = {}
    before: dict[int, int] = {}  # by add, the one whose sum it adds to

    def use(stream: int) -> None:
        if stream in current:
            uses[current[stream]] = uses.get(current[stream], 0) + 1

    def add(stream: int, number: int) -> None:
        use(stream)
        if stream in current:
            before[number] = current[stream]
        current[stream] = number

    for number, (kind, at, *rest) in enumerate(program.steps):
        if kind == "add":
            for source in rest[0]:
                use(source)
            add(at, number)
        elif kind == "joint":
            use(at)
            use(rest[0])
            add(at, number)
            add(rest[0], number + SECOND)
        elif kind == "merge":
            use(rest[0])
            add(at, number)
        elif kind in ("split", "aux"):
            use(at)
        elif kind in ("norm", "permute"):
            current.pop(at, None)
        elif kind == "stack":
            current.pop(at, None)
            current.pop(rest[0], None)
    found = {last}
    while last in before and uses[before[last]] == 1:
        last = before[last]
        found.add(last)
    return found


def gradients(program: Program, cut: Collection[int], x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients in eager, the addends of the steps ``cut`` detached."""
    program.cut = frozenset(cut)
    try:
        loss = program.loss_of(program, x)
    finally:
        program.cut = frozenset()
    named = dict(program.named_parameters())
    found = (
        torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        if loss.requires_grad
        else [None] * len(named)
    )
    return loss.detach(), dict(zip(named, found, strict=True))


def check_program(seed: int) -> tuple[int, int]:
    """Compare a random program with its oracle: nothing dropped, each branch alone, some at random.

    Warnings that some work of the program is in no branch are true and do not matter.

    Returns:
        How many patterns were compared, and how many were refused because the loss reads stored keys.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LessDroppedWarning)
        warnings.simplefilter("ignore", NoResidualBranchWarning)
        return _check_program(seed)


def _check_program(seed: int) -> tuple[int, int]:
    torch._dynamo.reset()
    program = random_program(seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(2, 3, D, generator=generator, device="cpu").to(torch.get_default_device())
    backend = dropbp_backend(inner="aot_eager", seed=0)
    run = torch.compile(program, backend=backend)
    names = dict(program.named_parameters())

    def trained(pattern: list[int]) -> Result:
        program.zero_grad(set_to_none=True)
        with backend.pinned(pattern):
            loss = program.loss_of(run, x)
            if loss.requires_grad:
                loss.backward()
        return Result(loss.detach(), {name: p.grad for name, p in names.items()})

    assert_equal(trained([]), Result(*gradients(program, (), x)), what=f"program {seed}, nothing dropped")
    droppable = [branch.index for branch in backend.branches if branch.droppable]
    rng = random.Random(seed)
    patterns = [[index] for index in droppable]
    patterns += [[index for index in droppable if rng.random() < 0.5] for _ in range(2)]
    compared = refused = 0
    for pattern in patterns:
        steps = [number for index in pattern for number in adds_of(program, backend.branches[index].name)]
        try:
            actual = trained(pattern)
        except ValueError as error:
            assert "nothing would be trained" in str(error)  # noqa: PT017
            continue
        except RuntimeError as error:
            assert str(error).startswith(REFUSED)  # noqa: PT017
            refused += 1
            continue
        assert_equal(actual, Result(*gradients(program, steps, x)), what=f"program {seed}, steps {steps}")
        compared += 1
    return compared, refused


def main() -> None:
    """Check many programs: ``python -m tests.streams --count 10000 --processes 16``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first program's seed")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further program after that long")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    begun = time.monotonic()
    seeds = range(options.first, options.first + options.count)
    compared = refused = programs = 0
    failed: list[str] = []
    with multiprocessing.get_context("spawn").Pool(options.processes, _start, (options.device,)) as pool:
        for found in pool.imap_unordered(_checked, seeds, chunksize=4):
            programs += 1
            if isinstance(found, str):
                failed.append(found)
                print(found, flush=True)
            else:
                compared, refused = compared + found[0], refused + found[1]
            if time.monotonic() - begun > options.seconds:
                pool.terminate()
                break
    print(
        f"{programs} programs, {compared} patterns equal to the oracle, {refused} refused, {len(failed)} failed; "
        f"torch {torch.__version__} on {options.device}, {time.monotonic() - begun:.0f} s"
    )


def _start(device: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_device(device)
    warnings.simplefilter("ignore")


def _checked(seed: int) -> tuple[int, int] | str:
    try:
        return check_program(seed)
    except Exception as error:
        return f"program {seed}: {type(error).__name__}: {str(error)[:500]}"


if __name__ == "__main__":
    main()
