"""The branches a backend has found, in one table for all graphs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence

from dropbp_fx.values import as_int, shown


@dataclasses.dataclass
class Branch:
    """One residual branch of a model.

    Attributes:
        index: its position in execution order, the number :meth:`DropBPBackend.pinned` takes.
        name: unique and readable, from the module tree (``model.layers.3.self_attn``); with ``@2`` behind it in the second
            model of a backend.
        layer: the layer it belongs to (``model.layers.3``).
        rate: its drop rate at present, in [0, 1).
        trainable: whether it has parameters that require a gradient, or a gradient passes through it to something trainable
            that it reaches in no other way, such as the prefix of prefix tuning. As of its last forward, like the next.
        droppable: whether a gradient reaches it in training at all. Below frozen layers that feed no trainable
            parameter there is nothing to drop, and the branch takes no part in patterns.
        backward_flops: floating-point operations that dropping it saves in one backward, from its joint graph.
        times_seen: training forwards in which it could be dropped.
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
    def model(self) -> int:
        """The number of the model it belongs to, from 1 in the order in which a backend found its models."""
        return _split(self.name)[1]

    @property
    def realised_rate(self) -> float:
        """The share of its training forwards that dropped it, 0 before the first."""
        return self.times_dropped / self.times_seen if self.times_seen else 0.0


def in_model(name: str, number: int) -> str:
    """What a branch or a layer called ``name`` is called in the model of this number."""
    return name if number == 1 else f"{name}@{number}"


def _split(name: str) -> tuple[str, int]:
    """What a branch is called in its model, and the model's number."""
    plain, mark, number = name.rpartition("@")
    return (plain, int(number)) if mark and number.isdecimal() else (name, 1)


class BranchTable:
    """Branches by name, in the order they were first found."""

    def __init__(self) -> None:
        self._branches: dict[str, Branch] = {}
        self._order: list[Branch] = []
        self._models: list[int] = []
        self._by_model: dict[int, list[Branch]] = {}
        self._namesakes: dict[str, list[int]] = {}

    def __iter__(self) -> Iterator[Branch]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Branch:
        return self._order[index]

    def named(self, name: str) -> Branch | None:
        """The branch called ``name``, ``None`` if none has been found."""
        return self._branches.get(name)

    def add(self, name: str, layer: str, *, rate: float) -> Branch:
        """The branch called ``name``, new or known."""
        branch = self._branches.get(name)
        if branch is None:
            branch = Branch(len(self._order), name, layer, rate)
            self._enter(branch)
        return branch

    def become(self, records: Sequence[Branch]) -> None:
        """Hold exactly these, in this order. Whoever holds a known branch of one of the names sees it change."""
        known, self._branches = self._branches, {}
        self._order, self._models, self._by_model, self._namesakes = [], [], {}, {}
        for record in records:
            branch = known.get(record.name, record)
            for field in dataclasses.fields(Branch):
                setattr(branch, field.name, getattr(record, field.name))
            self._enter(branch)

    def _enter(self, branch: Branch) -> None:
        plain, model = _split(branch.name)
        self._branches[branch.name] = branch
        self._order.append(branch)
        self._models.append(model)
        self._by_model.setdefault(model, []).append(branch)
        self._namesakes.setdefault(plain, []).append(branch.index)

    @property
    def models(self) -> tuple[int, ...]:
        """The numbers of the models that have branches."""
        return tuple(self._by_model)

    def model_of(self, index: int) -> int:
        """The number of the model that a branch belongs to."""
        return self._models[index]

    def of(self, model: int) -> Sequence[Branch]:
        """The branches of one model, in the order they were first found."""
        return self._by_model.get(model, ())

    def times_dropped(self) -> int:
        """How many (branch, training forward) pairs were dropped."""
        return sum(branch.times_dropped for branch in self)

    def realised_rate(self) -> float:
        """The share of (branch, training forward) pairs that was dropped, of those that could be."""
        seen = sum(branch.times_seen for branch in self)
        return self.times_dropped() / seen if seen else 0.0

    def realised_flops_rate(self) -> float:
        """The same, branches counting by the backward FLOPs that dropping them saves."""
        seen = sum(branch.times_seen * branch.backward_flops for branch in self)
        return sum(branch.times_dropped * branch.backward_flops for branch in self) / seen if seen else 0.0

    def resolve(self, chosen: Iterable[int | str | Branch]) -> frozenset[int]:
        """Indices of branches given by index, name or object.

        An index or a name of the first model's stands for the branches of that name in all models, an object for itself.

        Raises:
            IndexError: an index is out of range.
            KeyError: no branch has that name.
            TypeError: something else was given.
        """
        found: set[int] = set()
        for item in checked_choice(chosen):
            single = isinstance(item, Branch)
            if isinstance(item, Branch):
                item = item.name
            if isinstance(item, int):
                if not 0 <= item < len(self):
                    raise IndexError(
                        f"There is no branch {shown(item)}: the model has {len(self)} residual branches, numbered 0 to "
                        f"{len(self) - 1} in execution order."
                    )
                item = self._order[item].name
            if item not in self._branches:
                raise KeyError(unknown_name(item, self._branches))
            found.add(self._branches[item].index)
            if not single and len(self._by_model) > 1:
                found.update(self._namesakes.get(item, ()))
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
