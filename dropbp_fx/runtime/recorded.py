"""One region's forward and backward as CUDA graphs: what they read, and where they put what they make.

All memory that a graph names stays: parameters where the user has them, values in buffers of the program's, what is kept
for the backward in a :class:`Slot`. What a graph needs only while it runs comes from a pool that all of them share.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dropbp_fx import _torch
from dropbp_fx.runtime.copies import exact_copy
from dropbp_fx.runtime.placement import Layout, Placement, copy_into, run_placed

_Made = TypeVar("_Made")

#: Gradients of parameters below this many bytes are copied out of a graph's memory together.
_PACKED = 2**20


class Capturing(Protocol):
    """What captures work in graphs."""

    def capture(self, work: Callable[[], _Made]) -> tuple[Callable[[], None], _Made]:
        """What runs the work, and what it returned; see :class:`dropbp_fx._torch.GraphCapture`."""
        ...


class KeptMemory(NamedTuple):
    """What a region's forward keeps for its backward in memory of its own.

    Attributes:
        placed: allocations that are put there.
        copied: results that are copied there.
        layout: what all of them look like, in this order.
    """

    placed: tuple[int, ...]
    copied: tuple[int, ...]
    layout: tuple[Layout, ...]


def kept_memory(placement: Placement, outputs: int, passing: frozenset[int]) -> KeptMemory:
    """What a forward keeps that lies neither in a parameter nor in a value that stays until the backward.

    Args:
        placement: where the forward's results lie.
        outputs: how many of its results are outputs; the others are for its backward.
        passing: inputs whose memory holds something else by the time of the backward.
    """
    owned = {placement.origins[k].number for k in range(outputs) if placement.origins[k].kind == "allocation"}
    placed: dict[int, None] = {}
    copied: list[int] = []
    for k in range(outputs, len(placement.origins)):
        kind, number = placement.origins[k]
        if placement.results[k] is None:
            continue
        if kind == "allocation" and number not in owned:
            placed[number] = None
        elif kind != "input" or number in passing:
            copied.append(k)
    layouts = [placement.allocations[number] for number in placed]
    layouts += [layout for k in copied if (layout := placement.results[k]) is not None]
    return KeptMemory(tuple(placed), tuple(copied), tuple(layouts))


class Slot:
    """Memory for what one region at a time keeps for its backward, and the graphs that were recorded upon it."""

    def __init__(self, layout: Sequence[Layout], device: torch.device) -> None:
        self.memory = [mine.empty(device) for mine in layout]
        self.recorded: dict[tuple[int, int], RecordedRegion] = {}


@dataclasses.dataclass
class RecordedRegion:
    """A region's forward, and once it was needed its backward.

    Attributes:
        staying: the slots of inputs that stay in place, and where they were.
        moving: the slots of all others, and the buffers that it reads them from.
        outputs: buffers of its values.
        saved: what its backward takes before its tangents.
        run: runs the forward.
        backward: its backward, ``None`` before it was recorded.
    """

    staying: tuple[tuple[int, ...], tuple[int, ...]]
    moving: tuple[tuple[int, Tensor], ...]
    outputs: tuple[Tensor, ...]
    saved: tuple[Any, ...]
    run: Callable[[], None]
    backward: RecordedBackward | None = None

    def still_fits(self, values: Sequence[Any]) -> bool:
        """Whether what stays in place is where it was."""
        slots, addresses = self.staying
        return tuple([values[slot].data_ptr() for slot in slots]) == addresses


def record_forward(
    capturing: Capturing,
    code: _torch.BoxedCode,
    placement: Placement,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    kept: KeptMemory,
    slot: Slot | None,
) -> tuple[Callable[[], None], tuple[Any, ...]]:
    """Record a forward.

    Args:
        capturing: what records.
        code: the forward's.
        placement: where its results lie unless told otherwise.
        inputs: memory that it reads.
        outputs: memory of its values.
        kept: what it keeps for its backward.
        slot: memory for that; ``None`` if it keeps nothing.

    Returns:
        What runs it, and what its backward takes before its tangents.
    """
    places: dict[int, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for k, buffer in enumerate(outputs):
        if placement.alone(k) and placement.results[k] == Layout.of(buffer):
            number = placement.origins[k].number
            allocation = placement.allocations[number]
            places[number] = buffer.as_strided(allocation.size, allocation.stride)
        else:
            copies[k] = buffer
    if slot is not None:
        places.update(zip(kept.placed, slot.memory, strict=False))
        copies.update(zip(kept.copied, slot.memory[len(kept.placed) :], strict=True))

    fixed = {place.untyped_storage().data_ptr() for place in (*places.values(), *inputs)}

    def work() -> tuple[Any, ...]:
        made = list(run_placed(code, list(inputs), places, outputs[0].device))
        for k, value in enumerate(made):
            on_device = isinstance(value, Tensor) and value.device == outputs[0].device
            if not on_device:
                copies.pop(k, None)  # a number that the graph holds
            elif k not in copies:
                _check_fixed(value, fixed)
        for k, place in copies.items():
            copy_into(place, made[k])
            made[k] = place
        return tuple(made[len(outputs) :])

    return capturing.capture(work)


class RecordedBackward(NamedTuple):
    """A region's backward.

    Attributes:
        tangents: memory that the gradients of its outputs are read from.
        homes: slots whose gradients it puts into buffers, and those.
        loose: slots whose gradients it leaves in the pool, and those.
        packed: gradients that lie in the pool one behind the other: that memory, their slots, lengths and sizes.
        run: runs it.
    """

    tangents: tuple[Tensor, ...]
    homes: tuple[tuple[int, Tensor], ...]
    loose: tuple[tuple[int, Tensor], ...]
    packed: tuple[tuple[Tensor, tuple[int, ...], list[int], tuple[torch.Size, ...]], ...]
    run: Callable[[], None]

    def copied_out(self) -> list[tuple[int, Tensor]]:
        """Slots and their gradients in memory of their own: the pool's is another graph's next."""
        found = [(slot, exact_copy(gradient)) for slot, gradient in self.loose]
        for together, slots, lengths, sizes in self.packed:
            parts = together.clone().split_with_sizes(lengths)
            found += [(slot, part.view(size)) for slot, part, size in zip(slots, parts, sizes, strict=True)]
        return found


def record_backward(
    capturing: Capturing,
    code: _torch.BoxedCode,
    saved: Sequence[Any],
    tangents: Sequence[Tensor],
    homes: Mapping[int, Tensor],
    graded: Sequence[int | None],
) -> RecordedBackward:
    """Record a backward.

    Args:
        capturing: what records.
        code: the backward's.
        saved: what its forward kept.
        tangents: memory that it reads the gradients of the outputs from.
        homes: memory for some of its gradients, by position among the inputs.
        graded: for each input the slot that its gradient belongs to, ``None`` where nobody wants it.
    """
    sources = {tangent.untyped_storage().data_ptr() for tangent in tangents}

    def work() -> tuple[list[tuple[int, Tensor]], list[tuple[Tensor, tuple[int, ...]]]]:
        gradients = code([*saved, *tangents])
        found = {k: gradient for k, gradient in enumerate(gradients) if graded[k] is not None and gradient is not None}
        for k, gradient in found.items():
            stays = k in homes and _same(homes[k], gradient)
            if gradient.untyped_storage().data_ptr() in sources and not stays:
                found[k] = exact_copy(gradient)  # another gradient may have its home in that tangent's memory
        for k, home in homes.items():
            if not _same(home, found[k]):
                copy_into(home, found[k])
        rest = {k: gradient for k, gradient in found.items() if k not in homes}
        small = [k for k, g in rest.items() if g.is_contiguous() and 0 < g.numel() * g.itemsize <= _PACKED]
        packed = []
        for _, group in itertools.groupby(sorted(small, key=lambda k: str(rest[k].dtype)), lambda k: rest[k].dtype):
            mine = tuple(group)
            if len(mine) > 1:
                packed.append((torch.cat([rest.pop(k).flatten() for k in mine]), mine))
        sizes.update((k, gradient.size()) for k, gradient in found.items())
        return list(rest.items()), packed

    sizes: dict[int, torch.Size] = {}
    slots = {k: slot for k, slot in enumerate(graded) if slot is not None}
    run, (loose, packed) = capturing.capture(work)
    return RecordedBackward(
        tuple(tangents),
        tuple((slots[k], home) for k, home in homes.items()),
        tuple((slots[k], gradient) for k, gradient in loose),
        tuple(
            (
                together,
                tuple(slots[k] for k in mine),
                [sizes[k].numel() for k in mine],
                tuple(sizes[k] for k in mine),
            )
            for together, mine in packed
        ),
        run,
    )


def _check_fixed(value: Tensor, fixed: Collection[int]) -> None:
    if value.numel() and value.untyped_storage().data_ptr() not in fixed:
        raise RuntimeError("A result of compiled code lies elsewhere than in its first run.")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and Layout.of(one) == Layout.of(other)
