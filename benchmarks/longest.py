"""Search for the longest sequence that fits into a memory cap, with few steps that really run."""

from __future__ import annotations

from benchmarks.measure import Record

#: Aim a little below what the last probe predicts: a probe that fails tells less than one that fits.
_AIM = 0.985


class Search:
    """Proposes lengths. Memory is nearly linear in the length, so a probe that fits predicts the next; between a length
    that fits and one that does not, the search bisects.

    Attributes:
        fits: the longest length that ran, 0 while there is none.
    """

    def __init__(self, start: int, cap_gib: float, multiple: int) -> None:
        self._cap, self._multiple = cap_gib, multiple
        self._next = self._rounded(start)
        self._predicted = 0.0
        self._fails: int | None = None
        self.fits = 0

    def next_length(self) -> int | None:
        """The length to try now, ``None`` when the answer is known to within one multiple."""
        return None if self._fails is not None and self._fails - self.fits <= self._multiple else self._next

    def tell(self, record: Record) -> None:
        """What the probe of ``next_length`` gave."""
        tokens = record["tokens"]
        if record["fits"]:
            self.fits = max(self.fits, tokens)
            room, used = self._cap - record["held_gib"], record["peak_gib"] - record["held_gib"]
            self._predicted = tokens * room / used * _AIM if used > 0 else 2.0 * tokens
        else:
            self._fails = tokens if self._fails is None else min(self._fails, tokens)
        longest = max(self._rounded(self._predicted), self.fits + self._multiple)
        if self._fails is not None and (longest >= self._fails or not self.fits):
            longest = self._rounded((self.fits + self._fails) / 2)
        self._next = max(longest, self._multiple)

    def _rounded(self, tokens: float) -> int:
        return max(int(tokens) // self._multiple, 1) * self._multiple
