"""``python -m benchmarks.at_peak SUITE``: which pieces of memory are held when a training step's memory is at its peak.

Compiles for the CPU, where the profiler reports every allocation, in float32. What is held depends on the order of the
compiled code's operations and on what is fused, so a GPU's may differ: compare the totals.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from benchmarks.suites import SUITES, build
from dropbp_fx import dropbp_backend


def held_at_peak(changes: Iterable[int]) -> Counter[int]:
    """How many pieces of each size are held at the peak, given the bytes of every allocation (freed: negative) in order."""
    held: Counter[int] = Counter()
    total = most = 0
    at_most = Counter[int]()
    for change in changes:
        if change < 0 and not held[-change]:
            continue  # of something from before
        held[abs(change)] += 1 if change > 0 else -1
        total += change
        if total > most:
            most, at_most = total, held.copy()
    return +at_most


def measure(
    suite: str, dropped: Sequence[int], *, inner: str = "inductor", budget: float | None = None
) -> Counter[int]:
    """The pieces held at the peak of one forward and backward that drops the branches ``dropped``."""
    shape = SUITES[suite]
    model = build(shape, device="cpu", dtype=torch.float32, fused_loss=False)
    backend = dropbp_backend(inner=inner, activation_memory_budget=budget)
    run = torch.compile(model, backend=backend)
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.tokens + 1))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with backend.pinned(dropped):
            run(ids).backward()

    step()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step()
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    return held_at_peak(change for _, change in sorted(events, key=lambda event: event[0]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.at_peak", description=__doc__)
    parser.add_argument("suite", choices=SUITES, metavar="SUITE")
    parser.add_argument("--dropped", nargs="*", type=int, default=[], help="indices of branches")
    parser.add_argument("--budget", type=float, help="activation_memory_budget")
    chosen = parser.parse_args()
    held = measure(chosen.suite, chosen.dropped, budget=chosen.budget)
    total = sum(size * count for size, count in held.items())
    rows = [
        [f"{size / 2**20:.2f}", held[size]] for size in sorted(held, reverse=True) if size * held[size] > total / 200
    ]
    print(tabulate([*rows, [f"{total / 2**20:.2f} in all", ""]], ["MiB", "pieces"], tablefmt="github"))


if __name__ == "__main__":
    main()
