"""The branches a backend has met, in one table for all graphs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence

from dropbp_fx.policy.values import as_int, shown


@dataclasses.dataclass
class Branch:
    """One residual branch of a model.

    Attributes:
        index: its position in execution order, the number :meth:`DropBPBackend.pinned` takes.
        name: unique and readable, from the module tree (``model.layers.3.self_attn``).
        layer: the layer it belongs to (``model.layers.3``).
        rate: its drop rate at present, in [0, 1).
        trainable: whether it has parameters that require a gradient, or a gradient passes through it to something trainable
            that it reaches in no other way, such as the prefix of prefix tuning.
        droppable: whether a gradient reaches it in training at all. Below frozen layers that feed no trainable
            parameter there is nothing to drop, and the branch takes no part in the draw.
        backward_flops: floating-point operations that dropping it saves in one backward, from its joint graph.
        times_seen: training forwards it took part in.
        times_dropped: how many of them dropped it.
    """

    index: int
    name: str
    layer: str
    rate: float
    trainable: bool = False
    droppable: bool = False
    backward_flops: int = 0
    times_seen: int = 0
    times_dropped: int = 0

    @property
    def realised_rate(self) -> float:
        """The share of its training forwards that dropped it, 0 before the first."""
        return self.times_dropped / self.times_seen if self.times_seen else 0.0


class BranchTable:
    """Branches by name, in the order they were first met."""

    def __init__(self) -> None:
        self._branches: dict[str, Branch] = {}
        self._order: list[Branch] = []

    def __iter__(self) -> Iterator[Branch]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Branch:
        return self._order[index]

    def named(self, name: str) -> Branch | None:
        """The branch called ``name``, ``None`` if none has been met."""
        return self._branches.get(name)

    def meet(self, name: str, layer: str, *, rate: float) -> Branch:
        """The branch called ``name``, new or known."""
        branch = self._branches.get(name)
        if branch is None:
            branch = self._branches[name] = Branch(len(self._order), name, layer, rate)
            self._order.append(branch)
        return branch

    def become(self, records: Sequence[Branch]) -> None:
        """Hold exactly these, in this order. Whoever holds a known branch of one of the names sees it change."""
        order: list[Branch] = []
        for record in records:
            branch = self._branches.get(record.name, record)
            for field in dataclasses.fields(Branch):
                setattr(branch, field.name, getattr(record, field.name))
            order.append(branch)
        self._order = order
        self._branches = {branch.name: branch for branch in order}

    def resolve(self, chosen: Iterable[int | str | Branch]) -> frozenset[int]:
        """Indices of branches given by index, name or object.

        Raises:
            IndexError: an index is out of range.
            KeyError: no branch has that name.
            TypeError: something else was given.
        """
        found: set[int] = set()
        for item in checked_choice(chosen):
            if isinstance(item, Branch):
                item = item.name
            if isinstance(item, int):
                if not 0 <= item < len(self):
                    raise IndexError(
                        f"There is no branch {shown(item)}: the model has {len(self)} residual branches, numbered 0 to "
                        f"{len(self) - 1} in execution order."
                    )
                found.add(item)
            elif item in self._branches:
                found.add(self._branches[item].index)
            else:
                raise KeyError(unknown_name(item, self._branches))
        return frozenset(found)


def checked_choice(chosen: Iterable[int | str | Branch]) -> tuple[int | str | Branch, ...]:
    """Branches given by index, name or object, whether or not there are such branches.

    Raises:
        TypeError: something else was given.
    """
    try:
        items = tuple(chosen)
    except TypeError:  # arrays without dimensions say that they can be iterated over
        raise TypeError(f"Branches are chosen by a list of indices or names, not by {shown(chosen)}.") from None
    return tuple(_checked_item(item) for item in items)


def _checked_item(item: object) -> int | str | Branch:
    if isinstance(item, (str, Branch)):
        return item
    index = as_int(item)
    if index is None:
        raise TypeError(f"A branch is chosen by its index or its name, not by {shown(item)}.")
    return index


def unknown_name(name: str, known: Iterable[str]) -> str:
    """A sentence that tells which names there are."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return f"There is no branch named {name!r}; did you mean {', '.join(map(repr, close))}? See backend.branches."
