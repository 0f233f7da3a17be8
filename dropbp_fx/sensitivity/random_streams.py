"""Keep random streams, and run something again under the ones it ran under."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RandomStreams:
    """The states of PyTorch's random streams at one moment."""

    cpu: Tensor
    devices: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> RandomStreams:
        devices = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(torch.get_rng_state(), devices)

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.devices:
            torch.cuda.set_rng_state_all(list(self.devices))

    def rerun(self, run: Callable[[], Any]) -> Any:
        """Run once more what ran at that moment."""
        before = self.now()
        self.set()
        try:
            with torch.enable_grad():
                return run()
        finally:
            before.set()


@contextlib.contextmanager
def random_streams_kept() -> Iterator[None]:
    """Leave the random streams of PyTorch, Python and NumPy after the block as they were before it."""
    numpy = sys.modules.get("numpy")
    before, python = RandomStreams.now(), random.getstate()
    legacy = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        before.set()
        random.setstate(python)
        if numpy is not None and legacy is not None:
            numpy.random.set_state(legacy)
