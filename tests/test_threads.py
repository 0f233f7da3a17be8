"""Threads that compile and train at once: each its own model, and each with the gradients of its own pattern."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from tests.helpers import make_backend
from tests.oracle import assert_equal, compiled, eager
from tests.test_models import ResidualMLP, square_loss

THREADS = 3


def test_threads_that_compile_for_the_first_time_at_once_train_what_they_ask_for() -> None:
    models: list[nn.Module] = [ResidualMLP(4) for _ in range(THREADS)]
    patterns = [["blocks.0"], ["blocks.1", "blocks.3"], []]
    runs, failures = [], []
    for model in models:
        backend = make_backend(inner="aot_eager")
        runs.append((backend, torch.compile(model, backend=backend)))
    results: list[Any] = [None] * THREADS
    start = threading.Barrier(THREADS)

    def train(number: int) -> None:
        backend, run = runs[number]
        try:
            start.wait()
            for _ in range(3):
                with backend.pinned(patterns[number]):
                    results[number] = compiled(models[number], square_loss, run)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for model, pattern, result in zip(models, patterns, results, strict=True):
        assert_equal(result, eager(model, square_loss, pattern), what=str(pattern))
