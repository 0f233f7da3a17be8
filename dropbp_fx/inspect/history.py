"""Record the patterns that a run drops."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from dropbp_fx.backend import DropBPBackend
from dropbp_fx.inspect import heatmap


@dataclasses.dataclass
class PatternHistory:
    """The patterns of a run.

    Attributes:
        patterns: for each training forward the indices of the branches that it dropped.
        names: the name of each branch, by index.
    """

    patterns: list[frozenset[int]] = dataclasses.field(default_factory=list)
    names: dict[int, str] = dataclasses.field(default_factory=dict)
    _seen: set[int] = dataclasses.field(default_factory=set)

    @property
    def indices(self) -> tuple[int, ...]:
        """The branches that took part, in execution order."""
        return tuple(sorted(self.names))

    def rates(self) -> dict[str, float]:
        """The share of the recorded forwards that dropped each branch, by name."""
        forwards = max(len(self.patterns), 1)
        return {self.names[i]: sum(i in pattern for pattern in self.patterns) / forwards for i in self.indices}

    def draw(self, path: str | Path) -> None:
        """Draw the patterns, a column for each forward and a row for each branch.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no forward was recorded.
        """
        heatmap.draw_patterns(self.patterns, self.names, Path(path))

    def add(self, indices: Sequence[int], dropped: frozenset[int]) -> None:
        """Enter what one graph's forward dropped. A branch that comes again starts a new forward."""
        if not self.patterns or not self._seen.isdisjoint(indices):
            self.patterns.append(frozenset())
            self._seen = set()
        self.patterns[-1] |= dropped
        self._seen |= set(indices)


@contextlib.contextmanager
def record_patterns(backend: DropBPBackend) -> Iterator[PatternHistory]:
    """Record the patterns that the training forwards within the block drop, pinned ones included.

    Usage::

        with record_patterns(backend) as history:
            train()
        history.draw("patterns.png")
    """
    history = PatternHistory()

    def listen(indices: Sequence[int], dropped: frozenset[int]) -> None:
        history.names.update((index, backend.branches[index].name) for index in indices if index not in history.names)
        history.add(indices, dropped)

    stop = backend.on_sample(listen)
    try:
        yield history
    finally:
        stop()
