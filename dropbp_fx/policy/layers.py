"""A pattern that drops the same layers every time, given by their places: the first eight, all but the last two."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence

from dropbp_fx.policy.balanced import Unit
from dropbp_fx.policy.contiguous import Line
from dropbp_fx.values import as_int, shown

_NAME = re.compile(r"layers\[\s*(?P<start>-?\d{0,9})\s*:\s*(?P<stop>-?\d{0,9})\s*\]", re.ASCII)
#: The greatest number that a name can have.
_FARTHEST = 10**9 - 1


@dataclasses.dataclass(frozen=True)
class LayersPattern:
    """Drop the layers from ``start`` to before ``stop``, in every forward. Places count as in a slice of a list.

    ``LayersPattern(0, 8)`` is the first eight layers, ``LayersPattern(None, -2)`` all but the last two, and
    ``LayersPattern(-4, None)`` the last four; by name ``"layers[0:8]"``, ``"layers[:-2]"``, ``"layers[-4:]"``. What is
    counted are the model's layers with a branch that can be dropped. With ``drop="below"`` the first N are as if frozen, the
    embedding with them.

    Rates do not matter, but that a branch of rate 0 is not dropped: a schedule may begin with it. Where all that can be
    trained would be dropped, the last trainable layer stays.
    """

    start: int | None
    stop: int | None

    def __post_init__(self) -> None:
        bounds = {}
        for name in ("start", "stop"):
            value = getattr(self, name)
            bounds[name] = None if value is None else as_int(value)
            if value is not None and bounds[name] is None:
                raise TypeError(f"{name} must be a whole number, the place of a layer, or None, not {shown(value)}.")
            if abs(bounds[name] or 0) > _FARTHEST:
                raise ValueError(f"{name} must be the place of a layer, at most {_FARTHEST}, not {shown(value)}.")
        start, stop = bounds["start"] or None, bounds["stop"]  # a start at 0 is none
        if start is None and stop is None:
            raise ValueError("LayersPattern needs a start or a stop: all layers of a model cannot be dropped.")
        ends = 0 if start is None else start
        if stop == 0 or (stop is not None and stop <= ends and (stop < 0) == (ends < 0)):
            raise ValueError(
                f"LayersPattern drops the layers from start to before stop, and with start={start}, stop={stop} there are "
                "none. Let stop be behind start."
            )
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "stop", stop)

    @classmethod
    def named(cls, name: str) -> LayersPattern | None:
        """The pattern of a name like ``"layers[:8]"``, ``None`` for another name.

        Raises:
            ValueError: the range holds no layer, or all.
        """
        match = _NAME.fullmatch(name)
        if match is None or "-" in match.groups():
            return None
        return cls(*(int(bound) if bound else None for bound in match.groups()))

    @property
    def name(self) -> str:
        start, stop = ("" if bound is None else bound for bound in (self.start, self.stop))
        return f"layers[{start}:{stop}]"

    def sample(self, units: Sequence[Unit], rng: random.Random) -> frozenset[int]:
        line = Line.of(units)
        chosen = set(range(len(line.members))[self.start : self.stop])
        trainable = [layer for layer, flag in enumerate(line.trainable) if flag]
        if trainable and chosen.issuperset(trainable):
            chosen.discard(trainable[-1])
        return frozenset(index for layer in chosen for index in line.members[layer] if units[index].rate > 0)

    def frequencies(self, units: Sequence[Unit]) -> list[float]:
        dropped = self.sample(units, random.Random())
        return [float(index in dropped) for index in range(len(units))]
