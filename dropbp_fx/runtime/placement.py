"""Where the results of compiled code lie, so that a CUDA graph of it can have them where they are to stay.

Code that Inductor generated gets its memory from one function. A first run shows which of those allocations hold results;
in later ones memory that stays is given in their places, and the results need not be copied there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dropbp_fx import _torch


class Layout(NamedTuple):
    """What a tensor looks like in memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tuple(tensor.size()), tuple(tensor.stride()), tensor.dtype)

    def empty(self, device: torch.device) -> Tensor:
        """Memory for such a tensor, which may overlap itself (an expanded one)."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)


class Origin(NamedTuple):
    """Where a result lies: in the allocation or the input of that number, or (-1) in other memory."""

    kind: Literal["allocation", "input", "elsewhere"]
    number: int = -1


class Placement(NamedTuple):
    """What one run showed.

    Attributes:
        origins: for each result where it lies.
        results: for each result what it looks like, ``None`` for what is no tensor.
        on_device: for each result whether it is on the device; in a graph attention's seeds are, and otherwise may not be.
        fills: for each result whether it takes the whole of its allocation.
        allocations: what each allocation looks like.
    """

    origins: tuple[Origin, ...]
    results: tuple[Layout | None, ...]
    on_device: tuple[bool, ...]
    fills: tuple[bool, ...]
    allocations: tuple[Layout, ...]

    def alone(self, result: int) -> bool:
        """Whether the result is an allocation of its own, whole and shared with no other result."""
        return self.fills[result] and self.origins.count(self.origins[result]) == 1


def observe(code: _torch.BoxedCode, arguments: list[Any], device: torch.device) -> tuple[Sequence[Any], Placement]:
    """Run ``code`` and see where its results lie; ``arguments`` is emptied."""
    inputs = {_memory(value): number for number, value in enumerate(arguments) if isinstance(value, Tensor)}
    alive = list(arguments)  # no memory is given away within the run, so that none is taken for another's
    taken: dict[int, int] = {}
    layouts: list[Layout] = []

    def noting(allocate: _torch.Allocate) -> _torch.Allocate:
        def allocate_and_note(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
            made = allocate(size, stride, dtype)
            alive.append(made)
            taken[_memory(made)] = len(layouts)
            layouts.append(Layout.of(made))
            return made

        return allocate_and_note

    with _torch.allocating(code, device, noting):
        made = code(arguments)
    alive.clear()
    origins: list[Origin] = []
    for value in made:
        memory = _memory(value) if isinstance(value, Tensor) else 0
        if memory and memory in inputs:
            origins.append(Origin("input", inputs[memory]))
        elif memory and memory in taken:
            origins.append(Origin("allocation", taken[memory]))
        else:
            origins.append(Origin("elsewhere"))
    results = tuple(Layout.of(value) if isinstance(value, Tensor) else None for value in made)
    on_device = tuple(isinstance(value, Tensor) and value.device == device for value in made)
    fills = tuple(
        origin.kind == "allocation" and value.storage_offset() == 0 and _fill(Layout.of(value), layouts[origin.number])
        for value, origin in zip(made, origins, strict=True)
    )
    return made, Placement(tuple(origins), results, on_device, fills, tuple(layouts))


def run_placed(
    code: _torch.BoxedCode, arguments: list[Any], places: Mapping[int, Tensor], device: torch.device
) -> Sequence[Any]:
    """Run ``code`` with the memory in ``places`` for its allocations of those numbers."""
    if not places:
        return code(arguments)
    used = set[int]()

    def placing(allocate: _torch.Allocate) -> _torch.Allocate:
        count = -1

        def place(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
            nonlocal count
            count += 1
            given = places.get(count)
            if given is None:
                return allocate(size, stride, dtype)
            if Layout.of(given) != (tuple(size), tuple(stride), dtype):
                raise RuntimeError(f"Allocation {count} of compiled code is another one than in its first run.")
            used.add(count)
            return given

        return place

    with _torch.allocating(code, device, placing):
        made = code(arguments)
    if used != set(places):
        raise RuntimeError(f"Compiled code made fewer allocations than in its first run: {len(used)} of {len(places)}.")
    return made


def copy_into(place: Tensor, value: Tensor) -> None:
    """Copy a tensor to where it is to lie, laid out alike, each element once."""
    for dimension, stride in enumerate(place.stride()):
        if stride == 0 and place.size(dimension) > 1:
            place, value = place.narrow(dimension, 0, 1), value.narrow(dimension, 0, 1)
    place.copy_(value)


def _fill(result: Layout, allocation: Layout) -> bool:
    """Whether both take the same memory, without gaps."""
    dense = math.prod(result.size)
    return (
        result.dtype == allocation.dtype
        and dense == math.prod(allocation.size)
        and all(_reach(layout) == dense for layout in (result, allocation))
    )


def _reach(layout: Layout) -> int:
    """How many elements lie between the first and the last, these included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(layout.size, layout.stride, strict=True))


def _memory(value: Tensor) -> int:
    """What tells one piece of memory from others, 0 where there is none."""
    return value.untyped_storage().data_ptr()
